"""Tiny checkpoints with a tokenizer made here, for tests of LLM and generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.checkpoint_files import TINY
from helpers.tokenizer_files import model_file

NAME = "gqa_theta1e6_bf16"  # 512 ids, of which the tokenizer names the first 418
KV_MEMORY = "4MB"


def make_folder(
    folder: Path, *, name: str = NAME, tokenizer: bool = True, infilling: bool = True,
    generation_config: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A checkpoint directory: weights of a tiny golden one, linked, and a tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in [TINY / name / "config.json", *(TINY / name).glob("model*.safetensors*")]:
        (folder / file.name).symlink_to(file)
    if tokenizer:
        model_file(folder, infilling)
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder
