"""The tiny checkpoints with Transformers' logits and tokens, and engines to run them on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.model.kv_cache import KVCache
from codellama_rt.model.llama import Llama
from codellama_rt.ops import Quantized
from helpers.checkpoint_files import TINY, TINY_NAMES

# These hold a vocabulary or a layout of others and may not lie in the repository.
SHARED_NAMES = ["codellama_vocab_bf16_tok", "meta_1shard_bf16_hf", "meta_2shard_gqa_bf16_hf"]
GOLDEN_NAMES = [*TINY_NAMES, *SHARED_NAMES]


@dataclass(frozen=True)
class Golden:
    """A checkpoint's folder and what Transformers computed with it.

    Attributes:
        folder: the checkpoint.
        description: golden.json.
        arrays: golden.npz.
    """

    folder: Path
    description: dict[str, Any]
    arrays: Any

    @property
    def cases(self) -> list[dict[str, Any]]:
        return self.description["cases"]

    @property
    def stored_dtype(self) -> str:
        names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
        return names[self.description["stored_dtype"]]

    def logits(self, i: int) -> tuple[Sequence[int], np.ndarray]:
        """Positions and expected logits of case `i`."""
        positions = self.cases[i]["logit_positions"]
        if positions == "all":
            positions = range(len(self.cases[i]["prompt"]))
        return positions, self.arrays[f"logits_{i}"]

    def model(self, dtype: str = "auto", quantization: str | None = None) -> Llama:
        checkpoint = open_checkpoint(self.folder, dtype=dtype, quantization=quantization)
        return Llama(checkpoint.config, checkpoint.weights)


def load_golden(folder: Path) -> Golden:
    description = json.loads((folder / "golden.json").read_text())
    return Golden(folder, description, np.load(folder / "golden.npz"))


def tiny_golden(name: str) -> Golden:
    """One of the checkpoints in the repository."""
    return load_golden(TINY / name)


def make_engine(
    model: Any, *, num_blocks: int = 64, block_size: int = 16, kv_dtype: str = "float32",
    max_model_len: int = 100_000, **options: Any,
) -> Engine:  # fmt: skip
    """An engine without tokenizer; what is in its blocks at first is NaN, or scales of NaN."""
    kv_cache = KVCache(model.config, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype)
    for caches in kv_cache.layers:
        for cache in caches:
            if isinstance(cache, Quantized):
                cache.payload[...] = 0xFF
            else:
                cache[...] = np.nan
    return Engine(model, kv_cache, max_model_len=max_model_len, **options)


def run(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[list[int]]:
    """Generates for all prompts together; the first sample of each."""
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    token_ids: list[list[int]] = [[] for _ in prompts]
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None, output.error
            token_ids[int(output.request_id)] += output.token_ids
    return token_ids
