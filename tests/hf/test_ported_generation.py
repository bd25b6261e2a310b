"""What Transformers' tests ask of generate, under the names of its test methods.

Each check is written anew for `LlamaForCausalLM`; docs/transformers.md lists what stays out.
"""

import warnings
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from helpers.causal_calls import PROMPT, log_probability, new_tokens, tensor
from helpers.tiny_llm import KV_MEMORY, make_folder

import codellama_rt as clrt
from codellama_rt.checkpoint.tensor_names import expected_shapes
from codellama_rt.hf import beam_search, search

OUT = {
    "test_assisted_decoding_matches_greedy_search",
    "test_prompt_lookup_decoding_matches_greedy_search",
    "test_group_beam_search_generate",
    "test_contrastive_generate",
    "test_dola_decoding_sample",
    "test_generate_from_inputs_embeds_with_static_cache",
    "test_generate_continue_from_past_key_values",
    "test_watermark_generation",
    "test_generate_attentions",
    "test_cfg_generation",
    "test_generate_with_quant_cache",
}
OTHER = {"test_four_of_five_checks_pass", "test_what_stays_out_is_documented"}
BEAMS = {"num_beams": 3, "max_new_tokens": 6, "eos_token_id": []}
DRAWN = {"do_sample": True, "seed": 5, "max_new_tokens": 6, "eos_token_id": []}
DICT = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def rows_of(model, rows, **options):
    return model.generate(tensor(rows), **options).asnumpy().tolist()


def test_four_of_five_checks_pass():
    checks = {name for name in globals() if name.startswith("test_")} - OTHER
    assert len(checks | OUT) >= 56
    assert len(checks) / len(checks | OUT) >= 0.8
    assert not checks & OUT


def test_what_stays_out_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text("utf-8")
    assert [name for name in sorted(OUT) if f"`{name}`" not in text] == []


# What each kind of search returns


def test_greedy_generate(model):
    found = new_tokens(model, PROMPT, max_new_tokens=6, eos_token_id=[])
    logits = model.llm.logits(PROMPT + found)
    assert found == logits[len(PROMPT) - 1 : -1].argmax(axis=1).tolist()


def test_greedy_generate_dict_outputs(model):
    options = {"max_new_tokens": 4, "eos_token_id": []}
    output = model.generate(tensor([PROMPT]), **options, **DICT)
    assert output.sequences.asnumpy().tolist() == rows_of(model, [PROMPT], **options)
    assert len(output.scores) == len(output.logits) == 4
    assert output[0] is output.sequences


def test_greedy_generate_dict_outputs_use_cache(model):
    for use_cache in (True, False):
        found = new_tokens(model, PROMPT, max_new_tokens=4, use_cache=use_cache)
        assert found == new_tokens(model, PROMPT, max_new_tokens=4)


def test_sample_generate(model):
    options = DRAWN | {"num_return_sequences": 3}
    rows = rows_of(model, [PROMPT], **options)
    assert rows == rows_of(model, [PROMPT], **options)
    assert len({tuple(row) for row in rows}) == 3


def test_sample_generate_dict_output(model):
    output = model.generate(tensor([PROMPT]), **DRAWN, **DICT, top_k=7)
    assert [np.isfinite(step.asnumpy()).sum() for step in output.scores] == [7] * 6


def test_beam_search_generate(model):
    rows = rows_of(model, [PROMPT, PROMPT[::-1]], **BEAMS, num_return_sequences=2)
    assert [len(row) for row in rows] == [len(PROMPT) + 6] * 4
    assert rows[0] != rows[1]


def test_beam_search_generate_dict_output(model):
    output = model.generate(tensor([PROMPT]), **BEAMS, **DICT)
    assert output.sequences_scores.shape == (1,)
    assert output.beam_indices.shape == (1, 6)
    assert [step.shape for step in output.scores] == [(3, 512)] * 6


def test_beam_search_generate_dict_outputs_use_cache(model):
    assert rows_of(model, [PROMPT], **BEAMS, use_cache=False) == rows_of(model, [PROMPT], **BEAMS)


def test_beam_sample_generate(model):
    options = DRAWN | {"num_beams": 3, "num_return_sequences": 2}
    rows = rows_of(model, [PROMPT], **options)
    assert rows == rows_of(model, [PROMPT], **options)
    others = [rows_of(model, [PROMPT], **options | {"seed": seed}) for seed in range(8)]
    assert len({str(found) for found in others}) > 1
    together = rows_of(model, [PROMPT[::-1], PROMPT], **options | {"seed": 4})
    assert together[2:] == rows  # the second prompt draws from seed 5
    greedy = rows_of(model, [PROMPT], **BEAMS)
    for quiet in ({"temperature": 0.0}, {"temperature": 1e-6}):
        assert rows_of(model, [PROMPT], **DRAWN, num_beams=3, **quiet)[0][:6] == greedy[0][:6]


def test_beam_sample_generate_dict_output(model):
    options = DRAWN | {"num_beams": 3, "num_return_sequences": 3, "top_k": 9, "temperature": 0.7}
    output = model.generate(tensor([PROMPT]), **options, **DICT)
    kept = [np.isfinite(step.asnumpy()).sum(axis=1).tolist() for step in output.scores]
    assert kept == [[9, 9, 9]] * 6
    steps = model.compute_transition_scores(
        output.sequences, output.scores, output.beam_indices
    ).asnumpy()
    assert np.allclose(steps.sum(axis=1) / 6, output.sequences_scores.asnumpy(), atol=1e-5)
    for row, score in zip(output.sequences.asnumpy().tolist(), steps, strict=True):
        exact = log_probability(model, row[: len(PROMPT)], row[len(PROMPT) :])
        assert abs(score.sum() * 0.7 - exact) < 1e-4


def test_beam_sample_draws_without_replacement():
    """The first draw has the softmax's distribution, and no draw repeats."""
    log_probs, counts = np.log([0.5, 0.3, 0.2]), np.zeros(3)
    for seed in range(4000):
        order = np.argsort(-(log_probs + beam_search._gumbel(seed, 7, 3)))
        counts[order[0]] += 1
    assert np.abs(counts / 4000 - [0.5, 0.3, 0.2]).max() < 0.03
    near = [beam_search._gumbel(1, position, 50) for position in (3, 4)]
    assert not set(near[0]) & set(near[1])


# Prompts


def test_generate_without_input_ids(model):
    begin = model.config.bos_token_id
    options = {"max_new_tokens": 4, "eos_token_id": []}
    assert model.generate(**options).asnumpy().tolist() == rows_of(model, [[begin]], **options)


def test_generate_inputs_as_kwarg(model):
    expected = rows_of(model, [PROMPT], max_new_tokens=4)
    for name in ("inputs", "input_ids"):
        found = model.generate(**{name: tensor([PROMPT])}, max_new_tokens=4)
        assert found.asnumpy().tolist() == expected


def test_generate_too_many_inputs(model):
    with pytest.raises(TypeError, match="two names of one argument"):
        model.generate(tensor([PROMPT]), inputs=tensor([PROMPT]))


def test_left_padding_compatibility(model):
    options = {"max_new_tokens": 5, "eos_token_id": []}
    plain = new_tokens(model, PROMPT[:3], **options)
    mask = tensor([[0, 0, 1, 1, 1]])
    found = rows_of(model, [[9, 9, *PROMPT[:3]]], attention_mask=mask, **options)
    assert found[0][5:] == plain


def test_batching_equivalence(model):
    options = {"max_new_tokens": 5, "eos_token_id": []}
    rows = [PROMPT, PROMPT[::-1]]
    together = rows_of(model, rows, **options)
    assert together == [rows_of(model, [row], **options)[0] for row in rows]


def test_generate_methods_with_logits_to_keep(model):
    logits = model(tensor([PROMPT]), logits_to_keep=1).logits.asnumpy()
    assert np.array_equal(logits, model(tensor([PROMPT])).logits.asnumpy()[:, -1:])


# Ends


def test_max_new_tokens_decoder_only(model):
    options = {"eos_token_id": []}
    assert len(new_tokens(model, PROMPT, max_new_tokens=3, **options)) == 3
    assert len(new_tokens(model, PROMPT, max_length=8, **options)) == 3
    assert len(new_tokens(model, PROMPT, max_length=8, max_new_tokens=5, **options)) == 5


def test_min_length_and_min_new_tokens(model):
    """Of both, the one that asks for more tokens counts."""
    first = new_tokens(model, PROMPT, max_new_tokens=1)[0]
    for new, whole, least in [(4, 0, 4), (0, 9, 4), (2, 9, 4), (4, 7, 4), (4, 9, 4)]:
        found = new_tokens(
            model, PROMPT, max_new_tokens=6, eos_token_id=first, min_new_tokens=new,
            min_length=whole,
        )  # fmt: skip
        assert first not in found[:least]
    assert new_tokens(model, PROMPT, max_new_tokens=6, eos_token_id=first) == [first]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 3}])
def test_eos_token_id_int_and_list(model, options):
    options = {"max_new_tokens": 8, **options}
    long = new_tokens(model, PROMPT, eos_token_id=[], **options)
    end = long[3]
    single = new_tokens(model, PROMPT, eos_token_id=end, **options)
    assert new_tokens(model, PROMPT, eos_token_id=[end], **options) == single
    assert new_tokens(model, PROMPT, eos_token_id=[end, end], **options) == single


def test_custom_stopping_criteria(model):
    found = new_tokens(
        model, PROMPT, max_new_tokens=9, eos_token_id=[],
        stopping_criteria=[lambda ids, scores: ids.shape[1] >= len(PROMPT) + 3],
    )  # fmt: skip
    assert len(found) == 3


def test_beam_search_advanced_stopping_criteria(model):
    def after_three(ids, scores):
        return np.full(len(ids), ids.shape[1] >= len(PROMPT) + 3)

    found = new_tokens(model, PROMPT, stopping_criteria=[after_three], **BEAMS)
    assert len(found) == 3


def test_stop_sequence_stopping_criteria(model):
    text = model.llm.tokenizer.decode(new_tokens(model, PROMPT, max_new_tokens=6, eos_token_id=[]))
    found = new_tokens(model, PROMPT, max_new_tokens=6, eos_token_id=[], stop_strings=[text[1:3]])
    assert text[1:3] in model.llm.tokenizer.decode(found)
    assert len(found) < 6


@pytest.mark.parametrize("num_beams", [1, 3])
def test_max_time_criteria(model, monkeypatch, num_beams):
    now = iter(range(100))
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: next(now)))
    options = {"max_new_tokens": 9, "eos_token_id": [], "num_beams": num_beams}
    assert len(new_tokens(model, PROMPT, max_time=3.5, **options)) == 4
    monkeypatch.undo()
    assert len(new_tokens(model, PROMPT, max_time=3600, **options)) == 9
    assert len(new_tokens(model, PROMPT, max_time=0, **options)) == 1


def test_beam_search_early_stop_heuristic(model):
    lengths = {}
    for stop in (True, False, "never"):
        options = BEAMS | {"eos_token_id": list(range(0, 512, 2)), "early_stopping": stop}
        lengths[stop] = len(new_tokens(model, PROMPT, **options))
    assert lengths[True] <= lengths[False] <= lengths["never"]


# Processors


def test_logits_processor_not_inplace(model):
    seen = []

    def keeping(input_ids, scores):
        seen.append(scores.copy())
        return scores + 1.0

    options = {"max_new_tokens": 3, "eos_token_id": []}
    output = model.generate(tensor([PROMPT]), logits_processor=[keeping], **options, **DICT)
    for scores, logits, before in zip(output.scores, output.logits, seen, strict=True):
        assert np.allclose(scores.asnumpy(), before + 1.0, atol=1e-5)
        assert np.allclose(logits.asnumpy(), before, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_prefix_allowed_tokens_fn(model, num_beams):
    seen = []

    def allowed(batch_id, input_ids):
        seen.append((batch_id, input_ids.tolist()))
        return [20 + batch_id, 30 + batch_id, 40 + len(input_ids) % 2]

    options = BEAMS | {"num_beams": num_beams, "max_new_tokens": 4}
    rows = rows_of(model, [PROMPT, PROMPT[::-1]], prefix_allowed_tokens_fn=allowed, **options)
    for i, row in enumerate(rows):
        assert set(row[len(PROMPT) :]) <= {20 + i, 30 + i, 40, 41}
    assert {batch_id for batch_id, _ in seen} == {0, 1}
    assert all(ids[:5] == (PROMPT, PROMPT[::-1])[i] for i, ids in seen)


def test_prefix_allowed_tokens_of_several_results(model):
    rows = rows_of(
        model, [PROMPT, PROMPT], num_return_sequences=2, **DRAWN,
        prefix_allowed_tokens_fn=lambda batch_id, ids: [10 + batch_id],
    )  # fmt: skip
    assert [set(row[len(PROMPT) :]) for row in rows] == [{10}, {10}, {11}, {11}]


@pytest.mark.parametrize("do_sample", [False, True])
def test_beam_search_with_few_allowed_tokens(model, do_sample):
    """Fewer continuations than beams: no forbidden token and no copy fills them."""
    options = BEAMS | {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 2}
    rows = rows_of(
        model, [PROMPT], do_sample=do_sample, seed=1, **options,
        prefix_allowed_tokens_fn=lambda i, ids: [7, 8] if len(ids) == 5 else [9, 10],
    )  # fmt: skip
    assert sorted(row[5:] for row in rows) == [[7, 9], [7, 10], [8, 9], [8, 10]]


def test_beam_search_where_nothing_is_allowed_after_an_end(model):
    """A result that has ended stays when nothing may follow the others."""
    found = new_tokens(
        model, PROMPT, num_beams=2, max_new_tokens=6, eos_token_id=7,
        prefix_allowed_tokens_fn=lambda i, ids: [7, 8] if len(ids) == 5 else [8],
        logits_processor=[lambda ids, scores: np.where(ids[:, -1:] == 8, -np.inf, scores)],
    )  # fmt: skip
    assert found == [7]


def test_bad_words_ids(model):
    free = new_tokens(model, PROMPT, max_new_tokens=6, eos_token_id=[])
    for runs in ([[free[2]]], [[free[1], free[2]]]):
        found = new_tokens(model, PROMPT, max_new_tokens=6, eos_token_id=[], bad_words_ids=runs)
        assert found[:2] == free[:2]
        assert found[2] != free[2]


def test_sequence_bias(model):
    free = new_tokens(model, PROMPT, max_new_tokens=3, eos_token_id=[])
    options = {"max_new_tokens": 3, "eos_token_id": []}
    for bias in ({(33,): 1e3}, [[[33], 1e3]]):
        assert new_tokens(model, PROMPT, sequence_bias=bias, **options) == [33] * 3
    found = new_tokens(model, PROMPT, sequence_bias={(free[0], 33): 1e3}, **options)
    assert found[:2] == [free[0], 33]


def test_suppress_tokens(model):
    free = new_tokens(model, PROMPT, max_new_tokens=4, eos_token_id=[])
    options = {"max_new_tokens": 4, "eos_token_id": []}
    assert free[0] not in new_tokens(model, PROMPT, suppress_tokens=[free[0]], **options)


def test_begin_suppress_tokens(model):
    free = new_tokens(model, PROMPT, max_new_tokens=4, eos_token_id=[])
    options = {"max_new_tokens": 4, "eos_token_id": []}
    begin = new_tokens(model, PROMPT, begin_suppress_tokens=[free[0]], **options)
    assert begin[0] != free[0]
    later = new_tokens(model, PROMPT, begin_suppress_tokens=[free[1]], **options)
    assert later == free or free[1] == free[0]


def test_no_repeat_ngram_size(model):
    found = new_tokens(model, PROMPT, max_new_tokens=20, eos_token_id=[], no_repeat_ngram_size=1)
    assert len(set(PROMPT + found)) == 25


def test_repetition_penalty(model):
    free = new_tokens(model, PROMPT, max_new_tokens=20, eos_token_id=[])
    found = new_tokens(model, PROMPT, max_new_tokens=20, eos_token_id=[], repetition_penalty=50.0)
    assert len(set(found)) >= len(set(free))


def test_forced_bos_token(model):
    found = new_tokens(model, [1], max_new_tokens=2, forced_bos_token_id=44, eos_token_id=[])
    assert found[0] == 44
    assert 44 not in new_tokens(
        model, PROMPT, max_new_tokens=1, forced_bos_token_id=44, eos_token_id=[]
    )


def test_forced_eos_token(model):
    for options in ({"max_new_tokens": 4}, {"max_length": len(PROMPT) + 4}):
        found = new_tokens(model, PROMPT, forced_eos_token_id=44, eos_token_id=[], **options)
        assert (len(found), found[-1]) == (4, 44)


def test_exponential_decay_length_penalty(model):
    options = {"max_new_tokens": 60, "eos_token_id": 44}
    free = new_tokens(model, PROMPT, **options)
    found = new_tokens(model, PROMPT, exponential_decay_length_penalty=(2, 4.0), **options)
    assert found[:3] == free[:3]
    assert found[-1] == 44
    assert len(found) < 30


def test_remove_invalid_values(model):
    def spoiled(input_ids, scores):
        return np.where(np.arange(512) % 2, scores, np.nan)

    options = {"max_new_tokens": 2, "eos_token_id": []}
    clean = new_tokens(model, PROMPT, remove_invalid_values=True, **options)
    assert clean == new_tokens(model, PROMPT, **options)
    with pytest.raises(ValueError, match="no token can come next"):
        new_tokens(model, PROMPT, logits_processor=[spoiled], **options)


def test_renormalize_logits(model):
    options = {"max_new_tokens": 2, "eos_token_id": [], "renormalize_logits": True}
    output = model.generate(tensor([PROMPT]), **options, **DICT)
    for step in output.scores:
        assert abs(np.exp(step.asnumpy().astype(np.float64)).sum() - 1.0) < 1e-5


@pytest.mark.parametrize(
    "warper",
    [{"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.2}, {"min_p": 0.4}, {"typical_p": 0.3},
     {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.3}],
)  # fmt: skip
@pytest.mark.parametrize("num_beams", [1, 2])
def test_logits_warpers(model, warper, num_beams):
    options = DRAWN | {"top_k": 0, "num_beams": num_beams, **warper}
    output = model.generate(tensor([PROMPT]), **options, **DICT)
    kept = [np.isfinite(step.asnumpy()).sum() for step in output.scores]
    assert all(kept) if warper == {"temperature": 0.3} else max(kept) < 512 * num_beams


# Scores


def test_transition_scores_greedy_search(model):
    output = model.generate(tensor([PROMPT]), max_new_tokens=4, eos_token_id=[], **DICT)
    found = model.compute_transition_scores(output.sequences, output.scores).asnumpy()
    assert np.allclose(found, [[step.asnumpy().max() for step in output.scores]])


def test_transition_scores_greedy_search_normalized(model):
    output = model.generate(tensor([PROMPT]), max_new_tokens=4, eos_token_id=[], **DICT)
    found = model.compute_transition_scores(
        output.sequences, output.scores, normalize_logits=True
    ).asnumpy()
    new = output.sequences.asnumpy()[0, len(PROMPT) :].tolist()
    assert abs(found.sum() - log_probability(model, PROMPT, new)) < 1e-4


@pytest.mark.parametrize("end", [[], [439, 75]])
def test_transition_scores_beam_search(model, end):
    options = BEAMS | {"eos_token_id": end, "num_return_sequences": 3}
    output = model.generate(tensor([PROMPT]), **options, **DICT)
    steps = model.compute_transition_scores(
        output.sequences, output.scores, output.beam_indices
    ).asnumpy()
    lengths = (output.beam_indices.asnumpy() >= 0).sum(axis=1)
    expected = output.sequences_scores.asnumpy()
    assert np.allclose(steps.sum(axis=1) / lengths, expected, atol=1e-5)


def test_transition_scores_that_do_not_fit(model):
    output = model.generate(tensor([PROMPT]), max_new_tokens=2, eos_token_id=[], **DICT)
    with pytest.raises(ValueError, match="cannot have 0 scores"):
        model.compute_transition_scores(output.sequences, ())
    with pytest.raises(ValueError, match="different results"):
        model.compute_transition_scores(output.sequences, output.scores, tensor([[5, 5]]))


def test_loss_of_labels(model):
    loss = model(tensor([PROMPT]), labels=tensor([PROMPT])).loss
    expected = -log_probability(model, PROMPT[:1], PROMPT[1:]) / 4
    assert abs(float(loss.asnumpy()) - expected) < 1e-4


# Arguments


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"synced_gpus": False}, {"low_memory": True},
     {"trust_remote_code": True}, {"token_type_ids": np.zeros((1, 5))},
     {"return_attention_mask": True}],
)  # fmt: skip
def test_generate_ignores_harmless_arguments(model, options):
    with pytest.warns(UserWarning, match=f"ignores {next(iter(options))}"):
        found = new_tokens(model, PROMPT, max_new_tokens=3, **options)
    assert found == new_tokens(model, PROMPT, max_new_tokens=3)


def test_generate_takes_neutral_values(model):
    """What asks for nothing is taken in silence."""
    neutral = {
        "assistant_model": None, "num_beam_groups": 1, "guidance_scale": 1.0,
        "output_attentions": False, "output_hidden_states": False, "past_key_values": None,
        "diversity_penalty": 0.0, "penalty_alpha": None,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = new_tokens(model, PROMPT, max_new_tokens=3, **neutral)
    assert found == new_tokens(model, PROMPT, max_new_tokens=3)


def test_validate_generation_inputs(model):
    with pytest.raises(TypeError, match="no argument foo"):
        model.generate(tensor([PROMPT]), foo="bar")
    with pytest.raises(TypeError, match="the model has no argument foo"):
        model(tensor([PROMPT]), foo="bar")
    with pytest.raises(TypeError, match="does not support return_dict"):
        model(tensor([PROMPT]), return_dict=False)
    with pytest.warns(UserWarning, match="the model ignores use_cache"):
        model(tensor([PROMPT]), use_cache=False, return_dict=True)
    for name in ("past_key_values", "position_ids", "inputs_embeds"):
        for call in (model, model.generate):
            with pytest.raises(TypeError, match=f"does not support {name}: "):
                call(tensor([PROMPT]), **{name: tensor([PROMPT])})


def test_from_pretrained_arguments(tmp_path):
    folder = make_folder(tmp_path / "model")
    harmless = {"device_map": "auto", "low_cpu_mem_usage": True, "trust_remote_code": True}
    with pytest.warns(UserWarning, match="ignores device_map, low_cpu_mem_usage, trust_remote"):
        made = clrt.LlamaForCausalLM.from_pretrained(
            folder, kv_memory=KV_MEMORY, revision="main", load_in_8bit=False, **harmless
        )
    with made.llm:
        assert made.name_or_path == str(folder)
    for options, words in [
        ({"load_in_4bit": True}, "use quantization='int4'"), ({"revision": "v2"}, "its directory"),
        ({"quantization_config": {}}, "use quantization="), ({"subfolder": "a"}, "subfolder's"),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match=words):
            clrt.LlamaForCausalLM.from_pretrained(folder, **options)
    with pytest.raises(TypeError, match="no_such_option"):
        clrt.LlamaForCausalLM.from_pretrained(folder, no_such_option=1)


def test_generation_config_round_trip(tmp_path):
    config = clrt.GenerationConfig(
        max_time=2.5, sequence_bias={(1, 2): 0.5}, exponential_decay_length_penalty=(3, 1.5),
        forced_eos_token_id=[2, 7], begin_suppress_tokens=[9], num_beams=2, do_sample=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert clrt.GenerationConfig.from_pretrained(tmp_path) == config


# The model


def test_config_attributes(model):
    config, llm = model.config, model.llm.config
    named = {
        "hidden_size": llm.dim, "intermediate_size": llm.hidden_dim,
        "num_hidden_layers": llm.n_layers, "num_attention_heads": llm.n_heads,
        "num_key_value_heads": llm.n_kv_heads, "rms_norm_eps": llm.norm_eps,
        "torch_dtype": llm.dtype, "model_type": "llama", "vocab_size": llm.vocab_size,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "hidden_act": "silu",
        "is_encoder_decoder": False, "max_position_embeddings": llm.max_position_embeddings,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in named} == named
    for name in ("hidden_size", "dim", "model_type", "eos_token_id"):
        with pytest.raises(AttributeError):
            setattr(config, name, 5)


def test_several_and_no_ends_of_a_config():
    from codellama_rt.hf.llama_config import LlamaConfig

    sizes = dict.fromkeys(
        ("n_layers", "n_heads", "n_kv_heads", "head_dim", "dim", "hidden_dim", "vocab_size"), 2
    )
    assert LlamaConfig(**sizes, eos_token_ids=(2, 7)).eos_token_id == [2, 7]
    assert LlamaConfig(**sizes, eos_token_ids=()).eos_token_id is None


def test_model_properties(model):
    assert (model.dtype, model.device, model.can_generate()) == (ms.float32, "cpu", True)
    shapes = expected_shapes(model.llm.config)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    assert model.num_parameters() == sum(sizes.values())
    assert model.num_parameters(exclude_embeddings=True) == (
        model.num_parameters() - sizes["model.embed_tokens.weight"]
    )
    assert model.num_parameters(only_trainable=True) == 0


def test_training_mode(model):
    for call in (model.set_train, model.train):
        assert call(False) is model
        with pytest.raises(ValueError, match="training is not supported"):
            call()
    assert model.eval() is model
    assert model.training is False


def test_moving_the_model(model):
    for same in ("cpu", "cpu:0", ms.float32, "float32"):
        assert model.to(same) is model
    for other in ("cuda", "cuda:1", ms.float16):
        with pytest.raises(ValueError, match="cannot be moved"):
            model.to(other)


def test_resize_tokens_embeddings(model):
    model.resize_token_embeddings(512)
    model.resize_token_embeddings()
    with pytest.raises(ValueError, match="rows for 512 tokens and takes no others"):
        model.resize_token_embeddings(513)
    with pytest.raises(ValueError, match=r"token id in \[0, 512\), got 512"):
        model.generate(tensor([[1, 512]]))
