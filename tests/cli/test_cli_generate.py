"""`codellama-rt generate` and `convert`: text on stdout and nothing else."""

import json
import re
from dataclasses import fields

import pytest
from helpers.cli_calls import PROMPT, assert_one_line_error

import codellama_rt as clrt
from codellama_rt.cli import main as cli
from codellama_rt.cli import run as cli_run
from codellama_rt.cli.options import SamplingOptions
from codellama_rt.engine.sampling_params import SamplingParams


def test_generate_writes_the_text_alone(run, model):
    expected = clrt.generate(model, PROMPT, max_new_tokens=20)
    assert run("generate", model, "-p", PROMPT, "--max-new-tokens", 20) == (0, expected, "")


def test_generate_writes_text_as_it_comes(run, model, monkeypatch):
    pieces = []
    monkeypatch.setattr(cli, "_to_stdout", pieces.append)
    code, out, _ = run("generate", model, "-p", PROMPT, "--max-new-tokens", 20)
    assert (code, out) == (0, "")
    assert len([piece for piece in pieces if piece]) > 3


@pytest.mark.parametrize("option", [(), ("--prompt", "-"), ("--prompt-file", "-")])
def test_the_prompt_comes_from_stdin(run, model, option):
    prompt = "def f():\r\n    é\n"
    expected = clrt.generate(model, prompt, max_new_tokens=8)
    assert run("generate", model, *option, "--max-new-tokens", 8, stdin=prompt)[1] == expected


def test_the_prompt_comes_from_a_file(run, model, tmp_path):
    path = tmp_path / "prompt"
    path.write_bytes(b"def f():\r\n")
    expected = clrt.generate(model, "def f():\r\n", max_new_tokens=8)
    assert run("generate", model, "--prompt-file", path, "--max-new-tokens", 8)[1] == expected


def test_a_prompt_may_ask_for_a_filling(run, model):
    prompt = "def add(<FILL_ME>):\n    return first + second"
    expected = clrt.generate(model, prompt, max_new_tokens=12)
    assert run("generate", model, "-p", prompt, "--max-new-tokens", 12)[1] == expected


def test_sampling_options_reach_the_engine(run, model):
    options = ("--temperature", 0.9, "--top-k", 40, "--top-p", 0.95, "--seed", 7)
    expected = clrt.generate(
        model, PROMPT, temperature=0.9, top_k=40, top_p=0.95, seed=7, max_new_tokens=16
    )
    assert run("generate", model, "-p", PROMPT, *options, "--max-new-tokens", 16)[1] == expected


def test_stop_ends_the_text(run, model):
    text = clrt.generate(model, PROMPT, max_new_tokens=30)
    stop = text[6:8]
    result = run("generate", model, "-p", PROMPT, "--stop", stop, "--max-new-tokens", 30)
    assert result[1] == text[: text.index(stop)]


def test_restrictions_reach_the_engine(run, model):
    words = ("generate", model, "-p", PROMPT, "--max-new-tokens", 12)
    text = clrt.generate(model, PROMPT, max_new_tokens=12)
    stop = text[6:8]
    kept = run(*words, "--stop", stop, "--include-stop-str-in-output")[1]
    assert kept == text[: text.index(stop)] + stop
    restricted = ("--allowed-token-id", 2, "--allowed-token-id", 300, "--ignore-eos")
    with clrt.LLM(model) as llm:
        for skips in (True, False):
            params = clrt.SamplingParams(
                max_tokens=12, allowed_token_ids=[2, 300], bad_words=["zz"], ignore_eos=True,
                skip_special_tokens=skips, logit_bias={2: 5.0},
            )  # fmt: skip
            expected = llm.generate(PROMPT, params)[0].text
            option = "--skip-special-tokens" if skips else "--no-skip-special-tokens"
            options = (*restricted, "--bad-word", "zz", "--logit-bias", "2=5", option)
            assert run(*words, *options)[1] == expected
            assert ("</s>" in expected) == (not skips)
    code, _, err = run(*words, "--allowed-token-id", 10**6)
    assert code != 0
    assert "--allowed-token-id" in err or "allowed_token_ids" in err


def test_every_sampling_parameter_has_an_option():
    options = {field.name for field in fields(SamplingOptions)}
    renamed = {
        "max_tokens": "max_new_tokens", "stop_token_ids": "stop_token_id",
        "allowed_token_ids": "allowed_token_id", "bad_words": "bad_word",
    }  # fmt: skip
    names = {f.name for f in fields(SamplingParams)}
    names -= {"logits_processors", "structured_outputs"}  # functions; an option per form
    forms = {"json_schema", "json_object", "regex", "choice", "grammar"}
    assert {renamed.get(name, name) for name in names} | forms == options


def test_options_replace_what_the_checkpoint_says():
    defaults = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=7)
    options = SamplingOptions(temperature=0.0, logit_bias=["3=-2.5", "4=1"], stop_token_id=[5])
    assert options.resolve(defaults) == SamplingParams(
        temperature=0.0, top_p=0.9, max_tokens=7, logit_bias={3: -2.5, 4: 1.0}, stop_token_ids=(5,)
    )


def test_stats_go_to_stderr(run, model):
    code, out, err = run("generate", model, "-p", PROMPT, "--max-new-tokens", 9, "--stats")
    assert code == 0
    assert out == clrt.generate(model, PROMPT, max_new_tokens=9)
    assert "output 9 tokens, ended by length" in err
    assert "decode 8 tokens" in err
    for unit in ("tok/s", "GB/s", "% of the"):
        assert unit in err


@pytest.mark.parametrize(("roof", "share"), [(1.0, ">100%"), (1e18, "0%")])
def test_stats_mark_a_limit_that_moved(run, model, monkeypatch, roof, share):
    monkeypatch.setattr(cli_run, "read_bandwidth", lambda: roof)
    _, _, err = run("generate", model, "-p", PROMPT, "--max-new-tokens", 9, "--stats")
    assert f"GB/s = {share} of the" in err
    assert ("more than the measured limit" in err) == (roof == 1.0)


def test_decode_traffic_is_counted_key_by_key(model):
    with clrt.LLM(model) as llm:
        report = cli_run.follow(llm, [1, 5, 6], SamplingParams(max_tokens=4), lambda text: None)
    assert report.decode_steps == 3
    assert report.decode_keys == 4 + 5 + 6


def test_quantised_weights_and_cache(run, model):
    options = {"quantization": "int4", "kv_dtype": "int8"}
    expected = clrt.generate(model, PROMPT, max_new_tokens=9, **options)
    assert expected != clrt.generate(model, PROMPT, max_new_tokens=9)
    words = ("--quantization", "int4", "--kv-dtype", "int8", "--max-new-tokens", 9, "--stats")
    code, out, err = run("generate", model, "-p", PROMPT, *words)
    assert (code, out) == (0, expected)
    assert "GB/s" in err


def test_convert_writes_what_generate_opens(run, model, tmp_path):
    out = tmp_path / "converted"
    code, text, err = run("convert", model, "--quantization", "int4", "--out", out)
    assert (code, text) == (0, "")
    assert err == f"{out}: 0.00 GB\n"
    expected = clrt.generate(model, PROMPT, quantization="int4", max_new_tokens=9)
    assert run("generate", out, "-p", PROMPT, "--max-new-tokens", 9) == (0, expected, "")
    assert_one_line_error(
        run("convert", model, "--quantization", "int4", "--out", out), "already exists"
    )
    assert_one_line_error(
        run("convert", out, "--quantization", "int8", "--out", tmp_path / "b"),
        "already quantised to int4",
    )


def test_json_gives_a_line_a_sample(run, model):
    code, out, err = run(
        "generate", model, "-p", PROMPT, "--n", 2, "--temperature", 1, "--seed", 1,
        "--max-new-tokens", 3, "--ignore-eos", "--logprobs", 1, "--prompt-logprobs", 0, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    samples = [json.loads(line) for line in out.splitlines()]
    assert [sample["index"] for sample in samples] == [0, 1]
    for sample in samples:
        assert sample["finish_reason"] == "length"
        for token_id, reported in zip(sample["token_ids"], sample["logprobs"], strict=True):
            assert reported[str(token_id)]["logprob"] < 0
        assert sample["prompt_logprobs"][0] is None
        assert len(sample["prompt_logprobs"]) == sample["stats"]["prompt_tokens"]


@pytest.mark.parametrize("option", ["--n", "--logprobs", "--prompt-logprobs"])
def test_what_is_no_text_needs_json(run, model, option):
    assert_one_line_error(run("generate", model, "-p", "x", option, 2), option, "--json")


def test_outputs_of_a_form(run, model, tmp_path):
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar"
    schema.write_text(
        '{"type": "array", "items": {"enum": ["é", 1]}, "minItems": 1, "maxItems": 2}'
    )
    grammar.write_text('root ::= "ab" [c-e]{2}\n')

    def told(*options):
        return run("generate", model, "-p", PROMPT, "--temperature", 1, "--seed", 1, *options)

    assert set(json.loads(told("--json-schema", schema)[1])) <= {"é", 1}
    assert re.fullmatch("ab[c-e]{2}", told("--grammar", grammar)[1])
    assert told("--choice", "left", "--choice", "right")[1] in ("left", "right")
    assert re.fullmatch("x[0-9]{3}", told("--regex", "x[0-9]{3}")[1])
    assert told("--json-object", "--max-new-tokens", 1)[1].startswith("{")


def test_forms_that_cannot_be(run, model, tmp_path):
    damaged = tmp_path / "schema.json"
    damaged.write_text("{")
    for options, words in [
        (("--regex", "("), "structured_outputs: regex cannot be used"),
        (("--regex", "a", "--choice", "b"), "got regex and choice"),
        (("--json-schema", damaged), "--json-schema must be a JSON schema"),
        (("--grammar", tmp_path / "missing"), "does not exist"),
    ]:
        code, _, err = run("generate", model, "-p", PROMPT, *options)
        assert code == 2
        assert words in err
