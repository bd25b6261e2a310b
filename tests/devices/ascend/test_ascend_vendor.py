"""MindSpore's own Ascend kernels behind the ops' names: what they are called with.

There is no CPU kernel of them. NumPy stand-ins take their places, with MindSpore's signatures and
the layouts that its documentation gives; the results must then be the oracle's.
"""

import ctypes
import inspect

import numpy as np
import pytest
from helpers.builders import int32, normal, paged, rope_tables
from helpers.goldens import run, tiny_golden
from helpers.tolerances import assert_attention, assert_equal_bits, assert_lse, assert_rounded

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.model.ascend import ops as ascend
from codellama_rt.model.ascend import vendor as ascend_vendor
from codellama_rt.ops import reference

mindspore = pytest.importorskip("mindspore", reason="MindSpore is not installed")
auto_generate = mindspore.ops.auto_generate
tensor = mindspore.Tensor.from_numpy


def stand_in(monkeypatch, owner, function):
    """`function` instead of owner's of that name; every call must fit the real signature."""
    real = inspect.signature(getattr(owner, function.__name__))
    calls = []

    def called(*args, **kwargs):
        bound = real.bind(*args, **kwargs)
        calls.append(bound.arguments)
        bound.apply_defaults()
        return function(**bound.arguments)

    monkeypatch.setattr(owner, function.__name__, called)
    return calls


def fused_infer_attention_score(query, key, value, **given):
    """BNSD queries over BnNBsD pages; with several queries a mask, causal from the end."""
    batch, n_heads, queries, _ = query.shape
    assert given["input_layout"] == "BNSD"
    assert (given["num_heads"], given["block_size"]) == (n_heads, key[0].shape[2])
    assert given["num_key_value_heads"] == key[0].shape[1]
    assert given["actual_seq_lengths"] == [queries] * batch
    assert (given["sparse_mode"], given["atten_mask"] is not None) == (
        (3, True) if queries > 1 else (0, False)
    )
    if queries > 1:
        mask = given["atten_mask"].asnumpy()
        assert mask.shape == (2048, 2048)
        np.testing.assert_array_equal(mask, np.triu(np.ones_like(mask), 1))
    out, lse = np.empty(query.shape, np.float32), np.empty((batch, n_heads, queries, 1), np.float32)
    keys, values = key[0].asnumpy(), value[0].asnumpy()
    for i, length in enumerate(given["actual_seq_lengths_kv"]):
        pages = [
            reference.gather_blocks(c, given["block_table"].asnumpy()[i], length)
            for c in (keys, values)
        ]
        rows = query.asnumpy()[i].transpose(1, 0, 2)
        result, logsum = reference.attend(rows, *pages, True, given["scale"])
        out[i], lse[i, ..., 0] = result.transpose(1, 0, 2), logsum.T
    return tensor(out.astype(query.asnumpy().dtype)), tensor(lse)


@pytest.mark.parametrize(
    ("lens", "queries", "calls"),
    [
        ([300], [1], 1),
        ([5, 300, 128], [1, 1, 1], 1),
        ([200, 30], [20, 30], 2),
        ([5, 40, 33, 200, 9, 7], [1, 1, 0, 7, 1, 1], 3),
    ],
)
def test_paged_attention(rng, monkeypatch, lens, queries, calls):
    case = paged(rng, lens, queries, heads=(8, 2), head_dim=16, block_size=128, dtype="float16",
                 cache_dtype="float16")  # fmt: skip
    made = stand_in(monkeypatch, mindspore.ops, fused_infer_attention_score)
    out, lse = ascend_vendor.paged_attention(
        *map(tensor, case.arguments[:4]), *case.arguments[4:], scale=0.3
    )
    expected, expected_lse = reference.paged_attention(*case.arguments, scale=0.3)
    assert_attention(out.asnumpy(), expected)
    assert_lse(lse.asnumpy(), expected_lse)
    assert len(made) == calls


def memory_of(tensor):
    """A float16 tensor's own memory, a view's too, which asnumpy would copy."""
    memory = (ctypes.c_uint16 * tensor.size).from_address(tensor.data_ptr())
    return np.frombuffer(memory, np.float16).reshape(tensor.shape)


def reshape_and_cache(key, value, key_cache, value_cache, slot_mapping):
    """MindSpore's, over pages of (block_size, heads, head_dim)."""
    for cache, rows in ((key_cache, key), (value_cache, value)):
        pages = memory_of(cache)
        for row, slot in zip(rows.asnumpy(), slot_mapping.asnumpy(), strict=True):
            if slot >= 0:
                pages[slot // pages.shape[1], slot % pages.shape[1]] = row
    return key


def apply_rotary_pos_emb_(query, key, cos, sin, position_ids, cos_format):
    """cos_format 2: a row of (head_dim) a token, its halves the same."""
    assert cos_format == 2
    tables = [table.asnumpy() for table in (cos, sin)]
    half = tables[0].shape[1] // 2
    for table in tables:
        np.testing.assert_array_equal(table[:, :half], table[:, half:])
    rows, results = np.arange(len(tables[0])), []
    for x in (query.asnumpy(), key.asnumpy()):
        heads = x.reshape(len(x), -1, 2 * half)
        rotated = reference.rotate(heads, *(table[:, :half] for table in tables), rows)
        results.append(tensor(rotated.astype(x.dtype).reshape(x.shape)))
    assert position_ids.asnumpy().tolist() == [1] * len(rows)
    return results


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_rope_and_cache(rng, monkeypatch, heads):
    stand_in(monkeypatch, auto_generate, reshape_and_cache)
    stand_in(monkeypatch, auto_generate, apply_rotary_pos_emb_)
    qkv = normal(rng, (4, (heads[0] + 2 * heads[1]) * 32), "float16")
    tables, positions, slots = rope_tables(90, 32), int32([0, 89, 5, 7]), int32([300, -1, 127, 128])
    caches = [normal(rng, (3, heads[1], 128, 32), "float16") for _ in range(2)]
    expected_caches = [cache.copy() for cache in caches]
    query = ascend_vendor.rope_and_cache(
        tensor(qkv), *map(tensor, tables), tensor(positions), *map(tensor, caches), tensor(slots)
    )
    rounded = [table.astype(np.float16) for table in tables]  # it takes them in the query's dtype
    expected = reference.rope_and_cache(qkv, *rounded, positions, *expected_caches, slots)
    assert_rounded(query.asnumpy(), expected)
    assert_rounded(caches[0], expected_caches[0])
    assert_equal_bits(caches[1], expected_caches[1])


def rms_norm(x, gamma, epsilon):
    out = reference.rms_norm(x.asnumpy(), gamma.asnumpy(), epsilon).astype(x.asnumpy().dtype)
    return tensor(out), None


def add_rms_norm(x1, x2, gamma, epsilon):
    out, total = reference.add_rms_norm(x1.asnumpy(), x2.asnumpy(), gamma.asnumpy(), epsilon)
    dtype = x1.asnumpy().dtype
    return tensor(out.astype(dtype)), None, tensor(total.astype(dtype))


def swiglu(input, dim):  # MindSpore's name for it
    assert dim == -1
    return tensor(reference.silu_and_mul(input.asnumpy()).astype(input.asnumpy().dtype))


def test_norms_and_activation(rng, monkeypatch):
    for function in (rms_norm, add_rms_norm, swiglu):
        stand_in(monkeypatch, mindspore.ops, function)
    x, residual = (normal(rng, (3, 64), "float16") for _ in range(2))
    weight = normal(rng, 64, "float16")
    out = ascend_vendor.rms_norm(tensor(x), tensor(weight), 1e-6)
    assert_rounded(out.asnumpy(), reference.rms_norm(x, weight, 1e-6))
    out, total = ascend_vendor.add_rms_norm(tensor(x), tensor(residual), tensor(weight))
    expected, expected_total = reference.add_rms_norm(x, residual, weight)
    assert_rounded(out.asnumpy(), expected)
    assert_rounded(total.asnumpy(), expected_total)
    assert_rounded(ascend_vendor.silu_and_mul(tensor(x)).asnumpy(), reference.silu_and_mul(x))


def test_a_checkpoint_decodes(monkeypatch):
    """Prefill, decoding and the whole order of calls: the CPU's tokens, but for close ones."""
    from codellama_rt.model.ascend.llama import AscendKVCache, AscendLlama

    for function in (rms_norm, add_rms_norm, swiglu, fused_infer_attention_score):
        stand_in(monkeypatch, mindspore.ops, function)
    for function in (reshape_and_cache, apply_rotary_pos_emb_):
        stand_in(monkeypatch, auto_generate, function)
    golden = tiny_golden("mqa_fp16_sharded")
    checkpoint = open_checkpoint(golden.folder, dtype="float16")
    model = AscendLlama(checkpoint.config, checkpoint.weights, attention="vendor")
    engine = Engine(model, AscendKVCache(checkpoint.config, num_blocks=8), max_model_len=400)
    prompts = [case["prompt"] for case in golden.cases]
    tokens = run(engine, prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    compared = 0
    for case, ours in zip(golden.cases, tokens, strict=True):
        steps = min(12, case["first_low_margin_step"] or 12)
        assert ours[:steps] == case["greedy_no_eos"][:steps]
        compared += steps
    assert compared >= 24, "too few steps to prove anything"


def test_the_same_names_and_parameters():
    for name in ("rms_norm", "add_rms_norm", "silu_and_mul", "reshape_and_cache", "rope_and_cache",
                 "paged_attention"):  # fmt: skip
        ours, theirs = (getattr(module, name) for module in (ascend, ascend_vendor))
        assert inspect.signature(ours) == inspect.signature(theirs)


def test_a_pool_past_int32_is_refused():
    class Large:
        shape, dtype = (2**17, 8, 128, 16), "float16"

        def is_contiguous(self):
            return True

    rows = tensor(np.zeros((1, 8, 16), np.float16))
    with pytest.raises(ValueError, match=r"a cache of 2147483648 elements is more than 2147483647"):
        ascend_vendor.reshape_and_cache(rows, rows, Large(), Large(), tensor(int32([0])))
