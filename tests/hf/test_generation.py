"""Parts of Transformers-style generation: distributions, processors, configuration, branches."""

import json

import numpy as np
import pytest
from helpers.goldens import make_engine, run, tiny_golden

from codellama_rt.engine.branches import Branches
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.hf import GenerationConfig
from codellama_rt.hf.processors import make_processors, process
from codellama_rt.hf.warping import warped

NAME = "gqa_theta1e6_bf16"


def probabilities(logits, config, prompt_ids):
    """The distribution of the next token, (vocab_size,)."""
    processors = make_processors(config, len(prompt_ids), ())
    scores = process(processors, np.array([prompt_ids]), logits[None])[0]
    token_ids, probs = warped(scores, config)
    result = np.zeros(len(logits))
    result[token_ids] = probs
    return result


def test_distributions_are_those_of_transformers(shared_dir):
    """All fourteen of every tiny checkpoint."""
    num_cases = 0
    for path in sorted((shared_dir / "data" / "tiny").glob("*/golden.json")):
        golden, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
        index = golden["sampling"]["prompt_index"]
        logits, prompt_ids = arrays[f"logits_{index}"][-1], golden["cases"][index]["prompt"]
        for case in golden["sampling"]["cases"]:
            config = GenerationConfig(do_sample=True, **{"top_k": 0, **case["config"]})
            ours, theirs = probabilities(logits, config, prompt_ids), arrays[case["npz_key"]]
            rounding = 2.0**-11 * theirs if theirs.dtype == np.float16 else 0.0
            assert np.all(np.abs(ours - theirs) <= 1e-5 + rounding), (path.parent.name, case)
            if "no_repeat_ngram_size" not in case["config"]:  # its count is of the vocabulary
                assert np.count_nonzero(ours) == case["kept"], (path.parent.name, case)
            num_cases += 1
    assert num_cases == 13 * 14


def test_eta_falls_with_the_entropy():
    flat, steep = np.zeros(100), np.r_[5.0, np.zeros(99)]
    config = GenerationConfig(do_sample=True, top_k=0, eta_cutoff=0.02)
    assert len(warped(flat, config)[0]) == 100
    assert warped(steep, config)[0].tolist() == [0]


def scores_after(config, input_ids, vocab_size=8, eos=()):
    prompt_len = len(input_ids[0])
    logits = np.arange(vocab_size, dtype=np.float32) - 3
    return process(
        make_processors(config, prompt_len, eos), np.array(input_ids),
        np.repeat(logits[None], len(input_ids), axis=0),
    )  # fmt: skip


def forbidden(scores):
    return [np.flatnonzero(np.isinf(row)).tolist() for row in scores]


def test_no_run_comes_twice():
    rows = [[1, 2, 3, 1, 2], [1, 2, 1, 2, 1], [5, 5, 5, 5, 5]]
    assert forbidden(scores_after(GenerationConfig(no_repeat_ngram_size=3), rows)) == [
        [3],
        [2],
        [5],
    ]
    assert forbidden(scores_after(GenerationConfig(no_repeat_ngram_size=1), rows[:1])) == [
        [1, 2, 3]
    ]
    assert forbidden(scores_after(GenerationConfig(no_repeat_ngram_size=6), rows)) == [[], [], []]


def test_bad_words():
    config = GenerationConfig(bad_words_ids=[[4], [1, 2, 5], [2, 6], [0, 1, 2, 3, 4, 5, 7]])
    assert forbidden(scores_after(config, [[3, 1, 2], [1, 2, 2], [2, 2, 1]])) == [
        [4, 5, 6], [4, 6], [4],
    ]  # fmt: skip
    assert forbidden(scores_after(config, [[3]], eos=(4,))) == [[]]


def test_suppressed_tokens_and_the_least_length():
    config = GenerationConfig(suppress_tokens=[1, 7], min_new_tokens=2)
    processors = make_processors(config, 3, (2,))
    for length, expected in [(3, [1, 2, 7]), (4, [1, 2, 7]), (5, [1, 7])]:
        scores = process(processors, np.zeros((1, length), int), np.zeros((1, 8), np.float32))
        assert forbidden(scores) == [expected]


def test_repetition_penalty_touches_each_token_once():
    scores = scores_after(GenerationConfig(repetition_penalty=2.0), [[1, 1, 6, 6, 3]])[0]
    assert scores.tolist() == [-3, -4, -1, 0, 1, 2, 1.5, 4]


def test_logits_are_not_changed():
    logits = np.zeros((1, 8), np.float32)
    process(make_processors(GenerationConfig(suppress_tokens=[3]), 1, ()), np.ones((1, 1)), logits)
    assert not logits.any()


def test_configuration_of_a_checkpoint(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({
        "_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 32010],
        "temperature": None, "top_p": 0.9, "transformers_version": "4.57.6", "max_length": 40,
    }))  # fmt: skip
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config == GenerationConfig(eos_token_id=(2, 32010), top_p=0.9, max_length=40)
    assert config.new_tokens(30) == 10
    assert config.replaced(max_new_tokens=3, top_p=None).new_tokens(50) == 3
    assert config.replaced(max_new_tokens=3).top_p == 0.9
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config
    assert GenerationConfig().to_dict() == {}


# Branches


@pytest.fixture(scope="module")
def small():
    return tiny_golden(NAME).model("float32")


PROMPTS = [[1, *range(5, 5 + n)] for n in (3, 40, 17, 64, 1)]


def greedy(engine, prompts, length, *, other_requests=0):
    """Greedy continuations by branches, while the engine may have requests of its own."""
    for i in range(other_requests):
        engine.add_request(f"other {i}", PROMPTS[1], SamplingParams(max_tokens=length))
        engine.step()
    found = [[] for _ in prompts]
    with Branches(engine) as branches:
        live = [branches.add(prompt) for prompt in prompts]
        for _ in range(length):
            rows = branches.logits(live)
            for branch, ids, row in zip(live, found, rows, strict=True):
                ids.append(int(row.argmax()))
                branches.append(branch, ids[-1])
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 7},  # two of the prompts at a time
        {"prefix_caching": False},
        {"max_num_batched_tokens": 16},
        {"max_num_seqs": 2},
        {"num_blocks": 8, "max_num_seqs": 2, "max_num_batched_tokens": 7},
    ],
)
def test_branches_are_what_the_engine_computes(small, options):
    expected = run(make_engine(small), PROMPTS, SamplingParams(max_tokens=12, ignore_eos=True))
    engine = make_engine(small, **options)
    assert greedy(engine, PROMPTS, 12) == expected
    stats = engine.stats()
    assert stats["kv_blocks_free"] == stats["kv_blocks"]


def test_branches_beside_requests(small):
    engine = make_engine(small)
    expected = run(make_engine(small), PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True))
    assert greedy(engine, PROMPTS, 8, other_requests=2) == expected
    tokens = {}
    while engine.has_unfinished():
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    assert len(tokens) == 2
    stats = engine.stats()
    assert stats["kv_blocks_free"] == stats["kv_blocks"]


@pytest.mark.parametrize("num_blocks", [6, 64])
def test_forks_go_their_own_way(small, num_blocks):
    """Also when the blocks do not hold all of them at once."""
    prompt = PROMPTS[2]
    engine = make_engine(small, num_blocks=num_blocks)
    with Branches(engine) as branches:
        first = branches.add(prompt)
        [row] = branches.logits([first])
        tokens = np.argsort(-row)[:5].tolist()
        forks = [first, *(branches.fork(first) for _ in tokens[1:])]
        for branch, token_id in zip(forks, tokens, strict=True):
            branches.append(branch, token_id)
        for _ in range(20):
            rows = branches.logits(forks)
            for branch, row in zip(forks, rows, strict=True):
                branches.append(branch, int(row.argmax()))
        rows = branches.logits(forks)
        texts = [list(branch.token_ids) for branch in forks]
        branches.drop(forks[0])
        assert branches.logits(forks[1:]).tobytes() == rows[1:].tobytes()
    for ids, row in zip(texts, rows, strict=True):
        with Branches(make_engine(small)) as alone:
            assert alone.logits([alone.add(ids)])[0].tobytes() == row.tobytes()
    assert [ids[len(prompt)] for ids in texts] == tokens
    assert engine.stats()["kv_blocks_free"] == num_blocks


def test_blocks_that_requests_hold_are_taken_and_the_requests_computed_again(small):
    prompt, params = PROMPTS[1] + [7] * 20, SamplingParams(max_tokens=2, ignore_eos=True)
    expected = run(make_engine(small), [prompt], params)
    engine = make_engine(small, num_blocks=4)
    engine.add_request("holds all", prompt, params)
    token_ids = [token_id for output in engine.step() for token_id in output.token_ids]
    assert greedy(engine, PROMPTS[2:3], 8) == greedy(make_engine(small), PROMPTS[2:3], 8)
    assert engine.stats()["preemptions"] == 1
    while engine.has_unfinished():
        for output in engine.step():
            token_ids += output.token_ids
    assert [token_ids] == expected
    assert engine.stats()["kv_blocks_free"] == 4


def test_two_searches_share_blocks_that_only_one_can_have(small):
    """Also while a request waits for them."""
    alone = make_engine(small)
    with Branches(alone) as branches:
        expected = [branches.logits([branches.add(PROMPTS[i])])[0].tobytes() for i in (1, 3)]
    engine = make_engine(small, num_blocks=5)
    engine.add_request("r", PROMPTS[1], SamplingParams(max_tokens=3, ignore_eos=True))
    with Branches(engine) as outer, Branches(engine) as inner:
        for _ in range(3):
            first, second = outer.add(PROMPTS[1]), inner.add(PROMPTS[3])
            assert inner.logits([second])[0].tobytes() == expected[1]
            assert outer.logits([first])[0].tobytes() == expected[0]
            while engine.has_unfinished():
                engine.step()
            inner.append(second, 5)
            inner.logits([second])
    assert engine.stats()["kv_blocks_free"] == 5


def test_prompts_that_cannot_be(small):
    engine = make_engine(small, max_model_len=20)
    with Branches(engine) as branches:
        for prompt, words in [
            (PROMPTS[1], "max_model_len=20"),
            ([], "at least one"),
            ([9999], "id"),
        ]:
            with pytest.raises(ValueError, match=words):
                branches.add(prompt)
