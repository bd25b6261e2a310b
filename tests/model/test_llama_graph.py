"""LlamaCell: the direct calls' logits, bit for bit, from one compiled graph."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.checkpoint_files import TINY, TINY_NAMES
from helpers.goldens import run
from helpers.quantized_models import block_model
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.model.batch import Batch
from codellama_rt.model.kv_cache import KVCache
from codellama_rt.model.llama import Llama
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.ops.quantized import CACHE_DTYPES, OWN_WEIGHT_DTYPES, empty_caches

mindspore = pytest.importorskip("mindspore", reason="MindSpore is not installed")
VARIANTS = pytest.mark.parametrize("whole_layers", [False, True], ids=["ops", "whole_layers"])
STORED = {"float32": "mha_theta1e4_fp32", "float16": "mqa_fp16_sharded",
          "bfloat16": "gqa_theta1e6_bf16"}  # fmt: skip


def make_cell(checkpoint, whole_layers):
    from codellama_rt.model.llama_graph import LlamaCell

    return LlamaCell(checkpoint.config, checkpoint.weights, whole_layers=whole_layers)


def pages_of(kv_cache):
    return [cache for caches in kv_cache.layers for cache in caches]


class BothRoads:
    """A model that takes each step by direct calls and by graph ops, from equal caches."""

    def __init__(self, checkpoint, whole_layers):
        self.config = checkpoint.config
        self.direct = Llama(checkpoint.config, checkpoint.weights)
        self.cell = make_cell(checkpoint, whole_layers)
        self.steps = []  # (num_tokens, num_seqs, num_logits)

    def forward(self, batch, kv_cache):
        twin = KVCache(
            self.config, num_blocks=kv_cache.num_blocks, block_size=kv_cache.block_size,
            dtype=kv_cache.dtype,
        )  # fmt: skip
        for ours, theirs in zip(pages_of(twin), pages_of(kv_cache), strict=True):
            ours[...] = theirs
        logits = self.direct.forward(batch, kv_cache)
        assert_equal_bits(self.cell.forward(batch, twin), logits)
        for ours, theirs in zip(pages_of(twin), pages_of(kv_cache), strict=True):
            assert_equal_bits(ours, theirs)
        self.steps.append((len(batch.token_ids), len(batch.seq_lens), len(batch.logit_rows)))
        return logits


def run_requests(model, kv_dtype, seed=0):
    """A long request alone, then nine together, and not enough blocks for all of those."""
    rng = np.random.default_rng(seed)
    kv_cache = KVCache(model.config, num_blocks=14, block_size=16, dtype=kv_dtype)
    engine = Engine(model, kv_cache, max_num_batched_tokens=24, max_model_len=120)
    vocab_size = model.config.vocab_size
    lengths = [100, *rng.integers(1, 70, 9)]
    first, *others = [rng.integers(3, vocab_size, n).tolist() for n in lengths]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    return run(engine, [first], params) + run(engine, others, params)


def compiled_graphs():
    from mindspore.graph.api import ms_compile_cache

    return len(ms_compile_cache)


@VARIANTS
@pytest.mark.parametrize("kv_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", STORED.values(), ids=STORED)
def test_logits_of_an_engine_with_many_requests(name, kv_dtype, whole_layers):
    model = BothRoads(open_checkpoint(TINY / name), whole_layers)
    before = compiled_graphs()
    run_requests(model, kv_dtype)
    assert compiled_graphs() == before + 1
    num_tokens, num_seqs, num_logits = (set(counts) for counts in zip(*model.steps, strict=True))
    assert len(num_tokens) > 5, "chunks and decoding, in steps of many sizes"
    assert len(num_seqs) > 3
    assert 0 in num_logits, "a step that is only the middle of a prompt"


@VARIANTS
@pytest.mark.parametrize("name", sorted(set(TINY_NAMES) - set(STORED.values())))
def test_logits_of_the_other_checkpoints(name, whole_layers):
    """RoPE scalings, tied embeddings, another head_dim."""
    checkpoint = open_checkpoint(TINY / name)
    run_requests(BothRoads(checkpoint, whole_layers), checkpoint.config.dtype)


@VARIANTS
def test_an_engine_generates_the_same_tokens(whole_layers):
    checkpoint = open_checkpoint(TINY / STORED["bfloat16"])
    direct = Llama(checkpoint.config, checkpoint.weights)
    cell = make_cell(checkpoint, whole_layers)
    assert run_requests(cell, "bfloat16", seed=1) == run_requests(direct, "bfloat16", seed=1)


def three_tokens(block_size):
    return Batch(
        token_ids=np.array([5, 6, 7], np.int32), positions=np.arange(3, dtype=np.int32),
        cu_seqlens_q=np.array([0, 3], np.int32), seq_lens=np.array([3], np.int32),
        block_tables=np.array([[1]], np.int32), logit_rows=np.array([2, 0], np.int32),
        slot_mapping=np.arange(block_size, block_size + 3, dtype=np.int32),
    )  # fmt: skip


def test_pages_of_another_size_and_dtype():
    """Another cache: other blocks need no new graph, another dtype does."""
    checkpoint = open_checkpoint(TINY / STORED["float32"])
    cell, direct = make_cell(checkpoint, False), Llama(checkpoint.config, checkpoint.weights)
    before = compiled_graphs()
    for num_blocks, block_size, dtype, graphs in [
        (2, 16, "float32", 1), (5, 64, "float32", 1), (2, 16, "bfloat16", 2),
        (3, 32, "bfloat16", 2),
    ]:  # fmt: skip
        caches = [
            KVCache(checkpoint.config, num_blocks=num_blocks, block_size=block_size, dtype=dtype)
            for _ in range(2)
        ]
        batch = three_tokens(block_size)
        expected = direct.forward(batch, caches[0])
        assert_equal_bits(cell.forward(batch, caches[1]), expected)
        assert compiled_graphs() == before + graphs


def quantized(weights, dtype):
    """The same model with all projections and the head in `dtype`."""
    layers = [
        replace(layer, **{n: ops.quantize(w, dtype) for n, w in vars(layer).items() if "proj" in n})
        for layer in weights.layers
    ]
    return replace(weights, layers=layers, lm_head=ops.quantize(weights.lm_head, dtype))


@VARIANTS
@pytest.mark.parametrize("dtype", OWN_WEIGHT_DTYPES)
def test_logits_of_quantized_weights(dtype, whole_layers):
    checkpoint = open_checkpoint(TINY / STORED["bfloat16"])
    weights = quantized(checkpoint.weights, dtype)
    run_requests(BothRoads(replace(checkpoint, weights=weights), whole_layers), "bfloat16")


def test_a_quantized_embedding():
    """Its rows too: as a GGUF file has them."""
    checkpoint = open_checkpoint(TINY / STORED["float32"])
    table = ops.quantize(checkpoint.weights.embedding, "int8")
    weights = replace(checkpoint.weights, embedding=table)
    run_requests(BothRoads(replace(checkpoint, weights=weights), False), "float32")


def test_the_types_of_a_layer_are_multiplied_run_by_run(tmp_path):
    """Q4_K beside Q6_K, as GGUF's Q4_K_M mixes them."""
    mixed = {"attn_v": "Q6_K", "ffn_gate": "Q6_K", "output.": "Q6_K", "": "Q4_K"}
    path = block_model(tmp_path / "a.gguf", mixed)
    for repack in (False, True):
        run_requests(BothRoads(open_checkpoint(path, repack=repack), False), "float32")


def test_whole_layers_of_repacked_blocks(tmp_path):
    checkpoint = open_checkpoint(block_model(tmp_path / "a.gguf", {"": "Q4_1"}), repack=True)
    run_requests(BothRoads(checkpoint, True), "float32")


def quantized_cache(config, dtype, num_blocks, block_size):
    shape = (num_blocks, config.n_kv_heads, block_size, config.head_dim)
    layers = [empty_caches(dtype, shape) for _ in range(config.n_layers)]
    return SimpleNamespace(dtype=dtype, layers=layers)


@VARIANTS
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_logits_over_quantized_caches(dtype, whole_layers):
    """Blocks of another number and size need no new graph."""
    checkpoint = open_checkpoint(TINY / "hd128_gqa_bf16")
    cell, direct = (
        make_cell(checkpoint, whole_layers), Llama(checkpoint.config, checkpoint.weights)
    )  # fmt: skip
    before = compiled_graphs()
    for num_blocks, block_size in [(2, 16), (5, 64)]:
        ours, theirs = (
            quantized_cache(checkpoint.config, dtype, num_blocks, block_size) for _ in range(2)
        )
        batch = three_tokens(block_size)
        assert_equal_bits(cell.forward(batch, ours), direct.forward(batch, theirs))
        for a, b in zip(pages_of(ours), pages_of(theirs), strict=True):
            assert_equal_bits(a.payload, b.payload)
    assert compiled_graphs() == before + 1


def test_a_cell_keeps_its_quantized_dtype():
    checkpoint = open_checkpoint(TINY / "hd128_gqa_bf16")
    cell = make_cell(checkpoint, False)
    cell.forward(three_tokens(16), quantized_cache(checkpoint.config, "int8", 2, 16))
    with pytest.raises(ValueError, match=r"compiled for a cache in int8, got one in int4; make"):
        cell.forward(three_tokens(16), quantized_cache(checkpoint.config, "int4", 2, 16))


def test_weights_are_used_where_they_lie():
    checkpoint = open_checkpoint(TINY / STORED["bfloat16"])
    cell = make_cell(checkpoint, False)
    run_requests(cell, "float32")
    weights = checkpoint.weights
    arrays = {"embedding": weights.embedding, "norm": weights.norm, "lm_head": weights.lm_head}
    for i, layer in enumerate(weights.layers):
        arrays |= {f"layers.{i}.{part}": array for part, array in vars(layer).items()}
    parameters = {parameter.name: parameter for parameter in cell.get_parameters()}
    assert parameters.keys() == arrays.keys()
    for name, array in arrays.items():
        assert parameters[name].data_ptr() == array.ctypes.data, name
        assert parameters[name].shape == array.shape
