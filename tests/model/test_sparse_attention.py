"""Attention over chosen blocks against float64, and how blocks are chosen."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers.builders import int32, paged

from codellama_rt import ops
from codellama_rt.model import sparse_attention
from codellama_rt.model.batch import Batch, SparseDecoding
from codellama_rt.model.key_bounds import KeyBounds
from codellama_rt.model.sparse_attention import DENSE_LAYERS, SparseAttention
from codellama_rt.ops.quantized import read_cache

SIZE, LEAST = 16, 6  # tokens per block, blocks that are always attended
SEQ_LENS, NUM_QUERIES = [407, 250, 90, 399], [5, 1, 1, 3]
PROMPT_LENS = [404, 249, 90, 399]  # the first has both kinds of tokens, the last only a prompt's


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(sparse_attention, "_LEAST_TOKENS", LEAST * SIZE)


def batch_of(p, fraction):
    positions = [
        np.arange(length - count, length)
        for length, count in zip(SEQ_LENS, NUM_QUERIES, strict=True)
    ]
    unused = int32([])
    return Batch(
        unused, int32(np.concatenate(positions)), p.cu_seqlens_q, p.seq_lens, p.block_tables,
        unused, unused, sparse=SparseDecoding(fraction, int32(PROMPT_LENS)),
    )  # fmt: skip


def attention_of(p, fraction):
    bounds = KeyBounds(p.key_cache.shape, DENSE_LAYERS + 1)
    kv_cache = SimpleNamespace(block_size=SIZE, key_bounds=lambda: bounds)
    return SparseAttention.of(batch_of(p, fraction), kv_cache)


def attend(attention, p, layer=DENSE_LAYERS):
    out = np.empty_like(p.query), np.empty(p.query.shape[:2], np.float32)
    tables = p.block_tables, p.seq_lens, p.cu_seqlens_q
    attention(layer, p.query, p.key_cache, p.value_cache, tables, out)
    return out


def stored(cache, *, key):
    is_quantized = isinstance(cache, ops.Quantized)
    return (read_cache(cache, key=key) if is_quantized else cache).astype(np.float64)


def exact(query, keys, values):
    """Softmax attention of a head's queries (group, head_dim) over (tokens, head_dim)."""
    scores = query.astype(np.float64) @ keys.T * query.shape[1] ** -0.5
    weights = np.exp(scores - scores.max(1, keepdims=True))
    total = weights.sum(1, keepdims=True)
    return weights / total @ values, (np.log(total) + scores.max(1, keepdims=True))[:, 0]


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_the_chosen_blocks_are_attended_exactly(rng, cache_dtype, heads, monkeypatch):
    p = paged(rng, SEQ_LENS, NUM_QUERIES, heads=heads, block_size=SIZE, cache_dtype=cache_dtype)
    keys, values = stored(p.key_cache, key=True), stored(p.value_cache, key=False)
    chosen = []

    def remember(scores, columns, count):
        chosen.append(choose(scores, columns, count))
        return chosen[-1]

    choose = sparse_attention._choose
    monkeypatch.setattr(sparse_attention, "_choose", remember)
    found, lse = attend(attention_of(p, 0.4), p)
    dense, dense_lse = ops.paged_attention(*p.arguments)

    sparse_tokens = [2, 3, 4, 5]  # of the first sequence those behind 404, and that of the second
    others = np.setdiff1d(np.arange(len(found)), sparse_tokens)
    np.testing.assert_array_equal(found[others], dense[others])
    np.testing.assert_array_equal(lse[others], dense_lse[others])
    assert len(chosen) == len(sparse_tokens)
    for token, blocks in zip(sparse_tokens, chosen, strict=True):
        sequence = 0 if token < 5 else 1
        length = SEQ_LENS[sequence] - (4 - token if sequence == 0 else 0)
        total = -(-length // SIZE)
        assert blocks.shape == (heads[1], max(LEAST, int(np.ceil(total * 0.4))))
        for head, its in enumerate(blocks):
            assert {0, total - 2, total - 1} <= set(its.tolist())
            ids = p.block_tables[sequence, its]
            # All blocks but the last are full.
            rows = slice(0, (len(its) - 1) * SIZE + length - (total - 1) * SIZE)
            group = slice(head * heads[0] // heads[1], (head + 1) * heads[0] // heads[1])
            expected = exact(
                p.query[token, group],
                keys[ids, head].reshape(-1, keys.shape[-1])[rows],
                values[ids, head].reshape(-1, keys.shape[-1])[rows],
            )
            atol = 2e-5 if cache_dtype == "float32" else 5e-3  # dots of bfloat16, or of integers
            np.testing.assert_allclose(found[token, group], expected[0], atol=atol)
            np.testing.assert_allclose(lse[token, group], expected[1], atol=atol)


@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "int8"])
def test_a_bound_is_above_every_score_of_its_block(rng, cache_dtype):
    p = paged(rng, SEQ_LENS, NUM_QUERIES, block_size=SIZE, cache_dtype=cache_dtype)
    attention = attention_of(p, 0.4)
    bounds = attention._bounds.of_layer(DENSE_LAYERS, p.key_cache, attention._block_ids)
    query = p.query[[3, 4]]
    found = attention._largest_scores(query, bounds)[:, :, attention._block_ids - attention._first]
    keys = stored(p.key_cache, key=True)[attention._block_ids]  # (blocks, heads, size, head_dim)
    for head in range(2):
        scores = np.einsum("rgd,nsd->rgns", query[:, 2 * head : 2 * head + 2], keys[:, head])
        slack = 0.02 * np.abs(scores).max()  # bounds and queries are rounded to bfloat16
        assert (found[head] > scores.max((1, 3)) - slack).all()
        least, greatest = keys[:, head].min(1), keys[:, head].max(1)
        of_rows = [
            np.maximum(row[:, None] * least, row[:, None] * greatest).sum(-1).max(0)
            for row in query[:, 2 * head : 2 * head + 2].astype(np.float64)
        ]
        np.testing.assert_allclose(found[head], of_rows, rtol=0.01)


def test_the_best_blocks_are_chosen():
    scores = np.float32([[9, 1, 5, 3, 4, 2, 0, 0], [0, 7, 1, 1, 9, 8, 9, 9]])
    chosen = sparse_attention._choose(scores, np.arange(8), 5)
    assert chosen.tolist() == [[0, 2, 4, 6, 7], [0, 4, 5, 6, 7]]
    shuffled = np.array([3, 7, 0, 6, 1, 2, 5, 4])  # where blocks lie does not matter
    again = sparse_attention._choose(scores[:, np.argsort(shuffled)], shuffled, 5)
    assert again.tolist() == chosen.tolist()


def test_a_score_does_not_depend_on_the_places_of_blocks(rng):
    p = paged(rng, SEQ_LENS, NUM_QUERIES, block_size=SIZE, cache_dtype="bfloat16")
    first = attend(attention_of(p, 0.3), p)
    for _ in range(3):
        other = p.repaged(rng, SIZE)
        for one, same in zip(first, attend(attention_of(other, 0.3), other), strict=True):
            np.testing.assert_array_equal(one, same)


def test_the_first_layers_attend_everything(rng):
    p = paged(rng, SEQ_LENS, NUM_QUERIES, block_size=SIZE)
    expected = ops.paged_attention(*p.arguments)
    for layer in range(DENSE_LAYERS):
        for one, same in zip(attend(attention_of(p, 0.3), p, layer), expected, strict=True):
            np.testing.assert_array_equal(one, same)


def test_short_sequences_need_no_choice(rng):
    p = paged(rng, SEQ_LENS, NUM_QUERIES, block_size=SIZE)
    assert attention_of(p, 0.99) is None


def test_written_blocks_are_read_again(rng):
    p = paged(rng, [64], [1], block_size=SIZE)
    bounds, block_ids = KeyBounds(p.key_cache.shape, 1), p.block_tables[0, :2]
    before = bounds.of_layer(0, p.key_cache, block_ids).copy()
    p.key_cache[block_ids] *= 2
    assert (bounds.of_layer(0, p.key_cache, block_ids) == before).all()
    bounds.forget(block_ids[1:])
    after = bounds.of_layer(0, p.key_cache, block_ids)
    assert (after[:, block_ids[0]] == before[:, block_ids[0]]).all()
    assert (after[:, block_ids[1]] == 2 * before[:, block_ids[1]]).all()
