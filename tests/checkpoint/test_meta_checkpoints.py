"""Meta's layout: opened as it lies, and the same to the bit as Hugging Face's beside it."""

import json
import shutil

import numpy as np
import pytest
from helpers.checkpoint_files import TINY, mini_tensors, write_mini
from helpers.goldens import load_golden
from helpers.hostile_pth import HOSTILE
from helpers.pth_files import pth
from helpers.quantized_models import mapping_under

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.formats.meta_directory import hidden_dim_of, params_of
from codellama_rt.checkpoint.formats.pth import read_pth
from codellama_rt.checkpoint.tensor_names import halves_first, rotates
from codellama_rt.errors import CheckpointError
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.llm.variants import VARIANTS
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.llama import Llama
from codellama_rt.tools.convert.convert import convert

NAMES = ["meta_1shard_bf16", "meta_2shard_gqa_bf16"]
HEAD_DIM = 16


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    """A checkpoint in Meta's layout, made from one in Hugging Face's."""
    folder = tmp_path_factory.mktemp("meta") / "m"
    return convert(TINY / "gqa_theta1e6_bf16", folder, to="meta", shards=2)


def same_weights(a, b, head_dim):
    """Whether weights in Meta's order of rows are those in Hugging Face's."""
    for ours, theirs in zip(a.layers, b.layers, strict=True):
        for name, array in vars(ours).items():
            ordered = halves_first(array, head_dim) if rotates(f"{name}.weight") else array
            assert ordered.tobytes() == getattr(theirs, name).tobytes(), name
    for name in ("embedding", "norm", "lm_head"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_of_the_neighbour(shared_dir, name):
    folder = shared_dir / "data" / "tiny" / name
    meta, hf = open_checkpoint(folder), open_checkpoint(f"{folder}_hf")
    same_weights(meta.weights, hf.weights, HEAD_DIM)
    assert meta.config.rope_interleaved
    ignored = {"rope_interleaved": False, "dtype": "bfloat16"}
    assert vars(meta.config) | ignored == vars(hf.config) | ignored


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_goldens(shared_dir, name):
    folder = shared_dir / "data" / "tiny"
    golden = load_golden(folder / f"{name}_hf")
    checkpoint = open_checkpoint(folder / name, dtype="float32")
    model = Llama(checkpoint.config, checkpoint.weights)
    for i, case in enumerate(golden.cases):
        positions, expected = golden.logits(i)
        found = sequence_logits(model, case["prompt"])[list(positions)]
        assert np.abs(found - expected).max() < 1e-4


def test_one_shard_is_mapped(tmp_path):
    convert(TINY / "gqa_theta1e6_bf16", tmp_path / "m", to="meta")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.mapped_bytes == checkpoint.stored_bytes
    assert mapping_under(checkpoint.weights.layers[0].q_proj) is not None


def test_several_shards_are_joined(two_shards):
    calls = []
    checkpoint = open_checkpoint(two_shards, progress=lambda *call: calls.append(call))
    same_weights(checkpoint.weights, open_checkpoint(TINY / "gqa_theta1e6_bf16").weights, 16)
    assert checkpoint.mapped_bytes < checkpoint.stored_bytes / 100  # the norms alone
    assert {what for *_, what in calls} == {"joining shards"}
    assert calls[-1][0] == calls[-1][1]
    assert not checkpoint.weights.lm_head.flags.writeable


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_it_generates_as_the_original(two_shards, quantization):
    prompt = [1, 7, 300, 12, 5]
    with (
        LLM(two_shards, quantization=quantization) as meta,
        LLM(TINY / "gqa_theta1e6_bf16", quantization=quantization) as hf,
    ):
        a, b = meta.logits(prompt), hf.logits(prompt)
    assert np.abs(a - b).max() < 0.02 * b.std()


def test_the_vocabulary_and_the_context_are_not_in_params(two_shards):
    assert "vocab_size" not in json.loads((two_shards / "params.json").read_text())
    config = open_checkpoint(two_shards).config
    assert (config.vocab_size, config.max_position_embeddings) == (512, 16384)


@pytest.mark.parametrize("name", VARIANTS)
def test_params_of_the_published_models(tmp_path, name):
    config = VARIANTS[name].config
    params = params_of(config)
    assert params["multiple_of"] == (4096 if "70b" in name else 256)
    width = hidden_dim_of(params["dim"], params["multiple_of"], params["ffn_dim_multiplier"])
    assert width == config.hidden_dim


@pytest.mark.parametrize("hidden_dim", [1, 12, 176, 1000, 1536, 28671])
def test_any_width_has_params(hidden_dim):
    config = ModelConfig(n_layers=1, n_heads=2, n_kv_heads=1, head_dim=32, dim=64,
                         hidden_dim=hidden_dim, vocab_size=10)  # fmt: skip
    params = params_of(config)
    assert hidden_dim == hidden_dim_of(64, params["multiple_of"], params["ffn_dim_multiplier"])


def changed(folder, **values):
    file = folder / "params.json"
    kept = {k: v for k, v in (json.loads(file.read_text()) | values).items() if v is not ...}
    file.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"dim": ...}, "dim: expected an integer"),
        ({"n_heads": 0}, "n_heads: expected an integer from 1"),
        ({"dim": 129}, "dim: expected a multiple of n_heads"),
        ({"n_layers": 3.5}, "n_layers: expected an integer"),
        ({"n_kv_heads": 3}, "multiple of the number of key-value heads"),
        ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier: expected layers of at most"),
        ({"ffn_dim_multiplier": 9.0}, "expected shape"),
        ({"n_layers": 4}, "'layers.3.attention_norm.weight': expected"),
        ({"n_layers": 1}, "expected only the tensors of a Llama of 1 layers"),
        ({"rope_theta": "x"}, "rope_theta: expected a finite number"),
    ],
)
def test_params_that_cannot_be(two_shards, tmp_path, values, reason):
    folder = shutil.copytree(two_shards, tmp_path / "m")
    changed(folder, **values)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(folder)


def test_shards_that_do_not_fit_together(two_shards, tmp_path):
    folder = shutil.copytree(two_shards, tmp_path / "m")
    first, second = (folder / f"consolidated.0{i}.pth" for i in range(2))
    second.unlink()
    with pytest.raises(CheckpointError, match="expected shape"):
        open_checkpoint(folder)
    first.rename(second)
    with pytest.raises(CheckpointError, match=r"without a gap, found consolidated\.01\.pth"):
        open_checkpoint(folder)
    shutil.copy(two_shards / second.name, first)
    other = write_mini(tmp_path / "other", mini_tensors())
    convert(other, tmp_path / "mini", to="meta")
    shutil.copy(tmp_path / "mini" / first.name, second)
    with pytest.raises(CheckpointError, match="in every shard, or in none"):
        open_checkpoint(folder)


def test_norms_that_differ_between_shards(two_shards, tmp_path):
    folder = shutil.copytree(two_shards, tmp_path / "m")
    file = folder / "consolidated.01.pth"
    norm = read_pth(file)["norm.weight"]
    raw = bytearray(file.read_bytes())
    at = raw.index(norm.payload.tobytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"norm.weight': expected the same in every shard"):
        open_checkpoint(folder)


def test_no_params_and_no_weights(two_shards, tmp_path):
    folder = shutil.copytree(two_shards, tmp_path / "m")
    (folder / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"params.json: expected a readable JSON file"):
        open_checkpoint(folder)
    (tmp_path / "n").mkdir()
    shutil.copy(two_shards / "params.json", tmp_path / "n")
    with pytest.raises(CheckpointError, match=r"expected consolidated.00.pth, .* found none"):
        open_checkpoint(tmp_path / "n")


@pytest.mark.parametrize("payload", ["os.system", "stack_global", "an axis of 2**60"])
def test_a_hostile_file_is_refused_by_all_that_read_directories(two_shards, tmp_path, payload):
    folder = shutil.copytree(two_shards, tmp_path / "m")
    (folder / "consolidated.01.pth").write_bytes(pth(HOSTILE[payload]))
    for use in (LLM, open_checkpoint, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth"):
            use(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("to", ["huggingface", "meta"])
def test_damaged_bytes_are_not_converted(two_shards, tmp_path, to):
    """Opening reads no weight; a conversion compares the checksums of the archive."""
    folder = shutil.copytree(two_shards, tmp_path / "m")
    path = folder / "consolidated.01.pth"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: .*CRC-32 .*is damaged"):
        convert(folder, tmp_path / "out", to=to, dtype="float32")
    assert not (tmp_path / "out").exists()


def test_sums_are_part_of_the_progress(two_shards, tmp_path):
    said = []
    convert(two_shards, tmp_path / "out", progress=lambda *call: said.append(call))
    sums = [call for call in said if call[2] == "verifying checksums"]
    assert sums
    assert sums[-1][0] <= sums[-1][1]
