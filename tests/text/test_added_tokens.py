"""Added tokens in a text: where they match, by their flags, as in the `tokenizers` package."""

import random

import pytest
from tokenizers import AddedToken as Reference
from tokenizers import Tokenizer, models, normalizers

from codellama_rt.text.tokenizer.added_tokens import FLAGS, AddedToken, TokenSplitter
from codellama_rt.text.tokenizer.end_tokens import END_NAMES, find_end_ids


def splitter(*tokens, normalize=str):
    return TokenSplitter(tokens, normalize)


@pytest.mark.parametrize(
    ("flags", "text", "parts"),
    [
        ({}, "a <x> b<x>", ["a ", 7, " b", 7]),
        ({}, "<x>", [7]),
        ({}, "", []),
        ({"lstrip": True}, "a \t<x> b", ["a", 7, " b"]),
        ({"lstrip": True}, "  <x>", [7]),
        ({"rstrip": True}, "a <x>\n b", ["a ", 7, "b"]),
        ({"rstrip": True, "lstrip": True}, "a <x> <x> b", ["a", 7, 7, "b"]),
        ({"single_word": True}, "a<x> <x>b <x>", ["a<x> <x>b ", 7]),
        ({"single_word": True}, "(<x>)", ["(", 7, ")"]),
    ],
)
def test_flags(flags, text, parts):
    assert splitter(AddedToken(7, "<x>", **flags)).split(text) == parts


def test_the_longest_name_counts():
    tokens = AddedToken(1, "<x"), AddedToken(2, "<x>"), AddedToken(3, "x>y")
    assert splitter(*tokens).split("<x>y<xy") == [2, "y", 1, "y"]


def test_normalised_tokens_match_the_normalised_text():
    tokens = AddedToken(1, "<a>"), AddedToken(2, "<b>", normalized=True)

    def normalize(text):
        return "▁" + text.replace(" ", "▁")

    split = splitter(*tokens, normalize=normalize).split
    assert split("x<b> <b>") == ["▁x<b>", 2]  # its name is ▁<b>, by the same rule
    assert split("<a><b>c") == [1, 2, "c"]  # each stretch begins with a space


@pytest.mark.parametrize("seed", range(40))
def test_as_the_tokenizers_package(seed):
    """Random tokens with random flags in random texts, one letter a piece."""
    rng = random.Random(seed)
    names = rng.sample(["<x>", "<xy>", "x", "[a b]", " z", "ab", "é<", "▁w", "\nq"], 4)
    alphabet = sorted(set("".join(names) + "ab xyz<>▁\n\té.") | {"?"})
    own = {letter: i for i, letter in enumerate(alphabet)}
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    peer = Tokenizer(models.BPE(own, [], unk_token="?"))
    peer.normalizer = normalizers.Sequence(steps)
    tokens = []
    for i, name in enumerate(names):
        flags = {flag: rng.random() < 0.4 for flag in FLAGS}
        tokens.append(AddedToken(len(own) + i, name, **flags))
        peer.add_tokens([Reference(name, **flags)])
    expected = {t.content: peer.token_to_id(t.content) for t in tokens}
    tokens = [AddedToken(**{**vars(t), "id": expected[t.content]}) for t in tokens]
    mine = splitter(*tokens, normalize=lambda text: "▁" + text.replace(" ", "▁"))
    for _ in range(50):
        text = "".join(rng.choice([*names, *alphabet]) for _ in range(rng.randrange(12)))
        ids = []
        for part in mine.split(text):
            ids += [part] if isinstance(part, int) else [own.get(c, own["?"]) for c in part]
        assert ids == peer.encode(text).ids, (text, tokens)


def test_ends_by_name():
    pieces = ["<s>", "</s>", "<|im_end|>", "a", "▁<EOT>"]
    assert find_end_ids(pieces, [1, None]) == {1, 2}, "▁<EOT> ends fillings only"
    assert find_end_ids(["a", "b"], []) == frozenset()
    assert {"<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>"} <= END_NAMES
