"""decoder_layer: the bits of the single ops one after another, and the oracle's numbers."""

import numpy as np
import pytest
from helpers.builders import ends, int32, normal, paged, rope_tables
from helpers.tolerances import LOGITS_ATOL, assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES

SEQ_LENS, NUM_QUERIES = [40, 1, 17], [3, 1, 17]  # a chunk, a first token, a prompt
DIM, HIDDEN_DIM, HEAD_DIM = 48, 70, 16


def make(rng, heads=(4, 2), dtype="float32", cache_dtype="float32", norm_dtype=None):
    """Arguments by name; the blocks hold what was computed before, and NaN elsewhere."""
    n_heads, n_kv_heads = heads
    p = paged(rng, SEQ_LENS, NUM_QUERIES, heads=heads, head_dim=HEAD_DIM, cache_dtype=cache_dtype)
    cos, sin = rope_tables(64, HEAD_DIM)
    positions = np.concatenate(
        [np.arange(n - q, n) for n, q in zip(SEQ_LENS, NUM_QUERIES, strict=True)]
    )
    tables = np.repeat(p.block_tables, NUM_QUERIES, axis=0)
    pages = tables[np.arange(len(positions)), positions // 16]
    shapes = {
        "q_proj": (n_heads * HEAD_DIM, DIM), "k_proj": (n_kv_heads * HEAD_DIM, DIM),
        "v_proj": (n_kv_heads * HEAD_DIM, DIM), "o_proj": (DIM, n_heads * HEAD_DIM),
        "gate_proj": (HIDDEN_DIM, DIM), "up_proj": (HIDDEN_DIM, DIM),
        "down_proj": (DIM, HIDDEN_DIM),
    }  # fmt: skip
    weights = {name: normal(rng, shape, dtype, 0.2) for name, shape in shapes.items()}
    norms = {n: normal(rng, DIM, norm_dtype or dtype) for n in ("attention_norm", "mlp_norm")}
    return {
        "x": normal(rng, (len(positions), DIM)), **weights, **norms, "cos": cos, "sin": sin,
        "positions": int32(positions), "key_cache": p.key_cache, "value_cache": p.value_cache,
        "slot_mapping": int32(pages * 16 + positions % 16), "block_tables": p.block_tables,
        "seq_lens": int32(SEQ_LENS), "cu_seqlens_q": ends(NUM_QUERIES),
    }  # fmt: skip


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
    unit = np.ones(DIM, np.float32)
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


def test_heads_that_do_not_fill_q_proj(rng):
    a = make(rng)
    a["q_proj"], a["o_proj"] = a["q_proj"][:-8], np.ascontiguousarray(a["o_proj"][:, :-8])
    with pytest.raises(ValueError, match=r"decoder_layer: q_proj.* must be a multiple of head_dim"):
        ops.decoder_layer(**a)
