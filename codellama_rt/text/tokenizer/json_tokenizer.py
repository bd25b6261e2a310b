"""The tokenizer in a tokenizer.json: byte-level BPE, or a SentencePiece model converted to it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codellama_rt.checkpoint.formats.strict_json import MAX_TOKENIZER_BYTES, read_object
from codellama_rt.errors import CheckpointError
from codellama_rt.text.tokenizer.bpe_tokenizer import BpeTokenizer
from codellama_rt.text.tokenizer.sentencepiece_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceTokenizer,
    build_model_proto,
)
from codellama_rt.text.tokenizer.tokenizer_base import Tokenizer, token_text


def tokenizer_from_json(path: Path) -> Tokenizer:
    """Read the tokenizer from a tokenizer.json; tokenizer_config.json beside it names bos and eos.

    Raises:
        CheckpointError: the file is damaged, or its model is of neither kind.
    """
    contents = read_object(path, MAX_TOKENIZER_BYTES)
    backend = _backend(path, contents)
    model = contents["model"]
    added = contents.get("added_tokens") or []
    pieces = _pieces(path, {**model["vocab"], **{token["content"]: token["id"] for token in added}})
    special_ids = {token["id"] for token in added if token["special"]}

    config_path = path.with_name("tokenizer_config.json")
    config = read_object(config_path) if config_path.is_file() else {}
    names = [token_text(config.get(f"{role}_token")) for role in ("bos", "eos")]
    bos_id, eos_id = (backend.token_to_id(name or "") for name in names)
    adds_bos = _begins_with(contents.get("post_processor") or {}, names[0])
    if model.get("byte_fallback"):
        # Running the model in SentencePiece keeps Meta's ids, which conversion often loses.
        proto = _model_proto(contents, pieces, special_ids, bos_id, eos_id)
        return SentencePieceTokenizer(proto, source=str(path), adds_bos=adds_bos)
    if '"ByteLevel"' not in json.dumps([contents.get("pre_tokenizer"), contents.get("decoder")]):
        raise CheckpointError(f"{path}: expected ByteLevel or byte_fallback, found neither")
    return BpeTokenizer(
        backend,
        pieces,
        special_ids=special_ids,
        literal_ids=[token["id"] for token in added],
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=adds_bos,
    )


def _backend(path: Path, contents: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(json.dumps(contents))
    except Exception as error:  # `tokenizers` raises no more specific type
        raise CheckpointError(f"{path}: expected a tokenizer: {error}") from None
    kind = contents["model"].get("type", "BPE")
    if kind != "BPE":
        raise CheckpointError(f"{path}: model.type: expected 'BPE', found {kind!r}")
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # a user's text never becomes a control token
    return backend


def _begins_with(post_processor: Mapping[str, Any], name: str | None) -> bool:
    steps = post_processor.get("processors", [post_processor])
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    return any(step.get("single", [])[:1] == [first] for step in steps)


def _pieces(path: Path, vocabulary: Mapping[str, int]) -> list[str]:
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    for token_id, piece in enumerate(pieces):
        if vocabulary[piece] != token_id:
            raise CheckpointError(
                f"{path}: expected a piece of id {token_id}, found {vocabulary[piece]}"
            )
    return pieces


def _model_proto(
    contents: Mapping[str, Any],
    pieces: list[str],
    special_ids: set[int],
    bos_id: int | None,
    eos_id: int | None,
) -> bytes:
    """Convert a SentencePiece model back: the rank of its first merge orders the pieces."""
    model = contents["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    unk_id = model["vocab"].get(model.get("unk_token"))

    def kind(token_id: int, piece: str) -> int:
        if token_id == unk_id:
            return UNKNOWN
        if piece in ranks:  # true of Code Llama's infilling tokens, although they are special
            return NORMAL
        if len(piece) == 6 and piece.startswith("<0x"):
            return BYTE
        if token_id in special_ids:
            return CONTROL
        return NORMAL if piece in model["vocab"] else USER_DEFINED

    # Llama's runs of spaces share the lowest score: they merge last, and from the left.
    worst = 1 + max((rank for piece, rank in ranks.items() if set(piece) != {SPACE}), default=0)
    scores = [-min(ranks.get(piece, worst), worst) for piece in pieces]
    steps = json.dumps([contents.get("normalizer"), contents.get("pre_tokenizer")])
    marks = ('"Prepend"', '"prepend_scheme": "always"', '"prepend_scheme": "first"')
    return build_model_proto(
        pieces,
        scores,
        [kind(token_id, piece) for token_id, piece in enumerate(pieces)],
        unk_id=unk_id,
        bos_id=bos_id,
        eos_id=eos_id,
        add_dummy_prefix=any(mark in steps for mark in marks),
    )
