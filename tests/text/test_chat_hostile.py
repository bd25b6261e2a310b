"""Hostile templates and messages: bounded, refused by one class of error, and without a trace."""

import gc
import itertools
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import hostile_templates
from helpers.at_work import while_it_computes
from helpers.hostile_templates import HOSTILE, SECONDS

from codellama_rt.text.chat import JinjaFormat, Message, checked_messages, find_format, sandbox
from codellama_rt.text.chat.sandbox import ChatTemplateError, TemplateLimitError, render_template
from codellama_rt.text.tokenizer.tokenizer_config import TokenizerConfig

MAX_BYTES = 400_000_000
# The caller holds Python itself, and of the longest reply the bytes and the text: how much memory
# that takes depends on which replies are complete in time.
MAX_BYTES_OF_CALLER = 64 * 2**20 + 3 * 4 * sandbox.MAX_TEXT
SLACK = 60  # seconds, to start a process on a busy machine
ENDLESS = "{{ 1|round(10**8, 'ceil') }}"
TOO_LARGE = "{{ 'a' * 10**9 }}"


@pytest.fixture
def hasty(monkeypatch):
    """Shorten the time that a template may take."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1.0)


def test_hostile_templates_are_bounded_and_leave_nothing_behind():
    """In one process that renders nothing else, which each process of a test run would repeat."""
    command = [sys.executable, hostile_templates.__file__]
    run = subprocess.run(command, capture_output=True, check=True, timeout=3600, env=_env())
    rendered = json.loads(run.stdout)
    assert rendered["results"].keys() == HOSTILE.keys()
    faults = {name: result for name, result in rendered["results"].items() if _fault(name, result)}
    assert faults == {}
    of_the_caller, of_the_workers = rendered["peaks"]
    assert of_the_caller < MAX_BYTES_OF_CALLER
    assert of_the_workers < MAX_BYTES


def _fault(name, result):
    """Return whether a template came to an end that it must not."""
    kind, is_text = name.split(":")[0], result["kind"] == "text"
    if kind == "time" and result["kind"] != "TemplateLimitError":
        return True
    if kind == "outside" and is_text and result["text"]:
        return True
    is_error = result["kind"] in ("ChatTemplateError", "TemplateLimitError")
    is_told = is_text or (is_error and "chat template" in result["text"])
    return not is_told or result["seconds"] > SECONDS + SLACK or result["after"] != "1000"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% break %}", "'break' outside loop"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
        ("{% macro m(a, a) %}{% endmacro %}", "duplicate argument"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion depth"),
        ("{{ '%c' % 99999999999 }}", "OverflowError|not in range|too large"),
        ("{{ 1 is divisibleby 0 }}", "modulo by zero"),
        ("{{ [1, 'a']|sort }}", "not supported between"),
    ],
)
def test_whatever_a_template_raises_is_one_error(template, reason):
    """SyntaxError of Python's compiler, too, which is no ValueError."""
    with pytest.raises(ChatTemplateError, match=f"^chat template: .*({reason})"):
        render_template(template, {})


def test_a_limit_is_a_kind_of_its_own(hasty):
    with pytest.raises(TemplateLimitError, match="needs too much memory"):
        render_template(TOO_LARGE, {})
    with pytest.raises(TemplateLimitError, match="computes for more than"):
        render_template(ENDLESS, {})


class OfNoNames:
    """A tokenizer without control tokens."""

    bos_id = eos_id = unk_id = pad_id = None
    special_names = ()

    def split_special(self, text):
        return [text]

    def encode_rendered(self, parts):
        return parts


class OfMeta(OfNoNames):
    """One with the control tokens that Meta's format needs."""

    bos_id, eos_id, config = 1, 2, TokenizerConfig(spacing="each")

    def piece(self, token_id):
        return {1: "<s>", 2: "</s>"}[token_id]


def test_a_template_at_a_limit_is_not_taken_for_another_format(hasty):
    """Otherwise the ids of a conversation would depend on the load of the machine."""
    with pytest.raises(TemplateLimitError):
        find_format("[INST]" + ENDLESS, OfMeta())


@pytest.mark.parametrize("character", ["a", "\xe9", "\u4e2d", "\x01", "\n", "\ud800"])
def test_output_up_to_the_bound_is_returned_and_beyond_it_refused(character, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_TEXT", 10**6)
    template = "{{ x * n }}"
    names = {"x": character, "n": 10**6}
    assert render_template(template, names) == character * 10**6
    with pytest.raises(ChatTemplateError, match="it writes more than 1000000 characters"):
        render_template(template, {**names, "n": 10**6 + 1})


@pytest.mark.parametrize(
    "hoarder",
    [
        "{% set n = namespace() %}{% set n.n = n %}{% set n.x = x * 90000000 %}",  # a cycle
        "{% set y = 'a' * 70000000 %}{{ y|length }}",  # folded into the compiled template
    ],
    ids=["cycle", "compiled"],
)
def test_memory_that_a_template_keeps_is_not_missing_for_the_next(hoarder, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 60)
    render_template(hoarder, {"x": "a"})
    assert render_template("{{ (x * 310000000)|length }}", {"x": "a"}) == "310000000"


def test_ordinary_templates_keep_their_process():
    texts = [{"role": "user", "content": str(i) * 200_000} for i in range(10)]
    pids = set()
    for _ in range(20):
        render_template(
            "{% for m in messages %}{{ m.content|trim }}{% endfor %}", {"messages": texts}
        )
        pids.add(sandbox._shared._process.pid)
    assert len(pids) == 1


def test_threads_render_beside_hostile_ones(hasty):
    def render(i):
        if i % 8 == 0:
            with pytest.raises(TemplateLimitError):
                render_template((ENDLESS, TOO_LARGE)[i // 8 % 2], {})
            return str(i)
        return render_template("{{ x }}", {"x": i})

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(render, range(64))) == [str(i) for i in range(64)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_renders_while_a_thread_holds_the_worker(method, hasty):
    """A forked process has the lock in the state it was in, which no thread of it would end."""
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(_refused, ENDLESS)
        while not sandbox._shared._lock.locked() and not busy.done():
            time.sleep(0.001)
        with multiprocessing.get_context(method).Pool(1) as processes:
            assert processes.apply_async(render_template, ("{{ 2 }}", {})).get(60) == "2"
        assert "computes for more than" in busy.result()
    assert render_template("{{ 3 }}", {}) == "3"


def _refused(template):
    with pytest.raises(ChatTemplateError) as caught:
        render_template(template, {})
    return str(caught.value)


def test_an_interrupt_ends_the_template():
    def interrupt(number, frame):
        raise KeyboardInterrupt

    def send(pid):
        processes.append(sandbox._shared._process)
        os.kill(os.getpid(), signal.SIGUSR1)

    processes, before = [], signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), while_it_computes(send):
            render_template(ENDLESS, {})
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert processes[0].returncode == -signal.SIGKILL  # by us; at its limit it ends by SIGPROF
    assert not Path(f"/proc/{processes[0].pid}").exists()
    assert render_template("{{ 1 }}", {}) == "1"


def test_a_worker_that_was_killed_meanwhile_is_replaced():
    render_template("", {})
    pid = sandbox._shared._process.pid
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert render_template("{{ 1 }}", {}) == "1"


def test_a_worker_that_is_killed_at_work_is_an_error():
    ended = pytest.raises(TemplateLimitError, match="its process ended with status -9")
    with ended, while_it_computes(lambda pid: os.kill(pid, signal.SIGKILL)):
        render_template(ENDLESS, {})
    assert render_template("{{ 1 }}", {}) == "1"


def test_without_file_descriptors_the_error_says_so():
    sandbox._shared.stop()
    gc.collect()  # of what other tests have left, which may hold files
    limits, open_before = resource.getrlimit(resource.RLIMIT_NOFILE), os.listdir("/proc/self/fd")
    is_open = set(map(int, open_before))
    free = [fd for fd in range(max(is_open) + 13) if fd not in is_open]
    found = set()
    try:
        for limit in free[:13]:  # none may be opened, then one more each time
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
            try:
                found.add(render_template("{{ 1 }}", {}))
            except RuntimeError as error:
                found.add(str(error).partition(": ")[2])
            sandbox._shared.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    refusal = "the process that renders it cannot be started: Too many open files"
    assert found == {"1", refusal}
    assert os.listdir("/proc/self/fd") == open_before
    assert render_template("{{ 1 }}", {}) == "1"


def test_a_lower_limit_of_memory_is_kept():
    """A service manager may have set one; the worker cannot raise it, and need not."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (300 * 2**20,) * 2)\n"
        "from codellama_rt.text.chat.sandbox import render_template\n"
        "print(render_template('{{ 1 }}', {}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, env=_env())
    assert run.stdout == b"1\n", run.stderr


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed, tmp_path):
    code = (
        "import sys; from codellama_rt.text.chat.sandbox import render_template\n"
        "open(sys.argv[1], 'w').write(render_template('{{ 1 }}', {}) * 2)"
    )
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code, tmp_path / "a"]
    subprocess.run(command, check=True, timeout=60, env=_env())
    assert (tmp_path / "a").read_text() == "11"


def _env():
    """Variables of a process whose memory does not grow with the CPUs, for each a thread."""
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"}


def _cyclic():
    value = []
    value.append(value)
    return value


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def _doubled(times):
    value = [1]
    for _ in range(times):
        value = [value, value]
    return value


NOT_JSON = {
    "not a number": (math.nan, ValueError, "finite numbers, got nan"),
    "infinity": ([{"a": -math.inf}], ValueError, "finite numbers, got -inf"),
    "cycle": (_cyclic(), ValueError, "64 levels at most, none that contains itself"),
    "many cycles": ([_cyclic()] * 1000, ValueError, "at most"),
    "deep": (_nested(100_000), ValueError, "64 levels at most"),
    "shared": (_doubled(50), ValueError, "1000000 values at most"),
    "many values": ([None] * 10**6, ValueError, "1000000 values at most"),
    "long text": ("a" * (8 * 10**6 + 1), ValueError, "8000000 characters at most"),
    "long key": ({"a" * 5_000_000: "b" * 5_000_000}, ValueError, "8000000 characters at most"),
    "int as a key": ({1: 2}, TypeError, "keys of variables must be str, got int"),
    "none as a key": ([{None: 2}], TypeError, "keys of variables must be str, got NoneType"),
    "bytes": (b"a", TypeError, "JSON's types, got bytes"),
    "set": ({1, 2}, TypeError, "JSON's types, got set"),
    "object": (object(), TypeError, "JSON's types, got object"),
    "long number": (10**5000, ValueError, "digits"),
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_variables_that_are_not_json_are_refused_before_they_are_sent(name, monkeypatch):
    value, error, reason = NOT_JSON[name]
    monkeypatch.setattr(sandbox._shared, "ask", None)
    with pytest.raises(error, match=reason) as caught:
        render_template("{{ x }}", {"x": value})
    assert not isinstance(caught.value, ChatTemplateError)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (_nested(60), "[" * 61 + "]" * 61),
        ([True, None, 1, 1.5, -(2**70)], "[True, None, 1, 1.5, -1180591620717411303424]"),
        ({"a\ud800": ("\x00",)}, "{'a\\ud800': ['\\x00']}"),
        ({}, "{}"),
    ],
)
def test_odd_variables_that_are_json_arrive(value, text):
    assert render_template("{{ x }}", {"x": value}) == text


def test_the_longest_variables_arrive():
    text = "\U0001f600" * 3_999_998
    assert render_template("{{ x|length }}", {"x": text, "y": text}) == "3999998"


@pytest.mark.parametrize(
    ("messages", "error", "reason"),
    [
        ([{"role": "user", "content": "a\udc80"}], ValueError, r"messages\[0\].*surrogate.* 1"),
        ([{"role": "user", "content": _cyclic()}], ValueError, "nested at most 32 deep"),
        ([{"role": "user", "content": math.nan}], TypeError, "content must be a str, got float"),
        ([{"role": "user", "content": "a", 5: 6}], TypeError, "values of JSON only, got dict"),
        ([{"role": "user", "content": "a", "b": _cyclic()}], ValueError, "nested at most 32 deep"),
        ([{"role": _cyclic(), "content": "a"}], ValueError, "nested at most 32 deep"),
        ([{"role": ["user"], "content": "a"}], ValueError, "role must be one of"),
        ([_cyclic()], TypeError, r"messages\[0\] must be"),
        (itertools.repeat({"role": "user", "content": "a"}), ValueError, "at most 10000 messages"),
    ],
)
def test_hostile_messages_are_refused(messages, error, reason):
    with pytest.raises(error, match=reason):
        checked_messages(messages)


def test_a_message_must_leave_a_private_character_to_separate():
    style = JinjaFormat("{{ messages[0].content }}")
    text = "".join(map(chr, range(0xE000, 0xF900)))
    assert style.encode(OfNoNames(), [Message("user", text[:-1])]) == [text[:-1]]
    with pytest.raises(ValueError, match="every private-use character"):
        style.encode(OfNoNames(), [Message("user", text)])
