"""Every file a tokenizer can lie in, well formed and not."""

import random
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.tokenizer_files import (
    BPE_PIECES,
    bpe_fields,
    bpe_json,
    gguf_file,
    json_file,
    model_file,
    sentencepiece_fields,
    sentencepiece_json,
    sentencepiece_model,
)

from codellama_rt.errors import CheckpointError, CheckpointWarning
from codellama_rt.text.tokenizer import has_tokenizer, load_tokenizer
from codellama_rt.text.tokenizer.bpe_tokenizer import PRE_TOKENIZERS, BpeTokenizer, build_bpe
from codellama_rt.text.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

SPM = SentencePieceTokenizer(sentencepiece_model())
TEXT = "def f(a, b):\n    return ' <s>é😀▁<PRE>'\n\t12345  "
NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


@pytest.fixture(params=["directory", "model", "gguf", "json"])
def sentencepiece_path(request, tmp_path):
    if request.param == "gguf":
        return gguf_file(tmp_path, sentencepiece_fields())
    if request.param == "json":
        return json_file(tmp_path, sentencepiece_json(), NAMES)
    return model_file(tmp_path) if request.param == "model" else model_file(tmp_path).parent


def test_every_file_of_a_sentencepiece_model_gives_the_same_ids(sentencepiece_path):
    tokenizer = load_tokenizer(str(sentencepiece_path), vocab_size=SPM.vocab_size)
    assert tokenizer.encode(TEXT) == SPM.encode(TEXT)
    assert tokenizer.encode_infill(TEXT, TEXT) == SPM.encode_infill(TEXT, TEXT)
    assert tokenizer.decode(SPM.encode(TEXT)) == SPM.decode(SPM.encode(TEXT))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id) == (1, 2, SPM.eot_id)
    assert tokenizer.special_ids == SPM.special_ids


def test_tokenizer_model_comes_before_tokenizer_json(tmp_path):
    model_file(tmp_path)
    json_file(tmp_path, bpe_json())
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


# GGUF, SentencePiece


@pytest.mark.parametrize("middle_key", ["middle_token_id", "fim_mid_token_id"])
def test_infilling_tokens_by_the_keys_of_a_gguf_file(tmp_path, middle_key):
    keys = {"prefix_token_id": 5, "fim_suf_token_id": 6, middle_key: 7, "eot_token_id": 8}
    tokenizer = load_tokenizer(gguf_file(tmp_path, sentencepiece_fields() | keys))
    assert tokenizer.encode_infill("", "") == [1, 5, 6, 7]
    assert tokenizer.eot_id == 8
    assert {5, 6, 7, 8} < tokenizer.special_ids


def test_the_end_of_a_chat_turn_is_no_infilling_token(tmp_path):
    fields = sentencepiece_fields(sentencepiece_model(infilling=False)) | {"eot_token_id": 2}
    tokenizer = load_tokenizer(gguf_file(tmp_path, fields))
    assert tokenizer.eot_id is None
    assert not tokenizer.can_infill


def test_infilling_pieces_that_a_text_would_match(tmp_path):
    fields = sentencepiece_fields()
    fields["token_type"][SPM.prefix_id] = 4
    tokenizer = load_tokenizer(gguf_file(tmp_path, fields))
    assert SPM.prefix_id not in tokenizer.encode("a <PRE> b")
    assert tokenizer.encode_infill("", "")[1] == SPM.prefix_id


def test_gguf_flags(tmp_path):
    flags = {"add_space_prefix": False, "add_bos_token": False}
    tokenizer = load_tokenizer(gguf_file(tmp_path, sentencepiece_fields() | flags))
    assert tokenizer.encode("def f") == SPM.encode_continuation("def f")
    assert tokenizer.decode(SPM.encode("def f")) == " def f"


def test_vocabularies_without_types_or_scores(tmp_path):
    """llama.cpp takes both as optional: pieces are text, and equally good."""
    fields = without(without(sentencepiece_fields(), "token_type"), "scores")
    with pytest.warns(CheckpointWarning, match=r"(token_type|scores): expected it, found nothing"):
        tokenizer = load_tokenizer(gguf_file(tmp_path, fields))
    assert {0, 1, 2} <= tokenizer.special_ids
    text = "é\ndef f(): # 漢"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes(tokenizer.piece_id("<0x0A>")) == b"\n"


@pytest.mark.parametrize("kind", [0, 1])
def test_pieces_that_are_bytes_by_name_alone(tmp_path, kind):
    fields = sentencepiece_fields()
    fields["token_type"] = [kind if x == 6 else x for x in fields["token_type"]]
    tokenizer = load_tokenizer(gguf_file(tmp_path, fields))
    assert tokenizer.encode("漢\n") == SPM.encode("漢\n")
    assert tokenizer.decode(tokenizer.encode("漢\n")) == "漢\n"


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_pieces_without_a_name(tmp_path, model):
    fields = sentencepiece_fields() if model == "llama" else bpe_fields()
    for key, value in (("tokens", ""), ("scores", 0.0), ("token_type", 1)):
        if key in fields:
            fields[key] = [*fields[key], value, value]
    tokenizer = load_tokenizer(gguf_file(tmp_path, fields))
    size = len(fields["tokens"])
    assert [tokenizer.piece(i) for i in (size - 2, size - 1)] == [
        f"[EMPTY_{size - 2}]", f"[EMPTY_{size - 1}]"]  # fmt: skip


@pytest.mark.parametrize("key", ["bos", "eos", "unknown", "eot", "prefix"])
@pytest.mark.parametrize("none", [421, 32000, 2**32 - 1])
def test_ids_that_mean_none(tmp_path, key, none):
    fields = sentencepiece_fields() | {f"{key}_token_id": none}
    with pytest.warns(CheckpointWarning, match=f"{key}_token_id: {none} is none of the 421 tokens"):
        tokenizer = load_tokenizer(gguf_file(tmp_path, fields))
    assert tokenizer.encode("def", bos=False) == SPM.encode("def", bos=False)
    # As in llama.cpp, the pieces "<s>" and "</s>" are those that a file does not name.
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize("kind", [..., "none", "no_vocab"])
def test_a_gguf_file_without_a_vocabulary_has_no_tokenizer(kind):
    metadata = {"tokenizer.ggml.model": kind} if kind is not ... else {}
    assert not has_tokenizer(Path("a.gguf"), metadata)


# Byte-level BPE


@pytest.mark.parametrize("kind", ["gguf", "json"])
def test_bpe(tmp_path, kind):
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    is_gguf = kind == "gguf"
    path = gguf_file(tmp_path, bpe_fields()) if is_gguf else json_file(tmp_path, bpe_json(), names)
    tokenizer = load_tokenizer(path, vocab_size=300)
    assert isinstance(tokenizer, BpeTokenizer)
    ids = tokenizer.encode("a def re<|end|>", bos=False)
    assert [BPE_PIECES[i] for i in ids][:4] == ["a", "Ġdef", "Ġ", "re"]
    assert 1 not in ids
    assert tokenizer.decode(ids) == "a def re<|end|>"
    parsed = tokenizer.encode("a<|end|>", parse_special=True)
    assert parsed == ([] if is_gguf else [0]) + [BPE_PIECES.index("a"), 1]
    assert tokenizer.decode(parsed, skip_special_tokens=False).endswith("a<|end|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (0, 1, not is_gguf)
    assert tokenizer.token_bytes(BPE_PIECES.index("Ġdef")) == b" def"


def test_pieces_that_stand_for_themselves(tmp_path):
    tokenizer = load_tokenizer(gguf_file(tmp_path, bpe_fields()))
    ids = tokenizer.encode("a<tab>b")
    assert BPE_PIECES.index("<tab>") in ids
    assert tokenizer.decode(ids) == "a<tab>b"


# Of "Don't say 1234 $x+=\n  y" and "camelCase XMLHttp's 3/4 中文ab, «é» \r\n\r\n  z /  ".
WORDS = {
    "gpt-2": "Don|'t| say| 1234| $|x|+=|\n | y|camelCase| XMLHttp|'s| 3|/|4| 中文ab|,| «|é|»"
    "| \r\n\r\n | z| /|  ",
    "smollm": "Don|'t| say| |1|2|3|4| $|x|+=|\n | y|camelCase| XMLHttp|'s| |3|/|4| 中文ab|,| «|é|»"
    "| \r\n\r\n | z| /|  ",
    "llama-bpe": "Don|'t| say| |123|4| $|x|+=\n| | y|camelCase| XMLHttp|'s| |3|/|4| 中文ab|,| «|é|»"
    "| \r\n\r\n| | z| /|  ",
    "qwen2": "Don|'t| say| |1|2|3|4| $|x|+=\n| | y|camelCase| XMLHttp|'s| |3|/|4| 中文ab|,| «|é|»"
    "| \r\n\r\n| | z| /|  ",
    "tekken": "Don|'t| say| |1|2|3|4| $|x|+=\n| | y|camel|Case| XMLHttp|'s| |3|/|4| 中文ab|,| «|é|»"
    "| \r\n\r\n| | z| /|  ",
    "gpt-4o": "Don't| say| |123|4| $|x|+=\n| | y|camel|Case| XMLHttp's| |3|/|4| 中文ab|,| «|é|»"
    "| \r\n\r\n| | z| /|  ",
    "seed-coder": "Don|'t| say| |1|2|3|4| $|x|+=|\n| | y|camelCase| XMLHttp|'s| |3|/|4| 中文ab|,"
    "| «|é|»| \r\n\r\n| | z| /|  ",
    "deepseek-coder": "Don|'|t| say| |1|2|3|4| $|x|+=|\n| | y|camelCase| XMLHttp|'|s| |3|/|4| |中文"
    "|ab|,| «|é|»| |\r|\n|\r|\n| | z| /|  ",
    "deepseek-llm": "Don|'|t| say| |1234| $|x|+=|\n| | y|camelCase| XMLHttp|'|s| |3|/|4| |中文|ab|,"
    "| «|é|»| |\r|\n|\r|\n| | z| /|  ",
    "deepseek-v3": "Don|'t| say| |123|4| $|x|+=\n| | y|camelCase| XMLHttp|'s| |3|/|4| |中文|ab|,"
    "| «|é|»| \r\n\r\n| | z| /|  ",
    "default": "Don|'|t| say| |123|4| |$|x|+=|\n | y|camelCase| XMLHttp|'|s| |3|/|4| 中文ab|,"
    "| |«|é|»| \r\n\r\n | z| |/|  ",
}
SAME_WORDS = {
    "gpt-2": "mpt olmo jais trillion phi-2 granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe "
    "chatglm-bpe",
    "qwen2": "stablelm2 hunyuan deepseek-r1-qwen megrez",
    "gpt-4o": "llama4",
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_words_of_pre_tokenizers(name):
    """As llama.cpp cuts them: the first four were checked against it on 3016 texts."""
    backend = build_bpe(BPE_PIECES, [], PRE_TOKENIZERS[name])
    words = []
    for text in ("Don't say 1234 $x+=\n  y", "camelCase XMLHttp's 3/4 中文ab, «é» \r\n\r\n  z /  "):
        cut = backend.pre_tokenizer.pre_tokenize_str(text)
        words += [text[begin:end] for _, (begin, end) in cut]
    same = next((known for known, names in SAME_WORDS.items() if name in names.split()), name)
    assert "|".join(words) == WORDS[same]


def test_names_that_take_a_known_word_whole_and_begin_a_text():
    """As llama.cpp sets `ignore_merges` and `add_bos` for these names."""
    whole = {name for name, pre in PRE_TOKENIZERS.items() if pre.ignore_merges}
    llama3 = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2"
    assert whole == {*llama3.split(), "tekken"}
    assert whole == {name for name, pre in PRE_TOKENIZERS.items() if pre.adds_bos}


def test_llama_bpe_adds_a_begin_token_unless_told_not_to(tmp_path):
    fields = bpe_fields() | {"pre": "llama-bpe"}
    assert load_tokenizer(gguf_file(tmp_path, fields)).encode("a")[0] == 0
    fields["add_bos_token"] = False
    assert 0 not in load_tokenizer(gguf_file(tmp_path, fields)).encode("a")


# Faults


def without(fields, name):
    return {key: value for key, value in fields.items() if key != name}


SPM_FIELDS = sentencepiece_fields()
BAD_GGUF = [
    (bpe_fields() | {"pre": "bloom"}, r"pre: expected gpt-2, mpt, .* found 'bloom'"),
    (bpe_fields() | {"model": "bert"}, r"model: expected 'llama' .* or 'gpt2' .*, found 'bert'"),
    (without(bpe_fields(), "model"), "model: expected 'llama'"),
    (without(bpe_fields(), "tokens"), "tokens: expected a list of strings"),
    (bpe_fields() | {"tokens": "abc"}, "tokens: expected a list of strings, found 'abc'"),
    (without(bpe_fields(), "merges"), "merges: expected a list of strings"),
    (bpe_fields() | {"merges": ["no such"]}, "merges do not fit the tokens"),
    (bpe_fields() | {"merges": ["a"]}, "merges do not fit the tokens"),
    (bpe_fields() | {"token_type": [1, 2]}, f"token_type: expected {len(BPE_PIECES)} numbers"),
    (SPM_FIELDS | {"token_type": [7] * 421}, "token_type: expected numbers from 0 to 6"),
    (SPM_FIELDS | {"scores": [0.0] * 420}, "scores: expected 421 numbers"),
    (SPM_FIELDS | {"scores": [float("nan")] * 421}, "scores: expected numbers, found NaN"),
    (bpe_fields() | {"bos_token_id": "0"}, "bos_token_id: expected a token id"),
    (SPM_FIELDS | {"tokens": ["<unk>"] * 421}, "SentencePiece rejects the model"),
    (SPM_FIELDS | {"add_bos_token": "yes"}, "add_bos_token: expected true or false"),
    ({}, "model: expected|tokens: expected"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_GGUF)
def test_bad_gguf_files(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(gguf_file(tmp_path, fields))
    assert "model.gguf" in str(caught.value)


def changed(contents, **changes):
    return contents | {"model": contents["model"] | changes}


BAD_JSON = [
    ({}, "expected a tokenizer"),
    ({"model": 5}, "expected a tokenizer"),
    (changed(bpe_json(), merges=["no such"]), "expected a tokenizer"),
    (changed(bpe_json(), vocab={"a": 0, "b": 2}, merges=[]), "expected a piece of id"),
    (bpe_json() | {"pre_tokenizer": None, "decoder": None}, "expected ByteLevel or byte_fallback"),
    (
        {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
        "model.type: expected 'BPE', found 'WordLevel'",
    ),
]


@pytest.mark.parametrize(("contents", "message"), BAD_JSON)
def test_bad_json_files(tmp_path, contents, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(json_file(tmp_path, contents))
    assert "tokenizer.json" in str(caught.value)


NOT_UTF8 = sentencepiece_model().replace("▁def".encode(), "▁de".encode() + b"\xff")


@pytest.mark.parametrize("data", [b"", b"\0\0", b"not a model", NOT_UTF8])
def test_bad_model_files(tmp_path, data):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"tokenizer.model or tokenizer.json\), found neither"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="expected a tokenizer, found No such file"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("name", ["tokenizer.model", "model.gguf", "tokenizer.json"])
def test_damaged_files_are_read_or_refused(tmp_path, name):
    rng = random.Random(name)
    model_file(tmp_path)
    gguf_file(tmp_path, sentencepiece_fields())
    path = json_file(tmp_path, sentencepiece_json(), NAMES).with_name(name)
    whole = path.read_bytes()
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 2, 10])):
            place = rng.randrange(len(data))
            data[place : place + rng.choice([0, 1, 1, 20])] = rng.randbytes(
                rng.choice([0, 1, 1, 8])
            )
        path.write_bytes(data)
        with suppress(CheckpointError):
            tokenizer = load_tokenizer(path)
            assert isinstance(tokenizer.decode(tokenizer.encode(TEXT)), str)
