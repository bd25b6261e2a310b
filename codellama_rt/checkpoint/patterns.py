"""Regular expressions out of a configuration, matched in polynomial time.

Python's `re` backtracks: `(a+)+b` takes years on forty letters. Here the set of all places where a
part can end is computed once for each place where it can begin, and a budget bounds the rest.
What single characters match is left to `re`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_MAX_LENGTH, _MAX_DEPTH = 2000, 20
STEPS_TO_PARSE = 50  # beside one per character: `re` compiles a plain name, which takes as long
_STEPS_OF_A_PART = 10  # beside a plain name, which takes one
_QUANTIFIER = re.compile(r"[*+?]|\{(?P<low>\d{0,4})(?P<comma>,?)(?P<high>\d{0,4})\}")
_GROUP = re.compile(r"\((?:\?(?::|P<\w{1,100}>|(?P<look>[=!])))?")
_NAME = re.compile(r"[\w.]+")

Ends = frozenset[int]
Node = Callable[["Search", int], Ends]  # the places where a part can end that begins here


class Budget:
    """How many steps all matches together may take, some seconds in all."""

    def __init__(self, steps: int = 1_500_000) -> None:
        self._steps = steps

    def spend(self, steps: int = 1) -> None:
        """Take some of them.

        Raises:
            ValueError: there is none left.
        """
        self._steps -= steps
        if self._steps < 0:
            raise ValueError("patterns that are matched in fewer steps")


class Pattern:
    """A regular expression of `re`, without lookbehind, references, flags and possessive repeats.

    Args:
        text: the expression.

    Raises:
        ValueError: it is none, or uses something else; the message says what was expected.

    Example:
        >>> Pattern(r"layers\\.[0-3]\\..*").ends_name("model.layers.2.mlp.up_proj", Budget())
        True
    """

    def __init__(self, text: str) -> None:
        """Parse the expression."""
        self._name = re.compile(rf"(?:.*\.)?{text}") if _NAME.fullmatch(text) else None
        self._node = _Parser(text).parse()

    def is_whole(self, name: str, budget: Budget) -> bool:
        """Return whether the expression matches a whole name."""
        return len(name) in Search(name, budget).ends(self._node, 0)

    def ends_name(self, name: str, budget: Budget) -> bool:
        """Return whether it matches a name, or what follows one of the name's dots, to its end."""
        if self._name is not None:  # hundreds of plain names for hundreds of modules are usual
            budget.spend()
            return self._name.fullmatch(name) is not None
        search = Search(name, budget)
        begins = [0, *(i + 1 for i, char in enumerate(name) if char == ".")]
        return any(len(name) in search.ends(self._node, begin) for begin in begins)


class Search:
    """One text, and what is known about it."""

    def __init__(self, text: str, budget: Budget) -> None:
        self.text = text
        self._budget = budget
        self._known: dict[tuple[Node, int], Ends] = {}

    def ends(self, node: Node, begin: int) -> Ends:
        """Return the places where a part can end that begins at `begin`."""
        key = node, begin
        if key not in self._known:
            self._budget.spend(_STEPS_OF_A_PART)
            self._known[key] = node(self, begin)
        return self._known[key]

    def all_ends(self, node: Node, begins: Ends) -> Ends:
        """Return the places where a part can end that begins at any of several places."""
        return frozenset().union(*(self.ends(node, begin) for begin in begins))


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > _MAX_LENGTH:
            raise ValueError(f"patterns of at most {_MAX_LENGTH} characters")
        self._text, self._at, self._depth = text, 0, 0

    def parse(self) -> Node:
        node = self._alternatives()
        if self._at < len(self._text):
            raise ValueError("patterns whose parentheses are balanced")
        return node

    def _alternatives(self) -> Node:
        options = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            options.append(self._sequence())
        return options[0] if len(options) == 1 else _one_of(options)

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return _one_after_another(parts)

    def _repeated(self, node: Node) -> Node:
        match = _QUANTIFIER.match(self._text, self._at)
        if match is None or match[0] in ("{}", "{,}"):  # which are text
            return node
        self._at = match.end()
        if self._peek() == "?":  # as few as possible: the same places
            self._at += 1
        if self._peek() in ("*", "+", "?"):
            raise ValueError("patterns without repeats of repeats")
        sign = match[0][0]
        if sign != "{":
            return _repeat(node, int(sign == "+"), 1 if sign == "?" else None)
        low = int(match["low"] or 0)
        high = (int(match["high"]) if match["high"] else None) if match["comma"] else low
        if high is not None and high < low:
            raise ValueError("patterns that repeat from few to many times")
        return _repeat(node, low, high)

    def _atom(self) -> Node:
        begin, char = self._at, self._peek()
        if char == "(":
            return self._group()
        if char in "*+?":
            raise ValueError("patterns with something to repeat")
        self._at += 1
        if char == "[":
            return _single(self._class())
        if char == "\\":
            self._at += 1
            text = self._text[begin : self._at]
            if re.fullmatch(r"\\[dDsSwWbBAZ\W_]", text) is None:
                raise ValueError("patterns without references and unusual escapes")
            return _single(text)
        return _single(char if char in ".^$" else re.escape(char))

    def _group(self) -> Node:
        match = _GROUP.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        if self._peek() == "?" or self._depth == _MAX_DEPTH:
            raise ValueError(
                f"patterns without lookbehind and flags, {_MAX_DEPTH} groups deep at most"
            )
        self._depth += 1
        node = self._alternatives()
        self._depth -= 1
        if self._peek() != ")":
            raise ValueError("patterns whose parentheses are balanced")
        self._at += 1
        return node if match["look"] is None else _ahead(node, match["look"] == "=")

    def _class(self) -> str:
        """Return a class of characters, as `re` takes it."""
        parts = ["["]
        if self._peek() == "^":
            parts.append(self._next())
        parts.append(self._member())
        while self._peek() != "]":
            parts.append(self._member())
        return "".join(parts) + self._next()

    def _member(self) -> str:
        char = self._next()
        if char == "\\":
            return char + self._next()
        return f"\\{char}" if char in "[]" else char

    def _next(self) -> str:
        if not self._peek():
            raise ValueError("patterns whose brackets are balanced")
        self._at += 1
        return self._text[self._at - 1]

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]


def _single(expression: str) -> Node:
    """Return a part that `re` matches: one character, or a place such as ^."""
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ValueError(f"regular expressions ({error})") from None

    def ends(search: Search, begin: int) -> Ends:
        match = compiled.match(search.text, begin)
        return frozenset() if match is None else frozenset([match.end()])

    return ends


def _one_after_another(parts: list[Node]) -> Node:
    def ends(search: Search, begin: int) -> Ends:
        places = frozenset([begin])
        for part in parts:
            places = search.all_ends(part, places)
            if not places:
                break
        return places

    return ends


def _one_of(options: list[Node]) -> Node:
    def ends(search: Search, begin: int) -> Ends:
        return frozenset().union(*(search.ends(option, begin) for option in options))

    return ends


def _repeat(node: Node, low: int, high: int | None) -> Node:
    def ends(search: Search, begin: int) -> Ends:
        places = frozenset([begin])
        for _ in range(low):
            following = search.all_ends(node, places)
            if following == places:  # and so they stay
                break
            places = following
        found, count = places, low
        while places and (high is None or count < high):
            places = search.all_ends(node, places) - found
            found, count = found | places, count + 1
        return found

    return ends


def _ahead(node: Node, wanted: bool) -> Node:
    def ends(search: Search, begin: int) -> Ends:
        return frozenset([begin] if bool(search.ends(node, begin)) == wanted else [])

    return ends
