"""Patterns out of configurations: what `re` says, in polynomial time."""

import re
import time

import numpy as np
import pytest

from codellama_rt.checkpoint.patterns import Budget, Pattern

NAMES = [
    "lm_head", "model.embed_tokens", "model.layers.0.self_attn.q_proj", "layers.3.mlp.up_proj",
    "model.layers.13.mlp.down_proj", "layers.31.self_attn.o_proj", "xq_proj", "",
]  # fmt: skip
PATTERNS = [
    "q_proj", "model.layers", "self_attn.q_proj", ".*", "", r"layers\.0\..*", r"layers\.[0-3]\..*",
    r"layers\.(1[0-9]|3[0-2]|\d)\.mlp\.(up|down)_proj", "^model.*proj", "^lm_head$", r"\w+",
    r"[^.]+",
    r"(?:q|k|v)_proj", r"(?P<x>up|down)_proj", r".*?_proj", r"(.*\.){2,3}\w+", r"(?!lm).*head",
    r"model\.layers\.\d{1,2}\.(?=mlp).*", r"\bmlp\..*", r"[a-z_]{3,}", r"x?q_proj", r"[]a-z_]+",
    r"(a|b|)*q_proj", r"((\w*)*\.?)*", r"(\w+\.?){3}", r"{", r"q{", r"\.", r"[.\-\]a]*",
    r"(|x)q_proj|lm.*",
    r"(layers|mlp)\.\S+", r"\Amodel\.e\D+\Z", r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)",
]  # fmt: skip


@pytest.mark.parametrize("text", PATTERNS)
def test_what_re_matches(text):
    pattern = Pattern(text)
    for name in NAMES:
        assert pattern.is_whole(name, Budget()) == (re.fullmatch(text, name) is not None)
        found = pattern.ends_name(name, Budget())
        assert found == (re.match(rf"(.*\.)?({text})$", name) is not None), name


def test_random_patterns_match_as_in_re():
    rng = np.random.default_rng(0)
    pieces = ["a", "b", ".", r"\.", "(a|b)", "(ab?)", "[ab]", "[^a]", "a*", "b+", "(a|ba)*",
              "b{1,2}", "(a*b)?", "^", "$", "(?=a)", "(?!b)", "|"]  # fmt: skip
    names = ["", "a", "ab", "ba.ab", "aab.b", "abab.a.bb", "b.aa"]
    for _ in range(3000):
        text = "".join(rng.choice(pieces, rng.integers(1, 6)))
        for name in names:
            expected = re.match(rf"(.*\.)?({text})$", name) is not None
            assert Pattern(text).ends_name(name, Budget()) == expected, (text, name)


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+b", "(.*)*x", r"(\w+\.?)+!", "(a|a)*" * 20 + "z", r"((\w*)*)*!",
        "(.?){1000}" * 3 + "!",
        ".*" * 200 + "!", "(((((.*)*)*)*)*)*!", r"(?:(?:\w|\w\w|.)*)*=", "(?=(.*)*!)" * 50 + ".*",
    ],
)  # fmt: skip
def test_patterns_that_backtrack_for_ever_in_re(text):
    name = "model.layers.11.self_attn." + "a" * 40
    before = time.perf_counter()
    assert not Pattern(text).ends_name(name, Budget())
    assert time.perf_counter() - before < 20  # re takes years


@pytest.mark.parametrize("text", [r"(\w+\.?)+", "q_proj"])
def test_the_steps_of_all_matches_have_a_bound(text):
    pattern, budget = Pattern(text), Budget(100)
    with pytest.raises(ValueError, match="fewer steps"):
        all(not pattern.ends_name("model.layers.0.", budget) or True for _ in range(101))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(", "parentheses are balanced"),
        ("a)", "parentheses are balanced"),
        ("[a", "brackets are balanced"),
        ("[z-a]", "regular expressions"),
        ("*a", "something to repeat"),
        ("a**", "repeats of repeats"),
        ("a*+", "repeats of repeats"),
        ("a{3,2}", "from few to many"),
        (r"(a)\1", "references"),
        (r"(?<=a)b", "lookbehind"),
        (r"(?<!a)b", "lookbehind"),
        ("(?i)a", "flags"),
        ("(?>a)", "flags"),
        ("a\\", "escapes"),
        ("(" * 100 + ")" * 100, "20 groups deep"),
        ("a" * 2001, "at most 2000"),
    ],
)
def test_what_is_not_supported(text, words):
    with pytest.raises(ValueError, match=words):
        Pattern(text)
