"""Opening a model: files are read once, what they say is handed on, no framework is imported."""

import subprocess
import sys
from collections import Counter

import pytest
from helpers.checkpoint_files import TINY, mini_gguf_bytes
from helpers.tiny_llm import KV_MEMORY, NAME, make_folder

from codellama_rt.checkpoint.formats import gguf_file, safetensors
from codellama_rt.checkpoint.open import resolve
from codellama_rt.checkpoint.weight_loading import choose_dtype, match_tensors
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.memory_plan import estimate, settle
from codellama_rt.llm.plan import Plan
from codellama_rt.text.chat import read_chat_template
from codellama_rt.text.tokenizer import load_tokenizer
from codellama_rt.tools.convert.convert import convert

PIECES = ["<s>", "</s>", "a", "b", "ab", "c", "d", "e", "f", "g"]
TOKENIZER = {
    "tokenizer__ggml__model": "gpt2",
    "tokenizer__ggml__pre": "gpt-2",
    "tokenizer__ggml__tokens": PIECES,
    "tokenizer__ggml__token_type": [3.0, 3.0, *[1.0] * 8],
    "tokenizer__ggml__merges": ["a b"],
    "tokenizer__chat_template": "{{ messages }}",
}


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(mini_gguf_bytes(**TOKENIZER))
    return path


def calls_during(action, *functions):
    """How often each function was called, by whatever name: a profiler sees the code itself."""
    names = {function.__code__: function.__name__ for function in functions}
    calls = Counter()

    def count(frame, event, argument):
        if event == "call" and frame.f_code in names:
            calls[names[frame.f_code]] += 1

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return dict(calls)


def test_a_gguf_file_is_parsed_once(gguf):
    def opened():
        with LLM(gguf, kv_memory=KV_MEMORY) as llm:
            assert llm.tokenizer.encode("ab") == [4]
            assert llm.chat_template == "{{ messages }}"

    functions = gguf_file.read_gguf, match_tensors, choose_dtype
    assert calls_during(opened, *functions) == {f.__name__: 1 for f in functions}


@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "dtype": "bfloat16"}])
def test_the_headers_of_a_directory_are_parsed_once(tmp_path, options):
    folder = make_folder(tmp_path / "m")

    def opened():
        LLM(folder, kv_memory=KV_MEMORY, **options).close()

    functions = safetensors._read_header, match_tensors, choose_dtype
    assert calls_during(opened, *functions) == {f.__name__: 1 for f in functions}


def test_so_are_those_of_quantised_weights(tmp_path):
    folder = convert(TINY / NAME, tmp_path / "out", quantization="int8")
    assert calls_during(lambda: resolve(folder), safetensors._read_header) == {"_read_header": 1}


def test_a_path_alone_gives_the_same(gguf):
    opened = resolve(gguf)
    ours = load_tokenizer(gguf, opened.config.vocab_size, metadata=opened.metadata)
    alone = load_tokenizer(gguf, opened.config.vocab_size)
    assert ours.pieces == alone.pieces == PIECES
    assert [ours.token_bytes(i) for i in range(10)] == [alone.token_bytes(i) for i in range(10)]
    assert read_chat_template(gguf, opened.metadata) == read_chat_template(gguf)


def test_settling_a_plan_fills_in_what_it_leaves_open(gguf):
    opened, asked = resolve(gguf), Plan(kv_memory=KV_MEMORY)
    plan = settle(opened, asked)
    assert (asked.kv_dtype, asked.num_blocks) == ("auto", None)
    assert plan.kv_dtype == opened.stored_dtype == "float32"
    assert plan.num_blocks > 0
    assert settle(opened, plan) == plan
    assert estimate(opened, asked, context=9) == estimate(opened, plan, context=9)


def test_opening_a_model_imports_no_framework(tmp_path):
    folder = make_folder(tmp_path / "m")
    code = (
        "import sys, codellama_rt;"
        f"llm = codellama_rt.LLM({str(folder)!r}, kv_memory={KV_MEMORY!r});"
        "llm.generate('a');"
        "print({'mindspore', 'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"
