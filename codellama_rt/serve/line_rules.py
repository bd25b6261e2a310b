"""Where llama.cpp's editors want a filling to end: at a line, by its indentation or by time."""

from __future__ import annotations

from time import perf_counter


class LineRules:
    """Cut a text that comes in pieces.

    Args:
        indent: end before a later line that is indented by fewer characters; 0: any.
        milliseconds: end at a new line once so much time has passed since the first text; 0: never.

    Example:
        >>> LineRules(4, 0).take("x = 1\\n    y\\nz")
        ('x = 1\\n    y', True)
    """

    def __init__(self, indent: int = 0, milliseconds: float = 0.0) -> None:
        self._indent, self._seconds = indent, milliseconds / 1e3
        self._line: str | None = None  # the begin of a later line, as far as it is blank
        self._held = ""  # of it, not given out
        self._started: float | None = None

    def take(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return what may be shown of it, and whether the text ends there."""
        if self._started is None:
            self._started = perf_counter()
        shown, ends = self._by_indent(text) if self._indent > 0 else (text, False)
        is_late = 0 < self._seconds <= perf_counter() - self._started
        if is_late and not ends and "\n" in shown:
            return shown[: shown.index("\n")], True
        return shown, ends

    def flush(self) -> str:
        """Return what is held back of a text that has ended by itself."""
        held, self._held = self._held, ""
        return held

    def _by_indent(self, text: str) -> tuple[str, bool]:
        shown: list[str] = []
        for character in text:
            if character == "\n":
                shown.append(self._held)
                self._line, self._held = "", character
            elif self._line is None:
                shown.append(character)
            elif character in " \t" and len(self._line) + 1 < self._indent:
                self._line += character
                self._held += character
            elif character in " \t":  # far enough: the line counts as part of the text
                shown.append(self._held + character)
                self._line, self._held = None, ""
            else:
                return "".join(shown), True
        return "".join(shown), False
