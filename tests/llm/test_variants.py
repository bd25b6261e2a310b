"""The twelve models: what they are, how they are recognised, and what they refuse."""

import warnings

import pytest
from helpers.tiny_llm import KV_MEMORY, make_folder

import codellama_rt as clrt
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.variants import VARIANTS, find_variant
from codellama_rt.model.config import ModelConfig

PARAMS = SamplingParams(max_tokens=2)
DIALOG = [{"role": "user", "content": "add"}]


def number_of_weights(config: ModelConfig) -> int:
    head = config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads) * config.dim
    layer = head + 3 * config.dim * config.hidden_dim + 2 * config.dim
    return config.n_layers * layer + 2 * config.vocab_size * config.dim + config.dim


@pytest.mark.parametrize(
    ("size", "billions", "kv_kib"),
    [(7, 6.74, 512), (13, 13.02, 800), (34, 33.74, 192), (70, 68.98, 320)],
)
def test_shapes(size, billions, kv_kib):
    """Numbers of weights as published, bytes of keys and values a token in 16 bits."""
    for name in (f"CodeLlama-{size}b", f"CodeLlama-{size}b-Instruct"):
        config = VARIANTS[name].config
        assert abs(number_of_weights(config) / 1e9 - billions) < 0.01
        assert 2 * config.n_layers * config.n_kv_heads * config.head_dim * 2 == kv_kib * 1024
        assert config.dim == config.n_heads * config.head_dim


def test_what_each_can():
    infilling = {name for name, variant in VARIANTS.items() if variant.can_infill}
    assert infilling == {
        f"CodeLlama-{size}b{kind}" for size in (7, 13, 70) for kind in ("", "-Instruct")
    }
    small = {name for name, variant in VARIANTS.items() if variant.config.vocab_size == 32000}
    assert small == {"CodeLlama-7b-Python", "CodeLlama-13b-Python"} | {
        f"CodeLlama-34b{kind}" for kind in ("", "-Python", "-Instruct")
    }
    short = {name for name, variant in VARIANTS.items() if variant.longest == 4096}
    assert short == {"CodeLlama-70b-Python", "CodeLlama-70b-Instruct"}
    for name, variant in VARIANTS.items():
        assert variant.config.rope_theta == (1e4 if name in short else 1e6)
        assert variant.config.max_position_embeddings == (4096 if name in short else 16384)
        assert variant.can_chat == name.endswith("-Instruct")
    assert len(VARIANTS) == 12


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("CodeLlama-7b-hf", "CodeLlama-7b"),
        ("codellama/CodeLlama-13b-Instruct-hf", "CodeLlama-13b-Instruct"),
        ("/models/CodeLlama-34b-Python/", "CodeLlama-34b-Python"),
        ("codellama-70b-instruct.Q4_K_M.gguf", "CodeLlama-70b-Instruct"),
        ("x/models--codellama--CodeLlama-7b-Python-hf/snapshots/0123", "CodeLlama-7b-Python"),
        ("code-llama-7b.f16.gguf", "CodeLlama-7b"),
        ("CodeLlama-8b", None),
        ("Phind-CodeLlama-34B-v2", None),
        ("CodeLlama-7b-finetuned", None),
        ("smollm2-135m-instruct", None),
        ("", None),
    ],
)
def test_names(model, name):
    assert find_variant(model) is (None if name is None else VARIANTS[name])


@pytest.fixture
def named(tmp_path):
    """A small model that is named like a large one; of course its shape differs."""

    def make(name, **options):
        folder = make_folder(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return clrt.LLM(folder, **{"kv_memory": KV_MEMORY, **options})

    return make


@pytest.mark.parametrize("name", ["CodeLlama-70b-Python", "CodeLlama-34b-Instruct-hf"])
def test_a_model_that_was_not_trained_to_infill_says_so(named, name):
    """Even where its vocabulary has the tokens."""
    with named(name) as llm:
        for fill in (lambda: llm.infill("a", "b", PARAMS), lambda: llm.generate("a<FILL_ME>b")):
            with pytest.raises(ValueError, match=r"cannot infill.*CodeLlama-7b, .*can$"):
                fill()
        assert llm.generate("a", PARAMS)


@pytest.mark.parametrize("name", ["CodeLlama-7b", "CodeLlama-13b-Python-hf"])
def test_a_model_that_was_not_trained_to_chat_says_so(named, name):
    with named(name) as llm:
        with pytest.raises(ValueError, match="cannot chat: it continues text; take an Instruct"):
            llm.chat(DIALOG, PARAMS)
        assert llm.chat(DIALOG, PARAMS, chat_template="code-llama").token_ids


def test_others_do_what_they_can(named):
    for name in ("CodeLlama-7b-Instruct-hf", "mine"):
        with named(name, max_model_len=20_000, kv_memory="20MB") as llm:
            assert llm.chat(DIALOG, PARAMS).token_ids
            assert llm.infill("a", "b", PARAMS).token_ids


def test_a_context_that_is_too_long(named):
    with pytest.raises(ValueError, match="CodeLlama-70b-Instruct makes sense of 4096 tokens at"):
        named("CodeLlama-70b-Instruct-hf", max_model_len=4097)
    with named("CodeLlama-70b-Instruct", max_model_len=4096) as llm:
        assert llm.max_model_len == 4096


def test_a_checkpoint_that_says_otherwise(tmp_path):
    folder = make_folder(tmp_path / "CodeLlama-70b-Instruct-hf")
    with pytest.warns(UserWarning, match="rope_theta 1e\\+06 where it has 10000"):
        clrt.LLM(folder, kv_memory=KV_MEMORY).close()
