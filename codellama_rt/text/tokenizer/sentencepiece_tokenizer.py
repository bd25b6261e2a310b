"""Code Llama's own tokenizer: SentencePiece, with the infilling format of Meta's reference code.

SentencePiece puts a space in front of a text ("dummy prefix"), so that a word at the start is the
same piece as elsewhere. The text after a hole continues a line and must not get that space: Meta's
code encodes it after an extra character that is cut off again; here the model never adds it, and
the tokenizer writes it where it belongs.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from codellama_rt.errors import CheckpointError
from codellama_rt.text.tokenizer.added_tokens import AddedToken
from codellama_rt.text.tokenizer.tokenizer_base import (
    DECODE_LIKE_SENTENCEPIECE,
    Tokenizer,
    as_id_list,
    check_text,
)
from codellama_rt.text.tokenizer.tokenizer_config import TokenizerConfig

SPACE = "▁"  # U+2581, a space inside a piece
INFILL_PIECES = {"prefix": "▁<PRE>", "middle": "▁<MID>", "suffix": "▁<SUF>", "eot": "▁<EOT>"}
STEP_PIECE = "<step>"  # ends a message of Code Llama 70B Instruct

# Types of pieces in sentencepiece_model.proto; GGUF files use the same numbers.
PIECE_TYPES = NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class SentencePieceTokenizer(Tokenizer):
    """Text to Meta's ids and back, from a SentencePiece model.

    Names of control tokens in a text are plain text. Code Llama's infilling tokens, however, are
    ordinary pieces of its model: for `encode`, as in Meta's code, "<EOT>" after a space is that
    token; for `encode_plain` it is text.

    Args:
        model_proto: the bytes of a tokenizer.model file.
        config: what the checkpoint says beside it.
        source: the file's name, for messages.

    Attributes:
        own_size: pieces of the model itself, without tokens added behind them.

    Raises:
        CheckpointError: the bytes are not a usable SentencePiece model.

    Example:
        >>> tokenizer = load_tokenizer("CodeLlama-7b-hf")  # doctest: +SKIP
        >>> tokenizer.encode_infill("def f(", "):\\n")  # doctest: +SKIP
        [1, 32007, 822, 285, 29898, 32008, 1125, 13, 32009]
    """

    decode_errors = DECODE_LIKE_SENTENCEPIECE

    def __init__(
        self,
        model_proto: bytes,
        config: TokenizerConfig | None = None,
        *,
        source: str = "tokenizer.model",
    ) -> None:
        proto = parse_model(model_proto, source)
        self.model_proto = model_proto
        self.own_size = len(proto.pieces)
        has_space = proto.normalizer_spec.add_dummy_prefix
        proto.normalizer_spec.add_dummy_prefix = False
        self._model = _processor(proto.SerializeToString(), source)
        config = _completed(config or TokenizerConfig(), proto, self._model, has_space)
        self.spacing = config.spacing

        pieces = config.pieces([entry.piece for entry in proto.pieces])
        infill_ids = config.infill_ids
        if infill_ids is None:
            names = INFILL_PIECES.items()
            infill_ids = {role: pieces.index(name) for role, name in names if name in pieces}
        self.prefix_id, self.middle_id, self.suffix_id, self.eot_id = map(
            infill_ids.get, INFILL_PIECES
        )
        types = [entry.type for entry in proto.pieces]
        types += [USER_DEFINED] * (len(pieces) - len(types))
        special = {i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL)}
        special |= {*infill_ids.values(), *(i for i, p in enumerate(pieces) if p == STEP_PIECE)}
        special |= {token.id for token in config.added if token.special}
        self._merged = frozenset(i for i in special if types[i] == NORMAL)
        super().__init__(
            pieces,
            [_piece_bytes(piece, types[i], i in special) for i, piece in enumerate(pieces)],
            special,
            config,
        )

    def encode(self, text: str, *, bos: bool = True, parse_special: bool = False) -> list[int]:
        """Encode text to token ids, as described for `Tokenizer`."""
        ids = super().encode(text, bos=False, parse_special=parse_special)
        if parse_special and self.spacing == "start":
            first, second = ids[:1], ids[1:2]
            if first == [self.piece_id(SPACE)] and self.special_ids.issuperset(second) and second:
                del ids[0]
        return self._head(bos) + ids

    def encode_infill(self, prefix: str, suffix: str, *, suffix_first: bool = False) -> list[int]:
        """Build Meta's infilling prompt from the text around a hole.

        Args:
            prefix: the text before the hole.
            suffix: the text after it.
            suffix_first: use SPM order, `<PRE> <SUF>suffix <MID> prefix`, instead of
                PSM, `<PRE> prefix <SUF>suffix <MID>`.

        Returns:
            The begin token and the prompt; the model ends the filling with `eot_id`.

        Raises:
            TypeError: an argument is not a str.
            ValueError: the vocabulary has no infilling tokens.
        """
        if not self.can_infill:
            return super().encode_infill(prefix, suffix)
        before = self.encode_plain(prefix)
        after = self.encode_continuation(suffix)
        if suffix_first:
            return [self.bos_id, self.prefix_id, self.suffix_id, *after, self.middle_id, *before]
        return [self.bos_id, self.prefix_id, *before, self.suffix_id, *after, self.middle_id]

    def encode_plain(self, text: str, *, bos: bool = False) -> list[int]:
        """Encode a user's text; unlike with `encode`, " <EOT>" does not become <EOT>."""
        check_text(text)
        return self._head(bos) + self.encode_rendered(self._plain.split(self._prepare(text)))

    def encode_continuation(self, text: str) -> list[int]:
        """Encode a user's text that continues a line, without the space that `encode` adds."""
        check_text(text)
        parts = self._plain.split(text)
        if parts and isinstance(parts[0], str) and self.spacing == "each":
            parts[0] = parts[0][1:]
        return self.encode_rendered(["", *parts])

    def split_special(self, text: str) -> list[int | str]:
        """Split a rendered chat template, as described for `Tokenizer`."""
        parts = super().split_special(text)
        if self.spacing == "start" and parts[:1] == [SPACE] and len(parts) > 1:
            del parts[0]
        return parts

    def encode_rendered(self, parts: Iterable[int | str]) -> list[int]:
        """Encode what has been split; " <EOT>" in the texts stays text."""
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._without_special(self._encode_stretch(part, i == 0))
        return ids

    def _without_special(self, ids: list[int]) -> list[int]:
        """Replace infilling tokens that merges have formed by plain pieces: ▁< and EOT>."""
        plain: list[int] = []
        for token_id in ids:
            if token_id in self._merged:
                name = self.pieces[token_id]
                for half in (name[:2], name[2:]):
                    plain += self._model.encode(half)
            else:
                plain.append(token_id)
        return plain

    def decode_infill(self, ids: Iterable[int]) -> str:
        """Decode the ids of a filling as Meta does; a leading space is kept.

        Args:
            ids: the filling, cut before its end token (an infilling token inside appears as text).

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        shown = [i for i in self._checked(as_id_list(ids)) if i < self.vocab_size]
        runs = itertools.groupby(shown, key=lambda token_id: token_id < self.own_size)
        return "".join(self._joined(list(run), is_own) for is_own, run in runs)

    def _joined(self, ids: list[int], are_own: bool) -> str:
        return self._model.decode(ids) if are_own else "".join(self.piece(i) for i in ids)

    def _prepare(self, text: str) -> str:
        return SPACE + text.replace(SPACE, " ") if text and self.spacing == "start" else text

    def _normalize(self, text: str) -> str:
        if self.spacing not in ("each", "none") or not text:
            return text
        return (SPACE if self.spacing == "each" else "") + text.replace(" ", SPACE)

    def _encode_stretch(self, text: str, is_first: bool) -> list[int]:
        takes_space = self.spacing == "first" and is_first and text
        if takes_space and not text.startswith((SPACE, " ")):
            text = SPACE + text
        return self._model.encode(text)

    def lead_length(self, ids: Sequence[int]) -> int:
        """Return how many leading characters of the text of `ids` were added by the encoder."""
        has_lead = self.spacing not in ("none", "never")
        return int(has_lead and bool(ids) and self.piece(ids[0]).startswith(SPACE))


def build_model_proto(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    unk_id: int | None,
    bos_id: int | None,
    eos_id: int | None,
    add_dummy_prefix: bool,
) -> bytes:
    """Serialize a SentencePiece BPE model with byte fallback, like Llama's.

    Args:
        pieces, scores, types: the vocabulary by id.
        unk_id, bos_id, eos_id: ids of the unknown, begin and end tokens, or None.
        add_dummy_prefix: put a space in front of a text.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb

    proto = pb.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type = pb.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    for name, token_id in (("unk", unk_id), ("bos", bos_id), ("eos", eos_id)):
        setattr(trainer, f"{name}_id", -1 if token_id is None else token_id)
        if token_id is not None:
            setattr(trainer, f"{name}_piece", pieces[token_id])
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def parse_model(model_proto: bytes, source: str) -> Any:
    """Return the parsed bytes of a tokenizer.model.

    Raises:
        CheckpointError: it is not one.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as pb

    try:
        proto = pb.ModelProto.FromString(model_proto)
        pieces = [entry.piece for entry in proto.pieces]  # some protobufs decode UTF-8 only here
    except DecodeError as error:
        raise CheckpointError(f"{source} is not a SentencePiece model: {error}") from None
    except UnicodeDecodeError:
        pieces = []
    if not pieces or not all(isinstance(piece, str) for piece in pieces):  # bytes if not UTF-8
        raise CheckpointError(f"{source} is not a SentencePiece model: expected pieces in UTF-8")
    return proto


def _processor(model_proto: bytes, source: str) -> Any:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model_proto)
    except (RuntimeError, UnicodeDecodeError) as error:  # the second: its message is not UTF-8
        raise CheckpointError(f"{source}: SentencePiece rejects the model: {error}") from None
    return processor


def _piece_bytes(piece: str, kind: int, special: bool) -> bytes:
    if kind == BYTE:
        return bytes([int(piece[3:5], 16)])  # <0x0A>
    return piece.encode() if special else piece.replace(SPACE, " ").encode()


def _completed(config: TokenizerConfig, proto: Any, model: Any, has_space: bool) -> TokenizerConfig:
    """Return a configuration with what the model itself says: roles, tokens, no space in front."""
    own = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
    role_ids = {role: None if token_id < 0 else token_id for role, token_id in own.items()}
    known = {token.id for token in config.added}
    matched = [
        AddedToken(i, entry.piece)
        for i, entry in enumerate(proto.pieces)
        if entry.type == USER_DEFINED and SPACE not in entry.piece and i not in known
    ]
    return replace(
        config,
        role_ids=role_ids | config.role_ids,
        added=(*matched, *config.added),
        spacing=config.spacing if has_space else "none",
    )
