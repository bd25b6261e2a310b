"""Bad input at the public API: each with its class, naming what, what was expected and found.

The readers of checkpoints and the sampling parameters have tests of hundreds of faults of their
own; here each kind must come through `LLM` and `generate` unchanged, and leave nothing behind.
"""

import json
import math

import numpy as np
import pytest
from helpers.checkpoint_files import mini_tensors, safetensors_bytes, write_mini, write_sharded
from helpers.tiny_llm import KV_MEMORY, make_folder
from helpers.tokenizer_files import model_file

import codellama_rt as clrt
from codellama_rt.errors import CheckpointWarning

NORM, LM_HEAD = "model.norm.weight", "lm_head.weight"


def missing(folder):
    tensors = mini_tensors()
    del tensors[NORM]
    write_mini(folder, tensors)


def extra(folder):
    write_mini(folder, mini_tensors() | {"model.extra.weight": np.ones(3, np.float32)})


def misshapen(folder):
    write_mini(folder, mini_tensors() | {NORM: np.ones(7, np.float32)})


def duplicated(folder):
    tensors = mini_tensors()
    write_sharded(
        folder, {"a.safetensors": tensors, "b.safetensors": {NORM: tensors[NORM]}},
        weight_map=dict.fromkeys(tensors, "a.safetensors") | {NORM: "b.safetensors"},
    )  # fmt: skip


def truncated(folder):
    write_mini(folder)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(mini_tensors())[:-5])


def overlapping(folder):
    write_mini(folder)
    content = safetensors_bytes(mini_tensors())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    size = header[NORM]["data_offsets"][1] - header[NORM]["data_offsets"][0]
    header[NORM]["data_offsets"] = [0, size]
    raw = json.dumps(header).encode().ljust(length)
    (folder / "model.safetensors").write_bytes(content[:8] + raw[:length] + content[8 + length :])


def not_finite(folder):
    tensors = mini_tensors()
    tensors[LM_HEAD][3, 1] = np.nan
    write_mini(folder, tensors)


def unknown_architecture(folder):
    write_mini(folder, architectures=["QwenForCausalLM"], model_type="qwen2")


def nothing_there(folder):
    pass


CHECKPOINTS = [  # what is wrong, options, and what the message names
    (missing, {}, [NORM, "missing|lacks|found none|not found"]),
    (extra, {}, ["model.extra.weight"]),
    (misshapen, {}, [NORM, r"\(8,?\)|\[8\]", r"\(7,?\)|\[7\]"]),
    (duplicated, {}, [NORM, "safetensors"]),
    (truncated, {}, ["model.safetensors", "bytes"]),
    (overlapping, {}, ["model.safetensors"]),
    (not_finite, {"check": "finite"}, [LM_HEAD, "(?i)nan|finite"]),
    (unknown_architecture, {}, ["Qwen", "Llama"]),
    (nothing_there, {}, ["expected a directory or a GGUF file"]),
]


@pytest.mark.parametrize(("break_it", "options", "names"), CHECKPOINTS)
def test_checkpoints(tmp_path, break_it, options, names):
    folder = tmp_path / "model"
    break_it(folder)
    for open_it in (clrt.LLM, lambda *a, **k: clrt.generate(*a, "a", **k)):
        with pytest.raises(clrt.CheckpointError) as caught:
            open_it(folder, kv_memory=KV_MEMORY, **options)
        assert isinstance(caught.value, ValueError)
        for name in [str(folder), *names]:
            caught.match(name)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(tmp_path):
    """It opens, as with every peer; a token without a row is refused where it is used."""
    write_mini(tmp_path)
    model_file(tmp_path)
    with pytest.warns(CheckpointWarning, match=r"tokenizer\.model: 421 tokens, .* 10 rows"):
        llm = clrt.LLM(tmp_path, kv_memory=KV_MEMORY, max_model_len=16)
    with llm:
        with pytest.raises(
            ValueError, match=r"holds '.*', token \d+ of .* rows for 10 tokens only"
        ):
            llm.generate("def")
        with pytest.raises(
            ValueError, match=r"prompt_token_ids\[0\] must be .* \[0, 10\), got 300"
        ):
            llm.generate([[300]])
        with pytest.raises(ValueError, match="cannot infill"):
            llm.infill("a", "b")
        assert llm.generate([[1]], clrt.SamplingParams(max_tokens=1, stop="</s>"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("bad") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    with clrt.LLM(folder, kv_memory=KV_MEMORY) as model:
        yield model


OPTIONS = [
    (
        {"device": "cuda"},
        RuntimeError,
        "device 'cuda' cannot be used: ",
    ),
    ({"device": "ascend"}, RuntimeError, "'ascend' cannot be used: .*available: cpu"),
    ({"device": "tpu"}, ValueError, "device must be 'cpu', 'cuda' or 'ascend', got 'tpu'"),
    ({"dtype": "int7"}, ValueError, "dtype must be one of auto, .*, got 'int7'"),
    ({"kv_dtype": "int7"}, ValueError, "kv_dtype must be one of auto, .*, got 'int7'"),
    ({"check": "all"}, ValueError, "check must be None or 'finite', got 'all'"),
    ({"max_model_len": 0}, ValueError, "max_model_len must be at least 1, got 0"),
    ({"max_model_len": 1}, ValueError, "max_model_len must be >= 2"),
    ({"max_model_len": "8k"}, TypeError, "max_model_len must be an int, got str"),
    ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    ({"block_size": 24}, ValueError, "block_size a positive multiple of 16, got .* and 24"),
    ({"block_size": 16.0}, TypeError, "block_size must be an int, got float"),
    ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1, got 0"),
    ({"max_num_batched_tokens": -1}, ValueError, "max_num_batched_tokens must be at least 1"),
    ({"num_threads": 0}, ValueError, "num_threads must be at least 1, got 0"),
    ({"num_threads": True}, TypeError, "num_threads must be an int, got bool"),
    ({"kv_memory": "plenty"}, ValueError, "a number and a unit such as '8GB', got 'plenty'"),
    ({"kv_memory": 1.5}, TypeError, "an int of bytes or a str like '8GB', got 1.5"),
    ({"kv_memory": 1000}, RuntimeError, "KV cache of .* tokens takes .* raise kv_memory"),
    (
        {"max_model_len": 50_000},
        RuntimeError,
        "KV cache of 50000 tokens takes .* lower max_model_len",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS)
def test_options(folder, options, error, message):
    with pytest.raises(error, match=message) as caught:
        clrt.LLM(folder, **({"kv_memory": KV_MEMORY} | options))
    assert type(caught.value) is error


@pytest.mark.parametrize("model", [None, 5, b"model"])
def test_model_that_is_no_path(model):
    with pytest.raises((TypeError, clrt.CheckpointError), match="model"):
        clrt.LLM(model)


PROMPTS = [
    (None, TypeError, "prompts are a str, token ids or a list of these, got NoneType"),
    (7, TypeError, "prompts are a str, token ids or a list of these, got int"),
    (b"text", TypeError, "got bytes"),
    ({}, ValueError, "has one entry, 'prompt' or 'prompt_token_ids'"),
    ({"prompt": "x", "prompt_token_ids": [1]}, ValueError, "has one entry"),
    ({"prompt_embeds": [[0.5]]}, ValueError, r"got \['prompt_embeds'\]"),
    ({"prompt": [1]}, TypeError, "entry 'prompt' is of a wrong type, got list"),
    ({"prompt_token_ids": 5}, TypeError, "entry 'prompt_token_ids' is of a wrong type, got int"),
    ({"prompt_token_ids": "ab"}, TypeError, "entry 'prompt_token_ids' is of a wrong type"),
    ([{"prompt": b"x"}], TypeError, "entry 'prompt' is of a wrong type, got bytes"),
    ([b"text"], TypeError, "must be a list of int, got bytes"),
    ([[]], ValueError, "must hold at least one token"),
    ([1, -1], ValueError, r"prompt_token_ids\[1\] must be a token id in \[0, 512\), got -1"),
    ([1, 512], ValueError, r"prompt_token_ids\[1\] must be a token id in \[0, 512\), got 512"),
    ([1, 2**40], ValueError, r"must be a token id in \[0, 512\), got 1099511627776"),
    ([1, 2.0], TypeError, r"prompt_token_ids\[1\] must be an int, got float"),
    ([1, True], TypeError, r"prompt_token_ids\[1\] must be an int, got bool"),
    ([1, "a"], TypeError, r"prompt_token_ids\[1\] must be an int, got str"),
    ([[1, 2], 3], TypeError, "must be a list of int, got int"),
    ([1] * 16_384, ValueError, "prompt of 16384 tokens does not fit max_model_len=16384"),
    ("a<FILL_ME>b<FILL_ME>c", ValueError, "a prompt may have one <FILL_ME>, this has 2"),
]


@pytest.mark.parametrize(("prompts", "error", "message"), PROMPTS)
def test_prompts(llm, prompts, error, message):
    ways = [
        lambda: llm.generate(prompts),
        lambda: clrt.generate(llm, prompts),
        lambda: clrt.generate(llm, prompts, stream=True),
    ]
    is_one = not isinstance(prompts, list) or not isinstance(prompts[0], (list, bytes, dict))
    if isinstance(prompts, (str, list, dict)) and is_one:
        ways.append(lambda: llm.stream(prompts))
    for way in ways:
        if way is ways[2] and isinstance(prompts, list) and hasattr(prompts[0], "__len__"):
            continue  # there a list is refused as such
        with pytest.raises(error, match=message):
            way()
        assert not llm.engine.has_unfinished()


def test_prompt_that_the_kv_memory_never_holds(llm):
    """Refused before it starts, and nothing is lost for the others."""
    held = llm.kv_cache.num_blocks * llm.kv_cache.block_size
    assert held < llm.max_model_len
    message = f"prompt of {held + 1} tokens is longer than the KV memory: .* hold {held}; shorten"
    with pytest.raises(ValueError, match=message):
        llm.generate([[1, 2], [1] * (held + 1)])
    params = clrt.SamplingParams(max_tokens=2, ignore_eos=True)
    assert len(llm.generate([[1, 2]], params)[0].token_ids) == 2


SAMPLING = [
    ("temperature", -0.1, ValueError), ("temperature", math.nan, ValueError),
    ("temperature", math.inf, ValueError), ("temperature", "hot", TypeError),
    ("top_p", 0, ValueError), ("top_p", 1.1, ValueError), ("top_p", math.nan, ValueError),
    ("top_k", -2, ValueError), ("top_k", 1.5, TypeError), ("top_k", True, TypeError),
    ("seed", -1, ValueError), ("seed", "x", TypeError), ("max_new_tokens", -1, ValueError),
    ("max_new_tokens", 2.0, TypeError), ("stop", "", ValueError), ("stop", 5, TypeError),
    ("stop", ["a"] * 17, ValueError), ("stop", [5], TypeError),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error"), SAMPLING)
def test_sampling_arguments(llm, name, value, error):
    expected = {"max_new_tokens": "max_tokens"}.get(name, name)
    with pytest.raises(error, match=f"SamplingParams: {expected}.* (must|takes)"):
        clrt.generate(llm, "a", **{name: value})


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"temperature": 0.5}, TypeError, "params must be SamplingParams, got dict"),
        ([None, 5], TypeError, "params must be SamplingParams, got int"),
        ([None], ValueError, "2 prompts need as many params, got 1"),
        (clrt.SamplingParams(stop_token_ids=[512]), ValueError, r"stop_token_ids\[0\] .* got 512"),
        (clrt.SamplingParams(logit_bias={600: 1}), ValueError, r"logit_bias\[600\] .* got 600"),
    ],
)
def test_params(llm, params, error, message):
    with pytest.raises(error, match=message):
        llm.generate(["a", "b"], params)
    if not isinstance(params, list):
        with pytest.raises(error, match=message):
            llm.stream("a", params)
        with pytest.raises(error, match=message):
            llm.infill("a", "b", params)
    assert not llm.engine.has_unfinished()


def test_several_samples_where_there_is_one(llm):
    params = clrt.SamplingParams(n=2)
    with pytest.raises(ValueError, match=r"a stream has one sample, got params\.n=2"):
        llm.stream("a", params)
    with pytest.raises(ValueError, match=r"infill gives one sample, got params\.n=2"):
        llm.infill("a", "b", params)


def test_infilling_on_a_model_that_cannot(tmp_path):
    folder = make_folder(tmp_path / "model", infilling=False)
    with clrt.LLM(folder, kv_memory=KV_MEMORY) as llm:
        for use in (
            lambda: llm.infill("a", "b"),
            lambda: llm.generate("a<FILL_ME>b"),
            lambda: llm.stream("a<FILL_ME>b"),
        ):
            with pytest.raises(ValueError, match="infill"):
                use()
        assert not llm.engine.has_unfinished()


@pytest.mark.parametrize(("prefix", "suffix"), [(None, "b"), ("a", 5), (b"a", "b")])
def test_infilling_of_what_is_no_text(llm, prefix, suffix):
    with pytest.raises(TypeError, match="text must be a str, got"):
        llm.infill(prefix, suffix)


@pytest.mark.parametrize(
    ("token_ids", "position", "error", "message"),
    [
        ([], 0, ValueError, "must hold at least one token"),
        ([512], 0, ValueError, r"must be a token id in \[0, 512\), got 512"),
        ("text", 0, TypeError, "must be a list of int, got str; encode text first"),
        ([1], -1, ValueError, r"first_position must be in \[0, 1048575\] for 1 tokens, got -1"),
        ([1], 0.5, TypeError, "first_position must be an int, got float"),
        ([1, 2], 2**31 - 1, ValueError, "for 2 tokens, got 2147483647"),
    ],
)
def test_logits(llm, token_ids, position, error, message):
    with pytest.raises(error, match=message):
        llm.logits(token_ids, position)
