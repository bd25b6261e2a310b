"""The command line as a process: one line for an error, exit codes, interrupts, progress."""

import fcntl
import signal
import subprocess
import sys

import pytest
from helpers.cli_calls import PROMPT, assert_one_line_error
from helpers.tiny_llm import make_folder

from codellama_rt.cli import main as cli
from codellama_rt.engine.engine import Engine


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("generate", "no-such-model", "-p", "x"), ["no-such-model", "found no such file"]),
        (("generate", "MODEL", "-p", "x", "--temperature", -1), ["--temperature must", "-1"]),
        (
            ("generate", "MODEL", "-p", "x", "--temperature", "nan"),
            ["--temperature must", "finite"],
        ),
        (("generate", "MODEL", "-p", "x", "--n", 65), ["--n must be"]),
        (("generate", "MODEL", "-p", "x", "--logit-bias", "a=1"), ["--logit-bias", "a=1"]),
        (
            ("generate", "MODEL", "-p", "x", "--device", "cuda"),
            ["--device cuda cannot", "available: cpu"],
        ),
        (("generate", "MODEL", "-p", "x", "--dtype", "int3"), ["--dtype", "int3"]),
        (("generate", "MODEL", "-p", "x", "--kv-dtype", "int3"), ["--kv-dtype", "int4", "int3"]),
        (("generate", "MODEL", "-p", "x", "--kv-dtype", "int4"), ["head_dim", "--kv-dtype int8"]),
        (
            ("generate", "MODEL", "-p", "x", "--quantization", "q4"),
            ["--quantization", "'q4' is not one of"],
        ),
        (("convert", "MODEL", "--quantization", "q4", "--out", "x"), ["--quantization", "'q4'"]),
        (("convert", "nowhere", "--quantization", "int4", "--out", "x"), ["found no such file"]),
        (
            ("generate", "MODEL", "-p", "x", "--kv-memory", "much"),
            ["--kv-memory", "memory size", "much"],
        ),
        (("generate", "MODEL", "-p", "x", "--kv-memory", "1B"), ["KV cache", "raise --kv-memory"]),
        (("generate", "MODEL", "-p", "x y z", "--max-model-len", 3), ["--max-model-len 3"]),
        (("generate", "MODEL", "-p", "x", "--num-threads", 0), ["--num-threads must"]),
        (("generate", "MODEL", "-p", "<FILL_ME> <FILL_ME>"), ["--prompt: ", "one <FILL_ME>"]),
        (("generate", "MODEL", "-p", "x\udcff"), ["--prompt: ", "surrogates not allowed"]),
        (("generate", "MODEL", "-p", "x", "--adapter", "no-folder"), ["--adapter", "no-folder"]),
        (("generate", "MODEL", "-p", "x", "--block-size", 7), ["--block-size", "multiple of 16"]),
        (("generate", "MODEL", "-p", "x", "--max-num-seqs", 0), ["--max-num-seqs must"]),
        (("generate", "MODEL", "-p", "x", "--max-num-batched-tokens", 0), ["batched-tokens must"]),
        (("generate", "MODEL", "-p", "x", "--stop-token-id", 600), ["--stop-token-id[0] must"]),
        (("generate", "MODEL", "-p", "x", "--devise", "cpu"), ["--devise", "generate --help"]),
        (("generate",), ["MODEL", "generate --help"]),
        (("genrate", "MODEL"), ["genrate", "generate"]),
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


def test_a_model_without_a_tokenizer(run, tmp_path):
    folder = make_folder(tmp_path / "weights", tokenizer=False)
    assert_one_line_error(run("generate", folder, "-p", "x"), str(folder), "no tokenizer")


def test_debug_lets_the_exception_through(model):
    with pytest.raises(ValueError, match="temperature"):
        cli.app(["generate", model, "-p", "x", "--temperature", "-1", "--debug"])


def test_a_fault_of_ours_is_not_hidden(model, monkeypatch):
    monkeypatch.setattr(Engine, "advance", lambda self, inboxes: {}["fault"])
    with pytest.raises(KeyError, match="fault"):
        cli.app(["generate", model, "-p", "x"])


def test_an_interrupt_gives_the_request_up(run, model, monkeypatch):
    engines = []

    def advance(engine, inboxes):
        engines.append(engine)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "advance", advance)
    code, out, err = run("generate", model, "-p", PROMPT)
    assert (code, out, err) == (130, "", "codellama-rt: interrupted\n")
    assert not engines[0].has_unfinished()


def start(*args):
    command = [sys.executable, "-m", "codellama_rt.cli.main", *args]
    process = subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # then it waits for the reader
    return process


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
    script = f"import sys, codellama_rt.cli.main; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout == "[]\n"
