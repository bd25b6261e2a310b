"""A model of Code Llama 7B's shape with random weights: steps and prefill against their limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from cuda_timing import Row, Timing, random_tensor, repeat, summary

from codellama_rt.engine.batching import build_batch
from codellama_rt.engine.sequence import Chunk, Sequence, int32_list
from codellama_rt.model.batch import Batch
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.cuda.kv_cache import DeviceKVCache
from codellama_rt.model.cuda.llama import DeviceLlama, workspace_bytes
from codellama_rt.model.cuda.quantize import FORMATS, quantize
from codellama_rt.model.cuda.tensor import empty
from codellama_rt.model.cuda.weights import DeviceLayer, DeviceWeights, Weight
from codellama_rt.ops import Quantized

BLOCK_SIZE = 64
CONFIG_7B = ModelConfig(
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    head_dim=128,
    dim=4096,
    hidden_dim=11_008,
    vocab_size=32_016,
    rope_theta=1e6,
)
CONFIG_SMOKE = ModelConfig(
    n_layers=2, n_heads=2, n_kv_heads=2, head_dim=128, dim=256, hidden_dim=128, vocab_size=64
)


@dataclass(frozen=True)
class ModelCase:
    """What is timed, and the milliseconds that its bytes take at 4.3 TB/s (one H200).

    Attributes:
        floors: context -> ms per token; 13.21 GB of weights (int8: 6.74) and 512 KiB of cache per
            token (fp8: 256).
        prefill: tokens of a prompt; its minimum is 0.27 s of products at 790 TFLOP/s and 0.11 s
            of attention at 620.
    """

    config: ModelConfig
    quantization: str | None
    kv_dtype: str
    floors: dict[int, float]
    prefill: int
    prefill_floor_ms: float
    chunk: int = 4096
    repeats: int = 20


CASES = {
    "model-bf16": ModelCase(
        CONFIG_7B, None, "bfloat16", {1024: 3.20, 16_384: 5.07, 100_000: 15.27}, 16_384, 380.0
    ),
    "model-int8-fp8": ModelCase(
        CONFIG_7B, "int8", "fp8", {1024: 1.63, 16_384: 2.57, 100_000: 7.66}, 16_384, 380.0
    ),
}
SMOKE_CASES = {
    "model-bf16": ModelCase(CONFIG_SMOKE, None, "bfloat16", {70: 1.0}, 50, 1.0, 40, 2),
    "model-int8-fp8": ModelCase(CONFIG_SMOKE, "int8", "fp8", {70: 1.0}, 50, 1.0, 40, 2),
}


def model_rows(case: ModelCase, out_of_time: Callable[[], bool]) -> list[Row]:
    """Time a decoding step at each context, batch 1, and the prefill of a prompt."""
    model, cache = build(case)
    rows = []
    for length, floor_ms in case.floors.items():
        if out_of_time():
            print(f"no time for the step at {length}", flush=True)
            continue
        batch = chunk_batch(cache, length - 1, length)
        timing = _timed(lambda b=batch: model.forward(b, cache), case.repeats)
        rows.append(_row(case, f"step at {length}", timing, floor_ms, 1))
    if not out_of_time():
        starts = range(0, case.prefill, case.chunk)
        batches = [chunk_batch(cache, n, min(n + case.chunk, case.prefill)) for n in starts]
        timing = _timed(lambda: [model.forward(batch, cache) for batch in batches], 2)
        what = f"prefill of {case.prefill}"
        rows.append(_row(case, what, timing, case.prefill_floor_ms, case.prefill))
    return rows


def _row(case: ModelCase, what: str, timing: Timing, floor_ms: float, tokens: int) -> Row:
    name = f"7B {case.quantization or 'bf16'}/{case.kv_dtype}, {what}"
    return Row(
        name,
        "ours",
        timing.us,
        timing.p10,
        timing.p90,
        tokens / timing.us * 1e6,
        "token/s",
        1e3 * floor_ms / timing.us,
        "floor at 4.3 TB/s" if tokens == 1 else "floor of arithmetic",
    )


def _timed(work: Callable[[], object], repeats: int) -> Timing:
    """Time with the caller's clock: inputs, copies, graph and logits, as in generation."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        work()
        times.append(1e6 * (time.perf_counter() - begin))
    return summary(times[2:])


def chunk_batch(cache: DeviceKVCache, start: int, stop: int) -> Batch:
    """Return tokens [start, stop) of one sequence; earlier tokens are in the cache (arbitrary)."""
    sequence = Sequence(int32_list([1] * stop), stop, (0, 0, 0), first_logit=stop - 1)
    blocks = np.random.default_rng(0).permutation(cache.num_blocks)[: -(-stop // BLOCK_SIZE)]
    sequence.block_ids = int32_list(blocks.tolist())
    return build_batch([Chunk(sequence, start, stop, 1)], BLOCK_SIZE)


def build(case: ModelCase) -> tuple[DeviceLlama, DeviceKVCache]:
    """Return random weights, and a cache with contents."""
    config, rng = case.config, np.random.default_rng(0)
    model = DeviceLlama(config, random_weights(rng, config, case.quantization))
    num_blocks = -(-max(*case.floors, case.prefill) // BLOCK_SIZE)
    cache = DeviceKVCache(config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=case.kv_dtype)
    model.lend_workspace(workspace_bytes(config, num_blocks * BLOCK_SIZE, 1))
    for layer in cache.layers:
        for part in layer:
            tensor = part.payload if isinstance(part, Quantized) else part
            stretch = rng.integers(0x30, 0x3F, 1 << 16, np.uint8)  # small numbers in any dtype
            repeat(tensor.device_ptr, tensor.nbytes, stretch)
    return model, cache


def random_weights(
    rng: np.random.Generator, config: ModelConfig, quantization: str | None
) -> DeviceWeights:
    """Return weights of the config's shapes; embedding and head are always bfloat16."""
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def put(n: int, k: int) -> Weight:
        if quantization is None:
            return random_tensor(rng, (n, k))
        tile = quantize(rng.standard_normal((16, k), np.float32), quantization)
        payload = empty((-(-n // 16), *tile.shape[1:]), "uint8")
        repeat(payload.device_ptr, payload.nbytes, tile)
        return Quantized(payload, FORMATS[quantization], (n, k))

    layers = tuple(
        DeviceLayer(
            attention_norm=random_tensor(rng, (config.dim,)),
            qkv_proj=(put(q_dim, config.dim), put(kv_dim, config.dim), put(kv_dim, config.dim)),
            o_proj=put(config.dim, q_dim),
            mlp_norm=random_tensor(rng, (config.dim,)),
            gate_up_proj=(put(config.hidden_dim, config.dim), put(config.hidden_dim, config.dim)),
            down_proj=put(config.dim, config.hidden_dim),
        )
        for _ in range(config.n_layers)
    )
    return DeviceWeights(
        dtype="bfloat16",
        embedding=random_tensor(rng, (config.vocab_size, config.dim)),
        layers=layers,
        norm=random_tensor(rng, (config.dim,)),
        lm_head=random_tensor(rng, (config.vocab_size, config.dim)),
    )
