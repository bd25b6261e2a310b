"""What MindSpore shows of a wrong argument: operator, argument and reason."""

import numpy as np
import pytest
from helpers.arguments import make_arguments
from helpers.builders import int32

from codellama_rt import ops
from codellama_rt.ops.schema import OPS

mindspore = pytest.importorskip("mindspore", reason="MindSpore is not installed")
tensor = mindspore.Tensor.from_numpy
graph = ops.graph
MODES = pytest.mark.parametrize("mode", ["pynative", "jit"])


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """MindSpore writes a report into the current folder when a graph can't be compiled."""
    monkeypatch.chdir(tmp_path)


def runner(name, mode):
    run = getattr(graph, name)

    @mindspore.jit
    def compiled(*tensors):
        return run(*tensors)

    return compiled if mode == "jit" else run


def run_and_read(name, mode, arrays):
    """The first result: PyNative shows an error when it is read, if not before."""
    made = runner(name, mode)(*[tensor(arrays[argument]) for argument in OPS[name].inputs])
    return (made[0] if isinstance(made, tuple) else made).asnumpy()


@MODES
@pytest.mark.parametrize(
    ("name", "argument", "dtype", "expected"),
    [
        ("rms_norm", "x", np.float64, "float32 or float16 or bfloat16 (num_tokens, dim)"),
        ("add_rms_norm", "residual", np.float16, "float32 (num_tokens, dim)"),
        ("linear", "weight", np.int8, "float32 or float16 or bfloat16 (out_features, in_features)"),
        ("paged_attention", "block_tables", np.int64, "int32 (num_seqs, max_blocks)"),
        ("rope_and_cache", "value_cache", np.float16, "float32 (num_blocks, n_kv_heads, "),
        ("copy_blocks", "block_pairs", np.int64, "int32 (num_pairs, 2)"),
        ("decoder_layer", "x", np.float16, "float32 (num_tokens, dim)"),
    ],
)
def test_dtypes(name, argument, dtype, expected, mode):
    arrays = make_arguments(OPS[name])
    arrays[argument] = arrays[argument].astype(dtype)
    with pytest.raises(TypeError) as caught:
        run_and_read(name, mode, arrays)
    assert str(caught.value).startswith(f"{name}: {argument} must be {expected}")
    assert f"got {np.dtype(dtype).name}; cast it with .astype" in str(caught.value)


@MODES
@pytest.mark.parametrize(
    ("name", "argument", "change", "message"),
    [
        ("rms_norm", "weight", lambda a: a[1:], "rms_norm: weight must be .* got float32 (11)"),
        ("rms_norm", "x", lambda a: a[0], "rms_norm: x must be .* got float32 (12)"),
        ("linear", "x", lambda a: a[:, 1:], "linear: weight must be .*, in_features=9)"),
        ("silu_and_mul", "gate_up", lambda a: a[:, 1:], "silu_and_mul: gate_up must be"),
        ("rope_and_cache", "qkv", lambda a: a[:, :8], "rope_and_cache: qkv must be"),
        ("rope_and_cache", "slot_mapping", lambda a: a + 96, "slot_mapping[0] must be in"),
        ("embedding", "token_ids", lambda a: a - 11, "embedding: token_ids[0] must be in [0, "),
        ("paged_attention", "seq_lens", lambda a: a + 99, "paged_attention: seq_lens[0]="),
        ("decoder_layer", "block_tables", lambda a: a - 6, "decoder_layer: block_tables[0, 0]="),
        ("rms_norm", "x", lambda a: a[None, None, None], "rms_norm: tensor 0 has 5 dimensions"),
    ],
)
def test_shapes_and_values(name, argument, change, message, mode):
    arrays = make_arguments(OPS[name])
    arrays[argument] = np.ascontiguousarray(change(arrays[argument]))
    before = {written: arrays[written].copy() for written in OPS[name].written}
    pattern = ".*".join(map(_escaped, message.split(".*")))
    with pytest.raises(RuntimeError, match=pattern):
        run_and_read(name, mode, arrays)
    for written, array in before.items():
        np.testing.assert_array_equal(arrays[written], array)
    assert run_and_read(name, mode, make_arguments(OPS[name])).size  # the next call works


def _escaped(text):
    return "".join(f"\\{c}" if c in "()[]" else c for c in text)


@pytest.mark.parametrize(
    ("given", "kind"), [(np.ones(2), "ndarray"), (1.0, "float"), (None, "None")]
)
def test_pynative_takes_tensors_only(given, kind):
    """Without this check MindSpore crashes where no argument is a Tensor."""
    with pytest.raises(TypeError, match=f"rms_norm: x must be a mindspore.Tensor, got {kind}"):
        graph.rms_norm(given, given)
    x = mindspore.ops.ones((1, 2))
    with pytest.raises(TypeError, match=f"rms_norm: weight must be a mindspore.Tensor, got {kind}"):
        graph.rms_norm(x, given)


WRITTEN = [(name, argument) for name in OPS for argument in OPS[name].written]
VIEWS = {
    "first": lambda stacked: stacked[0],
    "second": lambda stacked: stacked[1],
    "all of one": lambda stacked: stacked[:1][0],
    "all": lambda stacked: stacked[0].copy()[:],
    "viewed": lambda stacked: stacked.view(-1)[: stacked.size // 2].view(*stacked.shape[1:]),
    "transposed": lambda stacked: mindspore.ops.transpose(
        stacked[0].copy(), (1, 0, *range(2, stacked.ndim - 1))
    ),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("name", "argument"), WRITTEN)
def test_pynative_refuses_to_write_into_a_view(name, argument, view):
    """MindSpore would have a copy written. (A reshape of a whole tensor can't be told.)"""
    arrays = make_arguments(OPS[name])
    stacked = tensor(np.stack([arrays[argument]] * 2))
    tensors = {key: tensor(arrays[key]) for key in OPS[name].inputs}
    tensors[argument] = VIEWS[view](stacked)
    with pytest.raises(ValueError, match=rf"{name}: {argument} .* it is a view.*from_numpy"):
        getattr(graph, name)(*tensors.values())


def test_pynative_refuses_to_write_into_a_view_of_a_payload():
    payload = tensor(np.zeros((2, 6, 2, 16 * 12), np.uint8))
    caches = [ops.Quantized(payload[i], "int8", (6, 2, 16, 8)) for i in range(2)]
    key, slot = tensor(np.ones((1, 2, 8), np.float32)), tensor(int32([3]))
    with pytest.raises(ValueError, match=r"reshape_and_cache: key_cache .* it is a view"):
        graph.reshape_and_cache(key, key, *caches, slot)


@MODES
@pytest.mark.parametrize("shape", [(2**58 + 2, 64), (-2, 64), (2**62, 64)])
def test_sizes_of_a_quantised_weight(shape, mode):
    x, payload = tensor(np.ones((1, 64), np.float32)), tensor(np.zeros(4096, np.uint8))

    def multiply(x, payload):
        return graph.linear(x, (payload, "int8", shape))

    run = mindspore.jit(multiply) if mode == "jit" else multiply
    with pytest.raises(ValueError, match=r"no size below 0 and at most 2\*\*48 elements"):
        run(x, payload)


@MODES
@pytest.mark.parametrize("num_weights", [0, 4])
def test_number_of_weights(num_weights, mode):
    arrays = make_arguments(OPS["linear"])
    x, weights = tensor(arrays["x"]), (tensor(arrays["weight"]),) * num_weights

    @mindspore.jit
    def compiled(x, *weights):
        return graph.linear(x, weights)

    with pytest.raises(ValueError, match=f"linear: takes 1 to 3 weights, got {num_weights}"):
        compiled(x, *weights) if mode == "jit" else graph.linear(x, weights)


@pytest.mark.parametrize(
    ("name", "attributes", "error", "message"),
    [
        ("rms_norm", {"eps": "small"}, TypeError, "rms_norm: eps must be a float, got 'small'"),
        ("rms_norm", {"eps": True}, TypeError, "rms_norm: eps must be a float, got True"),
        ("rms_norm", {"eps": None}, TypeError, "rms_norm: eps must be a float, got None"),
        ("rms_norm", {"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1"),
        ("paged_attention", {"scale": float("nan")}, ValueError, "scale must be finite"),
        ("rope_and_cache", {"interleaved": 1}, TypeError, "interleaved must be a bool, got 1"),
        ("rms_norm", {"epsilon": 1.0}, ValueError, "has no attribute 'epsilon'; available: eps"),
        ("rmsnorm", {}, ValueError, "no op named 'rmsnorm'; available: embedding, rms_norm"),
    ],
)
def test_attributes(name, attributes, error, message):
    with pytest.raises(error, match=message):
        graph.primitive(name, **attributes)


def test_a_wrong_number_of_tensors():
    x = mindspore.ops.ones((1, 2))
    with pytest.raises(TypeError, match="rms_norm takes 2 tensors, got 1"):
        graph.primitive("rms_norm")(x)
