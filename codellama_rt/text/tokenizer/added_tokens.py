"""Tokens that a checkpoint matches whole in a text, before its model sees what is between them."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class AddedToken:
    """A token with the flags of Transformers' class of this name.

    Attributes:
        id: its row.
        content: the text that it matches.
        special: a control token: it matches only where control tokens are parsed, and is no text.
        lstrip, rstrip: it takes the white space before or after it along.
        single_word: it does not match inside a word.
        normalized: it matches the normalised text (with ▁ for spaces) instead of the text itself.
    """

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


class TokenSplitter:
    """Split texts at added tokens: the longest name counts, from the left.

    Args:
        tokens: to look for; of two with one name and kind, the last counts.
        normalize: applied to the text between the tokens, before `normalized` ones are looked for.
    """

    def __init__(self, tokens: Iterable[AddedToken], normalize: Callable[[str], str]) -> None:
        tokens = list(tokens)
        self._normalize = normalize
        self._plain = _Names({t.content: t for t in tokens if not t.normalized})
        self._normalized = _Names({normalize(t.content): t for t in tokens if t.normalized})

    def split(self, text: str) -> list[int | str]:
        """Return the ids of the tokens and the normalised texts between them, in order."""
        parts: list[int | str] = []
        for part in self._plain.split(text):
            if isinstance(part, int):
                parts.append(part)
            else:
                parts += self._normalized.split(self._normalize(part))
        return parts


class _Names:
    def __init__(self, tokens: dict[str, AddedToken]) -> None:
        self._tokens = tokens
        names = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def split(self, text: str) -> list[int | str]:
        parts: list[int | str] = []
        done = 0
        for match in self._pattern.finditer(text):
            token = self._tokens[match[0]]
            begin, end = match.span()
            if token.single_word and _touches_word(text, begin, end):
                continue
            while token.lstrip and begin > done and text[begin - 1].isspace():
                begin -= 1
            while token.rstrip and end < len(text) and text[end].isspace():
                end += 1
            if begin > done:
                parts.append(text[done:begin])
            parts.append(token.id)
            done = end
        return [*parts, text[done:]] if done < len(text) else parts


def _touches_word(text: str, begin: int, end: int) -> bool:
    beside = text[max(begin - 1, 0) : begin] + text[end : end + 1]
    return re.search(r"\w", beside) is not None
