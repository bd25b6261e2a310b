"""decoder_layer: the bits of the single ops one after another, and the oracle's numbers."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.builders import ends, int32, normal, paged, quantized_weight, rope_tables
from helpers.tolerances import LOGITS_ATOL, assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.ops.quantized import GGUF_BLOCKS, OWN_WEIGHT_DTYPES

SEQ_LENS, NUM_QUERIES = [40, 1, 17], [3, 1, 17]  # a chunk, a first token, a prompt
DIM, HIDDEN_DIM, HEAD_DIM = 48, 70, 16


def make(
    rng, heads=(4, 2), dtype="float32", cache_dtype="float32", norm_dtype=None,
    dims=(DIM, HIDDEN_DIM), seq_lens=SEQ_LENS, num_queries=NUM_QUERIES,
):  # fmt: skip
    """Arguments by name; the blocks hold what was computed before, and NaN elsewhere."""
    (n_heads, n_kv_heads), (dim, hidden_dim) = heads, dims
    p = paged(rng, seq_lens, num_queries, heads=heads, head_dim=HEAD_DIM, cache_dtype=cache_dtype)
    cos, sin = rope_tables(max(seq_lens), HEAD_DIM)
    positions = np.concatenate(
        [np.arange(n - q, n) for n, q in zip(seq_lens, num_queries, strict=True)]
    )
    tables = np.repeat(p.block_tables, num_queries, axis=0)
    pages = tables[np.arange(len(positions)), positions // 16]
    shapes = {
        "q_proj": (n_heads * HEAD_DIM, dim), "k_proj": (n_kv_heads * HEAD_DIM, dim),
        "v_proj": (n_kv_heads * HEAD_DIM, dim), "o_proj": (dim, n_heads * HEAD_DIM),
        "gate_proj": (hidden_dim, dim), "up_proj": (hidden_dim, dim),
        "down_proj": (dim, hidden_dim),
    }  # fmt: skip
    weights = {name: weight(rng, shape, dtype) for name, shape in shapes.items()}
    norms = {n: normal(rng, dim, norm_dtype or dtype) for n in ("attention_norm", "mlp_norm")}
    return {
        "x": normal(rng, (len(positions), dim)), **weights, **norms, "cos": cos, "sin": sin,
        "positions": int32(positions), "key_cache": p.key_cache, "value_cache": p.value_cache,
        "slot_mapping": int32(pages * 16 + positions % 16), "block_tables": p.block_tables,
        "seq_lens": int32(seq_lens), "cu_seqlens_q": ends(num_queries),
    }  # fmt: skip


def weight(rng, shape, dtype):
    if dtype in FLOAT_DTYPES:
        return normal(rng, shape, dtype, 0.2)
    return quantized_weight(rng, shape, dtype)


def with_own_caches(a):
    return a | {name: a[name].copy() for name in ("key_cache", "value_cache")}


def one_after_another(a, eps, interleaved):
    """The ops as model.py calls them."""
    caches = a["key_cache"], a["value_cache"]
    x = ops.rms_norm(a["x"], a["attention_norm"], eps)
    qkv = ops.linear(x, (a["q_proj"], a["k_proj"], a["v_proj"]))
    query = ops.rope_and_cache(
        qkv, a["cos"], a["sin"], a["positions"], *caches, a["slot_mapping"],
        interleaved=interleaved,
    )  # fmt: skip
    attended, _ = ops.paged_attention(
        query, *caches, a["block_tables"], a["seq_lens"], a["cu_seqlens_q"]
    )
    sublayer = ops.linear(attended.reshape(len(query), -1), a["o_proj"])
    x, residual = ops.add_rms_norm(sublayer, a["x"], a["mlp_norm"], eps)
    hidden = ops.silu_and_mul(ops.linear(x, (a["gate_proj"], a["up_proj"])))
    unit = np.ones(a["x"].shape[1], np.float32)
    return ops.add_rms_norm(ops.linear(hidden, a["down_proj"]), residual, unit, eps)[1]


@pytest.mark.parametrize("cache_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.usefixtures("isa")
def test_bits_of_the_single_ops(rng, dtype, cache_dtype):
    a = make(rng, dtype=dtype, cache_dtype=cache_dtype, norm_dtype="float32")
    apart, whole = with_own_caches(a), with_own_caches(a)
    expected = one_after_another(apart, 1e-5, False)
    assert_equal_bits(ops.decoder_layer(**whole), expected)
    assert_equal_bits(whole["key_cache"], apart["key_cache"])
    assert_equal_bits(whole["value_cache"], apart["value_cache"])


# Products of many tokens gate and add on their own road, in parts of 516 tokens. Long rows are cut
# in segments.
@pytest.mark.parametrize(
    ("num_tokens", "dims"), [(43, (DIM, HIDDEN_DIM)), (530, (DIM, 200)), (43, (2112, 2112))]
)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.usefixtures("isa")
def test_bits_of_many_tokens(rng, dtype, num_tokens, dims):
    assert_bits_of_many_tokens(make_many(rng, dtype, num_tokens, dims))


@pytest.mark.parametrize("num_tokens", [43, 530])
@pytest.mark.parametrize("dtype", [*OWN_WEIGHT_DTYPES, *GGUF_BLOCKS, "q4_1_tiled", "q6_k_tiled"])
@pytest.mark.usefixtures("isa")
def test_bits_of_many_tokens_over_quantised_weights(rng, dtype, num_tokens):
    hidden_dim = HIDDEN_DIM if dtype in OWN_WEIGHT_DTYPES else 256
    a = make_many(rng, dtype, num_tokens, (256, hidden_dim), heads=(16, 2))
    assert_bits_of_many_tokens(a)


def make_many(rng, dtype, num_tokens, dims, heads=(4, 2)):
    return make(
        rng, heads, dtype, norm_dtype="float32", dims=dims,
        seq_lens=[num_tokens + 40, 7], num_queries=[num_tokens - 2, 2],
    )  # fmt: skip


def assert_bits_of_many_tokens(a):
    expected = one_after_another(with_own_caches(a), 1e-5, False)
    for num_threads in (1, 2):
        whole = ops.decoder_layer(**with_own_caches(a), num_threads=num_threads)
        assert_equal_bits(whole, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
def test_head_ratios_and_pairings(rng, heads, interleaved):
    a = make(rng, heads)
    expected = one_after_another(with_own_caches(a), 0.1, interleaved)
    whole = ops.decoder_layer(**with_own_caches(a), eps=0.1, interleaved=interleaved)
    assert_equal_bits(whole, expected)
    oracle = reference.decoder_layer(**a, eps=0.1, interleaved=interleaved)
    np.testing.assert_allclose(whole, oracle, rtol=0, atol=LOGITS_ATOL)


def test_the_residual_stream_in_place(rng, guarded):
    a = make(rng)
    expected = ops.decoder_layer(**with_own_caches(a))
    a["x"], given = guarded(a["x"].shape), a["x"]
    a["x"][...] = given
    assert ops.decoder_layer(**a, out=a["x"]) is a["x"]
    assert_equal_bits(a["x"], expected)


def test_a_larger_call_and_then_a_smaller_one(rng):
    """Scratch memory is kept: what a call leaves there must not be seen by the next."""
    a = make(rng)
    last = {
        "x": a["x"][:1], "positions": a["positions"][:1], "slot_mapping": a["slot_mapping"][:1],
        "block_tables": a["block_tables"][:1], "seq_lens": int32([38]), "cu_seqlens_q": ends([1]),
    }  # fmt: skip
    alone = ops.decoder_layer(**with_own_caches(a) | last)
    ops.decoder_layer(**with_own_caches(a))
    assert_equal_bits(ops.decoder_layer(**with_own_caches(a) | last), alone)


def test_calls_side_by_side(rng):
    """The memory between the ops is lent to a call: more calls at a time than may be kept."""
    cases = [make(rng), make_many(rng, "float32", 43, (DIM, HIDDEN_DIM))]
    expected = [ops.decoder_layer(**with_own_caches(a)) for a in cases]

    def call(i):
        return ops.decoder_layer(**with_own_caches(cases[i % 2]))

    with ThreadPoolExecutor(80) as pool:
        for i, out in enumerate(pool.map(call, range(800))):
            assert_equal_bits(out, expected[i % 2])


def test_heads_that_do_not_fill_q_proj(rng):
    a = make(rng)
    a["q_proj"], a["o_proj"] = a["q_proj"][:-8], np.ascontiguousarray(a["o_proj"][:, :-8])
    with pytest.raises(ValueError, match=r"decoder_layer: q_proj.* must be a multiple of head_dim"):
        ops.decoder_layer(**a)
