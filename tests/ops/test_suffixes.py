"""The suffix automaton and the drafter against what a search of all occurrences finds."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_rt.ops.suffixes import SuffixAutomaton, SuffixDrafter

texts = st.lists(st.integers(0, 3), max_size=24)
corpora = st.lists(st.lists(texts, max_size=3), max_size=2)


def automaton(*parts):
    text = SuffixAutomaton()
    for part in parts:
        text.extend(array("i", part))
    return text


def corpus(parts):
    return automaton(*([*part, -1] for part in parts))


def places_after(text, word):
    size = len(word)
    return [i + size for i in range(len(text) - size + 1) if text[i : i + size] == word]


def continuations(prompt, output, others, length, draft):
    """What follows the suffix of so many tokens; own texts go on with the draft."""
    text = prompt + output
    word = text[len(text) - length :]
    found = [(text + draft)[i:] for i in places_after(prompt, word) if i < len(text)]
    found += [(output + draft)[i:] for i in places_after(output, word) if i < len(output)]
    found += [one[i:] for parts in others for one in parts for i in places_after(one, word)]
    return [one for one in found if one]


def longest(prompt, output, others):
    lengths = range(len(prompt) + len(output), 0, -1)
    return next((n for n in lengths if continuations(prompt, output, others, n, [])), 0)


@settings(max_examples=400, deadline=None)
@given(prompt=texts.filter(len), output=texts, most=st.integers(1, 9))
def test_the_longest_suffix_is_found_and_what_followed_it(prompt, output, most):
    drafter = SuffixDrafter(automaton(prompt), [])
    for i in range(len(output) + 1):
        length, draft = drafter.propose(most)
        assert length == longest(prompt, output[:i], [])
        assert len(draft) == (most if length else 0)
        followers = continuations(prompt, output[:i], [], length, draft) if length else [[]]
        assert draft in [one[: len(draft)] for one in followers]
        if i < len(output):
            is_hit = draft[:1] == [output[i]]
            assert drafter.push(output[i]) == (length, is_hit)


@settings(max_examples=400, deadline=None)
@given(prompt=texts.filter(len), output=texts, others=corpora, added=corpora)
def test_texts_of_others_are_looked_through_and_may_grow(prompt, output, others, added):
    grown = [corpus(parts) for parts in others]
    drafter = SuffixDrafter(automaton(prompt), grown)
    others = [list(parts) for parts in others]
    for i in range(len(output) + 1):
        length, draft = drafter.propose(5)
        # A longer match may end a text where its last place was seen, or begin in a text that came
        # after its first token had been read.
        own = longest(prompt, output[:i], [])
        assert own <= length <= longest(prompt, output[:i], others)
        assert bool(draft) == (length > 0)
        if length:
            followers = continuations(prompt, output[:i], others, length, draft)
            assert draft in [one[: len(draft)] for one in followers]
        if i < len(output):
            drafter.push(output[i])
        if i < len(added):
            for parts, text in zip(others, grown, strict=True):
                for part in added[i]:
                    text.extend(array("i", [*part, -1]))
                parts += added[i]


def test_one_text_of_another_is_found_in_full():
    other = corpus([[5, 6, 7, 8, 9], [6, 7, 1]])
    drafter = SuffixDrafter(automaton([2, 5]), [other])
    assert drafter.propose(8) == (1, [6, 7, 8, 9])
    drafter.push(6)
    assert drafter.propose(2) == (2, [7, 8])
    assert drafter.push(7) == (2, True)
    assert drafter.push(1) == (3, False)
    assert drafter.propose(8) == (0, [])


def test_a_period_goes_on():
    drafter = SuffixDrafter(automaton([1, 2, 3, 1, 2]), [])
    assert drafter.propose(7) == (2, [3, 1, 2, 3, 1, 2, 3])


@settings(max_examples=50, deadline=None)
@given(text=st.lists(st.integers(0, 40), min_size=1, max_size=400), cut=st.integers(0, 400))
def test_it_does_not_matter_how_a_text_was_given(text, cut):
    whole, parts = automaton(text), automaton(text[:cut], text[cut:])
    assert len(whole) == len(parts) == len(text)
    assert SuffixDrafter(whole, []).propose(20) == SuffixDrafter(parts, []).propose(20)


def test_memory_stays_below_200_bytes_per_token():
    text = automaton([i * i % 8191 % 32000 for i in range(20_000)])
    assert 0 < text.num_bytes < 200 * len(text)


@pytest.mark.parametrize("tokens", [array("q", [1]), array("i", [1, 2, 3])[::2].tolist()])
def test_other_than_int32_is_refused(tokens):
    with pytest.raises((ValueError, TypeError)):
        SuffixAutomaton().extend(tokens)
