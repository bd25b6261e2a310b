"""save_pretrained: what is written opens again, here and in safetensors, bit for bit."""

import json

import numpy as np
import pytest
from helpers.checkpoint_files import TINY_NAMES
from helpers.goldens import tiny_golden
from helpers.tiny_llm import KV_MEMORY, make_folder
from helpers.tokenizer_files import bpe_fields, gguf_file, model_file, sentencepiece_fields
from safetensors import safe_open

import codellama_rt as clrt
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.formats.hf_writer import halves_first, write_directory
from codellama_rt.model.config import RopeScaling
from codellama_rt.text.tokenizer import load_tokenizer
from codellama_rt.text.tokenizer.save_tokenizer import save_tokenizer

TEXTS = ["def f():", " x\n\ty  é 😀", "<|end|> </s> <EOT>", ""]


def arrays(weights):
    yield from (weights.embedding, weights.norm, weights.lm_head)
    for layer in weights.layers:
        yield from vars(layer).values()


@pytest.mark.parametrize("name", TINY_NAMES)
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 300_000, 1])
def test_weights_and_configuration_come_back(tmp_path, name, max_shard_bytes):
    before = open_checkpoint(tiny_golden(name).folder)
    write_directory(
        tmp_path / "copy", before.config, before.weights, max_shard_bytes=max_shard_bytes
    )
    after = open_checkpoint(tmp_path / "copy")
    assert after.config == before.config
    for one, other in zip(arrays(before.weights), arrays(after.weights), strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()
    files = sorted((tmp_path / "copy").glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes > 10**9)
    for file in files:
        with safe_open(file, "numpy") as opened:
            assert list(opened.keys())


def test_a_model_is_saved_over_itself(tmp_path):
    folder = make_folder(tmp_path / "model")
    model = clrt.LlamaForCausalLM.from_pretrained(folder, kv_memory=KV_MEMORY)
    prompt = np.array([[1, 40, 50]])
    with model.llm:
        before = model.generate(prompt, max_new_tokens=5).asnumpy()
        model.save_pretrained(folder, max_shard_size="1MB")
        assert (model.generate(prompt, max_new_tokens=5).asnumpy() == before).all()
    assert not (folder / ".saving").exists()
    again = clrt.LlamaForCausalLM.from_pretrained(folder, kv_memory=KV_MEMORY)
    with again.llm:
        assert (again.generate(prompt, max_new_tokens=5).asnumpy() == before).all()
        assert again.llm.tokenizer.encode(TEXTS[0]) == model.llm.tokenizer.encode(TEXTS[0])


def test_fewer_shards_replace_more(tmp_path):
    checkpoint = open_checkpoint(tiny_golden("tied_fp32").folder)
    for size in (1, 10**9):
        write_directory(tmp_path, checkpoint.config, checkpoint.weights, max_shard_bytes=size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failure_leaves_the_old_model(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny_golden("tied_fp32").folder)
    write_directory(tmp_path, checkpoint.config, checkpoint.weights)
    names = sorted(path.name for path in tmp_path.iterdir())

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("codellama_rt.checkpoint.formats.hf_writer.write_safetensors", full)
    with pytest.raises(OSError, match="no space left"):
        write_directory(tmp_path, checkpoint.config, checkpoint.weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert open_checkpoint(tmp_path).config == checkpoint.config


def test_rows_in_the_order_of_gguf():
    rows = np.arange(16).reshape(8, 2)  # two heads of head_dim 4
    order = halves_first(rows, 4)[:, 0] // 2
    assert order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_cannot_be_written(tmp_path):
    checkpoint = open_checkpoint(tiny_golden("tied_fp32").folder)
    scaling = RopeScaling("factors", 1.0, frequency_factors=(1.0,))
    object.__setattr__(checkpoint.config, "rope_scaling", scaling)
    with pytest.raises(ValueError, match="rope scaling 'factors'"):
        write_directory(tmp_path / "copy", checkpoint.config, checkpoint.weights)
    assert not (tmp_path / "copy").exists()


def tokenizers(folder):
    for name in ("sp", "gguf-sp", "gguf-bpe", "gguf-bpe-bos"):
        (folder / name).mkdir()
    yield load_tokenizer(model_file(folder / "sp"))
    yield load_tokenizer(gguf_file(folder / "gguf-sp", sentencepiece_fields()))
    yield load_tokenizer(gguf_file(folder / "gguf-bpe", bpe_fields()))
    yield load_tokenizer(gguf_file(folder / "gguf-bpe-bos", bpe_fields() | {"add_bos_token": True}))


def test_tokenizers_come_back(tmp_path):
    for i, before in enumerate(tokenizers(tmp_path)):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_tokenizer(before, folder, chat_template="T")
        after = load_tokenizer(folder)
        for text in TEXTS:
            for options in ({}, {"parse_special": True}, {"bos": False}):
                assert after.encode(text, **options) == before.encode(text, **options)
        ids = list(range(before.vocab_size))
        assert after.decode(ids, skip_special_tokens=False) == before.decode(
            ids, skip_special_tokens=False
        )
        assert after.special_ids == before.special_ids
        assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == "T"
