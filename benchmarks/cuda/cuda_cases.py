"""The cases of the operators: shapes, memory, and the part of it that each call uses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from cuda_timing import Graph, Row, Timing, copy_roof, random_tensor, read_roof, timed

from codellama_rt.model.cuda import ops
from codellama_rt.model.cuda.quantize import FORMATS, quantize
from codellama_rt.model.cuda.tensor import empty, to_device
from codellama_rt.ops import Quantized, native

BLOCK_SIZE, HEAD_DIM = 64, 128
READ, COPY = "read roof", "copy roof"
Heads = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """The sizes to measure; SMOKE runs the same code in a moment."""

    heads: tuple[Heads, ...] = ((32, 32), (64, 8))
    lengths: tuple[int, ...] = (1024, 16_384, 100_000)
    batches: tuple[int, ...] = (1, 8, 32)
    prefill: tuple[int, ...] = (4096, 16_384)
    rope_tokens: tuple[int, ...] = (1, 4096)
    linear: tuple[int, int, int] = (4096, 12_288, 4096)  # k, n, tokens of a prefill step
    roof_bytes: int = 8 << 30
    rotated_bytes: int = 256 << 20  # several times the L2 cache, so no run finds its data cached
    most_bytes: int = 60 << 30
    most_copies: int = 64
    repeats: int = 20


FULL = Sizes()
SMOKE = Sizes(
    heads=((2, 2), (8, 1)),
    lengths=(100,),
    batches=(1, 2),
    prefill=(40,),
    rope_tokens=(1, 130),
    linear=(128, 64, 40),
    roof_bytes=1 << 14,
    rotated_bytes=1 << 16,
    repeats=2,
    most_copies=2,
)


def copies_of(num_bytes: float, sizes: Sizes) -> int:
    """Return how many buffers, used in turn, exceed the cache."""
    return int(min(max(1, -(-sizes.rotated_bytes // num_bytes)), sizes.most_copies))


def row(
    what: str, who: str, timing: Timing, amount: float, unit: str, roof: float = 0, of: str = ""
) -> Row:
    """Return a row; amount: bytes or FLOP per run; roof: the same per second, 0: unknown."""
    rate = amount / timing.us * 1e6
    share = rate / roof if roof else None
    return Row(what, who, timing.us, timing.p10, timing.p90, rate / 1e12, unit, share, of)


class DecodeCase:
    """The attention of a decoding step, over `copies` caches in turn."""

    def __init__(
        self,
        rng: np.random.Generator,
        heads: Heads,
        length: int,
        batch: int,
        cache_dtype: str,
        sizes: Sizes,
    ) -> None:
        """Allocate and fill the memory."""
        self.n_heads, self.n_kv_heads = heads
        self.length, self.batch, self.cache_dtype = length, batch, cache_dtype
        self.blocks = -(-length // BLOCK_SIZE)  # per sequence
        item = 2 if cache_dtype == "bfloat16" else 1 + 4 / HEAD_DIM
        self.kv_bytes = int(2 * batch * length * self.n_kv_heads * HEAD_DIM * item)
        self.copies = copies_of(self.kv_bytes, sizes)
        self.query = random_tensor(rng, (batch, self.n_heads, HEAD_DIM))
        self.out = (
            empty((batch, self.n_heads, HEAD_DIM), "bfloat16"),
            empty((batch, self.n_heads), "float32"),
        )
        shape = (self.blocks * batch, self.n_kv_heads, BLOCK_SIZE, HEAD_DIM)
        self.caches = [
            tuple(_cache(rng, shape, cache_dtype) for _ in range(2)) for _ in range(self.copies)
        ]
        self.table = rng.permutation(self.blocks * batch).astype(np.int32).reshape(batch, -1)
        self.on_device = to_device(self.table)
        self.lens = to_device(np.full(batch, length, np.int32))
        self.bounds = to_device(np.arange(batch + 1, dtype=np.int32))

    def run(self) -> None:
        """Run once over every copy."""
        for caches in self.caches:
            ops.paged_attention(
                self.query, *caches, self.on_device, self.lens, self.bounds, out=self.out
            )


def _cache(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> object:
    if dtype == "bfloat16":
        return random_tensor(rng, shape)
    payload = empty((int(np.prod(shape[:3])) * (HEAD_DIM + 4),), "uint8")
    native.cuda().fill_async(payload.device_ptr, 0x11, payload.nbytes)
    return Quantized(payload, dtype, shape)


def roof_rows(sizes: Sizes) -> list[Row]:
    """Measure the limits of the memory, of which later steps' rows are shares."""
    rates = {
        READ: read_roof(sizes.roof_bytes, sizes.repeats),
        COPY: copy_roof(sizes.roof_bytes, sizes.repeats),
    }
    rows = []
    for name, rate in rates.items():
        us = sizes.roof_bytes / rate * 1e6
        rows.append(Row(name, "device", us, us, us, rate / 1e12, "TB/s"))
    return rows


def rope_rows(rng: np.random.Generator, sizes: Sizes, roof: float) -> list[Row]:
    """Time rope_and_cache over buffers in turn, as a share of the copy bandwidth."""
    rows = []
    for tokens in sizes.rope_tokens:
        num_bytes = 2 * tokens * 96 * HEAD_DIM * 2
        copies = copies_of(num_bytes, sizes)
        cache = (-(-tokens // BLOCK_SIZE), 32, BLOCK_SIZE, HEAD_DIM)
        sets = [
            (
                random_tensor(rng, (tokens, 96 * HEAD_DIM)),
                empty(cache, "bfloat16"),
                empty(cache, "bfloat16"),
                empty((tokens, 32, HEAD_DIM), "bfloat16"),
            )
            for _ in range(copies)
        ]
        table = to_device(np.ones((tokens, HEAD_DIM // 2), np.float32))
        index = to_device(np.arange(tokens, dtype=np.int32))
        work = Graph(lambda s=sets, t=table, i=index: _rope_all(s, t, i))
        timing = timed({"ours": work}, sizes.repeats, copies)["ours"]
        what = f"rope_and_cache 32/32, {tokens} tokens, bf16"
        rows.append(row(what, "ours", timing, num_bytes, "TB/s", roof, COPY))
    return rows


def _rope_all(sets: list[tuple], table: object, index: object) -> None:
    for qkv, key_cache, value_cache, out in sets:
        ops.rope_and_cache(qkv, table, table, index, key_cache, value_cache, index, out=out)


def linear_rows(rng: np.random.Generator, sizes: Sizes, roof: float) -> list[Row]:
    """Time linear of one token (memory) and of a prefill step (arithmetic), by kind of weight."""
    k, n, tokens = sizes.linear
    rows = []
    for name in ("bf16", *FORMATS):
        weights = _weights(rng, name, n, k, sizes)
        num_bytes = _bytes_of(weights[0])
        x, out = random_tensor(rng, (1, k)), empty((1, n), "bfloat16")
        work = Graph(lambda w=weights, x=x, o=out: [ops.linear(x, one, out=o) for one in w])
        timing = timed({"ours": work}, sizes.repeats, len(weights))["ours"]
        what = f"linear 1 x {k} x {n}, {name}"
        rows.append(row(what, "ours", timing, num_bytes, "TB/s", roof, READ))
        x, out = random_tensor(rng, (tokens, k)), empty((tokens, n), "bfloat16")
        timing = timed(
            {"ours": lambda w=weights[0], x=x, o=out: ops.linear(x, w, out=o)}, sizes.repeats
        )["ours"]
        what = f"linear {tokens} x {k} x {n}, {name}"
        rows.append(row(what, "ours", timing, 2 * tokens * k * n, "TFLOP/s"))
    return rows


def _weights(rng: np.random.Generator, name: str, n: int, k: int, sizes: Sizes) -> list:
    if name == "bf16":
        return [random_tensor(rng, (n, k)) for _ in range(copies_of(2 * n * k, sizes))]
    rows = np.tile(quantize(rng.standard_normal((16, k), np.float32), name), (-(-n // 16), 1, 1))
    copies = copies_of(rows.nbytes, sizes)
    return [Quantized(to_device(rows), FORMATS[name], (n, k)) for _ in range(copies)]


def _bytes_of(weight: object) -> int:
    return weight.payload.nbytes if isinstance(weight, Quantized) else weight.nbytes
