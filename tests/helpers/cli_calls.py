"""What tests of the command line share."""

PROMPT = "def add(first, second):"


def assert_one_line_error(result, *words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("codellama-rt: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
