"""`codellama-rt estimate`: the figures of `estimate` for every way to hold a model, for people."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

from codellama_rt.checkpoint.quantize import QUANTIZATIONS
from codellama_rt.checkpoint.stored_tensor import StoredModel
from codellama_rt.errors import CheckpointError
from codellama_rt.llm.memory_plan import Estimate, estimate, float_dtype, kv_bytes
from codellama_rt.ops.quantized import CACHE_DTYPES

SPEED_CONTEXTS = (1024, 16384, 100_000)


@dataclass(frozen=True)
class Way:
    """One way to hold the model, and what it takes.

    Attributes:
        weights: dtype or quantisation.
        kv_dtype: of the cache.
        figures: in bytes.
        fits: whether the available memory is enough for `LLM` to open it.
        tokens_per_s: at most, by context: what the measured bandwidth allows.
    """

    weights: str
    kv_dtype: str
    figures: Estimate
    fits: bool
    tokens_per_s: dict[int, float]


def compare(
    stored: StoredModel, *, context: int, num_seqs: int, dtype: str, quantization: str | None,
    kv_dtype: str, available: int, bandwidth: float,
) -> list[Way]:  # fmt: skip
    """What was asked for, then what else there is.

    Args:
        stored: the model.
        context: tokens a sequence.
        num_seqs: sequences at a time.
        dtype: of the weights, as in `LLM`.
        quantization: of the weights, as in `LLM`.
        kv_dtype: as in `LLM`.
        available: bytes of memory that may be taken.
        bandwidth: bytes a second that this machine reads.
    """
    asked = (quantization, float_dtype(stored, dtype) if kv_dtype == "auto" else kv_dtype)
    others = [
        (other, cache)
        for other in (None, *QUANTIZATIONS)
        for cache in (float_dtype(stored, dtype), *CACHE_DTYPES)
    ]
    ways = [_way(stored, *asked, context, num_seqs, dtype, available, bandwidth)]
    for pair in others:
        # Heads that int4 cannot hold, or weights that are quantised otherwise already.
        with contextlib.suppress(ValueError, CheckpointError):
            if pair != asked:
                ways.append(_way(stored, *pair, context, num_seqs, dtype, available, bandwidth))
    return ways


def _way(
    stored: StoredModel, quantization: str | None, kv_dtype: str, context: int, num_seqs: int,
    dtype: str, available: int, bandwidth: float,
) -> Way:  # fmt: skip
    figures = estimate(
        stored, context=context, num_seqs=num_seqs, dtype=dtype, quantization=quantization,
        kv_dtype=kv_dtype,
    )  # fmt: skip
    speeds = {
        length: figures.tokens_per_s(
            bandwidth, kv_bytes(stored.config, kv_dtype, length, num_seqs), num_seqs
        )
        for length in SPEED_CONTEXTS
    }
    name = quantization or stored.quantization or (dtype if dtype != "auto" else "as stored")
    return Way(name, kv_dtype, figures, figures.fits(available), speeds)


def as_json(ways: list[Way], available: int, bandwidth: float) -> dict[str, Any]:
    """The same for programs, in bytes."""
    return {
        "available_bytes": available, "read_bandwidth": bandwidth,
        "ways": [
            dataclasses.asdict(way) | {"peak_bytes": way.figures.peak} for way in ways
        ],
    }  # fmt: skip


def render(ways: list[Way], context: int, num_seqs: int, available: int, bandwidth: float) -> str:
    """The table: the first way in full, then all of them a line each."""
    figures = ways[0].figures
    parts = {
        "weights": figures.weights, "KV cache": figures.kv, "activations": figures.activations,
        "tokenizer": figures.tokenizer + figures.decoder, "interpreter": figures.interpreter,
        "peak": figures.peak,
    }  # fmt: skip
    sequences = "sequence" if num_seqs == 1 else "sequences"
    lines = [f"{num_seqs} {sequences} of {context} tokens, weights {ways[0].weights}, "
             f"KV cache {ways[0].kv_dtype}"]  # fmt: skip
    lines += [f"  {name:<12}{size / 1e9:>9.2f} GB" for name, size in parts.items()]
    loading = figures.interpreter + figures.decoder + figures.loading
    if figures.made:
        lines.append(f"  {'while loading':<13}{loading / 1e9:>8.2f} GB")
    lines += [
        "", f"{available / 1e9:.1f} GB are available; read at {bandwidth / 1e9:.1f} GB/s, which "
        "allows at most", "", "weights    KV cache   weights       KV     peak  fits   "
        "tokens/s at " + ", ".join(f"{n:,}" for n in SPEED_CONTEXTS),
    ]  # fmt: skip
    for way in ways:
        f = way.figures
        speeds = "".join(f"{speed:>9.1f}" for speed in way.tokens_per_s.values())
        lines.append(
            f"{way.weights:<11}{way.kv_dtype:<9}{f.weights / 1e9:>9.2f}{f.kv / 1e9:>9.2f}"
            f"{f.peak / 1e9:>9.2f}  {'yes' if way.fits else 'no':<4}{speeds}"
        )
    return "\n".join(lines)
