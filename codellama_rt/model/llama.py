"""Llama (arXiv:2302.13971, arXiv:2307.09288) in the paper's order, on the direct road.

Activations are float32 throughout: on a CPU they cost nothing beside the weights, and every matrix
product then rounds its input once, as a bfloat16 weight wants it, and nothing else.
"""

from __future__ import annotations

import itertools

import numpy as np

from codellama_rt import ops
from codellama_rt.model.batch import Batch
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import KVCache, Pages
from codellama_rt.model.rope import RotaryEmbedding
from codellama_rt.model.weights import LayerWeights, LlamaWeights, Weight

Array = np.ndarray


class Llama:
    """The decoder; it holds weights and scratch memory, and no state of any sequence."""

    applies_adapters = True  # of single requests: `Batch.adapted`

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        """Take the weights as they lie; nothing is copied."""
        self.config = config
        self.weights = weights
        self.rope = RotaryEmbedding(config)
        self._fused = [
            (_runs(layer.q_proj, layer.k_proj, layer.v_proj), _runs(layer.gate_proj, layer.up_proj))
            for layer in weights.layers
        ]
        self._activations = Activations(config, 1)

    def forward(self, batch: Batch, kv_cache: KVCache) -> Array:
        """Compute one step: write the tokens' keys and values, and return the logits asked for.

        Args:
            batch: the tokens of this step; its pages must be allocated.
            kv_cache: the pages.

        Returns:
            (num_logits, vocab_size) float32: the rows `batch.logit_rows`, in that order.
        """
        weights, eps = self.weights, self.config.norm_eps
        a = self._scratch(len(batch.token_ids))
        rope = self.rope.lookup(batch.positions, batch.rope_lengths)
        residual = ops.embedding(batch.token_ids, weights.embedding, out=a.residual)
        x = ops.rms_norm(residual, weights.layers[0].attention_norm, eps, out=a.x)
        following = [layer.attention_norm for layer in weights.layers[1:]]
        for i, layer in enumerate(weights.layers):
            qkv_proj, gate_up_proj = self._fused[i]
            _project(x, qkv_proj, a.qkv)
            _adapt(batch, i, ("q_proj", "k_proj", "v_proj"), x, a.qkv)
            self._attention(layer, rope, batch, kv_cache.layers[i], a)
            _adapt(batch, i, ("o_proj",), a.attended_rows, a.sublayer)
            ops.add_rms_norm(a.sublayer, residual, layer.mlp_norm, eps, out=(x, residual))
            _project(x, gate_up_proj, a.gate_up)
            _adapt(batch, i, ("gate_proj", "up_proj"), x, a.gate_up)
            ops.silu_and_mul(a.gate_up, out=a.hidden)
            ops.linear(a.hidden, layer.down_proj, out=a.sublayer)
            _adapt(batch, i, ("down_proj",), a.hidden, a.sublayer)
            if i < len(following):
                ops.add_rms_norm(a.sublayer, residual, following[i], eps, out=(x, residual))
        return self._logits(a.sublayer, residual, batch.logit_rows)

    def _attention(
        self, layer: LayerWeights, rope: tuple[Array, Array, Array], batch: Batch,
        caches: tuple[Pages, Pages], a: Activations,
    ) -> None:  # fmt: skip
        cos, sin, index = rope
        ops.rope_and_cache(
            a.qkv, cos, sin, index, *caches, batch.slot_mapping,
            interleaved=self.config.rope_interleaved, out=a.query,
        )  # fmt: skip
        ops.paged_attention(
            a.query, *caches, batch.block_tables, batch.seq_lens, batch.cu_seqlens_q,
            out=(a.attended, a.lse),
        )  # fmt: skip
        ops.linear(a.attended_rows, layer.o_proj, out=a.sublayer)

    def _logits(self, sublayer: Array, residual: Array, rows: Array) -> Array:
        if len(rows) != len(residual):
            sublayer, residual = sublayer[rows], residual[rows]
        x, _ = ops.add_rms_norm(sublayer, residual, self.weights.norm, self.config.norm_eps)
        return ops.linear(x, self.weights.lm_head)

    def _scratch(self, num_tokens: int) -> Activations:
        if self._activations.num_tokens != num_tokens:
            self._activations = Activations(self.config, num_tokens, self._activations.memory)
        return self._activations


def _runs(*weights: Weight) -> list[tuple[tuple[Weight, ...], slice]]:
    """Neighbours of one dtype, and their columns of the result: `linear` takes those in one pass.

    A GGUF file may hold a layer's values in more bits than its queries and keys.
    """
    runs, begin = [], 0
    for _, run in itertools.groupby(weights, key=lambda weight: str(weight.dtype)):
        members = tuple(run)
        end = begin + sum(weight.shape[0] for weight in members)
        runs.append((members, slice(begin, end)))
        begin = end
    return runs


def _project(x: Array, runs: list[tuple[tuple[Weight, ...], slice]], out: Array) -> None:
    """Multiply x by all weights of the runs, into (num_tokens, sum of their rows)."""
    for weights, columns in runs:
        ops.linear(x, weights, out=out[:, columns])


def _adapt(batch: Batch, i: int, projections: tuple[str, ...], x: Array, out: Array) -> None:
    """Add to layer i's projections what the adapters of some requests change in them."""
    for adapter, rows in batch.adapted:
        adapter.add(i, projections, x, rows, out)


class Activations:
    """Float32 scratch for one step, cut from one block of memory that only ever grows."""

    @staticmethod
    def widths(config: ModelConfig) -> dict[str, int]:
        """Floats a token, by name of the array."""
        q_dim = config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        return {
            "residual": config.dim, "x": config.dim, "sublayer": config.dim,
            "qkv": q_dim + 2 * kv_dim, "query": q_dim, "attended_rows": q_dim,
            "lse": config.n_heads, "gate_up": 2 * config.hidden_dim, "hidden": config.hidden_dim,
        }  # fmt: skip

    def __init__(self, config: ModelConfig, num_tokens: int, memory: Array | None = None) -> None:
        """Lay out the arrays of a step of `num_tokens` tokens, in `memory` if it is enough."""
        widths = self.widths(config)
        needed = num_tokens * sum(widths.values())
        if memory is None or memory.size < needed:
            memory = np.empty(needed, np.float32)
        self.num_tokens, self.memory = num_tokens, memory
        arrays, begin = {}, 0
        for name, width in widths.items():
            end = begin + num_tokens * width
            arrays[name] = memory[begin:end].reshape(num_tokens, width)
            begin = end
        heads = (num_tokens, config.n_heads, config.head_dim)
        self.residual, self.x, self.sublayer = (arrays[n] for n in ("residual", "x", "sublayer"))
        self.qkv, self.lse = arrays["qkv"], arrays["lse"]
        self.query = arrays["query"].reshape(heads)
        self.attended_rows = arrays["attended_rows"]
        self.attended = self.attended_rows.reshape(heads)
        self.gate_up, self.hidden = arrays["gate_up"], arrays["hidden"]
