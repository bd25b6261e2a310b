"""Find and load the tokenizer of a checkpoint, in whichever file it is stored.

There are two semantics, kept apart: `load_tokenizer` returns a tokenizer with Meta's ids, under
which a text never becomes a control token; `CodeLlamaTokenizer` follows the slow tokenizer of
Transformers, which parses control tokens.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from codellama_rt.checkpoint.formats.gguf_file import find_gguf_metadata
from codellama_rt.checkpoint.formats.gguf_parts import find_gguf
from codellama_rt.errors import CheckpointError, warn_of_checkpoint
from codellama_rt.text.tokenizer.detokenizer import IncrementalDetokenizer
from codellama_rt.text.tokenizer.directory_config import read_config
from codellama_rt.text.tokenizer.tokenizer_base import (
    TokenIdError,
    Tokenizer,
    check_text,
)

__all__ = [
    "FILL_TOKEN",
    "IncrementalDetokenizer",
    "TokenIdError",
    "Tokenizer",
    "has_tokenizer",
    "load_tokenizer",
    "split_fill",
]

FILL_TOKEN = "<FILL_ME>"
MAX_MODEL_BYTES = 2**26  # of a tokenizer.model; that of Llama has 500 kB
_FILES = ("tokenizer.model", "tokenizer.json")


def load_tokenizer(
    path: str | PathLike[str],
    vocab_size: int | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
        path: a directory with tokenizer.model or tokenizer.json, or such a file, or a GGUF file.
        vocab_size: rows of the model's embedding, to check against.
        metadata: of the GGUF file at `path`, where it has been read already.

    Returns:
        The tokenizer; ids up to `vocab_size` that it does not have decode to nothing. Where it has
        more tokens than the model has rows it warns: such a token cannot be used.

    Raises:
        CheckpointError: no tokenizer was found, or it or its configuration is damaged.

    Example:
        >>> load_tokenizer("CodeLlama-7b-hf").encode("def f():")  # doctest: +SKIP
        [1, 822, 285, 7295]
    """
    file = _find(Path(path))
    tokenizer = _load_file(file, metadata)
    if vocab_size is not None:
        _warn_of_missing_rows(tokenizer, vocab_size, file)
        tokenizer.pad_vocabulary(vocab_size)
    return tokenizer


def _warn_of_missing_rows(tokenizer: Tokenizer, vocab_size: int, file: Path) -> None:
    excess = [repr(piece) for piece in tokenizer.pieces[vocab_size:]]
    if excess:
        shown = ", ".join(excess[:4]) + (", ..." if len(excess) > 4 else "")
        warn_of_checkpoint(
            f"{file}: {len(tokenizer.pieces)} tokens, but the model has {vocab_size} rows; a "
            f"prompt that holds one of the others is refused: {shown}"
        )


def has_tokenizer(path: Path, metadata: Mapping[str, Any] | None) -> bool:
    """Return whether a checkpoint has a tokenizer: some are weights alone.

    Args:
        path: its directory or GGUF file.
        metadata: of the GGUF file; None for a directory.
    """
    if metadata is not None:
        return metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")
    return any((path / name).is_file() for name in _FILES)


def split_fill(prompt: str, fill_token: str = FILL_TOKEN) -> tuple[str, str] | None:
    """Split a prompt at its hole.

    Returns:
        The text before and after the hole, or None if the prompt has none.

    Raises:
        ValueError: there is more than one hole.

    Example:
        >>> split_fill("def f(<FILL_ME>):")
        ('def f(', '):')
    """
    check_text(prompt)
    parts = prompt.split(fill_token)
    if len(parts) > 2:
        raise ValueError(f"a prompt may have one {fill_token}, this has {len(parts) - 1}")
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    gguf = find_gguf(path)
    if gguf is not None:
        return gguf
    raise CheckpointError(f"{path}: expected a tokenizer ({' or '.join(_FILES)}), found neither")


def _load_file(path: Path, metadata: Mapping[str, Any] | None) -> Tokenizer:
    try:
        metadata = find_gguf_metadata(path) if metadata is None else metadata
    except OSError as error:
        raise CheckpointError(f"{path}: expected a tokenizer, found {error.strerror}") from None
    if metadata is not None:
        from codellama_rt.text.tokenizer.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(metadata, path)
    if path.suffix == ".json":
        from codellama_rt.text.tokenizer.json_tokenizer import tokenizer_from_json

        return tokenizer_from_json(path)
    return _sentencepiece(path)


def _sentencepiece(path: Path) -> Tokenizer:
    from codellama_rt.text.tokenizer.json_tokenizer import converted_contents, tokenizer_from_json
    from codellama_rt.text.tokenizer.sentencepiece_tokenizer import (
        CONTROL,
        SentencePieceTokenizer,
        parse_model,
    )

    if path.stat().st_size > MAX_MODEL_BYTES:
        raise CheckpointError(
            f"{path}: expected at most {MAX_MODEL_BYTES} bytes, found {path.stat().st_size}"
        )
    model_proto = path.read_bytes()
    entries = parse_model(model_proto, str(path)).pieces
    control = [entry.piece for entry in entries if entry.type == CONTROL]
    beside = path.with_name("tokenizer.json")
    contents = converted_contents(beside)
    pieces = [entry.piece for entry in entries]
    if contents is not None and contents["model"].get("vocab") != _ids(pieces):
        return tokenizer_from_json(beside)  # of a vocabulary that was extended, as in Transformers
    config = read_config(path.parent, pieces, contents, model_control=control)
    return SentencePieceTokenizer(model_proto, config, source=str(path))


def _ids(pieces: Sequence[str]) -> dict[str, int]:
    return {piece: token_id for token_id, piece in enumerate(pieces)}
