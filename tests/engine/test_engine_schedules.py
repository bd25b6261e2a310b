"""An output is a function of the request, whatever else runs and however it is scheduled."""

import numpy as np
import pytest
from helpers.paged_fakes import (
    HashModel,
    check_outputs,
    collect,
    drain,
    engine_of,
    generate,
    plain,
)

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.model.config import RopeScaling


def random_request(rng):
    shared = [1, *range(20, 20 + int(rng.integers(0, 30)))]
    prompt = shared + rng.integers(3, 64, rng.integers(0, 40)).tolist()
    greedy = rng.random() < 0.3
    wants = rng.random() < 0.3
    params = SamplingParams(
        n=int(rng.choice([1, 1, 1, 2, 4])),
        max_tokens=int(rng.integers(1, 40)),
        min_tokens=int(rng.choice([0, 0, 1])),
        temperature=0.0 if greedy else 1.5,
        top_p=float(rng.choice([1.0, 0.9])),
        top_k=int(rng.choice([0, 20])),
        repetition_penalty=float(rng.choice([1.0, 1.2])),
        presence_penalty=float(rng.choice([0.0, 0.5])),
        seed=int(rng.integers(1000)),
        stop=("ab", "hgf") if rng.random() < 0.5 else (),
        ignore_eos=bool(rng.random() < 0.5),
        logprobs=2 if wants else None,
        prompt_logprobs=2 if wants else None,
    )
    return prompt, params


@pytest.fixture(scope="module")
def requests():
    """(prompt, params, outputs of each sample when the request runs alone, unpaged as it were)."""
    rng = np.random.default_rng(7)
    made = [random_request(rng) for _ in range(60)]
    return [(*request, alone(*request)) for request in made]


def alone(prompt, params):
    engine = engine_of(1, 4096, prefix_caching=False, max_num_batched_tokens=4096, max_num_seqs=1)
    engine.add_request("alone", prompt, params)
    return [plain(total) for _, total in sorted(drain(engine).items())]


@pytest.mark.parametrize("seed", range(100))
def test_outputs_do_not_depend_on_the_schedule(requests, seed):
    rng = np.random.default_rng(seed)
    block_size = int(rng.choice([1, 4, 16]))
    engine = engine_of(
        int(rng.choice([150, 400, 2000])) // block_size,
        block_size,
        max_num_seqs=int(rng.integers(1, 33)),
        max_num_batched_tokens=int(rng.choice([16, 33, 64, 512])),
        prefix_caching=bool(rng.integers(2)),
    )
    rng.shuffle(engine.scheduler.blocks._free)
    pending = rng.choice(len(requests), int(rng.integers(1, 33)), replace=False).tolist()
    chosen, unwanted, gained = list(pending), set(), {}
    arrival_rate = rng.choice([0.3, 0.95])
    while pending or engine.has_unfinished():
        while pending and rng.random() < arrival_rate:
            i = pending.pop()
            prompt, params, _ = requests[i]
            salt = [None, "a", "b"][rng.integers(3)]
            engine.add_request(
                str(i), prompt, params, priority=int(rng.integers(3)), cache_salt=salt
            )
        if engine.scheduler.running and rng.random() < 0.2:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
        if rng.random() < 0.02:
            engine.reset_prefix_cache()
        if engine.table.requests and rng.random() < 0.02:
            name = str(rng.choice(list(engine.table.requests)))
            unwanted.add(name)
            collect(gained, engine.abort(name))
        collect(gained, engine.step())
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    check_outputs(requests, chosen, gained, unwanted)


def test_64_requests_on_memory_for_4_all_finish_as_if_alone():
    engine = engine_of(32, 4, max_num_seqs=64, prefix_caching=False)
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, seed=3)
    prompts = [[1, 3 + i % 50, 4 + i % 7, *range(3, 11)] for i in range(64)]  # 35 tokens at the end
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    gained = drain(engine)
    assert engine.stats()["preemptions"] > 0
    for i, prompt in enumerate(prompts):
        assert gained[str(i), 0].token_ids == generate(prompt, params).token_ids


def test_one_sequence_may_use_all_blocks():
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    total = generate([1] * 10, params, num_blocks=4, block_size=8)
    assert total.end == ("length", None)
    assert len(total.token_ids) == 32 - 10 + 1  # the last token needs no slot


def test_under_dynamic_rope_only_prompts_of_one_length_share_long_prefixes():
    model = HashModel(rope_scaling=RopeScaling("dynamic", 2.0))
    shared = list(range(3, 43))  # longer than the 32 positions of the model
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    prompts = [shared[:40], [*shared[:36], 50], [*shared[:39], 51], shared[:30], shared[:20]]
    expected = [generate(p, params, model=model, prefix_caching=False).token_ids for p in prompts]
    engine = engine_of(model=model)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
        gained = drain(engine)
        assert gained[str(i), 0].token_ids == expected[i]
    assert engine.stats()["prefix_hit_tokens"] == 39 + 19  # the third of the first, the fifth
