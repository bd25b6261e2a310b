"""What the user of `codellama-rt chat` types, pastes or pipes in, as messages and commands."""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Callable, Iterator
from importlib import import_module

from codellama_rt.cli.errors import tell

_QUESTION, _MORE = ">>> ", "... "
_FENCE = '"""'


def messages(is_command: Callable[[str], bool]) -> Iterator[str]:
    """Yield what stdin says; Ctrl-C in a terminal drops what is being typed.

    A line is a message. Several lines are one message when they are pasted into a terminal or stand
    between two lines of three double quotes.

    Args:
        is_command: says whether a line is a command, which never continues on the next line.
    """
    while True:
        try:
            text = _message(is_command)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            tell("")
            continue
        if text is None:
            return
        yield text


def set_up_editing(complete: Callable[[str], list[str]]) -> None:
    """Give a terminal's lines a history, keys to edit with, Tab completion and whole pastes.

    Args:
        complete: returns what a line may become.
    """
    with contextlib.suppress(ImportError):
        readline = import_module("readline")
        readline.set_completer_delims("")  # the completer sees the whole line
        readline.set_completer(completer(complete))
        is_libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        # Python switches it off; a terminal that has it marks a paste, and so its line ends.
        readline.parse_and_bind("set enable-bracketed-paste on")


def completer(complete: Callable[[str], list[str]]) -> Callable[[str, int], str | None]:
    """Return a completer as `readline` calls it; in a message, Tab stays a tab."""

    def find(line: str, index: int) -> str | None:
        found = complete(line) if line.startswith("/") else [f"{line}\t"]
        return found[index] if index < len(found) else None

    return find


def _message(is_command: Callable[[str], bool]) -> str | None:
    """Read the next message or command; None at the end of the input."""
    line = _line(_QUESTION)
    if line is None or is_command(line):
        return line
    lines = []
    if line.strip() == _FENCE:
        while (line := _line(_MORE)) is not None and line.strip() != _FENCE:
            lines.append(line)
        return "\n".join(lines)
    while line is not None:
        lines.append(line)
        line = _line(_MORE) if _is_pasted() else None
    return "\n".join(lines)


def _line(prompt: str) -> str | None:
    """Read a line, or a paste that the terminal marks as one, without its end; None: no more."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    if not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        tell("")
        return None


def _is_pasted() -> bool:
    """Return whether a terminal holds further lines already: nobody types that fast.

    This finds the rest of a paste where the terminal does not mark it, or where it came while an
    answer was written.
    """
    if not sys.stdin.isatty():
        return False
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # not a file that can be asked
        return False
