"""What Transformers' tests ask of every tokenizer, under the names of its test methods.

Each check is written anew for `CodeLlamaTokenizer`; docs/transformers.md lists what stays out.
"""

import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_llm import make_folder
from helpers.tokenizer_files import model_file

from codellama_rt.hf.code_llama_tokenizer import CodeLlamaTokenizer

OUT = {
    "test_subword_regularization_tokenizer",
    "test_pickle_subword_regularization_tokenizer",
    "test_pretokenized_inputs",
    "test_prepare_seq2seq_batch",
    "test_batch_encode_plus_overflowing_tokens",
    "test_offsets_mapping",
    "test_training_new_tokenizer",
    "test_chat_template_return_assistant_tokens_mask",
    "test_continue_final_message",
    "test_split_special_tokens",
}
DIALOG = [
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": "def"},
    {"role": "user", "content": "first"},
]


@pytest.fixture
def tok(tmp_path):
    return CodeLlamaTokenizer.from_pretrained(model_file(tmp_path))


@pytest.fixture
def padded(tok):
    tok.pad_token = tok.eos_token
    return tok


def reopened(tok, folder):
    tok.save_pretrained(str(folder))
    return CodeLlamaTokenizer.from_pretrained(folder)


def test_four_of_five_checks_pass():
    checks = {name for name in globals() if name.startswith("test_")} - {
        "test_four_of_five_checks_pass",
        "test_what_stays_out_is_documented",
        "test_tokens_that_cannot_be_added",
        "test_calls_that_cannot_be",
    }
    assert len(checks | OUT) >= 50
    assert len(checks) / len(checks | OUT) >= 0.8
    assert not checks & OUT


def test_what_stays_out_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text("utf-8")
    assert [name for name in sorted(OUT) if f"`{name}`" not in text] == []


def test_model_input_names_signature(tok):
    assert tuple(tok("def")) == tok.model_input_names


def test_sentencepiece_tokenize_and_convert_tokens_to_string(tok):
    text = "def add(first):"
    assert tok.convert_tokens_to_string(tok.tokenize(text)) == text


def test_sentencepiece_tokenize_and_decode(tok):
    text = "def add(first):\n    return"
    assert tok.decode(tok.encode(text, add_special_tokens=False)) == text


def test_save_sentencepiece_tokenizer(tok, tmp_path):
    (path,) = tok.save_vocabulary(str(tmp_path))
    assert Path(path).read_bytes() == tok.runtime.model_proto


def test_save_and_load_tokenizer(padded, tmp_path):
    padded.add_tokens(["<x>", "<long name>"])
    padded.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|end|>"]})
    text = "def<x> add<|end|>[PAD]<long name> first"
    copy = reopened(padded, tmp_path / "copy")
    assert copy(text).input_ids == padded(text).input_ids
    assert copy.special_tokens_map == padded.special_tokens_map
    assert copy.get_vocab() == padded.get_vocab()
    again = reopened(copy, tmp_path / "again")
    assert again(text).input_ids == padded(text).input_ids


def test_pickle_tokenizer(tok):
    copy = pickle.loads(pickle.dumps(tok))
    assert copy("def add").input_ids == tok("def add").input_ids


def test_pickle_added_tokens(tok):
    tok.add_tokens(["<x>"])
    copy = pickle.loads(pickle.dumps(tok))
    assert copy("a<x>b").input_ids == tok("a<x>b").input_ids


def test_added_tokens_do_lower_case(tok):
    tok.add_tokens(["AAA", "aaa"])
    assert tok("AAAaaa").input_ids[-2:] == tok.convert_tokens_to_ids(["AAA", "aaa"])


def test_add_tokens_tokenizer(tok):
    size = len(tok)
    assert tok.add_tokens(["<x>", "<y>"]) == 2
    assert tok.add_tokens(["<x>", "def"]) == 0
    assert tok.add_tokens("<z>") == 1
    assert (len(tok), tok.vocab_size) == (size + 3, size)
    assert tok.convert_tokens_to_ids(["<x>", "<y>", "<z>"]) == [size, size + 1, size + 2]
    # As the slow tokenizer of Transformers 4.57 encodes with the same vocabulary.
    assert tok.tokenize("def add(<x>first)") == ["▁def", "▁add", "(", "<x>", "first", ")"]
    assert tok.tokenize("def <x> add") == ["▁def", "▁", "<x>", "▁add"]
    assert tok.tokenize("<x> def") == ["▁", "<x>", "▁def"]
    assert tok.tokenize("a<x><x>b") == ["▁a", "<x>", "<x>", "b"]
    for text in ("def add(<x>first)", "def <x> add", "a<x><y>b</s>", "<x>def", "add<x>", " <z>"):
        assert tok.decode(tok.encode(text, add_special_tokens=False)) == text


def test_add_special_tokens(tok):
    assert tok.add_special_tokens({"pad_token": "[PAD]"}) == 1
    assert tok.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]}) == 2
    assert tok.add_special_tokens({"eos_token": "</s>"}) == 0
    ids = tok.encode("a[PAD]b<|a|>", add_special_tokens=False)
    assert ids.count(tok.pad_token_id) == 1
    assert tok.decode(ids) == "a[PAD]b<|a|>"
    assert tok.decode(ids, skip_special_tokens=True) == "ab"
    tok.add_special_tokens({"additional_special_tokens": ["<|b|>"]})
    assert tok.decode(ids, skip_special_tokens=True) == "ab<|a|>"
    assert tok.add_tokens(["<|c|>"], special_tokens=True) == 1
    assert "<|c|>" in tok.all_special_tokens


def test_internal_consistency(tok):
    tok.add_tokens(["<x>"])
    text = "def <x>add(first):"
    tokens = tok.tokenize(text)
    ids = tok.convert_tokens_to_ids(tokens)
    assert ids == tok.encode(text, add_special_tokens=False)
    assert tok.convert_ids_to_tokens(ids) == tokens
    assert tok.decode(ids) == text


def test_encode_decode_with_spaces(tok):
    tok.add_tokens(["[ABC]", "[DEF]"])
    text = "[ABC][DEF] [ABC]  def[DEF]"
    assert tok.decode(tok.encode(text, add_special_tokens=False)) == text


def test_mask_output(tok):
    mask = tok("def", return_special_tokens_mask=True).special_tokens_mask
    assert mask == [1] + [0] * (len(mask) - 1)


def test_token_type_ids(tok):
    encoding = tok("def", "add", return_token_type_ids=True)
    assert encoding.token_type_ids == tok.create_token_type_ids_from_sequences(
        tok.encode("def", add_special_tokens=False), tok.encode("add", add_special_tokens=False)
    )
    short = tok("def def", "add add", return_token_type_ids=True, truncation=True, max_length=4)
    assert len(short.token_type_ids) == len(short.input_ids) == 4
    assert sorted(set(short.token_type_ids)) == [0, 1]


def test_create_token_type_ids(tok):
    assert tok.create_token_type_ids_from_sequences([5, 6]) == [0] * 3
    assert tok.create_token_type_ids_from_sequences([5], [6]) == [0, 0, 1, 1]


def test_build_inputs_with_special_tokens(tok):
    tok.add_eos_token = True
    assert tok.build_inputs_with_special_tokens([5], [6]) == [1, 5, 2, 1, 6, 2]


def test_number_of_added_tokens(tok):
    for eos in (False, True):
        tok.add_eos_token = eos
        for pair in (None, "add"):
            plain = tok("def", pair, add_special_tokens=False).input_ids
            added = tok.num_special_tokens_to_add(pair=pair is not None)
            assert len(tok("def", pair).input_ids) - len(plain) == added


def test_num_special_tokens_to_add_equal(tok):
    tok.add_bos_token = False
    assert (tok.num_special_tokens_to_add(), tok.num_special_tokens_to_add(pair=True)) == (0, 0)


def test_max_length_equal(tok):
    tok.model_max_length = 100
    assert (tok.max_len_single_sentence, tok.max_len_sentences_pair) == (99, 98)


def test_maximum_encoding_length_single_input(tok):
    text = "def add " * 20
    whole = tok(text).input_ids
    assert len(whole) > 7
    assert tok(text, truncation=True, max_length=7).input_ids == whole[:7]
    tok.model_max_length = 9
    assert tok(text, truncation=True).input_ids == whole[:9]
    assert tok(text).input_ids == whole


def test_maximum_encoding_length_pair_input(tok):
    ids, pair = [5, 6, 7, 8], [9, 10]
    assert tok.truncate_sequences(ids, pair, 3) == ([5, 6], [9], [])
    cut = tok.prepare_for_model(ids, pair, truncation=True, max_length=5).input_ids
    assert cut == [1, 5, 6, 1, 9]


def test_special_tokens_mask(tok):
    encoding = tok("def</s> add", return_special_tokens_mask=True)
    special = set(tok.all_special_ids)
    assert encoding.special_tokens_mask == [int(i in special) for i in encoding.input_ids]


def test_special_tokens_mask_input_pairs(tok):
    encoding = tok("def", "add", return_special_tokens_mask=True)
    second = encoding.input_ids.index(1, 1)
    assert [i for i, m in enumerate(encoding.special_tokens_mask) if m] == [0, second]


def test_right_and_left_padding(padded):
    ids = padded("def").input_ids
    for side, expected in (("right", ids + [2] * 3), ("left", [2] * 3 + ids)):
        padded.padding_side = side
        longer = len(ids) + 3
        assert padded("def", padding="max_length", max_length=longer).input_ids == expected
        assert padded("def", padding=True).input_ids == ids


def test_padding_side_in_kwargs(tok):
    for side in ("left", "right"):
        opened = CodeLlamaTokenizer.from_pretrained(tok.vocab_file, padding_side=side)
        assert opened.padding_side == side
    with pytest.raises(ValueError, match="a side is"):
        CodeLlamaTokenizer.from_pretrained(tok.vocab_file, padding_side="unauthorized")


def test_right_and_left_truncation(tok):
    ids = tok("def add first", add_special_tokens=False).input_ids
    for side, expected in (("right", ids[:-2]), ("left", ids[2:])):
        tok.truncation_side = side
        options = {"add_special_tokens": False, "truncation": True, "max_length": len(ids) - 2}
        assert tok("def add first", **options).input_ids == expected


def test_truncation_side_in_kwargs(tok):
    opened = CodeLlamaTokenizer.from_pretrained(tok.vocab_file, truncation_side="left")
    assert opened.truncation_side == "left"


def test_padding_to_max_length(padded):
    encoding = padded("def", padding="max_length", max_length=12)
    assert (len(encoding.input_ids), sum(encoding.attention_mask)) == (12, len(padded("def")[
        "input_ids"]))  # fmt: skip


def test_padding_to_multiple_of(padded):
    for text in ("def", "def add first def add"):
        assert len(padded(text, padding=True, pad_to_multiple_of=8).input_ids) % 8 == 0
    assert padded("def", pad_to_multiple_of=8).input_ids == padded("def").input_ids


def test_padding_with_attention_mask(padded):
    features = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0]},
        {"input_ids": [5, 6], "attention_mask": [1, 0]},
    ]
    assert padded.pad(features).attention_mask == [[1, 1, 0], [1, 0, 0]]
    assert padded.pad(features, padding_side="left").attention_mask == [[1, 1, 0], [0, 1, 0]]
    assert padded.pad(features).input_ids == [[5, 6, 7], [5, 6, 2]]
    assert "attention_mask" not in padded.pad(features, return_attention_mask=False)


@pytest.mark.parametrize("kind", ["np", "ms"])
def test_padding_of_tensors(padded, kind):
    """What `return_tensors` has made is taken again: one text, or several."""
    one = padded("def", return_tensors=kind).input_ids
    both = padded.pad({"input_ids": [one[0], one[0][:1]]})
    assert both.input_ids == [padded("def").input_ids, [1, *[2] * (one.shape[1] - 1)]]
    assert padded.pad({"input_ids": one[0]}).input_ids == padded("def").input_ids
    again = padded.pad({"input_ids": one}, return_tensors=kind).input_ids
    assert type(again) is type(one)
    assert again.shape == one.shape


def test_encode_plus_with_padding(padded):
    encoding = padded.encode_plus(
        "def", padding="max_length", max_length=10, return_special_tokens_mask=True
    )
    plain = padded.encode_plus("def", return_special_tokens_mask=True)
    gap = 10 - len(plain.input_ids)
    assert encoding.input_ids == plain.input_ids + [2] * gap
    assert encoding.special_tokens_mask == plain.special_tokens_mask + [1] * gap
    assert encoding.attention_mask == plain.attention_mask + [0] * gap


def test_padding_different_model_input_name(padded):
    """What `pad` does not know stays as it is."""
    encoding = padded.pad({"input_ids": [[5, 6], [7]], "labels": [[1], [2, 3]]})
    assert encoding.labels == [[1], [2, 3]]


def test_batch_encode_plus_batch_sequence_length(padded):
    texts = ["def", "def add first", "add"]
    each = [padded.encode_plus(text) for text in texts]
    batch = padded.batch_encode_plus(texts)
    assert [batch.input_ids[i] for i in range(3)] == [one.input_ids for one in each]
    longest = max(len(one.input_ids) for one in each)
    together = padded.batch_encode_plus(texts, padding=True)
    assert {len(row) for row in together.input_ids} == {longest}


def test_batch_encode_plus_padding(padded):
    pairs = [("def", "add"), ("first", "def add")]
    batch = padded.batch_encode_plus(pairs, padding=True, return_tensors="np")
    assert batch.input_ids.shape == batch.attention_mask.shape
    for row, mask, pair in zip(batch.input_ids, batch.attention_mask, pairs, strict=True):
        assert row[mask == 1].tolist() == padded(*pair).input_ids


def test_prepare_for_model(tok):
    ids = tok.convert_tokens_to_ids(tok.tokenize("def add"))
    assert dict(tok.prepare_for_model(ids)) == dict(tok("def add"))
    assert dict(tok.prepare_for_model(ids, add_special_tokens=False)) == dict(
        tok("def add", add_special_tokens=False)
    )


def test_added_token_are_matched_longest_first(tok):
    tok.add_tokens(["extra_id"])
    tok.add_tokens(["extra_id_100"])
    assert tok.tokenize("a extra_id_100")[-1] == "extra_id_100"


def test_added_token_serializable(tok, tmp_path):
    class AddedToken:
        content = "<new>"

    tok.add_tokens([AddedToken()])
    assert reopened(tok, tmp_path / "copy").tokenize("a<new>")[-1] == "<new>"


def test_added_tokens_serialization(tok, tmp_path):
    tok.add_tokens(["<plain>"])
    tok.add_tokens(["<control>"], special_tokens=True)
    copy = reopened(tok, tmp_path / "copy")
    assert copy.added_tokens_decoder == tok.added_tokens_decoder
    assert copy.added_tokens_encoder["<plain>"] == tok.vocab_size
    assert copy.decode(copy.encode("a<plain><control>"), skip_special_tokens=True) == "a<plain>"


def test_is_fast(tok):
    assert tok.is_fast is False


def test_call(tok):
    texts = ["def", "add first"]
    assert dict(tok(texts[0])) == dict(tok.encode_plus(texts[0]))
    assert dict(tok(texts)) == dict(tok.batch_encode_plus(texts))
    assert dict(tok(texts, texts)) == dict(tok.batch_encode_plus([("def", "def"), (texts[1],) * 2]))
    assert tok("def").data == dict(tok("def"))
    assert tok(texts, return_length=True).length == [len(row) for row in tok(texts).input_ids]
    assert list(tok("def", return_attention_mask=False)) == ["input_ids"]
    assert tok("def").to("cpu").input_ids == tok("def").input_ids


def test_get_vocab(tok):
    tok.add_tokens(["asd"])
    vocab = tok.get_vocab()
    assert (vocab["asd"], len(vocab)) == (len(tok) - 1, len(tok))


def test_conversion_reversible(tok):
    tok.add_tokens(["<x>"])
    for word, token_id in tok.get_vocab().items():
        assert tok.convert_tokens_to_ids(word) == token_id
        assert tok.convert_ids_to_tokens(token_id) == word


def test_chat_template(tok):
    template = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    expected = "user:add</s>assistant:def</s>user:first</s>"
    assert tok.apply_chat_template(DIALOG, chat_template=template, tokenize=False) == expected
    tok.chat_template = template
    assert tok.apply_chat_template(DIALOG, tokenize=False) == expected
    assert tok.get_chat_template() == template
    ids = tok.apply_chat_template(DIALOG)
    assert tok.decode(ids) == expected


def test_chat_template_batched(padded):
    dialogs = [DIALOG, DIALOG[:1]]
    texts = padded.apply_chat_template(dialogs, tokenize=False)
    assert texts == [padded.apply_chat_template(one, tokenize=False) for one in dialogs]
    rows = padded.apply_chat_template(dialogs)
    assert rows == [padded.apply_chat_template(one) for one in dialogs]
    together = padded.apply_chat_template(
        dialogs, padding=True, return_dict=True, return_tensors="np"
    )
    assert together.input_ids.shape == together.attention_mask.shape == (2, len(rows[0]))
    assert together.input_ids[1][together.attention_mask[1] == 1].tolist() == rows[1]
    cut = padded.apply_chat_template(dialogs, truncation=True, max_length=5)
    assert [len(row) for row in cut] == [5, 5]
    assert padded.apply_chat_template([DIALOG[:1]]) == [rows[1]]
    assert padded.apply_chat_template((DIALOG[:1],)) == [rows[1]]


def test_chat_template_dict(tok):
    encoding = tok.apply_chat_template(DIALOG, return_dict=True)
    assert encoding.input_ids == tok.apply_chat_template(DIALOG)
    assert encoding.attention_mask == [1] * len(encoding.input_ids)


def test_chat_template_save_loading(tok, tmp_path):
    tok.chat_template = "{{ messages[0].content }}"
    copy = reopened(tok, tmp_path / "copy")
    assert copy.chat_template == tok.chat_template
    assert copy.apply_chat_template(DIALOG, tokenize=False) == "add"


def test_jinja_strftime(tok):
    text = tok.apply_chat_template(
        DIALOG, chat_template="{{ strftime_now('%Y-%m-%d') }}", tokenize=False
    )
    assert [len(part) for part in text.split("-")] == [4, 2, 2]


def test_special_tokens_initialization(tok):
    with pytest.raises(ValueError, match=r"'\[PAD\]' is not in the vocabulary"):
        CodeLlamaTokenizer(tok.vocab_file, pad_token="[PAD]")
    assert tok.add_special_tokens({"pad_token": "[PAD]", "bos_token": "def"}) == 1
    assert tok.pad_token_id == tok.vocab_size
    assert tok("add").input_ids[0] == tok.convert_tokens_to_ids("def")
    assert {"[PAD]", "def"} <= set(tok.all_special_tokens)


def test_special_tokens_map_equal(tok):
    assert tok.special_tokens_map == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"],
    }


def test_tokenizers_common_properties(tok):
    for role in ("bos", "eos", "unk", "pad", "cls", "sep", "mask"):
        assert hasattr(tok, f"{role}_token")
        assert hasattr(tok, f"{role}_token_id")
    for name in ("additional_special_tokens", "additional_special_tokens_ids", "name_or_path",
                 "model_max_length", "padding_side", "truncation_side"):  # fmt: skip
        assert hasattr(tok, name)
    assert tok.additional_special_tokens_ids == [
        tok.prefix_id, tok.middle_id, tok.suffix_id, tok.eot_id,
    ]  # fmt: skip


def test_tokenizers_common_ids_setters(tok):
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        setattr(tok, f"{role}_id", 5)
        assert getattr(tok, role) == tok.convert_ids_to_tokens(5)
        assert getattr(tok, f"{role}_id") == 5
        setattr(tok, f"{role}_id", None)
        assert getattr(tok, role) is None


def test_save_pretrained(tok, tmp_path):
    paths = tok.save_pretrained(str(tmp_path / "copy"))
    assert {Path(path).name for path in paths} == {"tokenizer_config.json", "tokenizer.model"}


def test_clean_up_tokenization_spaces(tok):
    assert tok.clean_up_tokenization("a . b n't") == "a. bn't"
    tok.clean_up_tokenization_spaces = True
    assert tok.decode(tok.encode("a .", add_special_tokens=False)) == "a."


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda tok: tok.add_tokens(5), TypeError, "must be a str, got int"),
        (lambda tok: tok.add_tokens(["a", None]), TypeError, "must be a str, got NoneType"),
        (lambda tok: tok.add_tokens([""]), ValueError, "must not be empty"),
        (lambda tok: tok.add_tokens(["\ud800"]), ValueError, "surrogates"),
        (lambda tok: tok.add_special_tokens({"sep_token": "x"}), ValueError, "has no sep_token"),
        (lambda tok: tok.add_special_tokens({"additional_special_tokens": "x"}), TypeError,
         "must be a list of tokens"),
    ],
)  # fmt: skip
def test_tokens_that_cannot_be_added(tok, tmp_path, call, error, words):
    with pytest.raises(error, match=words):
        call(tok)
    assert len(tok) == tok.vocab_size
    full = CodeLlamaTokenizer.from_pretrained(make_folder(tmp_path / "model"))
    room = 512 - len(full)
    assert full.add_tokens([f"<{i}>" for i in range(room)]) == room
    with pytest.raises(ValueError, match="the model has rows for 512 tokens, and '<more>'"):
        full.add_tokens(["<more>"])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda tok: tok.batch_encode_plus("def"), TypeError, "a batch must be a list"),
        (lambda tok: tok.pad({"ids": [1]}), ValueError, "have input_ids, got"),
        (lambda tok: tok.pad({"input_ids": [[1], [1, 2]]}), ValueError, "needs a pad token"),
        (lambda tok: tok.pad({"input_ids": [1], "attention_mask": [1, 1]}), ValueError,
         "attention_mask must have the lengths"),
        (lambda tok: tok.apply_chat_template([[], []]), ValueError, "at least one message"),
        (lambda tok: tok.apply_chat_template([DIALOG, "x"]), TypeError, "messages must be"),
        (lambda tok: tok.truncate_sequences([1], None, 1, "only_first"), ValueError,
         "truncation must be"),
        (lambda tok: tok("def").to(np.zeros(1)), TypeError, "a device must be a str"),
        (lambda tok: type(tok).from_pretrained(tok.vocab_file, revision="x"), TypeError,
         "does not support revision"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be(tok, call, error, words):
    with pytest.raises(error, match=words):
        call(tok)
