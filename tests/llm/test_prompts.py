"""What a str becomes: text, an infilling template written out, and names of control tokens."""

import json

import pytest
from helpers.tiny_llm import KV_MEMORY, make_folder
from helpers.tokenizer_files import sentencepiece_model

import codellama_rt as clrt
from codellama_rt import SamplingParams
from codellama_rt.llm.prompts import PromptEncoder
from codellama_rt.llm.variants import VARIANTS
from codellama_rt.text.tokenizer import load_tokenizer
from codellama_rt.text.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

PARAMS = SamplingParams(max_tokens=8)
NAMES = ("<PRE>", "<SUF>", "<MID>", "<EOT>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<s>", "</s>")


@pytest.fixture(scope="module")
def code_llama(shared_dir):
    """Code Llama's own vocabulary, in which merges form its infilling tokens."""
    return load_tokenizer(shared_dir / "data" / "tokenizer" / "codellama-32016")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["{}", " {}", "x {} y", "x{}y", "a\n{}\nb", "{} {}", "({})"])
def test_names_in_a_prompt_stay_text(code_llama, name, text):
    prompt = text.replace("{}", name)
    ids, _ = PromptEncoder(code_llama).completion(prompt, PARAMS)
    assert ids[0] == code_llama.bos_id
    assert not code_llama.special_ids & set(ids[1:])
    assert code_llama.decode(ids) == prompt.replace("▁", " ")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix_first", [False, True])
def test_names_around_a_gap_stay_text(code_llama, name, suffix_first):
    text = f"x {name} y {name}"
    ids = PromptEncoder(code_llama).infilling(text, text, PARAMS, suffix_first=suffix_first)[0]
    tokens = [i for i in ids if i in code_llama.special_ids]
    marks = [code_llama.prefix_id, code_llama.suffix_id, code_llama.middle_id]
    assert tokens == [code_llama.bos_id, *marks]


@pytest.mark.parametrize(
    "suffix", [")", ".b", ",", ": x", "(", "[0]", "{", '"', "'", "", "\n    x", " x"]
)
@pytest.mark.parametrize("prefix", ["", "def f(", "x = ", " ", "\n", "# <PRE> <MID> <EOT>\n"])
def test_a_template_written_out(code_llama, prefix, suffix):
    prompts = PromptEncoder(code_llama)
    expected, _ = prompts.infilling(prefix, suffix, PARAMS)
    ids, params = prompts.completion(f"<PRE> {prefix} <SUF>{suffix} <MID>", PARAMS)
    assert ids == expected
    assert params == PARAMS, "the engine ends at <EOT> whatever holds <MID>"
    if "<MID>" not in prefix:
        other, _ = prompts.infilling(prefix, suffix, PARAMS, suffix_first=True)
        assert prompts.completion(f"<PRE> <SUF>{suffix} <MID> {prefix}", PARAMS)[0] == other
    if prefix and not prefix.startswith(" "):
        assert prompts.completion(f"<PRE>{prefix} <SUF> {suffix} <MID>", PARAMS)[0] == expected


def test_a_template_around_a_fill_token(code_llama):
    """The whole template counts first: what is in it is a user's text."""
    prompts = PromptEncoder(code_llama)
    expected, _ = prompts.infilling("a <FILL_ME> <FILL_ME>", "b", PARAMS)
    assert prompts.completion("<PRE> a <FILL_ME> <FILL_ME> <SUF>b <MID>", PARAMS)[0] == expected


@pytest.mark.parametrize("name", ["CodeLlama-34b", "CodeLlama-70b-Python"])
def test_a_model_that_cannot_infill_takes_the_template_as_text(code_llama, name):
    prompt = "<PRE> a <SUF>b <MID>"
    ids, _ = PromptEncoder(code_llama, None, VARIANTS[name]).completion(prompt, PARAMS)
    assert ids == code_llama.encode_plain(prompt, bos=True)
    plain = SentencePieceTokenizer(sentencepiece_model(infilling=False))
    assert PromptEncoder(plain).completion(prompt, PARAMS)[0] == plain.encode(prompt)


# Ends


def opened(folder, **files):
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    return clrt.LLM(folder, kv_memory=KV_MEMORY)


def ended_by(llm, prompt, token_id, **params):
    """Whether a token that is forced ends the output at once."""
    params = SamplingParams(max_tokens=4, logit_bias={token_id: 100}, **params)
    (completion,) = llm.generate([prompt], params)
    assert set(completion.token_ids) == {token_id}
    return completion.finish_reason == "stop" and len(completion.token_ids) == 1


def config_with(eos):
    return {"tokenizer_class": "LlamaTokenizer", "eos_token": eos}


def test_ends_of_every_file(tmp_path):
    folder = make_folder(tmp_path / "model", generation_config={"eos_token_id": [300, 301]})
    added = {"<|im_end|>": 421, "<|eot_id|>": 422, "<tag>": 423}
    with opened(folder, tokenizer_config=config_with("<|im_end|>"), added_tokens=added) as llm:
        assert llm.engine.admission.eos_token_ids == (300, 301, 2, 421, 422)
        for end in (300, 301, 2, 421, 422):
            assert ended_by(llm, [1, 100], end)
        for other in (423, 299, llm.tokenizer.eot_id):
            assert not ended_by(llm, [1, 100], other)
        assert not ended_by(llm, [1, 100], 421, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with opened(make_folder(tmp_path_factory.mktemp("prompts") / "model")) as model:
        yield model


def test_eot_ends_whatever_holds_mid(llm):
    tokenizer = llm.tokenizer
    for prompt in (
        [tokenizer.middle_id],
        [1, tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id],
        tokenizer.encode_infill("a", "b"),
        tokenizer.encode_infill("a", "b", suffix_first=True),
        "<PRE> a <SUF>b <MID>",
        "a<FILL_ME>b",
    ):
        assert ended_by(llm, prompt, tokenizer.eot_id)
        assert not ended_by(llm, prompt, tokenizer.eot_id, ignore_eos=True)
    for prompt in ([1, tokenizer.prefix_id], "a", "a <MID>"):
        assert not ended_by(llm, prompt, tokenizer.eot_id)


@pytest.mark.parametrize("name", ["</s>", "<EOT>", "▁<EOT>", "<MID>", "<s>", "<unk>"])
def test_a_stop_string_that_names_a_control_token(llm, name):
    token_id = llm.tokenizer.control_id(name)
    params = SamplingParams(
        max_tokens=4, logit_bias={token_id: 100}, stop=["zz", name], ignore_eos=True
    )
    (completion,) = llm.generate([[100]], params)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", name)
    assert completion.token_ids == [token_id]
    assert completion.text == ""


def test_a_stop_string_before_min_tokens(llm):
    params = SamplingParams(max_tokens=6, min_tokens=3, logit_bias={2: 100}, stop="</s>")
    (completion,) = llm.generate([[100]], params)
    assert completion.token_ids[:3].count(2) == 0
    assert completion.token_ids[3] == 2


def test_a_stop_string_that_is_text(llm):
    (completion,) = llm.generate([[100]], SamplingParams(max_tokens=4, stop="</s", ignore_eos=True))
    assert llm.tokenizer.control_id("</s") is None
    assert completion.finish_reason == "length"
