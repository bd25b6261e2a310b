"""The command line: text on stdout and nothing else, one line for an error, exit codes."""

import io
import json
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from tiny_llm import make_folder

import codellama_rt as clrt
from codellama_rt import cli, cli_run
from codellama_rt.cli_options import SamplingOptions
from codellama_rt.engine import Engine
from codellama_rt.sampling_params import SamplingParams

PROMPT = "def add(first, second):"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model") / "infilling"))


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model") / "plain", infilling=False))


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run_it(*args, stdin=None):
        stream = io.TextIOWrapper(io.BytesIO((stdin or "").encode()))
        monkeypatch.setattr(stream, "isatty", lambda: stdin is None)
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(SystemExit) as ended:
            cli.app([str(arg) for arg in args], prog_name="codellama-rt")
        return ended.value.code, *capsys.readouterr()

    return run_it


def assert_one_line_error(result, *words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("codellama-rt: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


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


def test_every_sampling_parameter_has_an_option():
    options = {field.name for field in fields(SamplingOptions)}
    renamed = {"max_tokens": "max_new_tokens", "stop_token_ids": "stop_token_id"}
    assert {renamed.get(f.name, f.name) for f in fields(SamplingParams)} == options


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
        run("convert", model, "--quantization", "int4", "--out", out), "is there already"
    )
    assert_one_line_error(
        run("convert", out, "--quantization", "int8", "--out", tmp_path / "b"), "in int4 already"
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


def test_infill_writes_the_filling_alone(run, model, tmp_path):
    path = tmp_path / "hole.py"
    path.write_bytes(b"def add(<FILL_ME>):\r\n    return first")
    with clrt.LLM(model) as llm:
        params = SamplingParams(max_tokens=12)
        expected = [
            llm.infill("def add(", "):\r\n    return first", params, suffix_first=order).text
            for order in (False, True)
        ]
    assert expected[0] != expected[1]
    options = ("--max-new-tokens", 12)
    assert run("infill", model, path, *options) == (0, expected[0], "")
    assert run("infill", model, path, "--suffix-first", *options) == (0, expected[1], "")
    assert run("infill", model, "-", *options, stdin=path.read_bytes().decode())[1] == expected[0]


def test_infill_takes_prefix_and_suffix(run, model, tmp_path):
    prefix, suffix = tmp_path / "prefix", tmp_path / "suffix"
    prefix.write_text("a <FILL_ME>")  # stays text here
    suffix.write_text(" b")
    with clrt.LLM(model) as llm:
        expected = llm.infill("a <FILL_ME>", " b", SamplingParams(max_tokens=6)).text
    result = run("infill", model, "--prefix", prefix, "--suffix", suffix, "--max-new-tokens", 6)
    assert result == (0, expected, "")


def test_infill_in_place_changes_the_gap_alone(run, model, tmp_path):
    path = tmp_path / "hole.py"
    path.write_bytes(b"a = (<FILL_ME>)\r\n")
    path.chmod(0o640)
    filling = run("infill", model, path, "--max-new-tokens", 5)[1]
    assert run("infill", model, path, "--max-new-tokens", 5, "--in-place") == (0, "", "")
    assert path.read_bytes().decode() == f"a = ({filling})\r\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["hole.py"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("generate", "no-such-model", "-p", "x"), ["no-such-model", "found no such file"]),
        (("generate", "MODEL", "-p", "x", "--temperature", -1), ["temperature", "-1"]),
        (("generate", "MODEL", "-p", "x", "--temperature", "nan"), ["temperature", "finite"]),
        (("generate", "MODEL", "-p", "x", "--n", 65), ["n must be"]),
        (("generate", "MODEL", "-p", "x", "--logit-bias", "a=1"), ["--logit-bias", "a=1"]),
        (("generate", "MODEL", "-p", "x", "--device", "cuda"), ["cuda", "available: cpu"]),
        (("generate", "MODEL", "-p", "x", "--dtype", "int3"), ["dtype", "int3"]),
        (("generate", "MODEL", "-p", "x", "--kv-dtype", "int3"), ["kv_dtype", "int4", "int3"]),
        (("generate", "MODEL", "-p", "x", "--kv-dtype", "int4"), ["head_dim", "kv_dtype='int8'"]),
        (("generate", "MODEL", "-p", "x", "--quantization", "q4"), ["int8, int4, got 'q4'"]),
        (("convert", "MODEL", "--quantization", "q4", "--out", "x"), ["int8, int4, got 'q4'"]),
        (("convert", "nowhere", "--quantization", "int4", "--out", "x"), ["found no such file"]),
        (("generate", "MODEL", "-p", "x", "--kv-memory", "much"), ["memory size", "much"]),
        (("generate", "MODEL", "-p", "x", "--kv-memory", "1B"), ["KV cache", "raise kv_memory"]),
        (("generate", "MODEL", "-p", "x y z", "--max-model-len", 3), ["max_model_len=3"]),
        (("generate", "MODEL", "-p", "x", "--num-threads", 0), ["num_threads"]),
        (("generate", "MODEL", "-p", "<FILL_ME> <FILL_ME>"), ["one <FILL_ME>"]),
        (("generate", "MODEL", "-p", "x", "--prompt-file", "y"), ["given twice"]),
        (("generate", "MODEL", "--prompt-file", "no-such-file"), ["no-such-file"]),
        (("generate", "MODEL"), ["no prompt"]),
        (("generate", "PLAIN", "-p", "a <FILL_ME>"), ["cannot infill"]),
        (("infill", "MODEL"), ["FILE with <FILL_ME>, or --prefix"]),
        (("infill", "MODEL", "x", "--prefix", "y"), ["FILE with <FILL_ME>, or --prefix"]),
        (("infill", "MODEL", "no-such-file"), ["no-such-file"]),
        (("infill", "MODEL", "--prefix", "README", "--in-place"), ["README"]),
    ],
)
def test_a_mistake_is_told_in_one_line(run, model, plain_model, args, words):
    places = {"MODEL": model, "PLAIN": plain_model}
    assert_one_line_error(run(*(places.get(arg, arg) for arg in args)), *words)


def test_files_that_infill_cannot_take(run, model, tmp_path):
    path = tmp_path / "text"
    path.write_text("no gap")
    assert_one_line_error(run("infill", model, path), str(path), "no <FILL_ME>")
    path.write_bytes(b"\xff<FILL_ME>")
    assert_one_line_error(run("infill", model, path), str(path), "not UTF-8", "byte 0")
    path.write_text("<FILL_ME><FILL_ME>")
    assert_one_line_error(run("infill", model, path), "one <FILL_ME>")
    path.write_text("<FILL_ME>")
    assert_one_line_error(run("infill", model, path, "--in-place", "--json"), "--in-place")


def test_a_model_without_a_tokenizer(run, tmp_path):
    folder = make_folder(tmp_path / "weights", tokenizer=False)
    assert_one_line_error(run("generate", folder, "-p", "x"), str(folder), "no tokenizer")


def test_debug_lets_the_exception_through(model):
    with pytest.raises(ValueError, match="temperature"):
        cli.app(["generate", model, "-p", "x", "--temperature", "-1", "--debug"])


def test_a_fault_of_ours_is_not_hidden(model, monkeypatch):
    monkeypatch.setattr(Engine, "step", lambda self: {}["fault"])
    with pytest.raises(KeyError, match="fault"):
        cli.app(["generate", model, "-p", "x"])


def test_an_interrupt_gives_the_request_up(run, model, monkeypatch):
    engines = []

    def step(engine):
        engines.append(engine)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", step)
    code, out, err = run("generate", model, "-p", PROMPT)
    assert (code, out, err) == (130, "", "codellama-rt: interrupted\n")
    assert not engines[0].has_unfinished()


def start(*args):
    command = [sys.executable, "-m", "codellama_rt.cli", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def endless(model):
    options = ("--max-new-tokens", "8000", "--max-model-len", "9000", "--ignore-eos")
    return start("generate", model, "-p", PROMPT, *options)


def test_ctrl_c_ends_a_running_process(model):
    with endless(model) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == b"codellama-rt: interrupted\n"


def test_a_reader_may_leave(model):
    with endless(model) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert err == b""


def test_progress_is_shown_on_a_terminal_alone(run, model, monkeypatch):
    long_prompt = "first + second\n" * 200
    quiet = run("generate", model, "--max-new-tokens", 2, stdin=long_prompt)
    assert quiet[2] == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    code, out, err = run("generate", model, "--max-new-tokens", 2, stdin=long_prompt)
    assert (code, out) == quiet[:2]
    assert "opening" in err
    assert "reading the prompt" in err


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    commands = ("generate", "infill", "chat", "convert", "doctor")
    assert all(f"  {command} " in out for command in commands)


def test_the_command_line_starts_light():
    heavy = ["numpy", "mindspore", "sentencepiece", "tokenizers", "gguf", "jinja2", "rich"]
    script = f"import sys, codellama_rt.cli; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout == "[]\n"


def test_doctor_tells_what_there_is(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    for word in ("numpy", "MindSpore", "instruction set", "threads", "GB/s", "bfloat16",
                 "KV caches", "int4", "q6_k", "custom ops", "device cpu", "device cuda",
                 "no: this build"):  # fmt: skip
        assert word in out


def test_doctor_speaks_json(run):
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["isa"] in found["isas"] == clrt.ops.available_isas()
    assert found["threads"] == clrt.ops.num_threads()
    assert found["read_bandwidth"] > 0
    assert found["devices"]["cpu"][0]
    assert not found["devices"]["ascend"][0]
    assert found["packages"]["numpy"] == np.__version__


def test_doctor_says_that_the_kernels_are_not_built(run, monkeypatch):
    monkeypatch.delattr(clrt, "_core")
    monkeypatch.setitem(sys.modules, "codellama_rt._core", None)
    code, out, _ = run("doctor")
    assert code == 0
    assert "_core" in out
    assert "instruction set" not in out


def test_doctor_knows_which_numpy_mindspore_wants(monkeypatch):
    from codellama_rt import doctor

    versions = {"mindspore": "2.10.0", "numpy": "2.1.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    assert "pip install 'numpy<2'" in doctor.examine(0.01)["mindspore"]
    del versions["mindspore"]
    assert "not installed" in doctor.examine(0.01)["mindspore"]


def test_doctor_names_a_library_that_does_not_load(tmp_path):
    from codellama_rt import doctor

    broken = tmp_path / "libcodellama_rt_cpu.so"
    broken.write_bytes(b"not a library")
    assert "cannot be loaded" in doctor._custom_ops(broken)
    mapped = Path("/proc/self/maps").read_text().split()
    another = next(word for word in mapped if "libc.so" in word)
    assert "lacks" in doctor._custom_ops(Path(another))
