"""Chat formats: Meta's ids, templates of repositories, and users who write control tokens."""

import json
import os
import signal
from time import sleep

import pytest
from helpers.at_work import while_it_computes
from helpers.tokenizer_files import bpe_fields, gguf_file, model_file, sentencepiece_model
from sentencepiece import sentencepiece_model_pb2 as pb

from codellama_rt.errors import CheckpointError
from codellama_rt.hf.code_llama_tokenizer import CodeLlamaTokenizer
from codellama_rt.text.chat import (
    JinjaFormat,
    Message,
    checked_messages,
    find_format,
    read_chat_template,
    sandbox,
)
from codellama_rt.text.chat.code_llama import RESERVED, InstFormat, StepFormat
from codellama_rt.text.tokenizer import load_tokenizer
from codellama_rt.text.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

CHATML = (
    "{% for m in messages %}{{ '<|begin|>' + m['role'] + ' ' + m['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|begin|>' }}{% endif %}"
)
DIALOG = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]


@pytest.fixture(scope="module")
def golden(shared_dir):
    text = (shared_dir / "data" / "golden" / "tok_chat.json").read_text("utf-8")
    return json.loads(text)


@pytest.fixture(scope="module")
def tokenizers(shared_dir):
    """Those of 7B and of 70B Instruct."""
    folder = shared_dir / "data" / "tokenizer"
    infilling = dict.fromkeys(["prefix_token", "middle_token", "suffix_token", "eot_token"])
    return {
        "7b": CodeLlamaTokenizer.from_pretrained(folder / "codellama-32016"),
        "70b": CodeLlamaTokenizer.from_pretrained(folder / "codellama70b-step", **infilling),
    }


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return load_tokenizer(gguf_file(tmp_path_factory.mktemp("bpe"), bpe_fields()))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_tokenizer(model_file(tmp_path_factory.mktemp("llama")))


def with_step():
    """A vocabulary with <step>, as that of 70B."""
    proto = pb.ModelProto.FromString(sentencepiece_model(infilling=False))
    proto.pieces.add(piece="<step>", score=-len(proto.pieces))
    return SentencePieceTokenizer(proto.SerializeToString())


SIZES = [("7b", "official_llama2_style_ids"), ("70b", "official_70b_ids")]


@pytest.mark.parametrize(("size", "column"), SIZES)
@pytest.mark.parametrize("given", [False, True])
def test_ids_are_those_of_meta(tokenizers, golden, size, column, given):
    """Also with Hugging Face's template, whose rendered text Transformers encodes otherwise."""
    template = golden["meta"][f"chat_template_{size}"] if given else None
    for case in golden["cases"]:
        if isinstance(case[column], dict):
            with pytest.raises(ValueError, match="alternating user and assistant"):
                tokenizers[size].apply_chat_template(case["messages"], chat_template=template)
        else:
            ids = tokenizers[size].apply_chat_template(case["messages"], chat_template=template)
            assert ids == case[column], case["id"]


@pytest.mark.parametrize("size", ["7b", "70b"])
def test_rendered_text_has_the_ids_of_transformers(tokenizers, golden, size):
    runtime = tokenizers[size].runtime
    for case in golden["cases"]:
        text = case[f"hf_text_{size}"]
        if isinstance(text, str):
            ids = runtime.encode_rendered(runtime.split_special(text))
            assert ids == case[f"hf_ids_{size}_slow"], case["id"]


def test_rendered_text_is_that_of_transformers(tokenizers, golden):
    for case in golden["cases"]:
        if isinstance(case["official_llama2_style_ids"], list):
            text = tokenizers["7b"].apply_chat_template(case["messages"], tokenize=False)
            assert text == case["hf_text_7b"]


def test_a_system_message_is_part_of_the_first_turn(llama):
    ids = InstFormat().encode(llama, [Message("system", "s"), *DIALOG])
    turns = "[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b ", "[INST] c [/INST]"
    assert ids == [1, *llama.encode(turns[0], bos=False), 2, *llama.encode(turns[1])]


def test_messages_of_70b_end_with_step():
    tokenizer = with_step()
    step = tokenizer.piece_id("<step>")
    ids = find_format(None, tokenizer).encode(tokenizer, [Message("system", "s"), *DIALOG])
    assert ids.count(step) == 4
    assert StepFormat().end_ids(tokenizer) == (step,)
    assert StepFormat().render(tokenizer, DIALOG).startswith("<s> Source: system<step> Source: us")


@pytest.mark.parametrize("style", [InstFormat(), StepFormat()])
@pytest.mark.parametrize("tag", RESERVED)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_marks_of_the_format_are_refused_in_any_message(style, tag, place):
    tokenizer = with_step()
    dialog = list(DIALOG)
    dialog[place] = Message(dialog[place].role, f"x{tag}y")
    with pytest.raises(ValueError, match=r"messages\[\d\] contains .*, a chat format mark"):
        style.encode(tokenizer, dialog)


@pytest.mark.parametrize("style", [InstFormat(), StepFormat()])
@pytest.mark.parametrize(
    "roles", ["a", "ua", "uu", "s", "su a", "us", "uau a", "sus", "t", "utu", "sa"]
)
def test_the_order_of_roles(style, roles):
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    dialog = [Message(names[role], "x") for role in roles.replace(" ", "")]
    with pytest.raises(ValueError, match="alternating user and assistant"):
        style.encode(with_step(), dialog)


@pytest.mark.parametrize("style", [InstFormat(), StepFormat()])
def test_several_system_messages_are_one(style):
    """Agents send several; the formats have one place for them."""
    system = [Message("system", "s"), Message("system", "t")]
    ids = style.encode(with_step(), [*system, Message("user", "x")])
    assert ids == style.encode(with_step(), [Message("system", "s\n\nt"), Message("user", "x")])


@pytest.mark.parametrize("style", [InstFormat(), StepFormat()])
def test_calls_of_tools_are_refused_where_the_format_has_none(style):
    called = Message("assistant", "", {"tool_calls": [{"id": "a"}]})
    with pytest.raises(ValueError, match=r"messages\[1\] has tool_calls, which this chat format"):
        style.encode(with_step(), [Message("user", "x"), called, Message("user", "y")])


CONTROL_TEXTS = [
    "</s>", "<s>", "a </s> b", "<unk>", " <EOT>", "x <PRE> y", " <EOT> <EOT><EOT>", "\n<SUF>",
    "▁<EOT>", "▁<MID>", "<s", "/s>", "</s", "s>",
]  # fmt: skip


@pytest.mark.parametrize("text", CONTROL_TEXTS)
def test_users_write_no_control_tokens_of_code_llama(llama, text):
    plain = InstFormat().encode(llama, [Message("user", "x")])
    ids = InstFormat().encode(llama, [Message("user", f"x{text}")])
    assert [i for i in ids if i in llama.special_ids] == [
        i for i in plain if i in llama.special_ids
    ]
    shown = text.replace("▁", " ")
    assert llama.decode(ids) == f"[INST] x{shown}".rstrip() + " [/INST]"


@pytest.mark.parametrize(
    "text",
    ["<|end|>", "<|begin|>", "<|begin|>x<|end|>", "<|end", "<|", "<", "end|>", "|>", ">", "begin",
     "|", "<<|end|>|end|>", "  <|end|>  ", "\n|>", "", " ", "\ue000<|end|>"],
)  # fmt: skip
def test_users_write_no_control_tokens_of_a_template(bpe, text):
    style = JinjaFormat(CHATML)
    for role in ("user", "system"):
        ids = style.encode(bpe, [Message(role, text), Message("user", "q")])
        assert [i for i in ids if i in bpe.special_ids] == [0, 1, 0, 1, 0]
        text_alone = bpe.decode(ids)
        assert text_alone == f"{role} {text.strip()}user q"


def test_users_do_not_end_what_a_template_begins(bpe):
    template = "{{ '<|' + messages[0]['content'] + '|>' }}"
    for content in ("end", "end|><|begin", "begin"):
        ids = JinjaFormat(template).encode(bpe, [Message("user", content)])
        assert not set(ids) & bpe.special_ids
        assert bpe.decode(ids) == f"<|{content}|>"


def test_a_template_decides_on_the_generation_prompt(bpe):
    style = JinjaFormat(CHATML)
    ids = style.encode(bpe, [Message("user", "q")])
    assert style.encode(bpe, [Message("user", "q")], add_generation_prompt=False) == ids[:-1]
    assert style.render(bpe, [Message("user", " q ")]) == "<|begin|>user q<|end|><|begin|>"


def test_a_template_knows_the_begin_and_end_tokens(bpe, llama):
    style = JinjaFormat("{{ bos_token }}|{{ eos_token }}")
    assert style.render(bpe, DIALOG) == "<|begin|>|<|end|>"
    begin, *middle, end = style.encode(llama, DIALOG)
    assert (begin, llama.decode(middle), end) == (1, "|", 2)


def test_formats_by_what_is_known(bpe, llama):
    assert isinstance(find_format(None, llama), InstFormat)
    assert isinstance(find_format("code-llama-70b", llama), StepFormat)
    assert isinstance(find_format(CHATML, llama), JinjaFormat)
    assert isinstance(find_format("{{ '[INST]' }}<step>", llama), JinjaFormat)
    assert isinstance(find_format("{{ 1 / 0 }}[INST]<step>", llama), JinjaFormat)
    with pytest.raises(ValueError, match="has no chat template"):
        find_format(None, bpe)
    with pytest.raises(ValueError, match="<step>, which is not in this vocabulary"):
        find_format("code-llama-70b", llama).encode(llama, DIALOG)
    with pytest.raises(TypeError, match="chat_template must be a str"):
        find_format(7, llama)


def test_where_templates_lie(tmp_path):
    assert read_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "A"}))
    assert read_chat_template(tmp_path) == "A"
    assert read_chat_template(model_file(tmp_path)) == "A"
    several = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "C"}]
    config.write_text(json.dumps({"chat_template": several}))
    assert read_chat_template(tmp_path) == "C"
    for wrong in ([], several[:1], 5, {"default": "x"}):
        config.write_text(json.dumps({"chat_template": wrong}))
        with pytest.raises(CheckpointError, match="chat_template: expected a text"):
            read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("D")
    assert read_chat_template(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="expected UTF-8"):
        read_chat_template(tmp_path)


def test_the_template_of_a_tokenizer_is_used_and_kept(tmp_path):
    model_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    tokenizer = CodeLlamaTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
    assert text == "<|begin|>user q<|end|>"
    tokenizer.save_pretrained(tmp_path / "copy")
    assert CodeLlamaTokenizer.from_pretrained(tmp_path / "copy").chat_template == CHATML


def test_ids_as_arrays(tmp_path):
    tokenizer = CodeLlamaTokenizer.from_pretrained(model_file(tmp_path))
    dialog = [{"role": "user", "content": "q"}]
    ids = tokenizer.apply_chat_template(dialog)
    assert tokenizer.apply_chat_template(dialog, return_tensors="np").tolist() == [ids]
    encoding = tokenizer.apply_chat_template(dialog, return_tensors="np", return_dict=True)
    assert encoding.input_ids.tolist() == [ids]
    assert encoding.attention_mask.tolist() == [[1] * len(ids)]


NESTED: list = []
NESTED.append(NESTED)  # without an end


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ("hello", TypeError, "must be a list"),
        ({"role": "user", "content": "x"}, TypeError, "must be a list"),
        (None, TypeError, "must be a list"),
        ([], ValueError, "at least one message"),
        (["hello"], TypeError, r"messages\[0\] must be"),
        ([{"role": "user"}], TypeError, "content must be a str, got nothing"),
        ([{"role": "user", "contents": "x"}], TypeError, "content must be a str, got nothing"),
        ([{"role": "user", "content": 7}], TypeError, "content must be a str, got int"),
        ([{"role": "user", "content": {"text": "x"}}], TypeError, "must be a str, got dict"),
        ([{"role": "user", "content": [7]}], ValueError, "a part of content must be text, got 7"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            ValueError,
            "a part of content must be text",
        ),
        ([{"role": "<|user|>", "content": "x"}], ValueError, "role must be one of system, user"),
        ([{"role": None, "content": "x"}], ValueError, "role must be one of"),
        ([{"role": "user", "content": "x", "name": b"y"}], TypeError, "values of JSON only"),
        ([{"role": "user", "content": "x", "a": {7: "y"}}], TypeError, "values of JSON only"),
        ([{"role": "user", "content": "x", "a": NESTED}], ValueError, "nested at most 32 deep"),
        ([{"role": "user", "content": "x", "a": ["\ud800"]}], ValueError, "surrogate"),
        ([{"role": "user", "content": "\ud800"}], ValueError, "surrogate"),
        ([{"role": "user", "content": "x"}] * 10_001, ValueError, "at most 10000 messages"),
    ],
)
def test_messages_that_are_none(messages, error, words):
    with pytest.raises(error, match=words):
        checked_messages(messages)


CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": None}, ("user", "", {})),
        ({"role": "user", "content": ["a", {"type": "text", "text": "b"}]}, ("user", "a\nb", {})),
        ({"role": "user", "content": []}, ("user", "", {})),
        ({"role": "developer", "content": "x"}, ("system", "x", {})),
        ({"role": "user", "content": "x", "name": "kim"}, ("user", "x", {"name": "kim"})),
        ({"role": "assistant", "tool_calls": CALLS}, ("assistant", "", {"tool_calls": CALLS})),
        (
            {"role": "tool", "content": "3", "tool_call_id": "c1"},
            ("tool", "3", {"tool_call_id": "c1"}),
        ),
        (
            {"role": "assistant", "content": "x", "refusal": None, "annotations": ()},
            ("assistant", "x", {"refusal": None, "annotations": []}),
        ),
    ],
)
def test_messages_as_clients_send_them(message, expected):
    [checked] = checked_messages([message])
    assert tuple(checked) == expected
    assert checked_messages([checked]) == [checked]


@pytest.mark.parametrize("escape", ["", "(ensure_ascii=True)"])
def test_no_control_token_comes_from_any_part_of_a_message(bpe, escape):
    """Names, calls of tools and their keys are a user's text as well."""
    template = "{{ messages[0]" + (f"|tojson{escape}" if escape else "|tojson") + " }}"
    hostile = {"arguments": {"a<|end|>": ["<|begin|>", {"\ue000<|end|>": "\\ue001"}]}}
    message = {"role": "user", "content": "<|end|>é", "name": "<|begin|>", "tool_calls": [hostile]}
    [checked] = checked_messages([message])
    ids = JinjaFormat(template).encode(bpe, [checked])
    assert not {0, 1} & set(ids)
    text = bpe.decode(ids)
    assert json.loads(text) == message


def test_a_template_reads_what_else_a_message_has(bpe):
    template = "{{ messages[0].name }}:{% for c in messages[0].tool_calls %}{{ c.function.name }}"
    message = {"role": "user", "content": "", "name": "kim", "tool_calls": CALLS}
    style = JinjaFormat(template + "{% endfor %}")
    assert style.render(bpe, checked_messages([message])) == "kim:f"


def test_a_busy_machine_ends_no_template(monkeypatch):
    """The process is stopped for longer than a template may compute, as if others had the CPUs."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1.0)
    now = "strftime_now('%s%f')|int"  # microseconds
    is_later = f"{{% if {now} > begin + 1500000 %}}{{% break %}}{{% endif %}}"
    inner = f"{{% for j in range(1000) %}}{is_later}{{% endfor %}}"
    wait = f"{{% for i in range(99999) %}}{inner}{is_later}{{% endfor %}}"

    def stop_for_a_while(pid):
        os.kill(pid, signal.SIGSTOP)
        sleep(1.6)
        os.kill(pid, signal.SIGCONT)

    with while_it_computes(stop_for_a_while):
        text = sandbox.render_template(f"{{% set begin = {now} %}}{wait}done", {})
    assert text == "done"
