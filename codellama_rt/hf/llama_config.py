"""Transformers' names of what a model's configuration says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from codellama_rt.model.config import ARCHITECTURE, ModelConfig


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """A `ModelConfig` that has Transformers' names, too; nothing can be set.

    Example:
        >>> config = LlamaConfig(n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, dim=64,
        ...                      hidden_dim=176, vocab_size=512)
        >>> config.hidden_size, config.num_key_value_heads, config.eos_token_id
        (64, 2, 2)
    """

    model_type: ClassVar[str] = "llama"
    architectures: ClassVar[tuple[str, ...]] = (ARCHITECTURE,)
    hidden_act: ClassVar[str] = "silu"
    is_encoder_decoder: ClassVar[bool] = False
    use_cache: ClassVar[bool] = True
    attention_dropout: ClassVar[float] = 0.0
    pad_token_id: ClassVar[None] = None

    @property
    def hidden_size(self) -> int:
        """Numbers per token between the layers: `dim`."""
        return self.dim

    @property
    def intermediate_size(self) -> int:
        """Numbers per token inside the MLP: `hidden_dim`."""
        return self.hidden_dim

    @property
    def num_hidden_layers(self) -> int:
        """Layers: `n_layers`."""
        return self.n_layers

    @property
    def num_attention_heads(self) -> int:
        """Heads of the queries: `n_heads`."""
        return self.n_heads

    @property
    def num_key_value_heads(self) -> int:
        """Heads of the keys and values: `n_kv_heads`."""
        return self.n_kv_heads

    @property
    def rms_norm_eps(self) -> float:
        """Added to the mean square before its root: `norm_eps`."""
        return self.norm_eps

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The end token; a list if there are several, None if there is none."""
        ids = list(self.eos_token_ids)
        return ids if len(ids) > 1 else next(iter(ids), None)

    @property
    def torch_dtype(self) -> str:
        """The dtype of the projections: `dtype`."""
        return self.dtype
