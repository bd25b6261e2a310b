"""Stop strings in text that comes in pieces."""

from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_rt.engine.stop_strings import TextStream


class Pieces:
    """A detokenizer whose tokens are numbers of pieces; the last piece comes with the flush."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return self.pieces[-1]


def read(pieces, stop, first_stoppable=0):
    """All text of a stream, and what stopped it."""
    stream, text = TextStream(Pieces(pieces), stop), ""
    for i in range(len(pieces) - 1):
        new, found = stream.push(i, may_stop=i >= first_stoppable)
        text += new
        if found is not None:
            return text, found
    return text + stream.flush(), None


def first_completed(text, stop):
    """The same, character by character."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text("ab", max_size=4)


@settings(max_examples=500, derandomize=True, database=None, deadline=None)
@given(
    pieces=st.lists(letters, min_size=1, max_size=10),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_the_text_does_not_depend_on_how_it_was_cut(pieces, stop):
    assert read([*pieces, ""], stop) == first_completed("".join(pieces), stop)


def test_nothing_is_held_without_stop_strings():
    assert TextStream(Pieces(["a", ""]), ()).push(0) == ("a", None)


def test_only_what_could_become_a_stop_string_is_held():
    stream = TextStream(Pieces(["xa", "b", "ab", "c", ""]), ["abc"])
    assert [stream.push(i) for i in range(4)] == [
        ("x", None),
        ("", None),
        ("ab", None),
        ("", "abc"),
    ]


def test_a_stop_string_before_it_may_stop_is_text():
    assert read(["ab", "ab", "ab", ""], ["ab"], first_stoppable=1) == ("ab", "ab")
    assert read(["a", "b", "b", "ab", ""], ["ab"], first_stoppable=2) == ("abb", "ab")


def test_a_stop_string_that_the_flush_completes_is_left_out():
    assert read(["xa", "b"], ["ab"]) == ("x", None)
