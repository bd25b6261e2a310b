"""Structured outputs: the tokens that a grammar allows next, as `llguidance` computes them.

llguidance tells of an error, or of a panic inside it, by `get_error` alone, while its mask allows
one token; so that is asked after each call, and ends the request. Its limits bound every call. The
states of one grammar share a lexer, which remembers what it has computed: what they allow never
depends on one another, only whether a grammar at the edge of the limits exceeds them.
"""

from __future__ import annotations

import atexit
import json
import os
from _thread import start_new_thread
from collections import OrderedDict
from collections.abc import Collection, Iterable
from contextlib import suppress
from queue import SimpleQueue
from threading import RLock
from typing import Any

import numpy as np

from codellama_rt.engine.stop_strings import Tokenizer
from codellama_rt.engine.structured_outputs import StructuredOutputs

MAX_GRAMMARS = 32  # kept compiled
# Half of llguidance's fuel compiles in 3 s at most what else takes 8 s and is refused then; a state
# of the lexer takes 1 to 2 kB.
_LIMITS = {"initial_lexer_fuel": 400_000, "max_lexer_states": 50_000, "verbose_errors": False}
# At most one of these where JSON may have white space: without a bound a model may write it for
# ever. Enough for an indented text.
_WHITESPACE = r" |\n[ \t]{0,20}"


class Vocabulary:
    """The tokens of a model as llguidance reads them: each is exactly the text that it adds.

    Row `size` of its masks is a token of ours: the text may end here. Control tokens and rows
    without a token have no text and are never allowed.

    Attributes:
        size: rows of the model.
        text: (ceil(size / 32),) uint32, one bit per token: it has a text.
        lead: the same: it loses a space at the beginning of a text.
        matching: what llguidance compiles grammars for.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        """Read all tokens.

        Raises:
            ImportError: llguidance is not installed.
        """
        llguidance = _llguidance()
        self.size = size
        pieces = [_text_bytes(tokenizer, token_id) for token_id in range(size)]
        ids = [token_id for token_id, piece in enumerate(pieces) if piece]
        self.text = self.bits(ids)
        self.lead = self.bits(i for i in ids if tokenizer.lead_length([i]))
        self.matching = llguidance.LLTokenizer(_Spelling(tokenizer, pieces))

    def bits(self, token_ids: Iterable[int]) -> np.ndarray:
        """Return tokens as a mask, (ceil(size / 32),) uint32; the lowest bit comes first."""
        flags = np.zeros(-(-self.size // 32) * 32, bool)
        flags[list(token_ids)] = True
        return np.packbits(flags, bitorder="little").view(np.uint32)


class _Spelling:
    """llguidance's view of a tokenizer: its tokens, and how it writes a text that is forced."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokenizer: Tokenizer, pieces: list[bytes]) -> None:
        self.eos_token_id = len(pieces)
        self.tokens = [*pieces, b"\xff<end>"]  # the first byte marks a special token
        self._tokenizer = tokenizer
        self._id_of = {piece: i for i, piece in enumerate(pieces) if piece}
        self._longest = max(map(len, self._id_of), default=0)

    def __call__(self, text: str) -> list[int]:
        """Return tokens whose bytes are exactly the text: the tokenizer's own if they are."""
        ids, spelled = self._tokenizer.encode_continuation(text), text.encode()
        pieces = [self.tokens[i] if i < self.eos_token_id else b"" for i in ids]
        is_exact = all(pieces) and b"".join(pieces) == spelled
        return ids if is_exact else self._longest_pieces(spelled)

    def _longest_pieces(self, text: bytes) -> list[int]:
        ids, begin = [], 0
        while begin < len(text):
            ends = range(min(begin + self._longest, len(text)), begin, -1)
            end = next((end for end in ends if text[begin:end] in self._id_of), None)
            if end is None:
                raise ValueError(f"no token spells {text[begin : begin + 1]!r}")
            ids.append(self._id_of[text[begin:end]])
            begin = end
        return ids


class Grammar:
    """Structured outputs compiled for a vocabulary.

    Attributes:
        vocabulary: what it was compiled for.
        is_broken: an error came up; its parts that states share may be unusable.
    """

    def __init__(self, vocabulary: Vocabulary, wanted: StructuredOutputs) -> None:
        """Compile, in bounded time and memory.

        Raises:
            ValueError: it cannot be compiled, or allows nothing; with llguidance's message.
        """
        llguidance = _llguidance()
        self.vocabulary, self.is_broken = vocabulary, False
        source = f"structured_outputs: {wanted.kind}"
        try:
            text = _grammar_text(wanted)
        except Exception as error:  # whatever the reader of GBNF raises
            raise ValueError(f"{source} cannot be read: {_shortened(str(error))}") from None
        limits = llguidance.LLParserLimits(**_LIMITS)
        self._start = llguidance.LLMatcher(vocabulary.matching, text, log_level=0, limits=limits)
        mask = None if self._start.is_error() else self._start.compute_bitmask()
        if self._start.is_error():
            error = _shortened(self._start.get_error())
            raise ValueError(f"{source} cannot be used: {error}")
        self._first_mask = np.frombuffer(mask, np.uint32)

    def start(self, end_ids: Collection[int], *, drops_lead: bool) -> GrammarState:
        """Return the state of an empty output.

        Args:
            end_ids: tokens that end the output: allowed where it may end, and nowhere else.
            drops_lead: the first token loses its leading space, so it must not have one.
        """
        matcher = self._start.deep_copy()
        return GrammarState(self, matcher, self._first_mask, end_ids, drops_lead)


class GrammarState:
    """What one output may go on with; everything follows from the tokens so far."""

    def __init__(
        self,
        grammar: Grammar,
        matcher: Any,
        first_mask: np.ndarray,
        end_ids: Collection[int],
        drops_lead: bool,
    ) -> None:
        """Start with an empty output; `Grammar.start` calls it."""
        self._grammar, self._matcher, self._end_ids = grammar, matcher, frozenset(end_ids)
        vocabulary = grammar.vocabulary
        self._ends = vocabulary.bits(self._end_ids)
        self._text = vocabulary.text & ~self._ends
        self._lead = vocabulary.lead if drops_lead else np.zeros_like(vocabulary.lead)
        self._raw: np.ndarray | None = first_mask  # as llguidance gave it
        self._is_queued = False

    def prepare(self) -> None:
        """Begin to compute the next mask in another thread, if it is not known."""
        if self._raw is None and not self._is_queued:
            self._is_queued = True
            with suppress(RuntimeError):  # no thread can be started (any more); `mask` computes it
                _queue().put(self)

    def compute(self) -> np.ndarray:
        """Return the next mask as llguidance gives it; one thread computes it.

        Raises:
            RuntimeError: llguidance exceeded its limits.
        """
        with _computing:
            if self._raw is None:
                mask = self._matcher.compute_bitmask()
                self._check()
                self._raw = np.frombuffer(mask, np.uint32)
            return self._raw

    def mask(self) -> np.ndarray:
        """Return the tokens that may come next, (ceil(vocab_size / 32),) uint32.

        Raises:
            RuntimeError: llguidance exceeded its limits, or no token fits.
        """
        raw = self.compute()
        allowed = raw[: len(self._text)] & self._text & ~self._lead
        word, bit = divmod(self._grammar.vocabulary.size, 32)
        return allowed | self._ends if raw[word] >> bit & 1 else allowed

    def accept(self, token_id: int) -> None:
        """Take the next token of the output; one that ends it changes nothing.

        Raises:
            RuntimeError: the token is not allowed, or llguidance exceeded its limits.
        """
        if token_id in self._end_ids:
            return
        with _computing:
            self._raw, self._is_queued = None, False
            self._matcher.consume_token(token_id)
        self._check()
        self._lead = np.zeros_like(self._lead)

    def _check(self) -> None:
        error = self._matcher.get_error()
        if error:
            self._grammar.is_broken = True
            raise RuntimeError(f"structured_outputs: {_shortened(error)}")


class Grammars:
    """The grammars of an engine; the last ones are kept compiled."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        """Start with none; the vocabulary is read for the first one.

        Args:
            tokenizer: needed for grammars, not for the object.
            vocab_size: of the model.
        """
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[StructuredOutputs, Grammar] = OrderedDict()

    def get(self, wanted: StructuredOutputs) -> Grammar:
        """Return a compiled grammar; may be called by any thread, and outside a step.

        Raises:
            ValueError: it cannot be compiled.
            ImportError: llguidance is not installed.
        """
        with _compiling:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer, self._vocab_size)
            grammar = self._compiled.pop(wanted, None)
            if grammar is None or grammar.is_broken:
                grammar = Grammar(self._vocabulary, wanted)
            self._compiled[wanted] = grammar
            while len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
            return grammar


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError(
            "structured_outputs need llguidance; install the extra: "
            "pip install 'codellama_rt[structured]'"
        ) from None
    return llguidance


def _text_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Return what a token adds to a text; nothing if it is a control token, or never UTF-8."""
    piece = tokenizer.token_bytes(token_id)
    return b"" if piece is None or piece.startswith(b"\xff") else piece


def _grammar_text(wanted: StructuredOutputs) -> str:
    """Return structured outputs in llguidance's own format."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    match wanted.kind:
        case "json" | "json_object":
            schema = wanted.json or '{"type": "object"}'
            defaults = {"whitespace_pattern": _WHITESPACE}
            return LLMatcher.grammar_from_json_schema(schema, defaults=defaults)
        case "regex":
            return LLMatcher.grammar_from_regex(wanted.regex)
        case "choice":
            quoted = (json.dumps(choice, ensure_ascii=False) for choice in wanted.choice)
            lark = f"start: {' | '.join(quoted)}"
        case _:
            lark = any_to_lark(wanted.grammar)
    return json.dumps({"grammars": [{"lark_grammar": lark}]})  # never read as another format


def _shortened(message: str) -> str:
    """Return an error of llguidance in a line, without its state and backtrace."""
    line = " ".join(message.partition("\n<")[0].split())
    return line if len(line) <= 400 else f"{line[:400]}..."


# A matcher is used by one thread at a time, and by none while the process forks or ends: the child
# would wait for ever for what a thread of the parent holds.
_computing, _compiling = RLock(), RLock()
atexit.register(_computing.acquire)

# The states whose masks a thread computes. An interruption of a step may come inside of any Python
# code: what the threading module and executors hold then stays locked. This is one call each.
_jobs: SimpleQueue[GrammarState] | None = None


def _queue() -> SimpleQueue[GrammarState]:
    global _jobs
    if _jobs is None:
        jobs: SimpleQueue[GrammarState] = SimpleQueue()
        start_new_thread(_work, (jobs,))
        _jobs = jobs
    return _jobs


def _work(jobs: SimpleQueue[GrammarState]) -> None:
    while True:
        with suppress(Exception):  # `mask` meets it again
            jobs.get().compute()


def _before_fork() -> None:
    _compiling.acquire()
    _computing.acquire()


def _after_fork() -> None:
    _computing.release()
    _compiling.release()


def _in_child() -> None:
    global _jobs
    _jobs = None  # its thread is the parent's
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
