"""generate: rows, ends, lengths, seeds, processors and criteria of the caller, scores."""

import mindspore as ms
import numpy as np
import pytest
from helpers.causal_calls import PROMPT, new_tokens, tensor
from helpers.tiny_llm import KV_MEMORY, make_folder

import codellama_rt as clrt


def test_the_engine_finds_the_same(model):
    """Greedy and drawn: `LLM` and the Transformers surface are one model."""
    greedy = clrt.SamplingParams(max_tokens=12)
    assert new_tokens(model, PROMPT, max_new_tokens=12) == (
        model.llm.generate([PROMPT], greedy)[0].token_ids
    )
    drawing = clrt.SamplingParams(
        n=3, temperature=0.9, top_k=40, top_p=0.95, seed=7, max_tokens=9, ignore_eos=True
    )
    expected = [c.token_ids for c in model.llm.generate([PROMPT], drawing)]
    rows = model.generate(
        tensor([PROMPT]), do_sample=True, temperature=0.9, top_k=40, top_p=0.95, seed=7,
        max_new_tokens=9, num_return_sequences=3, eos_token_id=[],
    )  # fmt: skip
    assert rows.asnumpy()[:, len(PROMPT) :].tolist() == expected


def test_rows_draw_from_seeds_of_their_own(model):
    options = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": []}
    together = model.generate(tensor([PROMPT, PROMPT]), seed=5, **options).asnumpy()
    alone = [model.generate(tensor([PROMPT]), seed=s, **options).asnumpy()[0] for s in (5, 6)]
    assert together.tolist() == [row.tolist() for row in alone]
    assert together[0].tolist() != together[1].tolist()


def test_rows_that_end_early_are_padded(model):
    long = new_tokens(model, PROMPT, max_new_tokens=10, eos_token_id=[])
    other = new_tokens(model, PROMPT[:3], max_new_tokens=10, eos_token_id=[])
    end = next(token_id for token_id in long if token_id not in other)
    rows = [[0, 0, *PROMPT[:3]], PROMPT]
    mask = tensor([[0, 0, 1, 1, 1], [1] * 5])
    found = model.generate(
        tensor(rows), attention_mask=mask, max_new_tokens=10, eos_token_id=end, pad_token_id=9
    ).asnumpy()
    cut = long.index(end) + 1
    assert found[0, 5:].tolist() == other
    assert found[1, 5:].tolist() == long[:cut] + [9] * (10 - cut)


def test_padding_is_seen_by_its_token(model):
    """Without a mask, as in Transformers: unless the pad token may end a row."""
    rows, options = [[9, 9, *PROMPT[:3]], PROMPT], {"max_new_tokens": 6, "pad_token_id": 9}
    masked = model.generate(
        tensor(rows), attention_mask=tensor([[0, 0, 1, 1, 1], [1] * 5]), **options
    ).asnumpy()
    assert np.array_equal(model.generate(tensor(rows), **options).asnumpy(), masked)
    unmasked = new_tokens(model, rows[0], eos_token_id=[9], **options)
    assert unmasked == new_tokens(model, rows[0], max_new_tokens=6, eos_token_id=9)
    assert unmasked != masked[0, 5:].tolist()
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(tensor([[*PROMPT, 9]]), **options)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ids_keep_their_type(model, dtype):
    assert model.generate(tensor([PROMPT], dtype), max_new_tokens=2).asnumpy().dtype == dtype


def test_fillings_end_at_eot(model, monkeypatch):
    prompt = model.llm.tokenizer.encode_infill("def f(", "):")
    first, second = new_tokens(model, prompt, max_new_tokens=2, eos_token_id=[])
    assert new_tokens(model, prompt, max_new_tokens=5)[:2] == [first, second]
    monkeypatch.setattr(model.llm.tokenizer, "eot_id", second)
    assert new_tokens(model, prompt, max_new_tokens=5) == [first, second]
    assert len(new_tokens(model, prompt, max_new_tokens=5, eos_token_id=[])) == 5


def test_no_ends(model, monkeypatch):
    """eos_token_id=None switches ends off, as in Transformers."""
    first, second = new_tokens(model, PROMPT, max_new_tokens=2, eos_token_id=[])
    monkeypatch.setattr(model.llm.engine.admission, "eos_token_ids", (second,))
    assert new_tokens(model, PROMPT, max_new_tokens=5) == [first, second]
    assert len(new_tokens(model, PROMPT, max_new_tokens=5, eos_token_id=None)) == 5
    config = clrt.GenerationConfig(max_new_tokens=5)
    assert new_tokens(model, PROMPT, generation_config=config) == [first, second]
    assert config.replaced(eos_token_id=None).eos_token_id == ()
    assert config.replaced(eos_token_id=0).eos_token_id == (0,)
    assert config.replaced(max_new_tokens=None).max_new_tokens == 5


def test_a_stop_string_that_names_a_control_token(model, monkeypatch):
    first, second = new_tokens(model, PROMPT, max_new_tokens=2, eos_token_id=[])
    names = {"</s>": second}
    monkeypatch.setattr(model.llm.tokenizer, "control_id", names.get)
    options = {"max_new_tokens": 5, "eos_token_id": None, "stop_strings": ["zz", "</s>"]}
    assert new_tokens(model, PROMPT, **options) == [first, second]
    names["</s>"] = model.config.vocab_size  # without a row
    assert len(new_tokens(model, PROMPT, **options)) == 5


def test_lengths(model):
    assert len(new_tokens(model, PROMPT, max_length=8, eos_token_id=[])) == 3
    assert len(new_tokens(model, PROMPT, max_length=8, max_new_tokens=4, eos_token_id=[])) == 4
    assert len(new_tokens(model, PROMPT, eos_token_id=[])) == 128
    first = new_tokens(model, PROMPT, max_new_tokens=1)[0]
    for options in ({"min_new_tokens": 4}, {"min_length": len(PROMPT) + 4}):
        found = new_tokens(model, PROMPT, max_new_tokens=6, eos_token_id=first, **options)
        assert len(found) > 4
        assert first not in found[:4]


def test_a_row_ends_where_the_model_does(tmp_path):
    folder = make_folder(tmp_path / "model")
    short = clrt.LlamaForCausalLM.from_pretrained(folder, kv_memory=KV_MEMORY, max_model_len=9)
    with short.llm:
        for num_beams in (1, 2):
            options = {"max_new_tokens": 50, "eos_token_id": [], "num_beams": num_beams}
            assert len(new_tokens(short, PROMPT, **options)) == 4
        with pytest.raises(ValueError, match="does not fit max_model_len=9"):
            short.generate(tensor([PROMPT * 2]))


def test_stop_strings(model):
    text = model.llm.generate([PROMPT], clrt.SamplingParams(max_tokens=12))[0].text
    whole = new_tokens(model, PROMPT, max_new_tokens=12)
    stop = text[3:5]
    found = new_tokens(model, PROMPT, max_new_tokens=12, stop_strings=stop)
    assert found == whole[: len(found)]
    assert len(found) < 12
    assert stop in model.llm.tokenizer.decode(PROMPT + found)
    assert stop not in model.llm.tokenizer.decode(PROMPT + found[:-1])[-len(text) :]
    beams = new_tokens(model, PROMPT, max_new_tokens=12, stop_strings=stop, num_beams=2)
    assert len(beams) <= 12


def test_stop_strings_are_looked_for_by_the_given_tokenizer(model, tmp_path, monkeypatch):
    text = model.llm.generate([PROMPT], clrt.SamplingParams(max_tokens=12))[0].text
    options = {"max_new_tokens": 12, "stop_strings": text[3:5]}
    expected = new_tokens(model, PROMPT, **options)
    tokenizer = clrt.CodeLlamaTokenizer.from_pretrained(make_folder(tmp_path / "model"))
    monkeypatch.setattr(model.llm, "tokenizer", None)
    assert new_tokens(model, PROMPT, tokenizer=tokenizer, **options) == expected
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        new_tokens(model, PROMPT, **options)
    with pytest.raises(TypeError, match="must be a CodeLlamaTokenizer, got object"):
        new_tokens(model, PROMPT, tokenizer=object(), **options)


def test_the_configuration_of_a_model_may_be_changed(model, monkeypatch):
    config = clrt.GenerationConfig(max_new_tokens=3)
    monkeypatch.setattr(model, "generation_config", config)
    whole = new_tokens(model, PROMPT)
    assert len(whole) == 3
    config.eos_token_id = whole[1]
    assert new_tokens(model, PROMPT) == whole[:2]
    config.num_beams = 0
    with pytest.raises(ValueError, match="num_beams must be at least 1"):
        new_tokens(model, PROMPT)


def test_criteria_of_the_caller(model):
    seen = []

    def after_three(input_ids, scores):
        seen.append((input_ids.copy(), scores))
        return input_ids.shape[1] >= len(PROMPT) + 3

    rows = tensor([PROMPT, PROMPT[::-1]])
    found = model.generate(rows, stopping_criteria=[after_three], max_new_tokens=9, eos_token_id=[])
    assert found.shape == (2, len(PROMPT) + 3)
    assert [ids.tolist() for ids, _ in seen] == [
        found.asnumpy()[:, : len(PROMPT) + n].tolist() for n in (1, 2, 3)
    ]
    assert new_tokens(model, PROMPT, logits_processor=None, stopping_criteria=None,
                      max_new_tokens=2) == new_tokens(model, PROMPT, max_new_tokens=2)  # fmt: skip
    one = [lambda input_ids, scores: np.array([True, False])]
    found = model.generate(
        rows, stopping_criteria=one, max_new_tokens=4, eos_token_id=[], pad_token_id=7
    )
    assert found.asnumpy()[0, len(PROMPT) + 1 :].tolist() == [7, 7, 7]
    assert 7 not in found.asnumpy()[1, len(PROMPT) :]
    beams = model.generate(rows, stopping_criteria=[after_three], num_beams=3, eos_token_id=[])
    assert beams.shape == (2, len(PROMPT) + 3)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_processors_of_the_caller(model, as_tensor, num_beams):
    def only_77(input_ids, scores):
        assert input_ids.shape == (num_beams, input_ids.shape[1])
        changed = np.full_like(scores, -1e4)
        changed[:, 77] = 0
        return ms.Tensor(changed) if as_tensor else changed

    options = {"num_beams": num_beams, "max_new_tokens": 3, "eos_token_id": []}
    assert new_tokens(model, PROMPT, logits_processor=[only_77], **options) == [77] * 3


def test_scores_and_logits(model):
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "eos_token_id": []}
    output = model.generate(
        tensor([PROMPT]), output_scores=True, output_logits=True, repetition_penalty=1.5, **options
    )
    ids = output.sequences.asnumpy()[0].tolist()
    expected = model.llm.logits(ids[:-1])[len(PROMPT) - 1 :]
    assert np.array_equal(np.concatenate([x.asnumpy() for x in output.logits]), expected)
    for i, scores in enumerate(output.scores):
        raw, processed = expected[i], scores.asnumpy()[0]
        seen = sorted(set(ids[: len(PROMPT) + i]))
        penalised = np.where(raw[seen] < 0, raw[seen] * 1.5, raw[seen] / 1.5)
        np.testing.assert_allclose(processed[seen], penalised, rtol=1e-6)
        rest = np.delete(np.arange(len(raw)), seen)
        assert np.array_equal(processed[rest], raw[rest])
        assert processed.argmax() == ids[len(PROMPT) + i]
    assert output["sequences"] is output[0] is output.sequences
    assert output.beam_indices is None
    with pytest.raises(AttributeError, match="not attentions"):
        _ = output.attentions


def test_scores_of_drawn_tokens_give_their_distribution(model):
    output = model.generate(
        tensor([PROMPT]), do_sample=True, temperature=0.5, top_k=4, seed=3, max_new_tokens=3,
        output_scores=True, output_logits=True, return_dict_in_generate=True, eos_token_id=[],
    )  # fmt: skip
    for raw, scores in zip(output.logits, output.scores, strict=True):
        raw, scores = raw.asnumpy()[0], scores.asnumpy()[0]
        kept = np.isfinite(scores)
        assert kept.sum() == 4
        assert raw[kept].min() > raw[~kept].max()
        np.testing.assert_allclose(scores[kept], raw[kept] / 0.5, rtol=1e-6)
