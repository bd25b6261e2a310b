"""Requests that callers follow to their ends: the one loop behind LLM, the CLI and evaluations."""

import pytest
from helpers.paged_fakes import PROMPT, engine_of, greedy_tokens

from codellama_rt.engine.follow import Jobs
from codellama_rt.engine.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


def test_following_yields_each_step_and_fills_the_completions():
    engine = engine_of(max_num_batched_tokens=4)
    jobs = Jobs(engine)
    job = jobs.submit(PROMPT, PARAMS)
    steps = [[output.token_ids for output in outputs] for outputs in jobs.follow([job])]
    num_prompt_steps = -(-len(PROMPT) // 4)
    assert steps[: num_prompt_steps - 1] == [[]] * (num_prompt_steps - 1)
    assert len(steps) == num_prompt_steps + 3
    (completion,) = job.completions
    assert completion.token_ids == [i for (ids,) in steps[num_prompt_steps - 1 :] for i in ids]
    assert completion.token_ids == greedy_tokens(4)
    assert completion.finish_reason == "length"
    assert completion.stats["generated_tokens"] == 4


def test_an_engine_steps_for_all_of_its_jobs():
    engine = engine_of()
    jobs = Jobs(engine)
    first, second = (jobs.submit(prompt, PARAMS) for prompt in (PROMPT, PROMPT[1:]))
    jobs.finish([first])
    assert first.completions[0].token_ids == greedy_tokens(4)
    assert second.completions[0].token_ids == []
    assert not engine.has_unfinished()  # the second was computed beside the first
    jobs.finish([second])
    assert second.completions[0].token_ids == greedy_tokens(4, PROMPT[1:])


def test_nothing_is_computed_before_the_iterator_is_asked():
    engine = engine_of()
    jobs = Jobs(engine)
    job = jobs.submit(PROMPT, PARAMS)
    steps = jobs.follow([job])
    assert engine.stats()["steps"] == 0
    next(steps)
    assert engine.stats()["steps"] == 1


def test_a_dismissed_job_is_aborted():
    engine = engine_of()
    jobs = Jobs(engine)
    job = jobs.submit(PROMPT, PARAMS)
    next(jobs.follow([job]))
    jobs.dismiss(job)
    assert not engine.has_unfinished()
    jobs.dismiss(job)


def test_a_stream_that_is_dropped_before_it_begins_leaves_nothing():
    engine = engine_of()
    jobs = Jobs(engine)
    jobs.stream(jobs.submit(PROMPT, PARAMS)).close()
    assert not engine.has_unfinished()


def test_a_request_that_is_refused_leaves_nothing():
    engine = engine_of()
    jobs = Jobs(engine)
    with pytest.raises(ValueError, match="at least one token"):
        jobs.submit([], PARAMS)
    assert not engine.has_unfinished()
    jobs.finish([jobs.submit(PROMPT, PARAMS)])
