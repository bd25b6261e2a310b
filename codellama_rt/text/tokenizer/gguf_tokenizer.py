"""The tokenizer in a GGUF file: SentencePiece ("llama") or byte-level BPE ("gpt2")."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from codellama_rt.errors import CheckpointError, warn_of_checkpoint
from codellama_rt.model.config_fields import ConfigFields
from codellama_rt.text.tokenizer.added_tokens import AddedToken
from codellama_rt.text.tokenizer.bpe_tokenizer import BpeTokenizer, build_bpe, find_pre_tokenizer
from codellama_rt.text.tokenizer.sentencepiece_tokenizer import (
    BYTE,
    CONTROL,
    INFILL_PIECES,
    NORMAL,
    PIECE_TYPES,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceTokenizer,
    build_model_proto,
)
from codellama_rt.text.tokenizer.tokenizer_base import Tokenizer
from codellama_rt.text.tokenizer.tokenizer_config import TokenizerConfig

# The keys of the infilling tokens in newer and in older files.
_INFILL_KEYS = {
    "prefix": ("fim_pre_token_id", "prefix_token_id"),
    "middle": ("fim_mid_token_id", "middle_token_id"),
    "suffix": ("fim_suf_token_id", "suffix_token_id"),
    "eot": ("eot_token_id",),
}
_ROLE_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}

_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """Return the tokenizer inside a GGUF file.

    Args:
        metadata: of the file.
        path: of the file, for messages.

    Raises:
        CheckpointError: the file has none, its fields disagree, or its kind is unknown.
    """
    vocabulary = _GgufVocabulary(metadata, path)
    if vocabulary.kind == "llama":
        return _sentencepiece(vocabulary)
    if vocabulary.kind == "gpt2":
        return _bpe(vocabulary)
    raise vocabulary.fields.fault("model", "'llama' (SentencePiece) or 'gpt2' (BPE)")


class _GgufVocabulary:
    """The fields under `tokenizer.ggml.` that both kinds share."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        start = "tokenizer.ggml."
        values = {
            key[len(start) :]: value for key, value in metadata.items() if key.startswith(start)
        }
        self.path = path
        self.fields = ConfigFields(values, f"{path}: {start[:-1]}")
        self.kind = values.get("model")
        self.pieces = [  # llama.cpp, too, gives those without a name one
            piece or f"[EMPTY_{i}]" for i, piece in enumerate(self.strings("tokens"))
        ]
        self.bos_id = self.token_id("bos_token_id")
        self.eos_id = self.token_id("eos_token_id")
        self.unk_id = self.token_id("unknown_token_id")
        self.types = self._types()

    def config(self, *, adds_bos: bool) -> TokenizerConfig:
        """Return the roles and ends that the file states, and whether a text begins with bos."""
        roles = {role: self.token_id(key) for role, key in _ROLE_KEYS.items()}
        ends = (self.token_id(key) for key in ("eot_token_id", "eom_token_id"))
        return TokenizerConfig(
            role_ids={role: token_id for role, token_id in roles.items() if token_id is not None},
            adds_bos=self.fields.flag("add_bos_token", adds_bos),
            adds_eos=self.fields.flag("add_eos_token", False),
            end_ids=tuple(token_id for token_id in ends if token_id is not None),
        )

    def token_id(self, key: str) -> int | None:
        return self.fields.token_id(key, vocab_size=len(self.pieces))

    def strings(self, key: str) -> list[str]:
        """Return a list of strings, which must be UTF-8."""
        values = self.fields.values.get(key)
        if not isinstance(values, list) or not values:
            raise self.fields.fault(key, "a list of strings")
        try:
            "".join(values).encode()
        except UnicodeEncodeError:
            raise self.fields.fault(key, "strings in UTF-8") from None
        return values

    def _types(self) -> list[int]:
        """Return the type of each piece; without the list, what the other keys say."""
        if "token_type" in self.fields.values:
            # 0 is llama.cpp's "undefined", by which the piece is like any other
            types = [kind or NORMAL for kind in self.numbers("token_type")]
            if not set(types) <= set(PIECE_TYPES):
                raise self.fields.fault("token_type", f"numbers from 0 to {len(PIECE_TYPES)}")
            return types
        self._warn_of_missing("token_type", "only the begin, end and unknown tokens are control")
        types = [NORMAL] * len(self.pieces)
        for token_id in (self.bos_id, self.eos_id):
            if token_id is not None:
                types[token_id] = CONTROL
        if self.kind == "llama":
            types[self.unk_id or 0] = UNKNOWN
        return types

    def _warn_of_missing(self, key: str, instead: str) -> None:
        warn_of_checkpoint(f"{self.fields.source}.{key}: expected it, found nothing; {instead}")

    def scores(self) -> list[float]:
        """Return the score of each piece, 0 without the list."""
        if "scores" in self.fields.values:
            scores = self.numbers("scores")
            if any(score != score for score in scores):  # NaN has no place in an order
                raise CheckpointError(f"{self.fields.source}.scores: expected numbers, found NaN")
            return scores
        self._warn_of_missing("scores", "all pieces count as equally good")
        return [0.0] * len(self.pieces)

    def numbers(self, key: str) -> list[float]:
        """Return a list with one number per piece."""
        values = self.fields.values.get(key)
        if not hasattr(values, "tolist") or len(values) != len(self.pieces):
            raise self.fields.fault(key, f"{len(self.pieces)} numbers, one per token")
        return values.tolist()


def _sentencepiece(vocabulary: _GgufVocabulary) -> SentencePieceTokenizer:
    has_space = vocabulary.fields.flag("add_space_prefix", True)
    config = vocabulary.config(adds_bos=True)
    infill_ids = _infill_ids(vocabulary)
    types = vocabulary.types
    for token_id in infill_ids.values():
        if types[token_id] == USER_DEFINED:  # such a piece would match inside a user's text
            types[token_id] = CONTROL
    for token_id, piece in enumerate(vocabulary.pieces):
        if types[token_id] == NORMAL and _BYTE_PIECE.fullmatch(piece):
            types[token_id] = BYTE  # some converters type them as text
    proto = build_model_proto(
        vocabulary.pieces,
        vocabulary.scores(),
        types,
        unk_id=vocabulary.unk_id,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        add_dummy_prefix=has_space,
    )
    return SentencePieceTokenizer(
        proto, replace(config, infill_ids=infill_ids), source=str(vocabulary.path)
    )


def _infill_ids(vocabulary: _GgufVocabulary) -> dict[str, int]:
    """Return the infilling tokens by the file's keys, or else by the names of pieces."""
    found = {
        role: token_id
        for role, keys in _INFILL_KEYS.items()
        for key in keys
        if (token_id := vocabulary.token_id(key)) is not None
    }
    if "prefix" in found:
        return found
    # Without the other keys, `eot_token_id` is the end of a chat model's turn.
    ids = {piece: token_id for token_id, piece in enumerate(vocabulary.pieces)}
    return {role: ids[piece] for role, piece in INFILL_PIECES.items() if piece in ids}


def _bpe(vocabulary: _GgufVocabulary) -> BpeTokenizer:
    pieces, types, fields = vocabulary.pieces, vocabulary.types, vocabulary.fields
    pre = find_pre_tokenizer(fields.values.get("pre", "default"), str(vocabulary.path))
    try:
        backend = build_bpe(pieces, vocabulary.strings("merges"), pre)
    except Exception as error:  # `tokenizers` raises no more specific type
        raise CheckpointError(f"{fields.source}: merges do not fit the tokens: {error}") from None
    config = vocabulary.config(adds_bos=pre.adds_bos)
    plain = [AddedToken(i, pieces[i]) for i, kind in enumerate(types) if kind == USER_DEFINED]
    return BpeTokenizer(
        backend,
        pieces,
        [i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)],
        replace(config, added=tuple(plain)),
        str(vocabulary.path),
    )
