"""Quantised weights and caches as graph ops: the direct calls' bits, in any size."""

import numpy as np
import pytest
from helpers.arguments import call, make_arguments, results
from helpers.builders import normal, quantized_weight
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops import Quantized
from codellama_rt.ops.quantized import (
    CACHE_DTYPES,
    GGUF_BLOCKS,
    OWN_WEIGHT_DTYPES,
    WEIGHT_DTYPES,
    empty_caches,
)
from codellama_rt.ops.schema import OPS

mindspore = pytest.importorskip("mindspore", reason="MindSpore is not installed")
graph = ops.graph
MODES = pytest.mark.parametrize("mode", ["pynative", "jit"])
CACHE_OPS = ("reshape_and_cache", "rope_and_cache", "paged_attention", "copy_blocks")
SIZES = {"head_dim": 32, "dim": 64, "hidden_dim": 96}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """MindSpore writes a report into the current folder when a graph can't be compiled."""
    monkeypatch.chdir(tmp_path)


class Compiled(mindspore.nn.Cell):
    """An op as a graph over payloads, their formats being constants."""

    def __init__(self, name, formats):
        super().__init__()
        self.run, self.formats = getattr(graph, name), formats

    @mindspore.jit
    def construct(self, *tensors):
        given = []
        for i in range(len(self.formats)):
            if self.formats[i] is None:
                given.append(tensors[i])
            else:
                given.append((tensors[i], self.formats[i][0], self.formats[i][1]))
        return self.run(*given)


def memory_of(array):
    return array.payload if isinstance(array, Quantized) else array


def as_tensor(array):
    if isinstance(array, Quantized):
        payload = mindspore.Tensor.from_numpy(array.payload)
        return Quantized(payload, array.dtype, array.shape)
    return mindspore.Tensor.from_numpy(array)


def formats_of(arrays):
    return tuple((a.dtype, tuple(a.shape)) if isinstance(a, Quantized) else None for a in arrays)


def runner(name, arrays, mode):
    """Takes arrays; of a graph, with all sizes of floats and blocks unknown."""
    if mode == "pynative":
        return lambda arrays: getattr(graph, name)(*map(as_tensor, arrays))
    cell = Compiled(name, formats_of(arrays))
    unknown = [
        mindspore.Tensor(shape=[None] * memory_of(a).ndim,
                         dtype=mindspore.Tensor.from_numpy(memory_of(a)).dtype)
        for a in arrays
    ]  # fmt: skip
    cell.set_inputs(*unknown)
    return lambda arrays: cell(*[mindspore.Tensor.from_numpy(memory_of(a)) for a in arrays])


def assert_same_as_direct(op, run, arrays):
    direct, registered = ({n: a.copy() for n, a in arrays.items()} for _ in range(2))
    expected = results(op, call(op, direct, give_out=False))
    returned = run([registered[name] for name in op.inputs])
    made = list(returned) if isinstance(returned, tuple) else [returned]
    made = [tensor.asnumpy() for tensor in made]  # PyNative is asynchronous
    for ours, theirs in zip(made, expected, strict=False):
        assert_equal_bits(ours, theirs)
    for name in op.written:
        assert_equal_bits(memory_of(registered[name]), memory_of(direct[name]))


def with_caches(op, arrays, dtype, sizes):
    """The blocks hold rows that were written by the op that writes them."""
    arrays = dict(arrays)
    shape = arrays["key_cache"].shape
    caches = empty_caches(dtype, shape)
    rng = np.random.default_rng(3)
    tokens = shape[0] * shape[2]
    key, value = normal(rng, (2, tokens, shape[1], shape[3]))
    ops.reshape_and_cache(key, value, *caches, np.arange(tokens, dtype=np.int32))
    arrays["key_cache"], arrays["value_cache"] = caches
    return arrays


@MODES
@pytest.mark.parametrize("dtype", [*OWN_WEIGHT_DTYPES, *GGUF_BLOCKS, "q4_1_tiled", "q6_k_tiled"])
@pytest.mark.parametrize("rows", [(40,), (16, 9), (7, 32, 5)])
def test_linear(rng, dtype, rows, mode):
    weights = tuple(quantized_weight(rng, (n, 256), dtype) for n in rows)
    payloads = [mindspore.Tensor.from_numpy(w.payload) for w in weights]

    @mindspore.jit(dynamic=1)
    def compiled(x, *payloads):
        given = []
        for i in range(len(rows)):
            given.append((payloads[i], dtype, (rows[i], 256)))
        return graph.linear(x, tuple(given))

    for num_tokens in (1, 7, 30):
        x = normal(rng, (num_tokens, 256))
        if mode == "jit":
            made = compiled(mindspore.Tensor(x), *payloads)
        else:
            made = graph.linear(mindspore.Tensor(x), tuple(map(as_tensor, weights)))
        assert_equal_bits(made.asnumpy(), ops.linear(x, weights))


@MODES
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_embedding(rng, dtype, mode):
    op, table = OPS["embedding"], quantized_weight(rng, (11, 256), dtype)
    token_ids = np.array([3, 10, 0, 3], np.int32)
    run = runner("embedding", [token_ids, table], mode)
    for count in (4, 1):
        assert_same_as_direct(op, run, {"token_ids": token_ids[:count], "table": table})


@MODES
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("name", CACHE_OPS)
def test_caches(name, dtype, mode):
    """Blocks of other numbers and sizes need no new graph."""
    op, run = OPS[name], None
    for changes in ({}, {"num_tokens": 17, "num_blocks": 9}, {"block_size": 32}):
        sizes = SIZES | changes
        arrays = with_caches(op, make_arguments(op, sizes), dtype, sizes)
        run = run or runner(name, [arrays[n] for n in op.inputs], mode)
        assert_same_as_direct(op, run, arrays)


@MODES
@pytest.mark.parametrize("cache_dtype", ["float32", *CACHE_DTYPES])
@pytest.mark.parametrize("dtype", ["float32", "int8", "int4", "q8_0"])
def test_decoder_layer(rng, dtype, cache_dtype, mode):
    op = OPS["decoder_layer"]
    arrays = make_arguments(op, SIZES)
    if cache_dtype != "float32":
        arrays = with_caches(op, arrays, cache_dtype, SIZES)
    if dtype != "float32":
        for name in [n for n in op.inputs if n.endswith("_proj")]:
            arrays[name] = quantized_weight(rng, arrays[name].shape, dtype)
    run = runner("decoder_layer", [arrays[n] for n in op.inputs], mode)
    assert_same_as_direct(op, run, arrays)


@MODES
def test_a_payload_of_another_size(rng, mode):
    weight = quantized_weight(rng, (16, 64), "int8")
    short = Quantized(weight.payload[:-1].copy(), "int8", (16, 64))
    x = np.ones((1, 64), np.float32)
    run = runner("linear", [x, short], mode)
    with pytest.raises(RuntimeError, match=r"linear: weight int8 \(16, 64\) must hold 1056 bytes"):
        run([x, short]).asnumpy()


@MODES
def test_weights_of_two_formats(rng, mode):
    a, b = (quantized_weight(rng, (16, 64), dtype) for dtype in ("int8", "int4"))
    x = mindspore.Tensor(np.ones((1, 64), np.float32))

    @mindspore.jit
    def compiled(x, a, b):
        return graph.linear(x, ((a, "int8", (16, 64)), (b, "int4", (16, 64))))

    def direct(x, a, b):
        return graph.linear(x, (Quantized(a, "int8", (16, 64)), Quantized(b, "int4", (16, 64))))

    run = compiled if mode == "jit" else direct
    with pytest.raises(TypeError, match="linear: weight_2 must be int8"):
        run(x, as_tensor(a).payload, as_tensor(b).payload)


def test_a_format_that_is_none():
    x, payload = (mindspore.Tensor(np.ones((1, 64), t)) for t in (np.float32, np.uint8))
    with pytest.raises(TypeError, match=r"linear: weight must be int8 or int4 or .*, got iq4_xs"):
        graph.linear(x, Quantized(payload, "iq4_xs", (1, 64)))
