"""llm.chat and `codellama-rt chat`: answers, history, commands, stdin that is no terminal."""

import io
import json
import sys

import pytest
from helpers.tiny_llm import KV_MEMORY, make_folder

from codellama_rt.cli import main as cli
from codellama_rt.cli.chat_defaults import SMALL_MODEL_SAMPLING, chat_defaults
from codellama_rt.cli.chat_input import completer
from codellama_rt.cli.chat_session import ChatSession
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.variants import VARIANTS

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
DIALOG = [{"role": "user", "content": "add"}]
OPTIONS = (
    *("--max-new-tokens", "6", "--ignore-eos", "--temperature", "0", "--kv-memory", KV_MEMORY),
)
CUT = "[cut after 6 tokens; /set max_tokens null removes this limit]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, kv_memory=KV_MEMORY) as model:
        yield model


@pytest.fixture
def chat(capsys, monkeypatch, folder):
    """Run `codellama-rt chat` in this process: (exit code, stdout, stderr); None: a terminal."""

    def run(stdin, *args):
        stream = io.TextIOWrapper(io.BytesIO((stdin or "").encode()))
        monkeypatch.setattr(stream, "isatty", lambda: stdin is None)
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(SystemExit) as ended:
            cli.app(["chat", str(folder), *OPTIONS, *map(str, args)], prog_name="codellama-rt")
        return ended.value.code, *capsys.readouterr()

    return run


def answers(llm, *questions, params=PARAMS, system=None):
    session = ChatSession(llm, params, system=system)
    return ["".join(session.answer(question)) for question in questions]


def test_chat_answers_after_the_prompt_of_the_format(llm):
    completion = llm.chat(DIALOG, PARAMS)
    assert completion.prompt_token_ids == llm.tokenizer.encode("[INST] add [/INST]")
    assert completion.text == llm.generate("[INST] add [/INST]", PARAMS)[0].text
    prompt, params = llm.chat_prompt(DIALOG, PARAMS)
    assert "".join(llm.stream(prompt, params)) == completion.text


def test_chat_takes_a_template(llm):
    template = "{{ bos_token }}def {{ messages[0]['content'] }}"
    assert llm.chat(DIALOG, PARAMS, chat_template=template).prompt_token_ids[0] == 1
    with pytest.raises(ValueError, match="<step>, which is not in this vocabulary"):
        llm.chat(DIALOG, PARAMS, chat_template="code-llama-70b")


def test_a_checkpoint_brings_its_template(tmp_path):
    folder = make_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}Q {{ messages[-1]['content'] }}")
    with LLM(folder, kv_memory=KV_MEMORY) as llm:
        ids, _ = llm.chat_prompt(DIALOG)
        assert llm.tokenizer.decode(ids).strip() == "Q add"


def test_chat_gives_one_answer(llm):
    with pytest.raises(ValueError, match=r"one answer, got params\.n=2"):
        llm.chat(DIALOG, SamplingParams(n=2))


def test_chat_needs_a_tokenizer(tmp_path):
    with (
        LLM(make_folder(tmp_path / "weights", tokenizer=False), kv_memory=KV_MEMORY) as llm,
        pytest.raises(ValueError, match="no tokenizer"),
    ):
        llm.chat(DIALOG)


def test_a_session_remembers(llm):
    first, second = answers(llm, "add", "print")
    dialog = [
        *DIALOG,
        {"role": "assistant", "content": first},
        {"role": "user", "content": "print"},
    ]
    assert second == llm.chat(dialog, PARAMS).text.lstrip()
    assert answers(llm, "print") != [second]


def test_what_cannot_be_said_is_not_remembered(llm):
    session = ChatSession(llm, PARAMS)
    with pytest.raises(ValueError, match="a chat format mark"):
        session.answer("[INST]")
    with pytest.raises(ValueError, match="does not fit max_model_len"):
        session.answer("add " * 20_000)
    assert session.messages == []
    assert not llm.engine.has_unfinished()


def test_an_answer_that_is_cut_is_remembered(llm):
    session = ChatSession(llm, SamplingParams(max_tokens=50, ignore_eos=True))
    pieces = session.answer("add")
    said = next(pieces)
    pieces.close()
    assert [message.content for message in session.messages] == ["add", said.rstrip()]
    assert not llm.engine.has_unfinished()


def test_a_conversation_is_saved_through_a_link(llm, tmp_path):
    session = ChatSession(llm, PARAMS)
    "".join(session.answer("add"))
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("[]")
    link.symlink_to(target)
    session.command(f"/save '{link}'")
    assert link.is_symlink()
    assert len(json.loads(target.read_text())) == 2


def test_commands(llm, tmp_path):
    session = ChatSession(llm, PARAMS, system="s")
    help_text = session.command("/help")
    for name in session.complete("/"):
        assert name in help_text
    assert session.command("/?") == help_text
    assert session.command("/bye") is None
    "".join(session.answer("add"))
    file = tmp_path / "a file.json"
    assert session.command(f"/save '{file}'") == f"3 messages in {file}"
    assert session.command("/show").startswith("[system] s\n[user] add\n[assistant]")
    assert "max_tokens = 2" in session.command("/set max_tokens 2")
    assert 'stop = ["x"]' in session.command("/set stop x").replace("(", "[")
    assert "temperature = 0.0" in session.command("/set")
    session.command("/undo")
    assert [message.role for message in session.messages] == ["system"]
    assert session.command("/system") == "system message: none"
    assert session.messages == []
    session.command(f"/load '{file}'")
    assert len(session.messages) == 3
    session.command("/reset")
    assert [message.content for message in session.messages] == ["s"]
    assert session.command("/exit") is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/nothing", "no command /nothing; there are /help"),
        ("/halp", "no command /halp, did you mean /help"),
        ("/stats", "nothing has been answered yet"),
        ("/undo", "nothing to undo"),
        ("/save", "one file name"),
        ("/save x", "nothing has been said"),
        ("/set x 1", "no sampling parameter 'x'"),
        ("/set n 2", "no sampling parameter 'n'"),
        ("/set temperature -1", "temperature must be"),
        ("/load EMPTY", "does not hold a conversation"),
        ("/load ODD", "the assistant spoke last"),
    ],
)
def test_commands_that_cannot_be(llm, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("[]")
    (tmp_path / "ODD").write_text(json.dumps(DIALOG))
    session = ChatSession(llm, PARAMS)
    with pytest.raises(ValueError, match=words):
        session.command(line)
    assert session.messages == []


def test_lines_of_stdin_are_messages(chat, llm):
    first, second, third = answers(llm, "add", "two\nlines", "/3")
    stdin = 'add\n\n/show\n"""\ntwo\nlines\n"""\n//3\n/exit\nadd\n'
    code, out, err = chat(stdin)
    assert code == 0
    assert out == f"{first}\n{second}\n{third}\n"
    assert err == f"{CUT}[user] add\n[assistant] {first.rstrip()}\n{CUT}{CUT}"


def test_a_mistake_does_not_end_the_conversation(chat, llm):
    code, out, err = chat("[INST]\n/foo\nadd")
    assert (code, out) == (0, answers(llm, "add")[0] + "\n")
    assert err.count("\n") == 3
    assert err.endswith(CUT)


def test_one_message(chat, llm):
    expected = answers(llm, "add", system="s")[0] + "\n"
    assert chat("print", "-m", "add", "--system", "s") == (0, expected, CUT)
    assert chat("add", "-m", "-", "--system", "s") == (0, expected, CUT)


def test_history_is_kept_in_a_file(chat, llm, tmp_path):
    file = tmp_path / "history.json"
    first, second = answers(llm, "add", "print", system="s")
    assert chat("add", "--history", file, "--system", "s")[1] == f"{first}\n"
    assert chat("print", "--history", file)[1] == f"{second}\n"
    assert [message["role"] for message in json.loads(file.read_text())][-1] == "assistant"
    file.write_text("{}")
    code, out, err = chat("print", "--history", file)
    assert (code, out) == (2, "")
    assert "does not hold a conversation" in err


def test_a_template_file(chat, tmp_path):
    file = tmp_path / "template"
    file.write_text("{{ raise_exception('not today') }}")
    code, out, err = chat("add", "--chat-template", file)
    assert (code, out) == (0, "")
    assert "not today" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [(("--n", 2), "chat takes no --n"), (("--logprobs", 1), "chat takes no --logprobs"),
     (("--chat-template", "no-such-file"), "no-such-file"), (("--temperature", -1), "temperature")],
)  # fmt: skip
def test_options_that_cannot_be(chat, args, words):
    code, out, err = chat("add", *args)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_ctrl_c_ends_a_session_without_a_terminal(chat, monkeypatch):
    def interrupted(self, text):
        yield "a"
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "answer", interrupted)
    assert chat("add")[0] == 130


def test_a_terminal_is_asked_line_by_line(chat, llm, monkeypatch):
    asked = []
    lines = iter(["add", '"""', "two", "lines", '"""', "/show"])

    def ask(prompt=""):
        asked.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    first, second = answers(llm, "add", "two\nlines")
    code, out, err = chat(None)
    assert (code, out) == (0, f"{first}\n{second}\n")
    assert "Ctrl-D ends" in err
    assert "[user] two\nlines" in err
    assert len(asked) == 7


def test_ctrl_c_drops_what_is_being_typed(chat, llm, monkeypatch):
    typed = iter(["add", '"""', "half of", KeyboardInterrupt, "print"])

    def ask(prompt=""):
        word = next(typed, EOFError)
        if isinstance(word, str):
            return word
        raise word

    monkeypatch.setattr("builtins.input", ask)
    first, second = answers(llm, "add", "print")
    code, out, _ = chat(None)
    assert (code, out) == (0, f"{first}\n{second}\n")


def test_tab_knows_commands_and_parameters(llm):
    session = ChatSession(llm, PARAMS)
    assert session.complete("/s") == ["/system", "/set", "/show", "/stats", "/save"]
    assert session.complete("/set top") == ["/set top_p ", "/set top_k "]
    assert session.complete("/set n") == []
    find = completer(session.complete)
    assert [find("/unk", 0), find("/und", 0), find("/und", 1)] == [None, "/undo", None]
    assert [find("def f", 0), find("def f", 1)] == ["def f\t", None]


def test_stats_of_the_last_answer(llm):
    session = ChatSession(llm, PARAMS)
    "".join(session.answer("add"))
    told = session.command("/stats")
    prompt = len(llm.chat_prompt(DIALOG)[0])
    assert f"{prompt + 6} of {llm.max_model_len} tokens" in told
    assert "6 tokens in " in told
    assert "tokens/s, ended by length" in told
    pieces = session.answer("print")
    next(pieces)
    pieces.close()
    assert "ended by Ctrl-C" in session.command("/stats")
    session.command("/reset")
    with pytest.raises(ValueError, match="nothing has been answered"):
        session.command("/stats")


def test_an_answer_that_is_cut_says_so(llm):
    session = ChatSession(llm, PARAMS)
    "".join(session.answer("add"))
    assert session.notice == CUT.strip()
    end = llm.generate(llm.chat_prompt(DIALOG)[0], PARAMS)[0].token_ids[2]
    session.command(f"/set stop_token_ids [{end}]")
    session.command("/reset")
    "".join(session.answer("add"))
    assert session.notice == ""


def test_a_full_context_says_what_makes_room(folder):
    with LLM(folder, kv_memory=KV_MEMORY, max_model_len=64) as llm:
        session = ChatSession(llm, SamplingParams(max_tokens=None, ignore_eos=True))
        "".join(session.answer("add"))
        assert (
            session.notice == "[cut: the context of 64 tokens is full; /undo or /reset makes room]"
        )
        with pytest.raises(ValueError, match=r"max_model_len=64; .* with /undo or .* /reset"):
            "".join(session.answer("print"))
        session.command("/undo")
        "".join(session.answer("print"))
        assert session.messages[0].content == "print"


def test_a_full_cache_says_so(folder):
    with LLM(folder, kv_memory="64kB") as llm:
        longest = llm.engine.scheduler.max_computed_tokens
        assert longest < llm.max_model_len
        with pytest.raises(ValueError, match=f"the KV cache, which holds {longest}"):
            ChatSession(llm, PARAMS).answer("add " * longest)


def test_an_answer_has_no_limit_unless_one_is_given(tmp_path, llm):
    assert chat_defaults(llm).max_tokens is None
    config = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.6}
    folder = make_folder(tmp_path / "model", generation_config=config)
    with LLM(folder, kv_memory=KV_MEMORY) as other:
        params = chat_defaults(other)
        assert (params.max_tokens, params.temperature) == (7, 0.6)
        assert params.repetition_penalty == 1.0


def test_small_models_are_sampled(llm, monkeypatch):
    params = chat_defaults(llm)
    assert {name: getattr(params, name) for name in SMALL_MODEL_SAMPLING} == SMALL_MODEL_SAMPLING
    assert chat_defaults(llm, greedy_is_meant=True).temperature == 0.0
    assert llm.default_params().temperature == 0.0
    config = VARIANTS["CodeLlama-7b-Instruct"].config
    monkeypatch.setattr(llm, "config", config)
    assert chat_defaults(llm).temperature == 0.0


def test_the_help_names_the_defaults_of_small_models(chat):
    code, out, _ = chat("", "--help")
    assert code == 0
    for value in SMALL_MODEL_SAMPLING.values():
        assert str(value) in out


def test_several_lines_are_never_a_command(chat, llm):
    text = "//3\n/bye"
    code, out, _ = chat(f'"""\n{text}\n"""\nadd')
    assert code == 0
    assert out == "".join(f"{answer}\n" for answer in answers(llm, text, "add"))
