"""What an editor's requests compute, and the script that counts it."""

import json
import sys
from itertools import pairwise

import bench_typing
import pytest
from bench_typing import LINES, count, counts, own_text, reading, table, typing
from helpers.tokenizer_files import TRAINING_TEXT, model_file

from codellama_rt.text.tokenizer import load_tokenizer

TEXT = "".join(  # 1,040 lines, of which no two blocks of tokens are equal
    line if line.isspace() else f"{line.rstrip()}  # {number}\n"
    for number, line in enumerate((TRAINING_TEXT + "\n\n\n\n").splitlines(keepends=True) * 60)
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(model_file(tmp_path_factory.mktemp("tokenizer")).parent)


def test_a_trace_is_of_gaps_in_the_file():
    lines = TEXT.splitlines(keepends=True)
    for before, after in reading(lines):
        assert before + after == TEXT
    typed = list(typing(lines))
    assert {len(b) - len(a) for (a, _), (b, _) in pairwise(typed)} == {3}
    assert all(TEXT.startswith(before) and TEXT.endswith(after) for before, after in typed)


@pytest.mark.parametrize("block_size", [16, 64])
def test_who_types_computes_at_most_five_tokens_with_the_suffix_first(tokenizer, block_size):
    lines = TEXT.splitlines(keepends=True)
    assert len(lines) >= 1_040
    spm = count(tokenizer, typing(lines), "typing", "SPM", block_size)
    psm = count(tokenizer, typing(lines), "typing", "PSM", block_size)
    assert spm.most <= 5 < spm.whole_blocks
    assert psm.computed > psm.suffix


def test_who_reads_on_computes_the_suffix_with_the_prefix_first(tokenizer):
    lines = TEXT.splitlines(keepends=True)
    psm = count(tokenizer, reading(lines), "reading on", "PSM", 64)
    spm = count(tokenizer, reading(lines), "reading on", "SPM", 64)
    line = len(tokenizer.encode_plain(max(lines, key=len)))
    assert psm.suffix < psm.most <= psm.suffix + (LINES + 1) * line
    assert spm.computed > 0.9 * spm.prompt


def test_the_typing_trace_with_code_llama_s_tokenizer(shared_dir):
    tokenizer = load_tokenizer(shared_dir / "data" / "tokenizer" / "codellama-32016")
    rows = counts(tokenizer, own_text(), ["typing"], [16, 64])
    for row in rows:
        if row.order == "SPM":
            assert row.most <= 5
            assert row.computed < 3
        else:
            assert row.computed > row.suffix


def test_the_script_prints_a_table_and_saves_it(tokenizer, tmp_path, monkeypatch, capsys):
    text, folder = tmp_path / "text.py", tmp_path / "rows.json"
    text.write_text(TEXT)
    model_file(tmp_path)
    words = ["--tokenizer", str(tmp_path), "--file", str(text), "--trace", "typing"]
    monkeypatch.setattr(sys, "argv", ["bench_typing.py", *words, "--quick", "--json", str(folder)])
    bench_typing.main()
    rows = counts(tokenizer, TEXT, ["typing"], [64])
    assert capsys.readouterr().out == f"{table(rows)}\n"
    assert [row["order"] for row in json.loads(folder.read_text())] == ["PSM", "SPM"]


def test_a_missing_file_ends_the_script(tmp_path, monkeypatch):
    words = ["--tokenizer", str(tmp_path), "--file", str(tmp_path / "none.py")]
    monkeypatch.setattr(sys, "argv", ["bench_typing.py", *words])
    with pytest.raises(SystemExit, match=r"bench_typing\.py: .*none\.py"):
        bench_typing.main()
