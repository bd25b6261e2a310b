"""LoRA: what an adapter adds, merged or to single requests, and that others keep every bit."""

import json

import mindspore as ms
import numpy as np
import pytest
from helpers.adapter_files import write_adapter
from helpers.goldens import make_engine, tiny_golden
from helpers.pth_files import call, pth, saved
from helpers.tiny_llm import KV_MEMORY, make_folder
from safetensors.numpy import load_file

import codellama_rt as clrt
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.adapter import load_adapter
from codellama_rt.checkpoint.formats.hf_writer import halves_first
from codellama_rt.engine.branches import Branches
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.errors import CheckpointError
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.model.llama import Llama
from codellama_rt.model.lora import merged

NAME = "gqa_theta1e6_bf16"
PROMPT = [1, 309, 103, 28, 67, 9, 44]
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(tiny_golden(NAME).folder, dtype="float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoint):
    """Two adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    first = write_adapter(folder / "first", checkpoint.config, seed=1)
    second = write_adapter(
        folder / "second", checkpoint.config, seed=2, rank=1, projections=("q_proj", "down_proj")
    )
    return first, second


@pytest.fixture(scope="module")
def adapters(folders, checkpoint):
    return [load_adapter(folder, checkpoint.config) for folder in folders]


@pytest.fixture
def llm(tmp_path):
    with clrt.LLM(make_folder(tmp_path / "model"), dtype="float32", kv_memory=KV_MEMORY) as model:
        yield model


def test_applied_and_merged_are_one(checkpoint, adapters):
    model = Llama(checkpoint.config, checkpoint.weights)
    plain = sequence_logits(model, PROMPT)
    for adapter in adapters:
        applied = sequence_logits(model, PROMPT, adapter=adapter)
        within = Llama(checkpoint.config, merged(checkpoint.weights, adapter))
        assert np.abs(applied - plain).max() > 0.5
        np.testing.assert_allclose(applied, sequence_logits(within, PROMPT), rtol=0, atol=2e-4)


def test_what_a_projection_becomes(checkpoint, folders, adapters):
    from safetensors.numpy import load_file

    tensors = load_file(folders[0] / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    change = 8 / 4 * tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]
    weights = merged(checkpoint.weights, adapters[0])
    before, after = checkpoint.weights.layers[1].up_proj, weights.layers[1].up_proj
    np.testing.assert_allclose(after - before, change, rtol=0, atol=1e-5)
    assert weights.lm_head is checkpoint.weights.lm_head


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({"lora_alpha": 2}, 0.5),
        ({"lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"lora_alpha": 2, "alpha_pattern": {"up_proj": 12}}, 3.0),
        ({"lora_alpha": 2, "alpha_pattern": {"layers.0.mlp.up_proj": 4, "xup_proj": 9}}, 1.0),
    ],
)
def test_the_scale(tmp_path, checkpoint, values, scale):
    ones = {"mlp.up_proj.lora_A": (4, checkpoint.config.dim),
            "mlp.up_proj.lora_B": (checkpoint.config.hidden_dim, 4)}  # fmt: skip
    tensors = {
        f"base_model.model.model.layers.0.{name}.weight": np.ones(shape, np.float16)
        for name, shape in ones.items()
    }
    folder = write_adapter(
        tmp_path / "a", checkpoint.config, projections=("q_proj",), changes=tensors, **values
    )
    change = load_adapter(folder, checkpoint.config).layers[0]["up_proj"]
    assert (change.up @ change.down == 4 * scale).all()


def test_rows_of_gguf_files(tmp_path, checkpoint, adapters, folders):
    """An adapter's rows follow those of the weights that it is added to."""
    config = checkpoint.config.__class__(**{**vars(checkpoint.config), "rope_interleaved": True})
    rows = load_adapter(folders[0], config).layers[0]
    for name in ("q_proj", "k_proj", "v_proj"):
        expected = adapters[0].layers[0][name].up
        found = rows[name].up if name == "v_proj" else halves_first(rows[name].up, config.head_dim)
        assert np.array_equal(found, expected)


def tokens(engine, requests):
    """Greedy tokens of (prompt, adapter) pairs, all together."""
    for i, (prompt, adapter) in enumerate(requests):
        engine.add_request(str(i), prompt, PARAMS, adapter=adapter)
    found = [[] for _ in requests]
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None, output.error
            found[int(output.request_id)] += output.token_ids
    return found


@pytest.mark.parametrize("options", [{}, {"num_blocks": 8}, {"max_num_batched_tokens": 5}])
def test_requests_do_not_touch_one_another(checkpoint, adapters, options):
    """Bit for bit: with which adapters others go, in which order, preempted or cached."""
    model = Llama(checkpoint.config, checkpoint.weights)
    kinds = [None, *adapters]
    prompts = [PROMPT, PROMPT[:3], [1, *range(30, 60)]]
    requests = [(prompt, adapter) for prompt in prompts for adapter in kinds]
    alone = [tokens(make_engine(model), [request])[0] for request in requests]
    assert alone[0] != alone[1] != alone[2] != alone[0]
    engine = make_engine(model, **options)
    assert tokens(engine, requests) == alone
    assert tokens(engine, requests[::-1]) == alone[::-1]  # now with what is cached
    assert engine.stats()["prefix_hit_tokens"] > 0


def test_rows_have_the_same_bits_in_any_company(checkpoint, adapters):
    model = Llama(checkpoint.config, checkpoint.weights)
    alone = [sequence_logits(model, PROMPT, adapter=a)[-1] for a in (None, *adapters)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0, 2, 0]):
        with Branches(make_engine(model)) as branches:
            live = [branches.add(PROMPT, (None, *adapters)[i]) for i in order]
            rows = branches.logits(live)
        for i, row in zip(order, rows, strict=True):
            assert row.tobytes() == alone[i].tobytes()


def test_cached_prefixes_are_those_of_the_adapter(checkpoint, adapters):
    model = Llama(checkpoint.config, checkpoint.weights)
    prompt = [1, *range(5, 60)]
    engine = make_engine(model)
    expected = tokens(make_engine(model), [(prompt, adapters[0])])
    tokens(engine, [(prompt, None)])
    hits = engine.stats()["prefix_hit_tokens"]
    assert tokens(engine, [(prompt, adapters[0])]) == expected
    assert engine.stats()["prefix_hit_tokens"] == hits
    assert tokens(engine, [(prompt, adapters[0])]) == expected
    assert engine.stats()["prefix_hit_tokens"] > hits


def test_every_way_of_asking(llm, folders):
    adapter = llm.load_adapter(folders[0])
    plain, adapted = (llm.generate([PROMPT], PARAMS, adapter=a)[0].text for a in (None, adapter))
    assert plain != adapted
    assert "".join(llm.stream(PROMPT, PARAMS, adapter=adapter)) == adapted
    dialog = [{"role": "user", "content": "add"}]
    assert llm.chat(dialog, PARAMS, adapter=adapter).text != llm.chat(dialog, PARAMS).text
    assert llm.infill("a", "b", PARAMS, adapter=adapter).text != llm.infill("a", "b", PARAMS).text
    samples = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=5, ignore_eos=True)
    first, second = llm.generate([PROMPT], samples, adapter=adapter)
    assert first.token_ids != second.token_ids
    assert (llm.logits(PROMPT, adapter=adapter) != llm.logits(PROMPT)).any()


def test_merged_when_opened(llm, folders, tmp_path):
    with clrt.LLM(
        make_folder(tmp_path / "merged"), dtype="float32", kv_memory=KV_MEMORY, adapter=folders[0]
    ) as other:
        applied = llm.logits(PROMPT, adapter=llm.load_adapter(folders[0]))
        np.testing.assert_allclose(other.logits(PROMPT), applied, rtol=0, atol=2e-4)


def test_the_transformers_surface(llm, folders):
    model = clrt.LlamaForCausalLM(llm)
    ids = ms.Tensor(np.array([PROMPT]))

    def outcome(**options):
        found = model.generate(ids, max_new_tokens=8, eos_token_id=[], **options)
        return found.asnumpy().tolist(), model(ids).logits.asnumpy().tobytes()

    plain = outcome()
    model.load_adapter(folders[0])
    adapted = outcome()
    assert adapted[0] != plain[0]
    assert adapted[1] != plain[1]
    assert outcome(num_beams=2)[1] == adapted[1]
    model.load_adapter(folders[1], "second")
    assert outcome()[1] not in (plain[1], adapted[1])
    model.set_adapter("default")
    assert outcome() == adapted
    model.set_adapter(None)
    assert outcome() == plain
    with pytest.raises(ValueError, match=r"no adapter 'third' is loaded; loaded: \['default'"):
        model.set_adapter("third")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', found 'IA3'"),
        ({"use_dora": True}, "use_dora: expected nothing, found True; DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected nothing"),
        ({"bias": "all"}, "bias: expected 'none'"),
        ({"lora_alpha": "x"}, "lora_alpha: expected a finite number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: expected names of modules"),
        ({"alpha_pattern": [1]}, "alpha_pattern: expected an object"),
    ],
)
def test_adapters_of_another_kind(tmp_path, checkpoint, options, words):
    folder = write_adapter(tmp_path / "a", checkpoint.config, **options)
    with pytest.raises(CheckpointError, match=words):
        load_adapter(folder, checkpoint.config)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{LAYER}A.weight": None}, "found no lora_A"),
        ({f"{LAYER}B.weight": None}, "found no lora_B"),
        ({f"{LAYER}A.weight": np.ones((4, 3), np.float32)}, r"expected \(rank, 128\), found"),
        ({f"{LAYER}B.weight": np.ones((3, 4), np.float32)}, r"expected \(128, rank\), found"),
        ({f"{LAYER}A.weight": np.ones((5, 128), np.float32)}, "expected one rank"),
        ({f"{LAYER}A.weight": np.ones(128, np.float32)}, r"expected \(rank, 128\), found \(128,\)"),
        ({f"{LAYER}A.weight": np.full((4, 128), np.nan, np.float32)}, "expected finite"),
        ({f"{LAYER}A.weight": np.ones((4, 128), np.int32)}, "expected float lora_A"),
        ({"base_model.model.lm_head.lora_A.weight": np.ones((4, 128), np.float32)}, "lm_head"),
        ({LAYER.replace("0", "9") + "A.weight": np.ones((4, 128), np.float32)},
         "expected a projection of the model"),
        ({LAYER.replace("q_proj", "x_proj") + "A.weight": np.ones((4, 128), np.float32)},
         "expected a projection of the model"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit(tmp_path, checkpoint, tensors, words):
    assert checkpoint.config.dim == 128
    folder = write_adapter(tmp_path / "a", checkpoint.config, changes=tensors)
    with pytest.raises(CheckpointError, match=words):
        load_adapter(folder, checkpoint.config)


def test_folders_without_an_adapter(tmp_path, checkpoint):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json, found none"):
        load_adapter(tmp_path, checkpoint.config)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, found neither"):
        load_adapter(tmp_path, checkpoint.config)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="expected a zip archive as torch"):
        load_adapter(tmp_path, checkpoint.config)
    (tmp_path / "adapter_model.bin").write_bytes(pth(call("os", "system", "true")))
    with pytest.raises(CheckpointError, match="nothing was run"):
        load_adapter(tmp_path, checkpoint.config)


@pytest.mark.parametrize("parameters", [False, True])
def test_adapters_that_torch_saved(tmp_path, checkpoint, parameters):
    folder = write_adapter(tmp_path / "a", checkpoint.config)
    expected = load_adapter(folder, checkpoint.config)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(saved(tensors, parameters=parameters))
    for found, layer in zip(
        load_adapter(folder, checkpoint.config).layers, expected.layers, strict=True
    ):
        assert found.keys() == layer.keys()
        assert all((found[n].up == layer[n].up).all() for n in layer)
        assert all((found[n].down == layer[n].down).all() for n in layer)


def test_engines_take_adapters_of_their_model_alone(llm, adapters, tmp_path):
    with pytest.raises(TypeError, match="must be a LoraAdapter"):
        llm.generate([PROMPT], adapter=str(tmp_path))
    other = open_checkpoint(tiny_golden("hd128_gqa_bf16").folder).config
    foreign = load_adapter(write_adapter(tmp_path / "a", other), other)
    with pytest.raises(ValueError, match="loaded for a model of another shape"):
        llm.generate([PROMPT], adapter=foreign)
    assert not llm.engine.has_unfinished()
