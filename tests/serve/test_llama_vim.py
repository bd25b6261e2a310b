"""llama.vim itself in headless vim, where both are there: its cache then has our filling."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.served import WAIT_S, record_prompts, wait_for

from codellama_rt import SamplingParams

SCRIPT = """
set nocompatible
set rtp+={plugin}
let g:llama_config = {{'endpoint_fim': '{url}/infill', 'n_predict': 24, 'auto_fim': v:false}}
runtime plugin/llama.vim
runtime autoload/llama.vim
silent! call llama#init()
edit {file}
call cursor(2, 5)
call llama#fim(-1, -1, v:false, [], v:false)
let g:waited = 0
while (empty(g:cache_data) || !filereadable('{seen}')) && g:waited < 600
  sleep 50m
  let g:waited += 1
endwhile
call writefile(values(g:cache_data), '{found}')
qa!
"""


@pytest.fixture
def plugin():
    folder = os.environ.get("CODELLAMA_RT_LLAMA_VIM")  # a checkout of github.com/ggml-org/llama.vim
    if folder is None or not shutil.which("vim") or not shutil.which("curl"):
        pytest.skip("no llama.vim: CODELLAMA_RT_LLAMA_VIM names a checkout; vim and curl run it")
    return Path(folder)


def test_llama_vim_takes_a_filling(served, llm, plugin, tmp_path, caplog, monkeypatch):
    prompts = record_prompts(served, monkeypatch)
    caplog.set_level("INFO", logger="codellama_rt.serve")
    names = ("add.py", "found.json", "script.vim", "seen")
    file, found, script, seen = (tmp_path / name for name in names)
    file.write_text("def add(first, second):\n    \n\nprint(add(1, 2))\n")
    paths = {"plugin": plugin, "file": file, "found": found, "seen": seen}
    script.write_text(SCRIPT.format(url=served.url, **paths))

    def lines():
        messages = [record.getMessage() for record in caplog.records]
        return [message for message in messages if "/infill" in message]

    command = ["vim", "-u", "NONE", "-N", "-es", "-S", str(script)]
    with subprocess.Popen(command) as vim:
        wait_for(lambda: len(lines()) >= 2)  # the filling, and the warm-up
        seen.touch()
        assert vim.wait(WAIT_S) == 0
    [answer] = found.read_text().splitlines()
    content = json.loads(answer)["content"]
    assert content
    prompt = prompts[0]
    assert prompt[:2] == [llm.tokenizer.bos_id, llm.tokenizer.prefix_id]
    assert "def add(first, second):" in llm.tokenizer.decode(prompt)
    whole = llm.generate([prompt], SamplingParams(max_tokens=24)).pop().text
    assert whole.startswith(content)  # it asks for an end by indentation and time
    assert all(" 200 " in line for line in lines()), lines()
