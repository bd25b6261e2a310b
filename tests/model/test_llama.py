"""The model against Transformers' goldens: logits, greedy tokens, far positions, long prompts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers.builders import running_on
from helpers.checkpoint_files import TINY_NAMES
from helpers.goldens import GOLDEN_NAMES, SHARED_NAMES, load_golden, make_engine, run, tiny_golden
from helpers.oracle import forward
from helpers.tolerances import LOGITS_ATOL, assert_equal_bits

from codellama_rt import ops
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.model.batch import Batch
from codellama_rt.model.kv_cache import KVCache

# Transformers scales a dynamic RoPE by the longest row of a batch; here each row has its own.
DYNAMIC = "rope_dynamic2"


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request):
    if request.param in SHARED_NAMES:
        shared = request.getfixturevalue("shared_dir")
        return load_golden(shared / "data" / "tiny" / request.param)
    return tiny_golden(request.param)


@pytest.mark.parametrize("isa", ops.available_isas())
def test_float32_logits(golden, isa):
    model = golden.model("float32")
    with running_on(isa=isa):
        for i, case in enumerate(golden.cases):
            positions, expected = golden.logits(i)
            logits = sequence_logits(model, case["prompt"])[positions]
            np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("isa", ops.available_isas())
def test_logits_as_stored_err_no_more_than_transformers(golden, isa):
    """16-bit weights and cache, against float32: at most what Transformers loses in them."""
    model, dtype = golden.model(), golden.stored_dtype
    assert model.config.dtype == dtype
    for i, case in enumerate(golden.cases):
        positions, expected = golden.logits(i)
        with running_on(isa=isa):
            logits = sequence_logits(model, case["prompt"], kv_dtype=dtype)[positions]
        allowed = max(case["native_dtype_max_abs_diff"], LOGITS_ATOL)
        assert np.abs(logits - expected).max() <= allowed


@pytest.mark.parametrize("ends_at_eos", [False, True])
def test_float32_greedy_tokens(golden, ends_at_eos):
    """One prompt at a time, then all together."""
    model = golden.model("float32")
    expected = [
        case["greedy_with_eos" if ends_at_eos else "greedy_no_eos"] for case in golden.cases
    ]
    if ends_at_eos and golden.folder.name == DYNAMIC:
        # Transformers' rotary module remembers the longest length it has seen: this golden was made
        # after the one without eos, on its base of 197 tokens. No eos occurs, so they must agree.
        expected[-1] = golden.cases[-1]["greedy_no_eos"]
    max_tokens = len(golden.cases[0]["greedy_no_eos"])
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=not ends_at_eos)
    prompts = [case["prompt"] for case in golden.cases]
    alone = [run(make_engine(model), [prompt], params)[0] for prompt in prompts]
    assert alone == expected
    assert run(make_engine(model, max_num_batched_tokens=50), prompts, params) == expected


@pytest.mark.parametrize("name", [name for name in TINY_NAMES if name != DYNAMIC])
def test_batch_of_transformers(name):
    golden = tiny_golden(name)
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    prompts = [case["prompt"] for case in golden.cases]
    expected = golden.description["left_padded_batch_greedy16"]
    assert run(make_engine(golden.model("float32")), prompts, params) == expected


@pytest.mark.parametrize("which", range(3))
def test_far_positions(which):
    golden = tiny_golden("gqa_theta1e6_bf16")
    case = golden.description["position_offset"][which]
    prompt = golden.cases[case["prompt_index"]]["prompt"]
    logits = sequence_logits(golden.model("float32"), prompt, first_position=case["offset"])
    expected = golden.arrays[case["npz_key"]]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("first_position", [1, 200, 5000])  # below, across and far above 128
def test_far_positions_of_a_dynamic_rope(first_position):
    """The base follows the position of the last token, not the number of tokens."""
    golden = tiny_golden(DYNAMIC)
    model, prompt = golden.model("float32"), golden.cases[3]["prompt"]
    logits = sequence_logits(model, prompt, first_position=first_position)
    expected = forward(
        model.weights, model.config, prompt, first_position=first_position,
        prompt_length=first_position + len(prompt),
    )  # fmt: skip
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS_ATOL)
    near = sequence_logits(model, prompt)
    assert np.abs(logits - near).max() > 100 * LOGITS_ATOL
    chunked = sequence_logits(model, prompt, first_position=first_position, chunk_size=7)
    assert chunked.tobytes() == logits.tobytes()


@pytest.mark.parametrize("which", range(2))
def test_long_prompts(which):
    golden = tiny_golden("hd128_gqa_bf16")
    case = golden.description["long"][which]
    prompt = golden.arrays[case["prompt_npz_key"]].tolist()
    assert len(prompt) == case["length"]
    model = golden.model("float32")
    logits = sequence_logits(model, prompt)[case["positions"]]
    expected = golden.arrays[case["npz_key"]]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS_ATOL)
    engine = make_engine(model, num_blocks=300, block_size=64)
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    assert run(engine, [prompt], params) == [case["greedy16"]]


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunks_change_no_bit(chunk_size):
    golden = tiny_golden("gqa_theta1e6_bf16")
    model, prompt = golden.model(), golden.cases[3]["prompt"]
    whole = sequence_logits(model, prompt)
    assert sequence_logits(model, prompt, chunk_size=chunk_size).tobytes() == whole.tobytes()
    assert sequence_logits(model, prompt, block_size=16).tobytes() == whole.tobytes()


def test_weights_are_used_as_they_lie():
    lm_head = tiny_golden("hd128_gqa_bf16").model().weights.lm_head
    assert not lm_head.flags.owndata
    assert not lm_head.flags.writeable


def three_chunks():
    """Return five tokens after two, one after nine, and three of a prompt's start."""
    tables = np.array([[3, -1], [0, 4], [2, -1]], np.int32)
    counts, starts = [5, 1, 3], [2, 9, 0]
    positions = np.concatenate(
        [start + np.arange(n) for start, n in zip(starts, counts, strict=True)]
    )
    chunks = np.repeat(np.arange(3), counts)
    return Batch(
        token_ids=np.arange(5, 14, dtype=np.int32),
        positions=positions.astype(np.int32),
        cu_seqlens_q=np.array([0, 5, 6, 9], np.int32),
        seq_lens=np.array([7, 10, 3], np.int32),
        block_tables=tables,
        slot_mapping=(tables[chunks, positions // 16] * 16 + positions % 16).astype(np.int32),
        logit_rows=np.arange(9, dtype=np.int32),
    )


@pytest.mark.parametrize(
    "wanted", [[], [4], [3, 4, 5, 8], [5, 7], [2, 0], [8, 7], [1, 0, 2, 3, 4, 5, 6, 7, 8], [6, 1]]
)
def test_the_last_layer_computes_the_tokens_whose_logits_are_wanted(wanted, monkeypatch):
    model = tiny_golden(GOLDEN_NAMES[0]).model()
    batch, rows = three_chunks(), np.array(wanted, np.int32)
    caches = [KVCache(model.config, num_blocks=5, block_size=16, dtype="float32") for _ in range(2)]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        for cache in itertools.chain(*layers):
            cache[:] = 0.5  # the tokens before the chunks
    expected = model.forward(batch, caches[0])[rows]
    computed = []

    def watch(name):  # layers but the last are one call each
        op = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda x, *rest, **more: computed.append(len(x)) or op(x, *rest, **more)
        )

    watch("decoder_layer")
    watch("silu_and_mul")
    assert_equal_bits(model.forward(replace(batch, logit_rows=rows), caches[1]), expected)
    for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert_equal_bits(a, b)
    tails = [
        end - min([row for row in wanted if begin <= row < end], default=end)
        for begin, end in [(0, 5), (5, 6), (6, 9)]
    ]
    assert computed == [9] * (model.config.n_layers - 1) + [sum(tails)]


@pytest.mark.parametrize("name", [name for name in TINY_NAMES if name != DYNAMIC])
def test_a_layer_in_one_call_has_the_bits_of_its_ops(name, monkeypatch):
    model, batch, calls = tiny_golden(name).model(), three_chunks(), []
    whole = ops.decoder_layer
    monkeypatch.setattr(
        ops, "decoder_layer", lambda x, *rest, **more: calls.append(x) or whole(x, *rest, **more)
    )

    def run():
        cache = KVCache(model.config, num_blocks=5, block_size=16, dtype="float32")
        for array in itertools.chain(*cache.layers):
            array[:] = 0.5  # the tokens before the chunks
        return model.forward(batch, cache), [*itertools.chain(*cache.layers)]

    in_one_call = run()
    assert len(calls) == model.config.n_layers - 1
    monkeypatch.setattr(model, "_whole", [None] * model.config.n_layers)
    op_by_op = run()
    assert len(calls) == model.config.n_layers - 1
    assert_equal_bits(in_one_call[0], op_by_op[0])
    for ours, theirs in zip(in_one_call[1], op_by_op[1], strict=True):
        assert_equal_bits(ours, theirs)
