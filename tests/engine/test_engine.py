"""What an engine gives for its requests, on a model that hashes what it reads from its blocks."""

import pytest
from helpers.paged_fakes import (
    PROMPT,
    HashModel,
    collect,
    drain,
    engine_of,
    generate,
    greedy_tokens,
    piece,
)

from codellama_rt.engine.logprobs import token_logprobs
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.errors import QueueFullError

# Samples of one prompt


def test_the_prompt_of_n_samples_is_computed_once():
    model = HashModel()
    engine = engine_of(model=model, prefix_caching=False)
    params = SamplingParams(n=8, max_tokens=5, temperature=1.0, seed=1, ignore_eos=True)
    engine.add_request("r", PROMPT, params)
    gained = drain(engine)
    assert model.num_computed_tokens == len(PROMPT) + 8 * 4
    assert len({tuple(total.token_ids) for total in gained.values()}) == 8


def test_n_may_exceed_the_sequences_of_a_step():
    params = SamplingParams(n=8, max_tokens=5, temperature=1.0, seed=1, ignore_eos=True)
    results = []
    for max_num_seqs in (3, 64):
        engine = engine_of(max_num_seqs=max_num_seqs)
        engine.add_request("r", PROMPT, params)
        results.append([total.token_ids for _, total in sorted(drain(engine).items())])
    assert results[0] == results[1]


def test_without_a_seed_requests_differ():
    params = SamplingParams(max_tokens=12, temperature=2.0, ignore_eos=True)
    assert generate(params=params).token_ids != generate(params=params).token_ids


# Ends


def test_end_of_sequence_ends_and_may_be_ignored():
    token_ids = greedy_tokens()
    model = HashModel(eos_token_ids=(token_ids[4],))
    total = generate(params=SamplingParams(max_tokens=12), model=model)
    first = token_ids.index(token_ids[4])
    assert total.token_ids == token_ids[: first + 1]
    assert total.end == ("stop", token_ids[4])
    assert total.text == "".join(map(piece, token_ids[:first]))
    ignoring = generate(params=SamplingParams(max_tokens=12, ignore_eos=True), model=model)
    assert ignoring.token_ids == token_ids
    assert ignoring.end == ("length", None)


@pytest.mark.parametrize("eos", [5, [5, 6]])
def test_the_ends_are_those_of_every_file(eos):
    """Transformers takes generation_config's alone; fine-tunes often name an end in one file."""
    engine = engine_of(generation_config={"eos_token_id": eos, "temperature": 0.5})
    assert engine.admission.eos_token_ids == ((5, 2) if eos == 5 else (5, 6, 2))
    assert engine_of(generation_config={"eos_token_id": None}).admission.eos_token_ids == (2,)


def test_stop_tokens_end_the_output_but_not_before_min_tokens():
    token_ids = greedy_tokens()
    stop = token_ids[3]
    total = generate(params=SamplingParams(stop_token_ids=[stop], max_tokens=12))
    assert total.end == ("stop", stop)
    assert total.token_ids == token_ids[: token_ids.index(stop) + 1]
    later = generate(
        params=SamplingParams(stop_token_ids=[stop], min_tokens=8, max_tokens=12, ignore_eos=True)
    )
    assert stop not in later.token_ids[:8]
    assert len(later.token_ids) >= 8


def test_max_tokens_is_clipped_to_the_model_s_length():
    total = generate(params=SamplingParams(max_tokens=500, ignore_eos=True), max_model_len=20)
    assert len(total.token_ids) == 20 - len(PROMPT)
    assert total.end == ("length", None)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("start", range(5))
def test_a_stop_string_ends_the_text_wherever_tokens_begin(start, width):
    text = generate().text
    stop = text[start : start + width]
    params = SamplingParams(max_tokens=12, ignore_eos=True, stop=["zzz", stop, stop + "?"])
    total = generate(params=params)
    assert total.text == text[: text.index(stop)]
    assert total.end == ("stop", stop)
    assert len(total.token_ids) == -(-(text.index(stop) + width) // 2)  # two letters a token


def test_text_that_may_become_a_stop_string_is_held_back_and_given_at_the_end():
    text = generate().text
    engine = engine_of()
    stop = text[3:7] + "?"
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=12, ignore_eos=True, stop=stop))
    pieces = []
    while engine.has_unfinished():
        pieces += [output.text for output in engine.step()]
    assert pieces[:4] == [text[:2], text[2:3], "", text[3:8]]
    assert "".join(pieces) == text
    final = generate(params=SamplingParams(max_tokens=3, ignore_eos=True, stop=stop))
    assert final.text == text[:6]


def test_stop_strings_wait_for_min_tokens():
    text = generate().text
    params = SamplingParams(max_tokens=12, min_tokens=6, ignore_eos=True, stop=text[2:4])
    assert generate(params=params).text.startswith(text[:10])
    params = SamplingParams(max_tokens=12, min_tokens=2, ignore_eos=True, stop=text[2:4])
    assert generate(params=params).text == text[: text.index(text[2:4])]


# Logprobs


def raw_logits(tokens):
    """Of every position, from one unpaged pass."""
    model, rows = HashModel(), []
    engine = engine_of(1, 4096, model=model, max_num_batched_tokens=4096)
    forward = model.forward

    def keep(batch, kv_cache):
        rows.append(forward(batch, kv_cache))
        return rows[-1]

    model.forward = keep
    engine.add_request("r", tokens, SamplingParams(max_tokens=1, prompt_logprobs=0))
    drain(engine)
    return rows[0]


@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_logprobs_of_prompt_and_output(chunk):
    params = SamplingParams(
        max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=1, temperature=1, seed=5, n=2
    )
    engine = engine_of(max_num_batched_tokens=chunk)
    engine.add_request("r", PROMPT, params)
    for total in drain(engine).values():
        tokens = PROMPT + total.token_ids
        rows = raw_logits(tokens)
        expected = [None, *(token_logprobs(rows[i - 1], tokens[i], 1) for i in range(1, 6))]
        assert list(total.prompt_logprobs) == expected
        expected = [token_logprobs(rows[i - 1], tokens[i], 3) for i in range(6, len(tokens))]
        assert total.logprobs == expected


def test_a_prompt_is_cached_as_soon_as_it_is_computed():
    """Its blocks, although the step that computed them ends within another one."""
    engine = engine_of(block_size=4)
    prompt = [1, *range(10, 19)]
    for name in ("first", "second"):
        engine.add_request(name, prompt, SamplingParams(max_tokens=1))
        drain(engine)
    assert engine.stats()["prefix_hit_tokens"] == 9  # and the tail of the last one


def test_prompt_logprobs_of_a_cached_prompt_are_complete():
    engine = engine_of()
    for name in "ab":
        engine.add_request(name, PROMPT, SamplingParams(max_tokens=2, prompt_logprobs=0))
        gained = drain(engine)
        assert len(gained[name, 0].prompt_logprobs) == len(PROMPT)


def test_prompt_logprobs_of_one_token():
    engine = engine_of()
    engine.add_request("r", [1], SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert list(drain(engine)["r", 0].prompt_logprobs) == [None]


# Aborting and failing


@pytest.mark.parametrize("num_steps", range(5))
def test_abort_frees_blocks_at_once_and_spares_the_others(num_steps):
    engine = engine_of(max_num_batched_tokens=4)
    params = SamplingParams(n=3, max_tokens=9, ignore_eos=True, temperature=1, seed=2)
    engine.add_request("keep", PROMPT, SamplingParams(max_tokens=12, ignore_eos=True))
    engine.add_request("drop", [9, 8, 7, 6, 5, 4, 3], params)
    gained = {}
    for _ in range(num_steps):
        collect(gained, engine.step())
    outputs = engine.abort("drop")
    collect(gained, outputs)
    assert [(o.index, o.finish_reason, o.token_ids) for o in outputs] == [
        (i, "abort", []) for i in range(3)
    ]
    held = engine.scheduler.running
    used = {block_id for sequence in held for block_id in sequence.block_ids}
    assert engine.scheduler.blocks.num_free == 64 - len(used)
    assert all(sequence.order[1] == 0 for sequence in held)
    assert engine.abort("drop") == []
    while engine.has_unfinished():
        collect(gained, engine.step())
    assert gained["keep", 0].token_ids == greedy_tokens()


def test_abort_gives_the_text_that_was_held_back():
    text = generate().text
    engine = engine_of()
    engine.add_request("r", PROMPT, SamplingParams(stop=text[:3] + "?"))
    assert engine.step()[0].text == ""
    assert engine.abort("r")[0].text == text[:2]
    assert not engine.has_unfinished()


def test_a_request_with_broken_logits_fails_alone():
    bad = 63
    engine = engine_of(model=HashModel(nan_token=bad))
    params = SamplingParams(max_tokens=12, ignore_eos=True, logit_bias={bad: -100})
    engine.add_request("bad", [*PROMPT, bad], SamplingParams(n=2))
    engine.add_request("good", PROMPT, params)
    gained = drain(engine)
    assert gained["good", 0].token_ids == generate(params=params).token_ids
    for index in range(2):
        assert gained["bad", index].end == ("error", None)
        assert gained["bad", index].token_ids == []
        with pytest.raises(RuntimeError, match=r"request 'bad'.*logit, of token 0, is nan"):
            raise gained["bad", index].error
    assert engine.stats()["corrupt_outputs"] == 2


def test_close_aborts_and_refuses():
    engine = engine_of()
    engine.add_request("r", PROMPT)
    engine.step()
    engine.close()
    engine.close()
    assert not engine.has_unfinished()
    assert engine.scheduler.blocks.num_free == 64
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.add_request("s", PROMPT)


# Everything else


def test_without_a_tokenizer_there_are_tokens_and_no_text():
    total = generate(tokenizer=False)
    assert total.token_ids == greedy_tokens()
    assert total.text == ""


def test_steps_stay_within_their_limits():
    model = HashModel()
    engine = engine_of(256, model=model, max_num_seqs=5, max_num_batched_tokens=11)
    for i in range(20):
        engine.add_request(str(i), [1 + i] * (1 + i), SamplingParams(max_tokens=4, n=1 + i % 3))
    drain(engine)
    assert model.largest_batch == (5, 11)


def test_stats_and_progress():
    engine = engine_of(max_num_batched_tokens=4, max_num_seqs=1)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    engine.add_request("a", PROMPT, params)
    engine.add_request("b", PROMPT, params)
    assert engine.progress("a") == (0, 6)
    assert engine.step() == []
    assert engine.progress("a") == (4, 6)
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["steps"]) == (1, 1, 1)
    assert stats["kv_usage"] == 2 / 64
    drain(engine)
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["kv_usage"]) == (0, 0, 0.0)
    assert (stats["prompt_tokens"], stats["generated_tokens"]) == (12, 6)
    assert stats["computed_tokens"] == 6 + 1 + 2 + 2  # the second finds five of its six
    assert (stats["prefix_queried_tokens"], stats["prefix_hit_tokens"]) == (12, 5)
    assert min(stats[f"{part}_seconds"] for part in ("schedule", "model", "sample")) > 0


def test_a_step_without_requests_does_nothing():
    assert engine_of().step() == []


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("prompt_logprobs", [None, 2])
def test_max_tokens_0_computes_the_prompt(n, prompt_logprobs):
    engine = engine_of(max_num_batched_tokens=4, block_size=2)
    params = SamplingParams(max_tokens=0, n=n, prompt_logprobs=prompt_logprobs)
    engine.add_request("a", PROMPT, params)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert [(o.index, o.token_ids, o.finish_reason) for o in outputs] == [
        (i, [], "length") for i in range(n)
    ]
    logprobs = outputs[0].prompt_logprobs
    assert (logprobs is None) == (prompt_logprobs is None)
    if logprobs is not None:
        assert len(logprobs) == len(PROMPT)
    assert engine.stats()["kv_blocks_free"] == engine.stats()["kv_blocks"]
    engine.add_request("b", PROMPT, SamplingParams(max_tokens=1))
    assert engine.step()[0].metrics.cached_tokens == 5  # all but the last token


def test_a_prompt_of_the_whole_length_may_be_computed_only():
    engine = engine_of(max_model_len=len(PROMPT))
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=0))
    assert engine.step()[0].finish_reason == "length"
    with pytest.raises(ValueError, match="with a token to generate: at most 5"):
        engine.add_request("b", PROMPT, SamplingParams(max_tokens=1))
    with pytest.raises(ValueError, match="max_model_len=6: at most 6"):
        engine.add_request("c", [*PROMPT, 1], SamplingParams(max_tokens=0))


def test_outputs_carry_times_and_counts():
    engine = engine_of(max_num_batched_tokens=4, max_num_seqs=1)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    engine.add_request("a", PROMPT, params)
    engine.add_request("b", PROMPT, params)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    first, second, third = (o.metrics for o in outputs if o.request_id == "a")
    assert [m.steps for m in (first, second, third)] == [2, 3, 4]
    assert [m.output_tokens for m in (first, second, third)] == [1, 2, 3]
    assert (first.prompt_tokens, first.cached_tokens) == (6, 0)
    assert first.token_seconds is None
    assert first.first_token_seconds == first.queue_seconds + first.prefill_seconds
    assert third.total_seconds >= second.token_seconds + third.token_seconds > 0
    waited = outputs[-1].metrics
    assert waited.queue_seconds >= third.total_seconds - third.queue_seconds > 0
    assert waited.cached_tokens == 5
    stats = engine.stats()
    assert stats["finish_reasons"] == {"length": 2}
    assert stats["histograms"]["inter_token_seconds"]["count"] == 4
    assert stats["histograms"]["first_token_seconds"]["count"] == 2
    assert stats["histograms"]["output_tokens"]["sum"] == 6
    assert stats["histograms"]["step_seconds"]["count"] == stats["steps"]
    assert stats["histograms"]["step_tokens"]["count"] == stats["steps"]
    assert stats["histograms"]["step_tokens"]["sum"] == stats["computed_tokens"] == 11
    assert stats["histograms"]["preemptions"] == {
        "buckets": [(bound, 2) for bound in (0, 1, 2, 4, 8, 16, 32)],
        "count": 2,
        "sum": 0,
    }


def test_requests_beyond_the_queue_are_refused_but_not_before_those_that_never_fit():
    engine = engine_of(max_queued_tokens=8, max_model_len=20)
    engine.add_request("a", PROMPT)
    with pytest.raises(QueueFullError, match="6 prompt tokens wait") as refused:
        engine.add_request("b", PROMPT)
    assert refused.value.pending_tokens == 6
    assert refused.value.retry_after_s is None
    with pytest.raises(ValueError, match="does not fit max_model_len"):
        engine.add_request("b", [1] * 30)
    engine.step()
    engine.add_request("b", PROMPT)
    assert engine.stats()["pending_prompt_tokens"] == 6


def test_the_backlog_is_priced_by_the_steps_so_far():
    engine = engine_of(max_queued_tokens=8, max_step_seconds=1.0)
    engine.add_request("a", PROMPT)
    with pytest.raises(QueueFullError) as refused:
        engine.add_request("b", PROMPT)
    assert 0 < refused.value.retry_after_s < 10


@pytest.mark.parametrize(
    ("limit", "error"), [(0, ValueError), (-1, ValueError), ("1", TypeError), (True, TypeError)]
)
@pytest.mark.parametrize("name", ["max_step_seconds", "max_queued_tokens"])
def test_limits_are_positive_numbers(name, limit, error):
    with pytest.raises(error, match=name):
        engine_of(**{name: limit})


def test_every_step_is_reported(caplog):
    records = []
    engine = engine_of(max_num_batched_tokens=4)
    engine.on_step = records.append
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=2, n=2, ignore_eos=True))
    drain(engine)
    assert [record.chunks for record in records] == [
        (("a", 0, 0, 4),),
        (("a", 0, 4, 6),),
        (("a", 0, 6, 7), ("a", 1, 6, 7)),
    ]
    assert all(record.model_seconds > 0 for record in records)
    assert [record.running for record in records] == [1, 2, 0]

    def fail(record):
        raise ValueError("of the callback")

    engine = engine_of()
    engine.on_step = fail
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(drain(engine)["a", 0].token_ids) == 2
    assert "on_step raised" in caplog.text
