"""The tokenizer interface of the runtime: text to ids, ids to text, and incremental decoding.

The vocabulary is stored as a table of bytes, one entry per id. Decoding is then one join and one
UTF-8 decode, whole or incremental, for every kind of tokenizer.
"""

import codecs
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from codellama_rt.text.tokenizer.added_tokens import AddedToken, TokenSplitter
from codellama_rt.text.tokenizer.detokenizer import IncrementalDetokenizer
from codellama_rt.text.tokenizer.end_tokens import find_end_ids
from codellama_rt.text.tokenizer.tokenizer_config import ROLES, TokenizerConfig

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

    The name of a special token in a text is plain text, unless `parse_special` is set. An added
    token that is not special is matched in every text.

    Args:
        pieces: the vocabulary's entries as the file names them, by id, with the added tokens.
        piece_bytes: the UTF-8 bytes of each entry's text, by id; for a special token, its name.
        special_ids: ids that are control tokens, not text, besides the special ones of `config`.
        config: added tokens, roles, and what surrounds a text.

    Attributes:
        bos_id, eos_id, unk_id, pad_id: ids of the roles, or None.
        adds_bos: whether the model expects `bos_id` before a prompt.
        adds_eos: whether Transformers puts `eos_id` after a text; a prompt goes on without it.
        end_ids: ids that end every answer.
        num_rows: ids that the model has rows for.
        whole_texts: texts of tokens that are whole characters, as `IncrementalDetokenizer` has met
            them.
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
        config: TokenizerConfig,
    ) -> None:
        self.pieces = list(pieces)
        self.config = config
        self.special_ids = frozenset(special_ids).union(t.id for t in config.added if t.special)
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = map(config.role_ids.get, ROLES)
        self.adds_bos = config.adds_bos and self.bos_id is not None
        self.adds_eos = config.adds_eos and self.eos_id is not None
        self._piece_bytes = list(piece_bytes)
        self.num_rows = len(self.pieces)
        self.whole_texts: dict[int, str] = {}
        self._id_of = {piece: token_id for token_id, piece in enumerate(self.pieces) if piece}
        self.end_ids = find_end_ids(self.pieces, (self.eos_id, *config.end_ids))
        plain = [token for token in config.added if token.id not in self.special_ids]
        own = self.special_ids.difference(token.id for token in config.added)
        own = [AddedToken(i, self.pieces[i], special=True) for i in sorted(own)]
        self._plain = TokenSplitter(plain, self._normalize)
        self._all = TokenSplitter([*own, *config.added], self._normalize)

    @property
    def vocab_size(self) -> int:
        """Number of pieces, added tokens included."""
        return len(self.pieces)

    @property
    def can_infill(self) -> bool:
        """Whether the vocabulary has the tokens of the infilling format."""
        return None not in (self.prefix_id, self.middle_id, self.suffix_id)

    def pad_vocabulary(self, vocab_size: int) -> None:
        """Fit the rows of a model: further ids, up to `vocab_size`, decode to nothing.

        Infilling tokens without a row are given up.
        """
        self.num_rows = vocab_size
        extra = range(self.vocab_size, vocab_size)
        self._piece_bytes += [b""] * len(extra)
        self.special_ids |= frozenset(extra)
        infill = (self.prefix_id, self.middle_id, self.suffix_id, self.eot_id)
        if any(token_id is not None and token_id >= vocab_size for token_id in infill):
            self.prefix_id = self.middle_id = self.suffix_id = self.eot_id = None

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
        splitter = self._all if parse_special else self._plain
        return self._head(bos) + self._encode_parts(splitter.split(self._prepare(text)))

    def encode_plain(self, text: str, *, bos: bool = False) -> list[int]:
        """Encode a user's text, in which no control token can occur.

        Args:
            text: any text.
            bos: put the begin token in front if the model expects one.

        Raises:
            TypeError, ValueError: as for `encode`.
        """
        return self.encode(text, bos=bos)

    def encode_infill(self, prefix: str, suffix: str, *, suffix_first: bool = False) -> list[int]:
        """Build an infilling prompt; not supported by this tokenizer, so it raises ValueError."""
        raise cannot_infill(self.vocab_size)

    def split_special(self, text: str) -> list[int | str]:
        """Split a rendered chat template at the names of added and control tokens.

        Returns:
            The ids of the tokens, and the texts between them, to be passed to `encode_rendered`.
        """
        return self._all.split(self._prepare(text))

    def encode_rendered(self, parts: Iterable[int | str]) -> list[int]:
        """Encode what `split_special` has split; no name in the texts becomes a token any more."""
        return self._encode_parts(parts)

    @property
    def special_names(self) -> list[str]:
        """The names that no message of a conversation may turn into a token.

        They are those of control tokens, of ends, and of added tokens in the form <|name|>.
        """
        marks = (t.id for t in self.config.added if t.content[:2] + t.content[-2:] == "<||>")
        ids = self.special_ids | self.end_ids | frozenset(marks)
        return [piece for piece in map(self.piece, sorted(ids)) if piece]

    def encode_continuation(self, text: str) -> list[int]:
        """Encode text that continues a line; a vocabulary may begin a text in another way."""
        return self.encode_plain(text)

    def control_id(self, name: str) -> int | None:
        """Return the id of the control token of this name, as a text writes it, or None."""
        found = (self._id_of.get(name), self._id_of.get(f"▁{name}"))
        return next((i for i in found if i in self.special_ids), None)

    def filling_end(self, prompt_ids: Sequence[int]) -> int | None:
        """Return the token that ends what follows a prompt that asks for a filling, else None."""
        return self.eot_id if self.can_infill and self.middle_id in prompt_ids else None

    def _head(self, bos: bool) -> list[int]:
        return [self.bos_id] if bos and self.adds_bos else []

    def _prepare(self, text: str) -> str:
        """Return a whole text as it is before it is split at tokens."""
        return text

    def _normalize(self, text: str) -> str:
        """Return the normalised form of a text between tokens."""
        return text

    def _encode_parts(self, parts: Iterable[int | str]) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(parts):
            ids += [part] if isinstance(part, int) else self._encode_stretch(part, i == 0)
        return ids

    def _encode_stretch(self, text: str, is_first: bool) -> list[int]:
        """Encode a normalised text between tokens, the first part of a whole text or not."""
        raise NotImplementedError

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
        return text.decode("utf-8", self.decode_errors)[self.lead_length(shown) :]

    def decode_infill(self, ids: Iterable[int]) -> str:
        """Decode the ids of a filling, up to its end token; a leading space is kept."""
        raise cannot_infill(self.vocab_size)

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> IncrementalDetokenizer:
        """Return an incremental decoder for the ids that follow `prompt_ids`."""
        checked = self._checked(as_id_list(prompt_ids))
        return IncrementalDetokenizer(self, checked, skip_special_tokens=skip_special_tokens)

    def begins_text(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether what follows is the beginning of a text: only the begin token is there."""
        return bool(prompt_ids) and set(prompt_ids) <= {self.bos_id}

    def lead_length(self, ids: Sequence[int]) -> int:
        """Return how many leading characters of the text of `ids` were added by the encoder."""
        return 0

    def _checked(self, ids: list[int]) -> list[int]:
        if ids and not 0 <= min(ids) <= max(ids) < len(self._piece_bytes):
            bad = next(i for i in ids if not 0 <= i < len(self._piece_bytes))
            raise TokenIdError(
                f"token id {bad} is out of range; expected 0 to {len(self._piece_bytes) - 1}"
            )
        return ids


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
