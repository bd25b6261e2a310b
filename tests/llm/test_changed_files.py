"""Every entry refuses to compute with files that were changed after they were mapped."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers.tiny_llm import KV_MEMORY, make_folder

import codellama_rt as clrt
from codellama_rt import LLM, LlamaForCausalLM, SamplingParams
from codellama_rt.engine.branches import Branches
from codellama_rt.errors import CheckpointChangedError

PARAMS = SamplingParams(max_tokens=3)
DIALOG = [{"role": "user", "content": "hello"}]
ENTRIES = {
    "generate": lambda llm: llm.generate("def f(", PARAMS),
    "generate many": lambda llm: llm.generate([[1, 2], [3]], PARAMS),
    "stream": lambda llm: list(llm.stream([1, 2], PARAMS)),
    "infill": lambda llm: llm.infill("def f(", "return", PARAMS),
    "chat": lambda llm: llm.chat(DIALOG, PARAMS),
    "logits": lambda llm: llm.logits([1, 2, 3]),
    "add_request": lambda llm: llm.engine.add_request("a", [1, 2], PARAMS),
    "branches": lambda llm: Branches(llm.engine).add([1, 2]),
    "save_pretrained": lambda llm: LlamaForCausalLM(llm).save_pretrained(os.devnull),
}


@pytest.fixture
def folder(tmp_path):
    linked = make_folder(tmp_path / "linked")
    return shutil.copytree(linked, tmp_path / "model", symlinks=False)


@pytest.fixture
def llm(folder):
    with LLM(folder, kv_memory=KV_MEMORY, max_model_len=64, max_num_seqs=2) as llm:
        yield llm


def weights_of(folder):
    [file] = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_cut_file_is_refused_at_every_entry(folder, llm, entry):
    os.truncate(weights_of(folder), 4096)
    for _ in range(2):
        with pytest.raises(CheckpointChangedError, match=r"model\.safetensors.*found 4096; open"):
            ENTRIES[entry](llm)
    assert not llm.engine.has_unfinished()
    assert llm.engine.stats()["kv_usage"] == 0


def test_the_interface_of_transformers_refuses_it(folder, llm):
    tensor = pytest.importorskip("mindspore").Tensor([[1, 2, 3]])
    model = LlamaForCausalLM(llm)
    os.truncate(weights_of(folder), 4096)
    for call in (model, lambda ids: model.generate(ids, max_new_tokens=2),
                 lambda ids: model.generate(ids, max_new_tokens=2, num_beams=2)):  # fmt: skip
        with pytest.raises(clrt.CheckpointError, match="found 4096"):
            call(tensor)


def test_replacing_the_file_leaves_the_open_model_as_it_was(folder, llm):
    expected = llm.generate("def f(", PARAMS)[0].token_ids
    weights_of(folder).with_name("new").write_bytes(b"another")
    os.replace(weights_of(folder).with_name("new"), weights_of(folder))
    assert llm.generate("def f(", PARAMS)[0].token_ids == expected
    weights_of(folder).unlink()
    assert llm.logits([1, 2]).shape[0] == 2


def test_converted_weights_need_their_file_no_more(folder):
    with LLM(folder, dtype="float32", kv_memory=KV_MEMORY, max_model_len=64) as llm:
        expected = llm.generate("def f(", PARAMS)[0].token_ids
        weights_of(folder).write_bytes(b"")
        assert llm.generate("def f(", PARAMS)[0].token_ids == expected


def test_a_process_whose_file_is_cut_between_requests_lives(folder):
    """Without the check it ends with SIGBUS."""
    code = (
        "import os, sys, codellama_rt as clrt\n"
        f"llm = clrt.LLM(sys.argv[1], kv_memory='{KV_MEMORY}', max_model_len=64)\n"
        "os.truncate(sys.argv[1] + '/model.safetensors', 0)\n"
        "try: llm.generate([1, 2], clrt.SamplingParams(max_tokens=2))\n"
        "except clrt.CheckpointError: print('refused')"
    )
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, b"refused\n"), run.stderr
