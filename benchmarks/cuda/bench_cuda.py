"""Times the device's kernels beside the read roof of the same run, and peers where they are there.

    python benchmarks/cuda/bench_cuda.py

Every figure is the median of CUDA-event times of graph replays of buffers larger than the L2
cache. Peers (torch's SDPA, FlashAttention-3 in prefill) run in the same process on the same memory.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import numpy as np

from codellama_rt.cuda import device, ops
from codellama_rt.cuda.tensor import DeviceTensor, Memory, empty, to_device
from codellama_rt.ops import Quantized

WORKSPACE_BYTES = 64 << 20
REPEATS, WARM_UP = 30, 3
BLOCK_SIZE, HEAD_DIM = 64, 128
LENGTHS, BATCHES = (1024, 16_384, 100_000), (1, 8, 32)
HEADS = ((32, 32), (64, 8))
MOST_BYTES = 60e9
Row = tuple[str, float, str]  # what, microseconds, what that is of a limit


def timed(work: Callable[[], None]) -> float:
    """Median microseconds of one replay of a graph of `work`."""
    module = device.module()
    work()
    module.synchronize()
    module.begin_capture()
    work()
    graph = module.end_capture()
    times = [
        module.elapsed_ms(lambda: module.launch_graph(graph)) for _ in range(REPEATS + WARM_UP)
    ]
    module.destroy_graph(graph)
    return 1e3 * statistics.median(times[WARM_UP:])


def read_roof() -> float:
    """Bytes a second of a kernel that only reads, over 8 GB."""
    memory, out = Memory(8 << 30), empty((1,), "float32")
    module = device.module()
    module.fill_async(memory.pointer, 1, memory.num_bytes)
    us = timed(lambda: module.read_sum(memory.pointer, memory.num_bytes, out.device_ptr))
    return memory.num_bytes / us * 1e6


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...]) -> DeviceTensor:
    """bfloat16; large ones repeat a stretch of random numbers."""
    tensor, size = empty(shape, "bfloat16"), int(np.prod(shape))
    stretch = rng.standard_normal(min(size, 1 << 22), np.float32).view(np.uint32) >> 16
    source = to_device(stretch.astype(np.uint16).view(np.uint8))
    module = device.module()
    for begin in range(0, size * 2, source.nbytes):
        module.copy_async(
            tensor.device_ptr + begin, source.device_ptr, min(source.nbytes, size * 2 - begin)
        )
    module.synchronize()
    return tensor


class DecodeCase:
    """A decoding step's attention at one shape."""

    def __init__(self, rng, heads, length, batch, cache_dtype="bfloat16") -> None:
        n_heads, n_kv_heads = heads
        pages = -(-length // BLOCK_SIZE)
        shape = (pages * batch, n_kv_heads, BLOCK_SIZE, HEAD_DIM)
        item = 2 if cache_dtype == "bfloat16" else 1 + 4 / HEAD_DIM
        self.kv_bytes = 2 * batch * length * n_kv_heads * HEAD_DIM * item
        self.query = random_tensor(rng, (batch, n_heads, HEAD_DIM))
        self.out = empty((batch, n_heads, HEAD_DIM), "bfloat16"), empty((batch, n_heads), "float32")
        if cache_dtype == "bfloat16":
            self.caches = [random_tensor(rng, shape) for _ in range(2)]
        else:
            num_bytes = int(np.prod(shape[:3])) * (HEAD_DIM + 4)
            self.caches = []
            for _ in range(2):
                payload = empty((num_bytes,), "uint8")
                device.module().fill_async(payload.device_ptr, 0x11, num_bytes)
                self.caches.append(Quantized(payload, cache_dtype, shape))
        table = rng.permutation(pages * batch).astype(np.int32).reshape(batch, pages)
        self.tables = to_device(table)
        self.lens = to_device(np.full(batch, length, np.int32))
        self.bounds = to_device(np.arange(batch + 1, dtype=np.int32))

    def run(self) -> None:
        ops.paged_attention(
            self.query, *self.caches, self.tables, self.lens, self.bounds, out=self.out
        )


def decode_rows(rng: np.random.Generator, roof: float) -> list[Row]:
    """paged_attention at every shape that fits, as a share of the read roof."""
    rows = []
    for heads in HEADS:
        for length in LENGTHS:
            for batch in BATCHES:
                if 4 * batch * length * heads[1] * HEAD_DIM > MOST_BYTES:
                    continue
                for cache_dtype in ("bfloat16", "fp8", "int8"):
                    case = DecodeCase(rng, heads, length, batch, cache_dtype)
                    us = timed(case.run)
                    name = f"decode {heads[0]}/{heads[1]} batch {batch} at {length} {cache_dtype}"
                    rows.append((name, us, f"{case.kv_bytes / us * 1e6 / roof:.0%} of read roof"))
    return rows


def prefill_rows(rng: np.random.Generator) -> list[Row]:
    """flash_attention, causal, 32 heads, and torch's SDPA where torch is."""
    rows = []
    for length in (4096, 16_384):
        tensors = [random_tensor(rng, (length, 32, HEAD_DIM)) for _ in range(3)]
        out = empty((length, 32, HEAD_DIM), "bfloat16"), empty((length, 32), "float32")
        bounds = to_device(np.array([0, length], np.int32))
        us = timed(lambda t=tensors, b=bounds, o=out: ops.flash_attention(*t, b, b, out=o))
        flops = 2 * length * length * 32 * HEAD_DIM
        rows.append((f"prefill 32 heads {length}", us, f"{flops / us / 1e6:.0f} TFLOP/s"))
        rows += [(f"{name} {length}", us, f"{flops / us / 1e6:.0f} TFLOP/s")
                 for name, us in torch_prefill(tensors)]  # fmt: skip
    return rows


def torch_prefill(tensors: list[DeviceTensor]) -> list[tuple[str, float]]:
    """Peers on the very same memory, through DLPack."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return []
    stream = torch.cuda.ExternalStream(device.module().stream())
    query, key, value = (torch.from_dlpack(t).transpose(0, 1)[None] for t in tensors)
    results = []
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        try:
            with torch.cuda.stream(stream), sdpa_kernel(getattr(SDPBackend, name)):
                us = torch_timed(
                    lambda: torch.nn.functional.scaled_dot_product_attention(
                        query, key, value, is_causal=True
                    )
                )
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        results.append((f"  torch {name.lower()}", us))
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        return results
    with torch.cuda.stream(stream):
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        us = torch_timed(lambda: flash_attn_func(query, key, value, causal=True))
    return [*results, ("  FlashAttention-3", us)]


def torch_timed(work: Callable[[], object]) -> float:
    """Median microseconds by the same events."""
    module = device.module()
    times = [module.elapsed_ms(lambda: work() and None) for _ in range(REPEATS + WARM_UP)]
    return 1e3 * statistics.median(times[WARM_UP:])


def small_rows(rng: np.random.Generator, roof: float) -> list[Row]:
    """rope_and_cache at 1 and 4,096 tokens; linear of one token."""
    rows = []
    for tokens in (1, 4096):
        qkv = random_tensor(rng, (tokens, 96 * HEAD_DIM))
        caches = [empty((tokens // 64 + 1, 32, 64, HEAD_DIM), "bfloat16") for _ in range(2)]
        table = to_device(np.ones((tokens, HEAD_DIM // 2), np.float32))
        index = to_device(np.arange(tokens, dtype=np.int32))
        out = empty((tokens, 32, HEAD_DIM), "bfloat16")
        us = timed(
            lambda q=qkv, t=table, i=index, c=caches, o=out: ops.rope_and_cache(
                q, t, t, i, *c, i, out=o
            )
        )
        share = 2 * qkv.nbytes / us * 1e6 / roof
        rows.append((f"rope_and_cache {tokens} tokens", us, f"{share:.0%} of read roof"))
    weights = [random_tensor(rng, (12_288, 4096)) for _ in range(4)]  # 400 MB: more than the L2
    x, out = random_tensor(rng, (1, 4096)), empty((1, 12_288), "bfloat16")

    def four() -> None:
        for weight in weights:
            ops.linear(x, weight, out=out)

    us = timed(four) / 4
    share = weights[0].nbytes / us * 1e6 / roof
    rows.append(("linear 1 x 4096 x 12288", us, f"{share:.0%} of read roof"))
    many, result = random_tensor(rng, (4096, 4096)), empty((4096, 12_288), "bfloat16")
    us = timed(lambda: ops.linear(many, weights[0], out=result))
    flops = 2 * 4096 * 4096 * 12_288
    rows.append(("linear 4096 x 4096 x 12288", us, f"{flops / us / 1e6:.0f} TFLOP/s"))
    return rows


def main() -> None:
    """Measure and print."""
    usable, text = device.available()
    if not usable:
        sys.exit(f"bench_cuda: {text}")
    module = device.module()
    stream, workspace = module.create_stream(), Memory(WORKSPACE_BYTES)
    ops.set_stream(stream)
    module.set_workspace(workspace.pointer, WORKSPACE_BYTES)
    rng = np.random.default_rng(0)
    roof = read_roof()
    print(f"{text}; read roof {roof / 1e12:.2f} TB/s\n")
    print("| what | median us | of a limit |\n| --- | --- | --- |")
    for part in (small_rows(rng, roof), prefill_rows(rng), decode_rows(rng, roof)):
        for name, us, share in part:
            print(f"| {name} | {us:.1f} | {share} |")


if __name__ == "__main__":
    main()
