"""The options of the command line: choices, what they cover, and how errors name them."""

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

import codellama_rt
from codellama_rt import ops
from codellama_rt.checkpoint.quantize import QUANTIZATIONS
from codellama_rt.cli import options
from codellama_rt.cli import run as cli_run
from codellama_rt.cli.errors import _OPTIONS, in_options
from codellama_rt.cli.options import ModelOptions, SamplingOptions
from codellama_rt.engine.speculation import SPECULATIONS
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.placement import RUNTIMES
from codellama_rt.model.kv_cache import KV_DTYPES
from codellama_rt.ops.dtypes import FLOAT_DTYPES

NOT_OPTIONS = {
    *("self", "prefix_caching", "attention", "check", "progress"),
    *("logits_processors", "max_step_seconds"),
}
COMMANDS = (
    *("generate", "infill", "chat", "eval humaneval", "eval infilling", "eval perplexity"),
    *("eval mbpp", "eval needle", "serve"),
)


def test_the_choices_are_those_of_the_runtime():
    assert get_args(options.DtypeName) == ("auto", *FLOAT_DTYPES)
    assert get_args(options.QuantizationName) == QUANTIZATIONS
    assert set(get_args(options.KvDtypeName)) == {"auto", *KV_DTYPES, "fp8"}  # that of cuda
    assert get_args(options.RuntimeName) == RUNTIMES
    assert get_args(options.SpeculationName) == SPECULATIONS
    for device in get_args(options.DeviceName):
        ops.available(device)


def test_what_llm_takes_has_an_option_with_the_same_default():
    parameters = inspect.signature(LLM).parameters
    given = {field.name: field.default for field in fields(ModelOptions)}
    assert given.keys() == parameters.keys() - NOT_OPTIONS
    for name in given.keys() - {"model"}:
        assert given[name] == parameters[name].default


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_choices(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    for words in ("cpu|cuda|ascend", "int8|int4", "auto|float32|float16|bfloat16"):
        assert words in out
    for option in ("--adapter", "--max-num-batched-tokens", "--max-num-seqs", "--block-size"):
        assert option in out


def test_options_reach_the_model(run, model, monkeypatch):
    opened = {}

    class Opened(Exception):
        pass

    def open_it(model, **given):
        opened.update(given)
        raise Opened

    monkeypatch.setattr(cli_run, "LLM", open_it)
    rope = ("--rope-theta", "1e6", "--rope-scaling", '{"rope_type": "linear", "factor": 4}')
    words = (*rope, "--max-num-batched-tokens", 32, "--max-num-seqs", 3, "--block-size", 32)
    with pytest.raises(Opened):
        run("generate", model, "-p", "x", *words, "--adapter", model, "--kv-memory", "1MB")
    assert opened.pop("progress")
    assert opened == {
        field.name: field.default for field in fields(ModelOptions) if field.name != "model"
    } | {
        "max_num_batched_tokens": 32,
        "max_num_seqs": 3,
        "block_size": 32,
        "adapter": Path(model),
        "kv_memory": "1MB",
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "linear", "factor": 4},
    }


@pytest.mark.parametrize("text", ["linear", "4", "[1]", '{"rope_type": "linear"', "[" * 10**5])
def test_a_scaling_that_is_no_object(run, model, text):
    code, _, err = run("generate", model, "-p", "x", "--rope-scaling", text)
    assert code == 2
    assert "expected JSON such as" in err


def test_a_small_step_gives_the_same_text(run, model):
    words = ("generate", model, "-p", "def add(first, second):", "--max-new-tokens", 9)
    small = ("--max-num-batched-tokens", 4, "--block-size", 16, "--max-num-seqs", 1)
    assert run(*words, *small) == run(*words)


def test_errors_know_every_option():
    names = {field.name for cls in (ModelOptions, SamplingOptions) for field in fields(cls)}
    python_names = {
        "json_schema": "json",
        "max_new_tokens": "max_tokens",
        "stop_token_id": "stop_token_ids",
        "allowed_token_id": "allowed_token_ids",
        "bad_word": "bad_words",
    }
    assert {python_names.get(name, name) for name in names} - {"model"} <= _OPTIONS.keys()


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("use kv_dtype='int8'", "use --kv-dtype int8"),
        ("at most max_model_len=4096; raise it", "at most --max-model-len 4096; raise it"),
        ("temperature must be >= 0.0", "--temperature must be >= 0.0"),
        ("SamplingParams: max_tokens must be", "--max-new-tokens must be"),
        ("device 'cuda' cannot be used", "--device cuda cannot be used"),
        ("raise kv_memory.", "raise --kv-memory."),
        ("/models/kv_memory/x: damaged", "/models/kv_memory/x: damaged"),
        ("stop strings need a tokenizer", "stop strings need a tokenizer"),
        ("the device is full", "the device is full"),
    ],
)
def test_errors_name_options(message, told):
    assert in_options(message) == told


def test_version(run):
    assert run("--version") == (0, f"codellama-rt {codellama_rt.__version__}\n", "")


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "codellama_rt", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"codellama-rt {codellama_rt.__version__}\n"


def test_completion_of_a_shell():
    script = (
        "import os; os.environ.update(_CODELLAMA_RT_COMPLETE='complete_bash', "
        "COMP_WORDS='codellama-rt generate --kv', COMP_CWORD='2');"
        "from codellama_rt.cli.main import main; main()"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.split() == ["--kv-dtype", "--kv-memory"]


def test_no_command_shows_the_help(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: codellama-rt")
    assert "--install-completion" in err
