"""Weights in GGUF's formats as the kernels read them: the bytes, and the bits computed of them."""

import numpy as np
import pytest
from helpers.builders import int32, normal, quantized_weight
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops import Quantized, reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.ops.quantized import GGUF_BLOCKS, TILED, weight_num_bytes

EVERY_FORMAT = pytest.mark.parametrize("dtype", GGUF_BLOCKS)
ROWS = (*range(1, 18), 100)


@EVERY_FORMAT
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
@pytest.mark.usefixtures("isa")
def test_bytes(rng, dtype, rows):
    weight = quantized_weight(rng, (rows, 768), dtype)
    tiles, expected = ops.repack(weight), reference.repack(weight)
    assert (tiles.dtype, tiles.shape) == (dtype + TILED, (rows, 768))
    assert_equal_bits(tiles.payload, expected.payload)
    assert_equal_bits(reference.dequantize(tiles), reference.dequantize(weight))


@EVERY_FORMAT
def test_as_many_bytes_as_blocks(dtype):
    assert weight_num_bytes(dtype + TILED, (64, 512)) == weight_num_bytes(dtype, (64, 512))
    assert weight_num_bytes(dtype + TILED, (49, 512)) == weight_num_bytes(dtype, (64, 512))


@EVERY_FORMAT
@pytest.mark.usefixtures("isa")
def test_linear_has_the_bits_of_blocks(rng, guarded, dtype):
    x = normal(rng, (100, 512))
    for rows in ROWS:
        weight = quantized_weight(rng, (rows, 512), dtype)
        tiles = ops.repack(weight)
        for num_tokens in (1, 2, 7, 19, 100):
            out = ops.linear(x[:num_tokens], tiles, out=guarded((num_tokens, rows)))
            assert_equal_bits(out, ops.linear(x[:num_tokens], weight))


@EVERY_FORMAT
def test_linear_over_several_weights_and_long_rows(rng, dtype):
    k = 2304
    weights = [quantized_weight(rng, (rows, k), dtype) for rows in (33, 7, 48)]
    tiles = [ops.repack(weight) for weight in weights]
    for num_tokens in (1, 5, 40, 600):
        x = normal(rng, (num_tokens, k), "bfloat16")
        assert_equal_bits(ops.linear(x, tiles), ops.linear(x, weights))


@EVERY_FORMAT
def test_bits_do_not_depend_on_threads(rng, threads, dtype):
    tiles, x = ops.repack(quantized_weight(rng, (300, 512), dtype)), normal(rng, (40, 512))
    expected = ops.linear(x, tiles)
    for num_threads in (1, 2, 3):
        threads(num_threads)
        assert_equal_bits(ops.linear(x, tiles), expected)
        assert_equal_bits(ops.linear(x[:1], tiles), expected[:1])


@EVERY_FORMAT
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
@pytest.mark.usefixtures("isa")
def test_embedding_has_the_bits_of_blocks(rng, guarded, dtype, out_dtype):
    table = quantized_weight(rng, (50, 1536), dtype)
    token_ids = int32([49, *rng.integers(0, 50, 20), 0])
    out = guarded((len(token_ids), 1536), out_dtype)
    expected = ops.embedding(token_ids, table, out=np.empty_like(out))
    assert_equal_bits(ops.embedding(token_ids, ops.repack(table), out=out), expected)


@EVERY_FORMAT
@pytest.mark.usefixtures("isa")
def test_what_is_not_finite(rng, dtype):
    tiles, x = ops.repack(quantized_weight(rng, (40, 512), dtype)), normal(rng, (20, 512))
    x[3, 511] = x[11, 0] = np.nan
    is_nan = np.isnan(ops.linear(x, tiles))
    assert is_nan[[3, 11]].all()
    assert is_nan.sum() == 80


@EVERY_FORMAT
def test_no_rows_and_no_columns(dtype):
    for shape in ((0, 512), (40, 0)):
        weight = Quantized(np.zeros(weight_num_bytes(dtype, shape), np.uint8), dtype, shape)
        assert ops.repack(weight).nbytes == 0


def test_rejected_weights(rng):
    with pytest.raises(TypeError, match=r"repack: weight must be a Quantized, got ndarray"):
        ops.repack(np.zeros((16, 32), np.float32))
    with pytest.raises(ValueError, match=r"repack: weight must be in one of q4_0, .* got 'int8'"):
        ops.repack(quantized_weight(rng, (16, 64), "int8"))
    with pytest.raises(ValueError, match=r"repack: weight must be in one of .* got 'q4_0_tiled'"):
        ops.repack(quantized_weight(rng, (16, 64), "q4_0_tiled"))
    short = Quantized(np.zeros(17, np.uint8), "q4_0", (1, 32))
    with pytest.raises(ValueError, match=r"repack: weight q4_0 \(1, 32\) must hold 18 bytes, got"):
        ops.repack(short)
    with pytest.raises(
        ValueError, match=r"repack: weight in q4_k must have in_features a multiple"
    ):
        ops.repack(Quantized(np.zeros(144, np.uint8), "q4_k", (1, 288)))
    with pytest.raises(ValueError, match=r"repack: weight q4_0 .* must hold \d+ bytes, got 18"):
        ops.repack(Quantized(np.zeros(18, np.uint8), "q4_0", (2**31, 2**17)))


def test_tiles_of_another_size(rng):
    tiles = quantized_weight(rng, (17, 64), "q5_1_tiled")
    short = Quantized(tiles.payload[:-1], tiles.dtype, tiles.shape)
    with pytest.raises(
        ValueError, match=r"linear: weight q5_1_tiled \(17, 64\) must hold 1536 bytes"
    ):
        ops.linear(np.ones((1, 64), np.float32), short)
