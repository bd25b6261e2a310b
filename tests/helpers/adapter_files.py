"""LoRA adapters in PEFT's format, made of random numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from codellama_rt.model.config import ModelConfig
from codellama_rt.model.lora import projection_widths

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapter(
    folder: Path, config: ModelConfig, *, seed: int = 0, rank: int = 4, projections=None,
    scale: float = 0.1, changes: dict[str, np.ndarray] | None = None, **values: Any,
) -> Path:  # fmt: skip
    """An adapter of all layers.

    Args:
        folder: made here.
        config: of the model.
        seed: of the numbers.
        rank: of the changes.
        projections: those that it changes; all by default.
        scale: of the numbers of B.
        changes: tensors to write besides or instead.
        values: of adapter_config.json besides or instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    widths = projection_widths(config)
    inputs = dict.fromkeys(widths, config.dim)
    inputs |= {"o_proj": config.n_heads * config.head_dim, "down_proj": config.hidden_dim}
    tensors = {}
    for layer in range(config.n_layers):
        for name in projections or widths:
            block = "self_attn" if name in ATTENTION else "mlp"
            base = f"base_model.model.model.layers.{layer}.{block}.{name}.lora_"
            tensors[f"{base}A.weight"] = rng.standard_normal((rank, inputs[name]), np.float32)
            tensors[f"{base}B.weight"] = scale * rng.standard_normal(
                (widths[name], rank), np.float32
            )
    tensors |= changes or {}
    save_file(
        {k: v for k, v in tensors.items() if v is not None}, folder / "adapter_model.safetensors"
    )
    config_values = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none"} | values
    (folder / "adapter_config.json").write_text(json.dumps(config_values))
    return folder
