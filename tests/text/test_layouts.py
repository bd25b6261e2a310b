"""Layouts of other people's tokenizers, against Transformers' ids: 120 directories with goldens.

The big parts of the files follow from Llama's tokenizer.model, so both lie in the shared data, with
the script that builds the directories and compares.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.tokenizer_files import sentencepiece_fields

import codellama_rt as clrt
from codellama_rt.text.tokenizer import load_tokenizer

NUM_SHARDS = 12
KINDS = {True: 3, False: 4}  # types of added tokens in a GGUF file: control, user defined


@pytest.fixture(scope="module")
def data(shared_dir):
    if not (shared_dir / "data" / "layouts").is_dir():
        pytest.skip("the shared data has no layouts")
    return shared_dir / "data"


@pytest.fixture(scope="module")
def check(data):
    """The script of the shared data."""
    spec = importlib.util.spec_from_file_location("layouts", data / "layouts" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def goldens(data):
    return json.loads((data / "layouts" / "goldens.json").read_text("utf-8"))


def with_tokenizer(tokenizer):
    """What the script opens a directory with; it is opened once."""
    opened = SimpleNamespace(from_pretrained=lambda folder: tokenizer)
    return SimpleNamespace(CodeLlamaTokenizer=opened)


def texts_of(check, goldens, row):
    return [check.fill(text, row["names"]) for text in goldens["texts"]]


def says_gguf(row):
    """Whether a GGUF file can say what these files say: flags, or no space at some texts' start."""
    config = row["content"].get("tokenizer_config.json", {})
    steps = row["content"].get("tokenizer.json", {})
    listed = [*steps.get("added_tokens", []), *config.get("added_tokens_decoder", {}).values()]
    is_plain = not any(t[k] for t in listed for k in ("lstrip", "rstrip", "single_word"))
    is_plain &= not any(t["normalized"] and not t["special"] for t in listed)
    is_plain &= "added_tokens.json" not in row["content"] or bool(listed)
    is_first = (steps.get("pre_tokenizer") or {}).get("prepend_scheme") == "first"
    is_first |= config.get("legacy") is False and not steps
    return is_plain and not is_first


def see_as_gguf(check, row, texts, source, tally):
    """Where a GGUF file can say it: one space for each stretch of text or none, tokens by type."""
    fields = sentencepiece_fields(source.model_proto)
    size = len(fields["tokens"])
    for token_id in range(size, source.vocab_size):
        fields["tokens"].append(source.pieces[token_id])
        fields["token_type"].append(KINDS[token_id in source.special_ids])
        fields["scores"].append(-1000.0)
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if getattr(source, f"{role}_id") is not None:
            fields[f"{key}_token_id"] = getattr(source, f"{role}_id")
    fields |= {"add_bos_token": source.adds_bos, "add_eos_token": source.adds_eos}
    fields["add_space_prefix"] = source.spacing != "none"
    metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        metadata[key] = np.array(metadata[key])
    tokenizer = load_tokenizer(Path("model.gguf"), metadata=metadata)
    tally.see("GGUF's end", row, "", tokenizer.end_ids, [source.end_ids])
    for k, text in enumerate(texts):
        expected = [ids[k] for ids in check.accepted(row, "ids")]
        if source.adds_eos:
            expected = [ids[:-1] for ids in expected]
        tally.see("GGUF", row, text, tokenizer.encode(text, parse_special=True), expected)


@pytest.mark.filterwarnings("ignore::codellama_rt.errors.CheckpointWarning")
@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_directories(check, goldens, data, shard):
    """Ids, texts and roles of CodeLlamaTokenizer; ids of the runtime's tokenizer; ends; GGUF's."""
    tally, num_gguf = check.Tally(3), 0
    for row in goldens["layouts"][shard::NUM_SHARDS]:
        folder = check.directory(row, data, [])
        try:
            texts = texts_of(check, goldens, row)
            hf = clrt.CodeLlamaTokenizer.from_pretrained(folder)
            check.check_tokenizer(with_tokenizer(hf), row, folder, texts, tally)
            tokenizer = hf.runtime
            for k, text in enumerate(texts):
                expected = [ids[k] for ids in check.accepted(row, "ids")]
                if row["add_eos_token"] is True:  # a prompt goes on
                    expected += [ids[:-1] for ids in expected]
                found = tokenizer.encode(text, parse_special=True)
                tally.see(f"runtime, {row['files']}", row, text, found, expected)
            if row["files"] != "json":
                ends = row["fast"]["special"][1] in tokenizer.end_ids
                tally.see("the tokenizer's end", row, "", ends, [True])
            if says_gguf(row):
                num_gguf += 1
                see_as_gguf(check, row, texts, tokenizer, tally)
        finally:
            shutil.rmtree(folder)
    assert num_gguf > 2
    assert not {name: found for name, found in tally.failures.items() if name[0] != "("}


def test_400_random_cuts_as_templates(data):
    """The template written out, as editors send it, gives the ids of `infill`."""
    from codellama_rt.llm.prompts import PromptEncoder

    tokenizer = load_tokenizer(data / "tokenizer" / "codellama-32016")
    prompts, params = PromptEncoder(tokenizer), clrt.SamplingParams()
    rng = np.random.default_rng(13)
    files = sorted((data.parent / "data" / "layouts").glob("*.py"))
    code = "".join(file.read_text("utf-8") for file in files)
    assert " <SUF>" not in code
    equal = 0
    for _ in range(400):
        begin, cut, end = np.sort(rng.integers(0, len(code), 3))
        begin, end = max(begin, cut - 2000), min(end, cut + 1000)
        prefix, suffix = code[begin:cut], code[cut:end]
        found, _ = prompts.completion(f"<PRE> {prefix} <SUF>{suffix} <MID>", params)
        equal += found == tokenizer.encode_infill(prefix, suffix)
    assert equal == 400
