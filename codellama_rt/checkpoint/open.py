"""Open a model: find its files, tell the formats apart, read the headers once, match the tensors.

Everything that follows (plan, weights, tokenizer, chat template) takes what is known from here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from codellama_rt.checkpoint.formats.gguf_model import read_gguf_model
from codellama_rt.checkpoint.formats.gguf_parts import find_gguf
from codellama_rt.checkpoint.formats.hf_directory import has_weights, read_directory
from codellama_rt.checkpoint.formats.meta_directory import is_meta_directory, read_meta_directory
from codellama_rt.checkpoint.model_names import resolve_model
from codellama_rt.checkpoint.stored_tensor import StoredModel
from codellama_rt.checkpoint.weight_loading import choose_dtype, match_tensors
from codellama_rt.ops.dtypes import FLOAT_DTYPES


@dataclass(frozen=True, kw_only=True)
class Opened(StoredModel):
    """A model whose tensors are those of its configuration, no more and no fewer.

    Attributes:
        stored_dtype: of the floats, as `choose_dtype` chooses it.
    """

    stored_dtype: str

    def float_dtype(self, dtype: str) -> str:
        """Return the dtype of the floats when the model is loaded with the option `dtype`.

        Raises:
            ValueError: neither "auto" nor a dtype of floats.
        """
        if dtype not in ("auto", *FLOAT_DTYPES):
            raise ValueError(f"dtype must be one of auto, {', '.join(FLOAT_DTYPES)}, got {dtype!r}")
        return self.stored_dtype if dtype == "auto" else dtype


def resolve(model: str | os.PathLike[str]) -> Opened:
    """Open a model's files and check their headers; no weight is read.

    Args:
        model: a directory in Hugging Face's or in Meta's layout or with one GGUF model, a GGUF
            file, a built-in name, or a hub id. Where a directory is in several layouts, Hugging
            Face's files are taken, then Meta's.

    Raises:
        CheckpointError: the files are missing, damaged, contradictory or of another architecture.
        TypeError: model is neither a path nor a name.
        RuntimeError: a named model cannot be fetched.
    """
    stored = _read(resolve_model(model))
    tensors = match_tensors(stored)
    known = vars(stored) | {"tensors": tensors}
    return Opened(**known, stored_dtype=choose_dtype(tensors).name)


def _read(path: Path) -> StoredModel:
    if not path.is_dir():
        return read_gguf_model(path)
    if is_meta_directory(path):
        return read_meta_directory(path)
    gguf = None if has_weights(path) else find_gguf(path)
    return read_directory(path) if gguf is None else read_gguf_model(gguf)
