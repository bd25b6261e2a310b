"""Code Llama's infilling template as text: taken apart only where it is the whole prompt, once."""

import pytest

from codellama_rt.text.tokenizer.infill_template import parse_infill_template as parse


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<PRE> f( <SUF>) <MID>", ("f(", ")", False)),  # Continue, Tabby, Zed
        ("<PRE>  <SUF>x <MID>", ("", "x", False)),
        ("<PRE>  <SUF> <MID>", ("", "", False)),
        ("<PRE>  a  <SUF> b  <MID>", (" a ", " b ", False)),
        ("<PRE> \na\n <SUF>\n <MID>", ("\na\n", "\n", False)),
        ("<PRE># a.py \nf( <SUF> ) <MID>", ("# a.py \nf(", ")", False)),  # twinny
        ("<PRE># a.py \nf( <SUF>  ) <MID>", ("# a.py \nf(", " )", False)),
        ("<PRE> <SUF>) <MID> f(", ("f(", ")", True)),  # SPM, the other order
        ("<PRE> <SUF>) <MID>", ("", ")", True)),
        ("<PRE> <PRE> <MID> <EOT> <SUF>b <MID> c <MID>", ("<PRE> <MID> <EOT>", "b <MID> c", False)),
    ],
)
def test_templates(prompt, expected):
    assert parse(prompt) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "x",
        "<PRE>",
        "<PRE> a",
        "<PRE> a <SUF>b",
        "<PRE> a <MID>",
        "a <SUF>b <MID>",
        " <PRE> a <SUF>b <MID>",
        "x<PRE> a <SUF>b <MID>",
        "<PRE> a <SUF>b <MID> ",
        "<PRE> a <SUF>b <MID>c",
        "<PRE> a <SUF>b<MID>",
        "<PRE> a<SUF>b <MID>",
        "<PRE> a <SUF>b <SUF>c <MID>",
        "<PRE> <SUF>b <MID> c <MID> d",
        "<MID> a <SUF>b <PRE>",
    ],
)
def test_everything_else_stays_text(prompt):
    assert parse(prompt) is None
