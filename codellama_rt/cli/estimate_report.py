"""`codellama-rt estimate`: the figures of `estimate` for every way to hold a model, for people."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, replace
from typing import Any

from codellama_rt.checkpoint.open import Opened
from codellama_rt.checkpoint.quantize import QUANTIZATIONS
from codellama_rt.errors import CheckpointError
from codellama_rt.llm.memory_plan import Estimate, estimate, kv_bytes, with_kv_dtype
from codellama_rt.llm.plan import Plan
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
    opened: Opened,
    plan: Plan,
    *,
    context: int,
    num_seqs: int,
    available: int,
    bandwidth: float,
) -> list[Way]:
    """Return what was asked for, then what else there is.

    Args:
        opened: the model.
        plan: what was asked for.
        context: tokens per sequence.
        num_seqs: sequences at a time.
        available: bytes of memory that may be taken.
        bandwidth: bytes per second that this machine reads.
    """

    def way(plan: Plan) -> Way:
        figures = estimate(opened, plan, context=context, num_seqs=num_seqs)
        speeds = {
            length: figures.tokens_per_s(
                bandwidth, kv_bytes(opened.config, plan, length, num_seqs), num_seqs
            )
            for length in SPEED_CONTEXTS
        }
        stored = "as stored" if plan.dtype == "auto" else plan.dtype
        name = plan.quantization or opened.quantization or stored
        return Way(name, plan.kv_dtype, figures, figures.fits(available), speeds)

    asked = with_kv_dtype(opened, plan)
    others = [
        replace(asked, quantization=quantization, kv_dtype=kv_dtype)
        for quantization in (None, *QUANTIZATIONS)
        for kv_dtype in (opened.float_dtype(plan.dtype), *CACHE_DTYPES)
    ]
    ways = [way(asked)]
    for other in others:
        # Heads that int4 cannot hold, or weights that are quantised otherwise already.
        with contextlib.suppress(ValueError, CheckpointError):
            if other != asked:
                ways.append(way(other))
    return ways


def as_json(ways: list[Way], available: int, bandwidth: float) -> dict[str, Any]:
    """Return the figures for programs, in bytes."""
    return {
        "available_bytes": available,
        "read_bandwidth": bandwidth,
        "ways": [dataclasses.asdict(way) | {"peak_bytes": way.figures.peak} for way in ways],
    }


def render(ways: list[Way], context: int, num_seqs: int, available: int, bandwidth: float) -> str:
    """Return the table: the first way in full, then a line per way."""
    first, figures = ways[0], ways[0].figures
    parts = {
        "weights": figures.weights,
        "KV cache": figures.kv,
        "activations": figures.activations,
        "tokenizer": figures.tokenizer + figures.decoder,
        "interpreter": figures.interpreter,
        "peak": figures.peak,
    }
    if figures.made:
        parts["while loading"] = figures.interpreter + figures.decoder + figures.loading
    sequences = "sequence" if num_seqs == 1 else "sequences"
    contexts = ", ".join(f"{n:,}" for n in SPEED_CONTEXTS)
    return "\n".join(
        [
            f"{num_seqs} {sequences} of {context} tokens, weights {first.weights}, "
            f"KV cache {first.kv_dtype}",
            *(f"  {name:<13}{size / 1e9:>8.2f} GB" for name, size in parts.items()),
            "",
            f"{available / 1e9:.1f} GB are available; read at {bandwidth / 1e9:.1f} GB/s, which "
            "allows at most",
            "",
            f"weights    KV cache   weights       KV     peak  fits   tokens/s at {contexts}",
            *map(_row, ways),
        ]
    )


def _row(way: Way) -> str:
    figures = way.figures
    speeds = "".join(f"{speed:>9.1f}" for speed in way.tokens_per_s.values())
    sizes = "".join(f"{size / 1e9:>9.2f}" for size in (figures.weights, figures.kv, figures.peak))
    return f"{way.weights:<11}{way.kv_dtype:<9}{sizes}  {'yes' if way.fits else 'no':<4}{speeds}"
