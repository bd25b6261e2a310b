"""`codellama-rt infill`: the filling alone, on stdout or in its place."""

from helpers.cli_calls import assert_one_line_error

import codellama_rt as clrt
from codellama_rt.engine.sampling_params import SamplingParams


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


def test_infill_in_place_through_a_link_fills_the_target(run, model, tmp_path):
    (tmp_path / "src").mkdir()
    target, link = tmp_path / "src" / "a.py", tmp_path / "link.py"
    target.write_text("def <FILL_ME>(a)")
    target.chmod(0o640)
    link.symlink_to("src/a.py")
    chain = tmp_path / "chain.py"
    chain.symlink_to(link)
    for path in (link, chain):
        target.write_text("def <FILL_ME>(a)")
        assert run("infill", model, path, "--max-new-tokens", 5, "--in-place") == (0, "", "")
        assert path.is_symlink()
        assert "<FILL_ME>" not in target.read_text()
        assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.py", "chain.py", "link.py", "src"]
