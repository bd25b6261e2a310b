"""Tells the formats of checkpoints apart."""

from pathlib import Path

from codellama_rt.checkpoint.formats.gguf_model import read_gguf_model
from codellama_rt.checkpoint.formats.hf_directory import read_directory
from codellama_rt.checkpoint.formats.meta_directory import is_meta_directory, read_meta_directory
from codellama_rt.checkpoint.stored_tensor import StoredModel


def read_model(path: Path) -> StoredModel:
    """Opens a model's files and checks their headers; no weight is read.

    Args:
        path: a directory in Hugging Face's or in Meta's layout, or a GGUF file. Where a directory
            is both, Hugging Face's files are taken.

    Raises:
        CheckpointError: the files are missing, damaged, contradictory or of another architecture.
    """
    if not path.is_dir():
        return read_gguf_model(path)
    return read_meta_directory(path) if is_meta_directory(path) else read_directory(path)
