"""LoRA adapters and chat over quantised weights and GGUF files."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from helpers.adapter_files import write_adapter
from helpers.checkpoint_files import TINY
from helpers.quantized_models import q8_model
from helpers.tiny_llm import KV_MEMORY, NAME, make_folder
from helpers.tokenizer_files import sentencepiece_fields

import codellama_rt as clrt
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.adapter import load_adapter
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.model.llama import Llama
from codellama_rt.model.lora import merged
from codellama_rt.ops.quantized import Quantized
from codellama_rt.ops.reference_weights import dequantize

PROMPT = [1, 309, 103, 28, 67, 9, 44]
DIALOG = [{"role": "user", "content": "add"}]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
WAYS = ["int8", "int4", "gguf", "repacked"]


def gguf_tokenizer():
    """The tiny tokenizer's fields as values of a GGUF file, padded to the model's 512 ids."""
    fields = sentencepiece_fields()
    missing = 512 - len(fields["tokens"])
    types = [*fields["token_type"], *[3] * missing]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*fields["tokens"], *(f"<pad{i}>" for i in range(missing))],
        "tokenizer.ggml.scores": [*fields["scores"], *[-1e4] * missing],
        "tokenizer.ggml.token_type": struct.pack("<IIQ", 9, 5, 512) + struct.pack("<512i", *types),
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(params=WAYS)
def quantized(request, tmp_path):
    """A quantised model, and the options that open it."""
    if request.param in ("gguf", "repacked"):
        path = q8_model(tmp_path / "model.gguf", NAME, gguf_tokenizer())
        return path, {"repack": request.param == "repacked"}
    return make_folder(tmp_path / "model"), {"quantization": request.param}


def in_floats(weights):
    """The weights with what is quantised decoded."""

    def decoded(weight):
        is_packed = isinstance(weight, Quantized)
        return dequantize(weight).astype(np.float32) if is_packed else weight

    layers = [
        replace(layer, **{name: decoded(value) for name, value in vars(layer).items()})
        for layer in weights.layers
    ]
    return replace(weights, layers=layers, lm_head=decoded(weights.lm_head))


def test_an_adapter_of_a_request_is_what_merging_into_the_floats_gives(quantized, tmp_path):
    path, options = quantized
    checkpoint = open_checkpoint(path, **options)
    config, weights = checkpoint.config, checkpoint.weights
    assert isinstance(weights.layers[0].q_proj, Quantized)
    adapter = load_adapter(write_adapter(tmp_path / "adapter", config, seed=3), config)
    found = sequence_logits(Llama(config, weights), PROMPT, adapter=adapter)
    plain = sequence_logits(Llama(config, weights), PROMPT)
    expected = sequence_logits(Llama(config, merged(in_floats(weights), adapter)), PROMPT)
    assert np.abs(found - expected).mean() < 0.04 * expected.std()
    assert np.abs(plain - expected).mean() > 0.3 * expected.std()


def test_dora_heads_and_norms_over_quantised_weights(quantized, tmp_path):
    """DoRA's lengths are those of the decoded weights."""
    path, options = quantized
    checkpoint = open_checkpoint(path, **options)
    config, weights = checkpoint.config, checkpoint.weights
    rng = np.random.default_rng(4)
    head = "base_model.model.lm_head.lora_"
    changes = {
        f"{head}A.weight": rng.standard_normal((4, config.dim)),
        f"{head}B.weight": 0.1 * rng.standard_normal((config.vocab_size, 4)),
        f"{head}magnitude_vector": 1.5 * np.linalg.norm(in_floats(weights).lm_head, axis=1),
    }
    for i, layer in enumerate(in_floats(weights).layers):
        length = np.linalg.norm(layer.o_proj, axis=1)
        base = f"base_model.model.model.layers.{i}.self_attn.o_proj."
        changes[f"{base}lora_magnitude_vector"] = rng.uniform(0.5, 2, length.shape) * length
    changes["base_model.model.model.norm.weight"] = 2 * np.asarray(weights.norm, np.float32)
    folder = write_adapter(
        tmp_path / "a", config, projections=("o_proj",), use_dora=True,
        changes={name: array.astype(np.float32) for name, array in changes.items()},
    )  # fmt: skip
    adapter = load_adapter(folder, config, weights)
    found = sequence_logits(Llama(config, weights), PROMPT, adapter=adapter)
    floats = in_floats(weights)
    whole = merged(floats, load_adapter(folder, config, floats))
    expected = sequence_logits(Llama(config, whole), PROMPT)
    assert np.abs(found - expected).mean() < 0.04 * expected.std()
    plain = sequence_logits(Llama(config, floats), PROMPT)
    assert np.abs(plain - expected).mean() > 0.3 * expected.std()


def test_an_adapter_follows_the_rows_of_a_gguf_file(tmp_path):
    """Whose heads are interleaved: the same adapter as for the checkpoint it was made from."""
    path = q8_model(tmp_path / "a.gguf", NAME)
    folder = write_adapter(tmp_path / "adapter", open_checkpoint(path).config, seed=3)
    found, expected = (
        sequence_logits(
            Llama(checkpoint.config, checkpoint.weights), PROMPT,
            adapter=load_adapter(folder, checkpoint.config),
        )
        for checkpoint in (open_checkpoint(path), open_checkpoint(TINY / NAME, dtype="float32"))
    )  # fmt: skip
    assert np.abs(found - expected).mean() < 0.04 * expected.std()


def test_an_adapter_is_not_merged_into_what_is_quantised(quantized, tmp_path):
    path, options = quantized
    config = open_checkpoint(path, **options).config
    folder = write_adapter(tmp_path / "adapter", config)
    with pytest.raises(ValueError, match=r"quantised; apply it to requests instead"):
        clrt.LLM(path, adapter=folder, kv_memory=KV_MEMORY, **options)


def test_adapters_and_none_share_a_step(quantized, tmp_path):
    path, options = quantized
    with clrt.LLM(path, kv_memory=KV_MEMORY, **options) as llm:
        folder = write_adapter(tmp_path / "adapter", llm.config, seed=5)
        adapter = llm.load_adapter(folder)
        jobs = [("a", None), ("b", adapter), ("c", None), ("d", adapter)]
        alone = [llm.generate([PROMPT], PARAMS, adapter=one)[0].token_ids for _, one in jobs]
        assert alone[0] != alone[1]
        for name, one in jobs:
            llm.engine.add_request(name, PROMPT, PARAMS, adapter=one)
        together = {name: [] for name, _ in jobs}
        while llm.engine.has_unfinished():
            for output in llm.engine.step():
                together[output.request_id] += output.token_ids
        assert list(together.values()) == alone


def test_chat_asks_in_the_model_s_format(quantized, tmp_path):
    path, options = quantized
    with clrt.LLM(path, kv_memory=KV_MEMORY, **options) as llm:
        prompt, params = llm.chat_prompt(DIALOG, PARAMS)
        assert prompt == llm.tokenizer.encode("[INST] add [/INST]")
        answer = llm.chat(DIALOG, PARAMS)
        assert answer.text == llm.generate([prompt], params)[0].text
        assert answer.text == "".join(llm.stream(prompt, params))
        adapter = llm.load_adapter(write_adapter(tmp_path / "adapter", llm.config, seed=5))
        assert llm.chat(DIALOG, PARAMS, adapter=adapter).token_ids != answer.token_ids


def test_a_gguf_file_brings_its_chat_template(tmp_path):
    template = "{{ bos_token }}Q {{ messages[-1]['content'] }}"
    values = gguf_tokenizer() | {"tokenizer.chat_template": template}
    with clrt.LLM(q8_model(tmp_path / "a.gguf", NAME, values), kv_memory=KV_MEMORY) as llm:
        assert llm.chat_template == template
        assert llm.tokenizer.decode(llm.chat_prompt(DIALOG)[0]).strip() == "Q add"


def test_a_gguf_file_has_the_ids_of_its_original(tmp_path):
    options = {"kv_memory": KV_MEMORY, "dtype": "float32"}
    with clrt.LLM(make_folder(tmp_path / "model"), **options) as llm:
        expected = llm.chat_prompt(DIALOG)[0]
    with clrt.LLM(q8_model(tmp_path / "a.gguf", NAME, gguf_tokenizer()), **options) as llm:
        assert llm.chat_prompt(DIALOG)[0] == expected
