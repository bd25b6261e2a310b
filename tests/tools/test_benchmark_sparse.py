"""The script that measures decoding over chosen blocks."""

import pytest
from sparse_decoding import main


@pytest.mark.real_model
def test_a_part_of_the_blocks_has_less_than_all_of_the_mass(capsys):
    main(["--quick"])
    _, exact, sparse = (line[24:].split() for line in capsys.readouterr().out.splitlines())
    assert len(exact) == 2
    assert exact[0] != sparse[0]
    assert 0.5 < float(sparse[2]) < 1.0


def test_attention_of_one_layer_is_timed(capsys):
    main(["--keys", "2048", "--kv-dtype", "float32,int8"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["float32", "2048"], ["int8", "2048"]]
