"""The tokenizer interface of the runtime: text to ids, ids to text, and incremental decoding.

The vocabulary is stored as a table of bytes, one entry per id. Decoding is then one join and one
UTF-8 decode, whole or incremental, for every kind of tokenizer.
"""

import codecs
import operator
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

DECODE_LIKE_SENTENCEPIECE = "codellama_rt.replace_one_byte"


class TokenIdError(ValueError, IndexError):
    """A token id is outside the vocabulary (also an IndexError, as Transformers raises)."""


def _replace_one_byte(error: UnicodeError) -> tuple[str, int]:
    """Decode each invalid byte to its own U+FFFD, as SentencePiece does; Python merges several."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error(DECODE_LIKE_SENTENCEPIECE, _replace_one_byte)


class Tokenizer:
    """The interface of all tokenizers; a subclass defines how plain text becomes ids.

    The name of a special token in a text is plain text, unless `parse_special` is set.

    Args:
        pieces: the vocabulary's entries as the file names them, by id.
        piece_bytes: the UTF-8 bytes of each entry's text, by id; for a special token, its name.
        special_ids: ids that are control tokens, not text.
        bos_id, eos_id: begin and end of sequence, or None.
        adds_bos: whether the model expects `bos_id` before a prompt.
    """

    decode_errors = "replace"  # how invalid UTF-8 decodes; SentencePiece differs
    prefix_id: int | None = None  # tokens of the infilling format, if the model has one
    middle_id: int | None = None
    suffix_id: int | None = None
    eot_id: int | None = None

    def __init__(
        self,
        pieces: Sequence[str],
        piece_bytes: Sequence[bytes],
        special_ids: Iterable[int],
        *,
        bos_id: int | None,
        eos_id: int | None,
        adds_bos: bool,
    ) -> None:
        self.pieces = list(pieces)
        self.special_ids = frozenset(special_ids)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.adds_bos = adds_bos and bos_id is not None
        self._piece_bytes = list(piece_bytes)
        self._id_of = {piece: token_id for token_id, piece in enumerate(self.pieces)}
        names = sorted((self.pieces[i] for i in self.special_ids), key=len, reverse=True)
        self._special_name = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return len(self.pieces)

    @property
    def can_infill(self) -> bool:
        """Whether the vocabulary has the tokens of the infilling format."""
        return None not in (self.prefix_id, self.middle_id, self.suffix_id)

    def pad_vocabulary(self, vocab_size: int) -> None:
        """Let further ids, up to the model's `vocab_size`, decode to nothing: padding rows."""
        extra = range(self.vocab_size, vocab_size)
        self._piece_bytes += [b""] * len(extra)
        self.special_ids |= frozenset(extra)

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a vocabulary entry, or None if it does not exist."""
        return self._id_of.get(piece)

    def piece(self, token_id: int) -> str:
        """Return the vocabulary entry of an id, "" for padding."""
        [token_id] = self._checked([token_id])
        return self.pieces[token_id] if token_id < self.vocab_size else ""

    # Text to ids

    def encode(self, text: str, *, bos: bool = True, parse_special: bool = False) -> list[int]:
        """Encode text to token ids.

        Args:
            text: any text; special-token names in it are plain text.
            bos: put the begin token in front if the model expects one.
            parse_special: replace the names of special tokens by their ids. Only for trusted text,
                such as a rendered chat template.

        Raises:
            TypeError: `text` is not a str.
            ValueError: `text` contains half of a surrogate pair.

        Example:
            >>> tokenizer.encode("def f():")  # doctest: +SKIP
            [1, 822, 285, 7295]
        """
        check_text(text)
        head = [self.bos_id] if bos and self.adds_bos else []
        return head + (self._encode_special(text) if parse_special else self._encode_text(text))

    def encode_infill(self, prefix: str, suffix: str, *, suffix_first: bool = False) -> list[int]:
        """Build an infilling prompt; not supported by this tokenizer, so it raises ValueError."""
        raise cannot_infill(self.vocab_size)

    def _encode_text(self, text: str) -> list[int]:
        raise NotImplementedError

    def _encode_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.split_special(text):
            ids += [part] if isinstance(part, int) else self._encode_text(part)
        return ids

    @property
    def special_names(self) -> list[str]:
        """The names of the control tokens, as `split_special` finds them in a text."""
        return [piece for piece in map(self.piece, self.special_ids) if piece]

    def encode_plain(self, text: str) -> list[int]:
        """Encode a user's text to ids without any control token, not even the begin token.

        Raises:
            TypeError, ValueError: as for `encode`.
        """
        check_text(text)
        return self._encode_text(text)

    def encode_continuation(self, text: str) -> list[int]:
        """Encode text that continues a line; a vocabulary may begin a text in another way."""
        return self.encode_plain(text)

    def encode_rendered(self, parts: Iterable[int | str]) -> list[int]:
        """Encode a rendered chat template that `split_special` has split."""
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self.encode_plain(part)
        return ids

    def split_special(self, text: str) -> list[int | str]:
        """Split text at the names of special tokens, longest first; each name becomes its id."""
        parts = self._special_name.split(text)
        # A pattern with one group puts the matches at the odd indices.
        return [self._id_of[part] if i % 2 else part for i, part in enumerate(parts) if part]

    # Ids to text

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return a token's UTF-8 bytes, possibly part of a character; None if it is special."""
        [token_id] = self._checked([token_id])
        return None if token_id in self.special_ids else self._piece_bytes[token_id]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Decode the ids of a whole text.

        Args:
            ids: token ids; a list, array or tensor of one axis, or a single id.
            skip_special_tokens: leave control tokens out; otherwise their names appear in the text.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        shown = self._checked(as_id_list(ids))
        if skip_special_tokens:
            shown = [token_id for token_id in shown if token_id not in self.special_ids]
        text = b"".join(map(self._piece_bytes.__getitem__, shown))
        return text.decode("utf-8", self.decode_errors)[self._lead_length(shown) :]

    def decode_infill(self, ids: Iterable[int]) -> str:
        """Decode the ids of a filling, up to its end token; a leading space is kept."""
        raise cannot_infill(self.vocab_size)

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> "IncrementalDetokenizer":
        """Return an incremental decoder for the ids that follow `prompt_ids`."""
        checked = self._checked(as_id_list(prompt_ids))
        return IncrementalDetokenizer(self, checked, skip_special_tokens=skip_special_tokens)

    def _lead_length(self, ids: Sequence[int]) -> int:
        """Return how many leading characters of the text of `ids` were added by the encoder."""
        return 0

    def _checked(self, ids: list[int]) -> list[int]:
        if ids and not 0 <= min(ids) <= max(ids) < len(self._piece_bytes):
            bad = next(i for i in ids if not 0 <= i < len(self._piece_bytes))
            raise TokenIdError(
                f"token id {bad} is out of range; expected 0 to {len(self._piece_bytes) - 1}"
            )
        return ids


class IncrementalDetokenizer:
    """Decode ids one by one, each character as soon as it is complete.

    The joined pieces equal the decoded continuation, including a leading space; no text is taken
    back, and the cost of a push does not depend on the length.

    Example:
        >>> detokenizer = tokenizer.detokenizer(prompt_ids)  # doctest: +SKIP
        >>> text = "".join(map(detokenizer.push, new_ids)) + detokenizer.flush()  # doctest: +SKIP
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        """Start after `prompt_ids`; if those are only the begin token, a text starts here.

        With `skip_special_tokens` the begin token has no text; otherwise its name is before.
        """
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(tokenizer.decode_errors)
        is_first = bool(prompt_ids) and set(prompt_ids) <= {tokenizer.bos_id}
        self._at_start = is_first and skip_special_tokens
        # A prompt may end inside a character; its at most three bytes are in the last three tokens.
        tail = takewhile(bool, map(tokenizer.token_bytes, reversed(prompt_ids[-3:])))
        self._decoder.decode(b"".join(reversed(list(tail))))

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that is now complete, possibly ""."""
        piece = self._tokenizer.token_bytes(token_id)
        if piece is None:
            if self._skips_special:
                return ""
            piece = self._tokenizer.piece(token_id).encode()
        text = self._decoder.decode(piece)
        if self._at_start:
            self._at_start = False
            text = text[self._tokenizer._lead_length([token_id]) :]
        return text

    def flush(self) -> str:
        """End the text; bytes of an incomplete character become U+FFFD."""
        return self._decoder.decode(b"", final=True)


def cannot_infill(n_pieces: int) -> ValueError:
    """Return the error for infilling with a vocabulary that has no infilling tokens."""
    return ValueError(
        f"this model cannot infill: its {n_pieces} pieces include no infilling tokens; Code Llama "
        "7B, 13B and 70B, base and Instruct (32016 pieces), can"
    )


def check_text(text: object) -> None:
    """Raise TypeError for anything but a str, ValueError (of str.encode) for a lone surrogate."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    text.encode("utf-8")


def as_id_list(ids: Any) -> list[int]:
    """Return ids as a list of int.

    Args:
        ids: an int, an iterable of ints, or an array or tensor of at most one axis.

    Raises:
        TypeError: an element is not an integer.
    """
    if hasattr(ids, "asnumpy"):  # a MindSpore tensor
        ids = ids.asnumpy()
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    return [ids] if isinstance(ids, int) else [operator.index(token_id) for token_id in ids]


def token_text(token: Any) -> str | None:
    """Return the text of a token in tokenizer_config.json: a string, an object, or null."""
    return token.get("content") if isinstance(token, dict) else token
