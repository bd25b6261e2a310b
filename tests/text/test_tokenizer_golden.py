"""Exact ids and texts: Meta's code and transformers 4.57.6 (slow) on the vocabularies of Llama."""

import json

import numpy as np
import pytest
from helpers.tokenizer_files import gguf_file, sentencepiece_fields

from codellama_rt.checkpoint.model_names import BUILT_IN_NAME, resolve_model
from codellama_rt.hf.code_llama_tokenizer import CodeLlamaTokenizer
from codellama_rt.hf.text_streamer import TextStreamer
from codellama_rt.text.tokenizer import FILL_TOKEN, load_tokenizer


@pytest.fixture(scope="module")
def vocabularies(shared_dir):
    return shared_dir / "data" / "tokenizer"


@pytest.fixture(scope="module")
def meta(vocabularies):
    return load_tokenizer(vocabularies / "codellama-32016", vocab_size=32016)


@pytest.fixture(scope="module")
def hf(vocabularies):
    return CodeLlamaTokenizer.from_pretrained(vocabularies / "codellama-32016")


@pytest.fixture(scope="module")
def cases(shared_dir):
    """Returns the cases of a golden file."""

    def load(name):
        file = shared_dir / "data" / "golden" / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8"))["cases"]

    return load


def assert_all(cases, actual, expected):
    failed = [case["id"] for case in cases if actual(case) != expected(case)]
    assert not failed, f"{len(failed)} of {len(cases)} differ, the first are {failed[:5]}"


def official_ids(case):
    ids = case["official_encode_bos"]
    return case["ids"] if ids == "same" else ids


# Text to ids


def test_encode_as_meta(meta, cases):
    assert_all(cases("tok_encode_decode"), lambda c: meta.encode(c["text"]), official_ids)


def test_encode_as_meta_with_32000_pieces(vocabularies, cases):
    tokenizer = load_tokenizer(vocabularies / "llama2-32000")

    def expected(case):
        ids = case["llama2_32000_ids"]
        return official_ids(case) if ids == "same_as_official" else ids

    assert_all(cases("tok_encode_decode"), lambda c: tokenizer.encode(c["text"]), expected)


def test_encode_as_transformers(hf, cases):
    golden = cases("tok_encode_decode")
    assert_all(golden, lambda c: hf(c["text"]).input_ids, lambda c: c["ids"])
    without = [hf.encode(c["text"], add_special_tokens=False) for c in golden]
    assert without == [c["ids_no_special"] for c in golden]
    with_tokens = [c for c in golden if c["tokens"] is not None]
    assert_all(with_tokens, lambda c: hf.tokenize(c["text"]), lambda c: c["tokens"])


@pytest.mark.parametrize("suffix_first", [False, True])
def test_infill_as_meta(meta, cases, suffix_first):
    assert_all(
        cases("tok_infilling"),
        lambda c: meta.encode_infill(c["prefix"], c["suffix"], suffix_first=suffix_first),
        lambda c: c["official_spm" if suffix_first else "official_psm"],
    )


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_infill_as_transformers(hf, cases, order):
    def expected(column):
        def of(case):
            ids = case[f"{column}_{order}"]
            return case[f"official_{order}"] if ids == "same_as_official" else ids

        return of

    golden, first = cases("tok_infilling"), order == "spm"
    assert_all(
        golden,
        lambda c: hf(c["prefix"], suffix=c["suffix"], suffix_first=first).input_ids,
        expected("hf_slow"),
    )
    assert_all(
        golden,
        lambda c: hf(c["prefix"] + FILL_TOKEN + c["suffix"], suffix_first=first).input_ids,
        expected("hf_slow_fill_me"),
    )


# Ids to text


def test_decode_whole_texts(meta, hf, cases):
    golden = cases("tok_encode_decode")
    assert_all(golden, lambda c: hf.decode(c["ids"]), lambda c: c["decode"])
    assert_all(golden, lambda c: meta.decode(c["ids"]), lambda c: c["decode_skip_special"])
    assert_all(
        golden, lambda c: hf.decode(c["ids_no_special"]), lambda c: c["decode_no_special_ids"]
    )
    cleaned = [c for c in golden if "decode_skip_special_cleanup" in c]
    assert_all(
        cleaned,
        lambda c: hf.decode(c["ids"], True, clean_up_tokenization_spaces=True),
        lambda c: c["decode_skip_special_cleanup"],
    )
    later = [c for c in golden if c["decode_from_token2"] is not None]
    assert_all(
        later, lambda c: hf.decode(c["ids_no_special"][1:]), lambda c: c["decode_from_token2"]
    )


def test_decode_any_ids(meta, hf, cases):
    golden = cases("tok_decode_ids")
    assert_all(golden, lambda c: hf.decode(c["ids"]), lambda c: c["hf_decode"])
    assert_all(golden, lambda c: hf.decode(c["ids"], True), lambda c: c["hf_decode_skip"])
    assert_all(
        golden, lambda c: meta.decode_infill(c["ids"]), lambda c: c["official_decode_infilling"]
    )
    # Meta's code shows infilling tokens as text; the runtime's decode leaves them out.
    plain = [c for c in golden if not meta.special_ids & set(c["ids"][1:-1])]
    assert_all(plain, lambda c: meta.decode(c["ids"]), lambda c: c["official_decode"])


def test_stream(meta, cases):
    def joined(ids, prompt_ids):
        detokenizer = meta.detokenizer(prompt_ids)
        return "".join(map(detokenizer.push, ids)) + detokenizer.flush()

    for case in cases("tok_stream") + cases("tok_decode_ids"):
        assert joined(case["ids"], [meta.bos_id]) == meta.decode(case["ids"])
    # TextStreamer loses a space a line, so its text is the whole one only for single lines.
    for case in cases("tok_stream"):
        if "\n" not in case["joined"][:-1]:
            assert joined(case["ids"], [meta.bos_id]) == case["joined"]


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_stream_chunks_as_transformers(hf, cases, skip_prompt):
    class Collector(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            chunks.append(text)

    for case in cases("tok_stream"):
        chunks, ids = [], case["ids"]
        cut = case["prompt_len_skipped"] if skip_prompt else 0
        streamer = Collector(hf, skip_prompt=skip_prompt, skip_special_tokens=True)
        for value in ([np.array([ids[:cut]])] if skip_prompt else []) + list(np.array(ids[cut:])):
            streamer.put(value)
        streamer.end()
        assert chunks == case["chunks_skip_prompt" if skip_prompt else "chunks"]


# Options of the Transformers interface


@pytest.fixture(scope="module")
def option(cases):
    by_id = {case["id"]: case for case in cases("tok_options")}

    def find(name):
        if name not in by_id:
            pytest.skip(f"tok_options has no case {name}")
        return by_id[name]

    return find


CALL_OPTIONS = ("padding_side", "pad_to_multiple_of", "max_length", "truncation")


@pytest.mark.parametrize(
    "name",
    ["batch_nopad", "batch_pad_right", "batch_maxlen_right", "batch_pad_mult8_left"],
)
def test_batches(vocabularies, option, name):
    case = option(name)
    tokenizer = CodeLlamaTokenizer.from_pretrained(
        vocabularies / "codellama-32016", pad_token=case.get("pad_token")
    )
    options = {key: case[key] for key in CALL_OPTIONS if key in case}
    options["padding"] = case.get("padding", "pad_token" in case)
    assert tokenizer(case["texts"], **options) == case["result"]


@pytest.mark.parametrize("name", ["truncate_right", "add_eos_pair", "no_bos", "fill_start"])
def test_single_texts(vocabularies, option, name):
    case = option(name)
    names = ("truncation_side", "add_bos_token", "add_eos_token")
    tokenizer = CodeLlamaTokenizer.from_pretrained(
        vocabularies / "codellama-32016", **{key: case[key] for key in names if key in case}
    )
    limit = {"truncation": True, "max_length": case["max_length"]} if "max_length" in case else {}
    ids = tokenizer(case["text"], case.get("text_pair"), **limit).input_ids
    assert ids == case["result"]


def test_pairs(hf, option):
    case = option("pair")
    assert hf(case["text"], case["text_pair"]) == case["result"]
    parts = [hf.encode(case[key], add_special_tokens=False) for key in ("text", "text_pair")]
    types = hf.create_token_type_ids_from_sequences(*parts)
    assert types == option("pair_token_types")["result"]


def test_special_ids(hf, option):
    ids = [hf.vocab_size, len(hf), hf.prefix_id, hf.middle_id, hf.suffix_id, hf.eot_id]
    lengths = option("len_32016")["result"]
    assert ids == lengths if len(lengths) == 6 else ids[1:] == lengths
    assert hf.all_special_ids == option("all_special_ids")["result"]
    names = ["▁Hello", "<s>", "no such piece", "<0x0A>", "▁<PRE>"]
    assert hf.convert_tokens_to_ids(names) == option("convert_tokens")["result"]


def test_small_decodes(hf, option):
    assert hf.decode([0, 15043]) == option("decode_unk")["result"]
    case = option("decode_bytes_full")
    assert hf.decode(case["ids"]) == case["result"]
    case = option("batch_decode")
    assert hf.batch_decode(case["ids"], skip_special_tokens=True) == case["result"]


def test_errors_as_transformers(vocabularies, hf, option):
    case = option("fill_unsupported_no_infill_tokens")
    none = dict.fromkeys(("prefix_token", "middle_token", "suffix_token", "eot_token"))
    for options in ({}, none):
        tokenizer = CodeLlamaTokenizer.from_pretrained(vocabularies / "llama2-32000", **options)
        assert len(tokenizer) == 32000  # Transformers would add four
        with pytest.raises(ValueError, match="cannot infill"):
            tokenizer(case["text"])
    tokenizer = CodeLlamaTokenizer.from_pretrained(vocabularies / "codellama-32016", **none)
    with pytest.raises(ValueError, match="cannot infill"):
        tokenizer(case["text"])
    with pytest.raises(IndexError, match="out of range"):
        hf.decode([40000])


# Other vocabularies and files


def test_the_step_piece_of_70b(vocabularies):
    tokenizer = load_tokenizer(vocabularies / "codellama70b-step")
    assert tokenizer.pieces[32015] == "<step>"
    assert tokenizer.token_bytes(32015) is None
    assert 32015 not in tokenizer.encode("a <step> b")
    assert 32015 in tokenizer.encode("a <step> b", parse_special=True)


def test_a_gguf_file_gives_the_same_ids(meta, cases, tmp_path):
    tokenizer = load_tokenizer(gguf_file(tmp_path, sentencepiece_fields(meta.model_proto)))
    assert_all(cases("tok_encode_decode"), lambda c: tokenizer.encode(c["text"]), official_ids)
    assert_all(
        cases("tok_infilling"),
        lambda c: tokenizer.encode_infill(c["prefix"], c["suffix"]),
        lambda c: c["official_psm"],
    )


@pytest.mark.real_model
def test_smollm2(cases):
    """The golden ids of chat prompts hold control tokens, which a template would have put there."""
    tokenizer = load_tokenizer(resolve_model(BUILT_IN_NAME), vocab_size=49152)
    for case in cases("smollm2_greedy"):
        assert tokenizer.encode(case["prompt"], parse_special=True) == case["prompt_ids"]
        assert not tokenizer.special_ids & set(tokenizer.encode(case["prompt"]))
        generated = case["greedy_fp32"]
        assert tokenizer.decode(generated, skip_special_tokens=False) == case["text"]
        detokenizer = tokenizer.detokenizer(case["prompt_ids"])
        text = "".join(map(detokenizer.push, generated)) + detokenizer.flush()
        assert text == tokenizer.decode(generated)
