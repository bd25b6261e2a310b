"""The runtime interface, on vocabularies made here; ids are exact in test_tokenizer_golden.py."""

import codecs
import random

import numpy as np
import pytest
from helpers.tokenizer_files import (
    TRAINING_TEXT,
    bpe_fields,
    gguf_file,
    model_file,
    sentencepiece_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb

from codellama_rt.errors import CheckpointWarning
from codellama_rt.text.tokenizer import FILL_TOKEN, TokenIdError, load_tokenizer, split_fill
from codellama_rt.text.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

SPM = SentencePieceTokenizer(sentencepiece_model())
CODE = st.lists(
    st.one_of(
        st.sampled_from(TRAINING_TEXT.split()),
        st.sampled_from(
            [" ", "  ", "    ", "\n", "\t", "\r\n", "<s>", "</s>", "é", "日本", "😀", "\0"]
        ),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=4),
    )
).map("".join)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return load_tokenizer(gguf_file(tmp_path_factory.mktemp("bpe"), bpe_fields()))


def stream(tokenizer, ids, prompt_ids=()):
    detokenizer = tokenizer.detokenizer(prompt_ids)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@given(CODE)
def test_round_trip_and_no_control_tokens(text):
    ids = SPM.encode(text)
    assert SPM.decode(ids) == text
    assert not SPM.special_ids & set(ids[1:])
    assert stream(SPM, ids[1:], ids[:1]) == text


@given(CODE)
def test_round_trip_of_byte_level_bpe(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == stream(bpe, ids) == text
    assert not bpe.special_ids & set(ids)


@given(CODE, CODE, st.booleans())
def test_an_infilling_prompt_holds_both_texts(prefix, suffix, suffix_first):
    ids = SPM.encode_infill(prefix, suffix, suffix_first=suffix_first)
    cut = ids.index(SPM.middle_id if suffix_first else SPM.suffix_id)
    before, after = (ids[cut:], ids[:cut]) if suffix_first else (ids[:cut], ids[cut:])
    assert SPM.decode(before) == prefix
    assert SPM.decode_infill([i for i in after if i not in SPM.special_ids]) == suffix


@settings(max_examples=200)
@given(st.lists(st.integers(0, SPM.vocab_size - 1)), st.booleans())
def test_streaming_equals_decoding(ids, from_start):
    """Any ids, with invalid bytes and control tokens; a continuation keeps its leading space."""
    shown = [i for i in ids if i not in SPM.special_ids]
    expected = SPM.decode(ids) if from_start else SPM.decode_infill(shown)
    assert stream(SPM, ids, [SPM.bos_id] if from_start else ()) == expected


def test_streaming_gives_only_whole_characters():
    detokenizer = SPM.detokenizer([SPM.bos_id])
    ids = SPM.encode_continuation("a😀b")
    assert [detokenizer.push(i) for i in ids] == ["a", "", "", "", "😀", "b"]
    assert detokenizer.flush() == ""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xf0\x9f\x98", "���"),  # an end inside a character
        (b"\xe3\x81a", "��a"),
        (b"\xff\xc3\xa9", "�é"),
        (b"\xed\xa0\x80", "���"),  # a surrogate
        (b"\xc0\x80", "��"),  # too long a form
        ("\ufffd".encode(), "\ufffd"),
    ],
)
def test_invalid_bytes_decode_as_in_sentencepiece(data, text):
    ids = [SPM.piece_id(f"<0x{byte:02X}>") for byte in data]
    assert SPM.decode(ids) == SPM.decode_infill(ids) == stream(SPM, ids) == text


def test_a_prompt_may_end_inside_a_character():
    *prompt, last = SPM.encode("x😀")
    assert stream(SPM, [last], prompt) == "😀"
    assert stream(SPM, [last], [*prompt, SPM.middle_id]) == "�"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [((), " def"), ([1], "def"), ([1, 300], " def"), ([1, SPM.middle_id], " def")],
)
def test_a_leading_space_is_dropped_only_where_a_text_starts(prompt, text):
    assert stream(SPM, SPM.encode("def", bos=False), prompt) == text


def test_special_tokens_in_decoding():
    ids = [*SPM.encode("def"), SPM.eot_id, SPM.eos_id]
    assert SPM.decode(ids) == stream(SPM, ids, [SPM.bos_id]) == "def"
    assert SPM.decode(ids, skip_special_tokens=False) == "<s> def▁<EOT></s>"
    assert SPM.token_bytes(SPM.eot_id) is None
    assert SPM.token_bytes(SPM.piece_id("<0xF0>")) == b"\xf0"


def test_special_tokens_are_parsed_only_on_request(bpe):
    text = "def </s> re<|end|>"
    assert SPM.eos_id not in SPM.encode(text)
    assert SPM.eos_id in SPM.encode(text, parse_special=True)
    assert bpe.eos_id not in bpe.encode(text)
    assert bpe.encode(text, parse_special=True)[-1] == bpe.eos_id


def test_characters_without_a_piece_are_the_unknown_token():
    proto = pb.ModelProto.FromString(sentencepiece_model())
    proto.trainer_spec.byte_fallback = False
    for entry in proto.pieces:
        entry.type = 1 if entry.type == 6 else entry.type  # no bytes
    tokenizer = SentencePieceTokenizer(proto.SerializeToString())
    for encode in (tokenizer.encode, tokenizer.encode_plain, tokenizer.encode_continuation):
        assert 0 in encode("def 日")


@pytest.mark.parametrize("ids", [[5], (5,), np.array([5]), np.int64(5), 5])
def test_kinds_of_id_lists(ids):
    assert SPM.decode(ids) == "\x02"


def test_rows_that_pad_an_embedding_decode_to_nothing(tmp_path):
    tokenizer = load_tokenizer(model_file(tmp_path), vocab_size=SPM.vocab_size + 3)
    assert tokenizer.vocab_size == SPM.vocab_size
    assert stream(tokenizer, [SPM.vocab_size + 2, 100]) == "a"
    assert tokenizer.decode([SPM.vocab_size + 2], skip_special_tokens=False) == ""
    assert tokenizer.decode_infill([SPM.vocab_size + 2]) == ""


@pytest.mark.parametrize("bad", [-1, SPM.vocab_size, 2**40])
def test_ids_out_of_range(bad):
    for call in (SPM.decode, SPM.decode_infill, SPM.detokenizer, stream_of(SPM)):
        with pytest.raises(ValueError, match=rf"token id {bad} is out of range; .* 0 to 420"):
            call([1, bad])
    with pytest.raises(IndexError):
        SPM.token_bytes(bad)
    assert issubclass(TokenIdError, ValueError)


def stream_of(tokenizer):
    return lambda ids: stream(tokenizer, ids)


@pytest.mark.parametrize("bad", [None, b"def", 5, ["def"]])
def test_text_that_is_not_a_str(bpe, bad):
    for call in (SPM.encode, bpe.encode, SPM.encode_continuation, split_fill):
        with pytest.raises(TypeError, match=f"text must be a str, got {type(bad).__name__}"):
            call(bad)
    with pytest.raises(TypeError, match="text must be a str"):
        SPM.encode_infill("def", bad)


def test_text_with_half_a_surrogate_pair(bpe):
    for tokenizer in (SPM, bpe):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            tokenizer.encode("def \ud800")


def test_ids_that_are_not_integers():
    with pytest.raises(TypeError, match="float"):
        SPM.decode([1.5])


def test_infilling_on_a_model_that_cannot(tmp_path, bpe):
    for tokenizer in (load_tokenizer(model_file(tmp_path, infilling=False)), bpe):
        assert not tokenizer.can_infill
        assert tokenizer.eot_id is None
        with pytest.raises(ValueError, match=r"cannot infill: .* Code Llama 7B, 13B and 70B"):
            tokenizer.encode_infill("a", "b")


def test_split_fill():
    assert split_fill("def f():") is None
    assert split_fill(f"a{FILL_TOKEN}b") == ("a", "b")
    assert split_fill(FILL_TOKEN) == ("", "")
    with pytest.raises(ValueError, match="a prompt may have one <FILL_ME>, this has 2"):
        split_fill(f"a{FILL_TOKEN}b{FILL_TOKEN}")


def test_a_tokenizer_larger_than_the_model(tmp_path):
    """Published so (CodeLlama-34b-hf, [PAD] = 32000): it opens, and warns."""
    file = model_file(tmp_path)
    with pytest.warns(CheckpointWarning, match=r"tokenizer.model: 421 tokens, .* has 100 rows"):
        assert load_tokenizer(tmp_path, vocab_size=100).vocab_size == 421
    assert load_tokenizer(file, vocab_size=421).vocab_size == 421


def test_a_long_text_is_encoded_and_streamed():
    rng = random.Random(1)
    text = "".join(rng.choice(TRAINING_TEXT) for _ in range(100_000))
    ids = SPM.encode(text)
    assert stream(SPM, ids[1:], ids[:1]) == text


def test_the_error_handler_leaves_other_decoders_alone():
    assert b"\xf0\x9f".decode("utf-8", "replace") == "�"
    assert codecs.lookup_error(SPM.decode_errors) is not codecs.lookup_error("replace")
