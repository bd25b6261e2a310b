"""How a model is to be held and run: what is decided before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The options of `LLM` that shape weights, cache and steps; first as asked, then settled.

    Attributes:
        device: "cpu", "cuda" or "ascend".
        dtype: of the weights, "auto" as stored.
        quantization: of the weights, None as stored.
        repack: copy GGUF's blocks into the order of the CPU's kernels, and a small model's weights
            into huge pages.
        kv_dtype: of the KV cache; "auto" until it is settled.
        block_size: tokens per block of the KV cache.
        num_blocks: of the KV cache; None until it is settled, and on "cuda", whose memory is asked
            when the weights are in it.
        max_model_len: tokens of one sequence that must fit; None: none in particular.
        max_num_seqs: sequences at a time.
        max_num_batched_tokens: tokens in one step.
        kv_memory: bytes or a str like "8GB" for the KV cache; None: what the memory allows.
        attention: "custom", or on Ascend "vendor".
        runtime: "direct" calls of the kernels, or on the CPU a MindSpore "graph" of them.
    """

    device: str = "cpu"
    dtype: str = "auto"
    quantization: str | None = None
    repack: bool = True
    kv_dtype: str = "auto"
    block_size: int = 64
    num_blocks: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_memory: int | str | None = None
    attention: str = "custom"
    runtime: str = "direct"

    @property
    def repacks(self) -> bool:
        """Whether weights are copied for the CPU's kernels: other devices copy them anyway."""
        return self.repack and self.device == "cpu"
