"""Bytes that generation has to read: what a step's time is measured against."""

from __future__ import annotations

from codellama_rt.checkpoint import LlamaWeights


def weight_bytes(weights: LlamaWeights) -> int:
    """Bytes of weights that every step reads: all but the embedding, of which it takes few rows.

    Args:
        weights: of the model; a tied embedding is read whole, as the head.
    """
    layers = sum(array.nbytes for layer in weights.layers for array in vars(layer).values())
    return layers + weights.norm.nbytes + weights.lm_head.nbytes
