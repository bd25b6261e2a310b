"""The script that measures decoding over chosen blocks."""

import pytest
from sparse_decoding import main


def table(capsys, *words):
    main(["--quick", *words])
    lines = capsys.readouterr().out.splitlines()[1:]
    return {line[:6]: [float(word) for word in line[24:].split()] for line in lines}


@pytest.mark.real_model
def test_all_blocks_are_exact_decoding(capsys):
    rows = table(capsys, "--fraction", "1", "--oracle")
    for name in ("bounds", "oracle"):
        assert rows[name][:2] == rows["exact,"]
        assert rows[name][2] == 1.0


@pytest.mark.real_model
def test_a_quarter_loses_some_and_the_bounds_more_than_the_true_mass(capsys):
    rows = table(capsys, "--oracle")
    assert 0.5 < rows["bounds"][2] < rows["oracle"][2] < 1.0
