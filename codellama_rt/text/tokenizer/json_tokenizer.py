"""The tokenizer in a tokenizer.json: byte-level BPE, or a SentencePiece model converted to it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codellama_rt.checkpoint.formats.strict_json import MAX_TOKENIZER_BYTES, read_object
from codellama_rt.errors import CheckpointError
from codellama_rt.text.tokenizer.bpe_tokenizer import BpeTokenizer, panics_refused
from codellama_rt.text.tokenizer.directory_config import read_config
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
from codellama_rt.text.tokenizer.tokenizer_base import Tokenizer


def tokenizer_from_json(path: Path) -> Tokenizer:
    """Read the tokenizer from a tokenizer.json, and its configuration from the files beside it.

    Raises:
        CheckpointError: a file is damaged, or the model is of neither kind.
    """
    contents = read_object(path, MAX_TOKENIZER_BYTES)
    backend = _backend(path, contents)
    model = contents["model"]
    pieces = _pieces(path, contents)
    if model.get("byte_fallback"):
        # Running the model in SentencePiece keeps Meta's ids, which conversion often loses.
        config = read_config(path.parent, pieces, contents)
        return SentencePieceTokenizer(_model_proto(contents, pieces), config, source=str(path))
    if '"ByteLevel"' not in json.dumps([contents.get("pre_tokenizer"), contents.get("decoder")]):
        raise CheckpointError(f"{path}: expected ByteLevel or byte_fallback, found neither")
    config = read_config(path.parent, pieces, contents)
    return BpeTokenizer(backend, pieces, (), config, str(path))


def converted_contents(path: Path) -> dict[str, Any] | None:
    """Return the contents of a tokenizer.json beside a tokenizer.model.

    Returns:
        Its contents, or None where there is no such file or it describes another kind of model.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.is_file():
        return None
    contents = read_object(path)
    model = contents.get("model")
    if not isinstance(model, Mapping) or not model.get("byte_fallback"):
        return None
    _backend(path, {**contents, "model": _EMPTY_MODEL})
    return contents


def _backend(path: Path, contents: Mapping[str, Any]) -> Any:
    """Return the tokenizer of `tokenizers`, which checks the contents, without added tokens."""
    from tokenizers import Tokenizer as Backend

    try:
        with panics_refused(str(path)):
            Backend.from_str(json.dumps({**contents, "model": _EMPTY_MODEL}))
            backend = Backend.from_str(json.dumps({**contents, "added_tokens": []}))
    except CheckpointError:
        raise
    except Exception as error:  # `tokenizers` raises no more specific type
        raise CheckpointError(f"{path}: expected a tokenizer: {error}") from None
    kind = contents["model"].get("type", "BPE")
    if kind != "BPE":
        raise CheckpointError(f"{path}: model.type: expected 'BPE', found {kind!r}")
    backend.no_truncation()
    backend.no_padding()
    return backend


_EMPTY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}


def _pieces(path: Path, contents: Mapping[str, Any]) -> list[str]:
    """Return the model's vocabulary by id; an added token may fill a gap in it."""
    pieces = {token_id: piece for piece, token_id in contents["model"]["vocab"].items()}
    size = max(pieces, default=-1) + 1
    for token in contents.get("added_tokens") or []:
        token_id, content = token["id"], token["content"]
        if token_id < size and pieces.setdefault(token_id, content) != content:
            raise CheckpointError(
                f"{path}: expected a piece of id {token_id} once, found "
                f"{pieces[token_id]!r:.80} and {content!r:.80}"
            )
    if len(pieces) < size:
        gap = next(i for i in range(size) if i not in pieces)
        raise CheckpointError(f"{path}: expected a piece of id {gap}, found none")
    return [pieces[i] for i in range(size)]


def _model_proto(contents: Mapping[str, Any], pieces: list[str]) -> bytes:
    """Convert a SentencePiece model back: the rank of its first merge orders the pieces."""
    model = contents["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    unk_id = model["vocab"].get(model.get("unk_token"))
    added = contents.get("added_tokens") or []
    special_ids = {token["id"] for token in added if token["special"]}

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
    return build_model_proto(
        pieces,
        scores,
        [kind(token_id, piece) for token_id, piece in enumerate(pieces)],
        unk_id=unk_id,
        bos_id=model["vocab"].get("<s>"),
        eos_id=model["vocab"].get("</s>"),
        add_dummy_prefix=True,
    )
