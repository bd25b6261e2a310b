"""The Transformers interface on a vocabulary made here; the golden tests hold the exact ids."""

import json

import numpy as np
import pytest
from helpers.tokenizer_files import bpe_fields, gguf_file, model_file, sentencepiece_fields

from codellama_rt.errors import CheckpointError
from codellama_rt.hf.code_llama_tokenizer import CodeLlamaTokenizer
from codellama_rt.hf.text_streamer import TextStreamer


@pytest.fixture
def tok(tmp_path):
    return CodeLlamaTokenizer.from_pretrained(model_file(tmp_path))


def test_a_prompt_with_a_hole(tok):
    encoding = tok("def f(<FILL_ME>):", return_tensors="np")
    assert encoding.input_ids.dtype == encoding.attention_mask.dtype == np.int64
    assert encoding.input_ids.shape == (1, len(tok.runtime.encode_infill("def f(", "):")))
    assert encoding.input_ids[0].tolist() == tok.runtime.encode_infill("def f(", "):")
    assert dict(encoding).keys() == {"input_ids", "attention_mask"}
    assert encoding["attention_mask"].all()
    filling = np.array([tok.runtime.encode("a, b", bos=False)])
    assert tok.batch_decode(filling, skip_special_tokens=True) == ["a, b"]


def test_the_order_of_a_hole(tok):
    first = tok.runtime.encode_infill("a", "b", suffix_first=True)
    assert tok("a<FILL_ME>b", suffix_first=True).input_ids == first
    assert tok("a", suffix="b", suffix_first=True).input_ids == first
    tok.suffix_first = True
    assert tok("a<FILL_ME>b").input_ids == first
    assert tok("a<FILL_ME>b", suffix_first=False).input_ids != first


def test_another_fill_token(tok):
    tok.fill_token = "[HOLE]"
    assert tok("a[HOLE]b").input_ids == tok.runtime.encode_infill("a", "b")
    tok.fill_token = None
    assert tok.prefix_id not in tok("a<FILL_ME>b").input_ids


def test_a_hole_at_the_end_is_a_completion(tok):
    assert tok("def f(<FILL_ME>").input_ids == tok("def f(").input_ids


def test_lists_and_tensors(tok):
    texts = ["def", "def add(first):"]
    encoding = tok(texts)
    assert [len(row) for row in encoding.input_ids] == [len(row) for row in encoding.attention_mask]
    assert tok(texts[0]).input_ids == encoding.input_ids[0]
    with pytest.raises(ValueError, match=r"rows have lengths .*padding=True"):
        tok(texts, return_tensors="np")
    tok.pad_token = tok.eos_token
    padded = tok(texts, padding=True, padding_side="left", return_tensors="np")
    assert padded.input_ids.shape == padded.attention_mask.shape
    assert padded.input_ids[0, 0] == tok.pad_token_id == 2
    assert padded.attention_mask[0, 0] == 0
    assert tok([]).input_ids == []
    with pytest.raises(AttributeError, match="token_type_ids"):
        _ = padded.token_type_ids


def test_mindspore_tensors(tok):
    mindspore = pytest.importorskip("mindspore")
    ids = tok("def", return_tensors="ms").input_ids
    assert ids.dtype == mindspore.int32
    assert ids.asnumpy().tolist() == [tok("def").input_ids]
    assert tok.batch_decode(ids) == ["<s> def"]
    assert tok.decode(ids[0]) == "<s> def"


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 7),
        ({"max_length": 4}, 4),
        ({"max_length": 4, "truncation": False}, 7),
        ({"max_length": 4, "truncation": "longest_first"}, 4),
        ({"max_length": 4, "padding": True}, 7),
        ({"max_length": 9, "padding": "max_length"}, 9),
        ({"padding": True, "pad_to_multiple_of": 8}, 8),
        ({"max_length": 1}, 1),
        ({"truncation": True}, 7),
    ],
)
def test_lengths(tok, options, length):
    tok.pad_token = "<unk>"
    ids = tok("\1\2\3\4\5", **options).input_ids  # the begin token, "▁" and five bytes
    assert len(ids) == length
    assert ids[0] == tok.bos_token_id


@pytest.mark.parametrize(
    ("side", "limit", "expected"),
    [
        ("right", 10, "<s> \1\2\3<s> \4\5\6"),
        ("right", 7, "<s> \1\2<s> \4"),  # "▁" counts, and the second text is cut first
        ("left", 7, "<s>\1\2\3<s>\5\6"),
        ("left", 2, "<s><s>"),
    ],
)
def test_pairs_are_cut_in_turn(tok, side, limit, expected):
    tok.truncation_side = side
    ids = tok("\1\2\3", "\4\5\6", max_length=limit, truncation=True).input_ids
    assert len(ids) == limit
    assert tok.decode(ids) == expected


def test_special_tokens_around_texts(tok):
    assert tok.build_inputs_with_special_tokens([5], [6]) == [1, 5, 1, 6]
    assert tok.get_special_tokens_mask([5, 5], [6]) == [1, 0, 0, 1, 0]
    assert tok.get_special_tokens_mask([1, 5, 2], already_has_special_tokens=True) == [1, 0, 1]
    assert tok.create_token_type_ids_from_sequences([5, 5], [6]) == [0, 0, 0, 1, 1]
    tok.add_bos_token, tok.add_eos_token = False, True
    assert tok.build_inputs_with_special_tokens([5]) == [5, 2]
    assert tok.get_special_tokens_mask([5]) == [0, 1]
    assert tok.create_token_type_ids_from_sequences([5]) == [0, 0]
    assert tok.encode("", add_special_tokens=False) == []


def test_pieces(tok):
    assert len(tok) == tok.vocab_size == len(tok.get_vocab()) == 421
    assert tok.get_vocab()["</s>"] == tok.eos_token_id == 2
    assert tok.convert_tokens_to_ids("<s>") == 1
    assert tok.convert_tokens_to_ids(["<s>", "no such piece"]) == [1, 0]
    assert tok.convert_ids_to_tokens(2) == "</s>"
    assert tok.convert_ids_to_tokens([1, 13, 2], skip_special_tokens=True) == ["<0x0A>"]
    assert "".join(tok.tokenize("def <s>")) == "▁def▁<s>"
    assert tok.all_special_tokens[:4] == ["<s>", "</s>", "<unk>", "▁<PRE>"]
    assert [tok.prefix_token, tok.eot_token] == ["▁<PRE>", "▁<EOT>"]


def test_cleaning_up_spaces(tok):
    ids = tok.encode("is n't it ?", add_special_tokens=False)
    assert tok.decode(ids) == "is n't it ?"
    assert tok.decode(ids, clean_up_tokenization_spaces=True) == "isn't it?"
    tok.clean_up_tokenization_spaces = True
    assert tok.decode(ids) == "isn't it?"


def test_saving(tok, tmp_path):
    tok.pad_token, tok.add_eos_token, tok.suffix_first = "</s>", True, True
    paths = tok.save_pretrained(tmp_path / "new" / "folder")
    again = CodeLlamaTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert len(paths) == 2
    assert again("a<FILL_ME>b") == tok("a<FILL_ME>b")
    assert again.pad_token_id == 2
    assert CodeLlamaTokenizer.from_pretrained(paths[-1], pad_token=None).pad_token is None
    [file] = tok.save_vocabulary(tmp_path, "other")
    assert file.endswith("other-tokenizer.model")
    assert CodeLlamaTokenizer(file)("def") == CodeLlamaTokenizer(tok.vocab_file)("def")


def test_configuration_files(tmp_path):
    model_file(tmp_path, infilling=False)
    config = {"bos_token": {"content": "<s>"}, "padding_side": "left", "legacy": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = CodeLlamaTokenizer.from_pretrained(tmp_path)
    assert tok.padding_side == "left"
    assert tok.prefix_token is tok.eot_id is None
    with pytest.raises(ValueError, match="cannot infill"):
        tok("a<FILL_ME>b")


def test_infilling_switched_off(tok):
    names = ("prefix_token", "middle_token", "suffix_token", "eot_token")
    plain = CodeLlamaTokenizer(tok.vocab_file, **dict.fromkeys(names))
    with pytest.raises(ValueError, match="cannot infill"):
        plain("a", suffix="b")


def test_a_gguf_file(tmp_path, tok):
    file = gguf_file(tmp_path, sentencepiece_fields())
    assert CodeLlamaTokenizer.from_pretrained(file)("a<FILL_ME>b") == tok("a<FILL_ME>b")
    with pytest.raises(CheckpointError, match="expected a SentencePiece vocabulary"):
        CodeLlamaTokenizer.from_pretrained(gguf_file(tmp_path, bpe_fields()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_tensors": "pt"}, "return_tensors must be None, 'np' or 'ms', got 'pt'"),
        ({"padding": True}, "padding needs a pad token"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"padding": "shortest"}, "padding must be True, False or in .*got 'shortest'"),
        ({"truncation": "only_first"}, "truncation must be True, False or in"),
        ({"padding_side": "top"}, "a side is 'left' or 'right', got 'top'"),
    ],
)
def test_refused_options(tok, options, message):
    with pytest.raises(ValueError, match=message):
        tok("def", **options)


def test_refused_texts_and_tokens(tok):
    with pytest.raises(ValueError, match="a prompt may have one <FILL_ME>, this has 2"):
        tok("<FILL_ME> <FILL_ME>")
    for bad in (5, b"def", None):
        with pytest.raises(TypeError):
            tok(bad)
    with pytest.raises(TypeError, match="text must be a str, got int"):
        tok(["def", 5])
    with pytest.raises(ValueError, match="token id 421 is out of range"):
        tok.decode([421])
    with pytest.raises(ValueError, match=r"'\[PAD\]' is not in the vocabulary"):
        CodeLlamaTokenizer(tok.vocab_file, pad_token="[PAD]")
    with pytest.raises(ValueError, match="a side is"):
        CodeLlamaTokenizer(tok.vocab_file, padding_side="top")
    with pytest.raises(TypeError, match="no_such_option"):
        CodeLlamaTokenizer.from_pretrained(tok.vocab_file, no_such_option=1)


def test_streamer_prints(tok, capsys):
    streamer = TextStreamer(tok, skip_prompt=True, skip_special_tokens=True)
    ids = tok("def add(first):").input_ids
    streamer.put(np.array([ids]))
    for token_id in tok("漢def add").input_ids:
        streamer.put(token_id)
    streamer.end()
    assert capsys.readouterr().out == "漢def add\n"
    with pytest.raises(ValueError, match="shows one text"):
        streamer.put(np.array([ids, ids]))


def test_an_unknown_option_is_refused_by_the_name_of_what_was_called(tok):
    with pytest.raises(TypeError, match=r"__call__\(\) got an unexpected keyword argument 'sufix'"):
        tok("def f(", sufix="x")
