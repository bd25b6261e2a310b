"""Damaged, contradictory and foreign GGUF files."""

import struct

import numpy as np
import pytest
from helpers.checkpoint_files import gguf_bytes, gguf_string, gguf_value, mini_gguf, mini_gguf_bytes

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.errors import CheckpointError

METADATA, TENSORS = mini_gguf()
GOOD = gguf_bytes(METADATA, TENSORS)
NORM = "output_norm.weight"
Q = "blk.0.attn_q.weight"


def tensors_with(changes, **metadata):
    tensors = {k: v for k, v in (TENSORS | changes).items() if v is not ...}
    return gguf_bytes(METADATA | metadata, tensors)


def head(version=3, n_tensors=0, n_keys=0):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def key_value(value):
    return head(n_keys=1) + gguf_string("k") + value


def entry(name="t", n_axes=1, axes=(4,), kind=0, offset=0):
    axes = struct.pack(f"<{len(axes)}Q", *axes)
    raw = gguf_string(name) + struct.pack("<I", n_axes) + axes + struct.pack("<IQ", kind, offset)
    return head(n_tensors=1) + raw + bytes(256)


def floats(*shape):
    return "F32", shape, np.ones(shape, np.float32).tobytes()


YARN = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 2.0}
BAD_FILES = {
    "empty": (b"", "found an empty file"),
    "another file": (
        b"PK\x03\x04" + bytes(64),
        "b'GGUF', found b'PK.*the directory with the safetensors",
    ),
    "3 bytes": (b"GGU", "expected 4 bytes at offset 0, found 3; the file is truncated"),
    "version 1": (head(1), "GGUF version 2 or 3, little-endian, found version 1"),
    "version 4": (head(4), "found version 4"),
    "big-endian": (head(3 << 24), "found a big-endian file"),
    "no counts": (head()[:12], "truncated"),
    "2**64 keys": (head(n_keys=2**64 - 1) + bytes(100), "truncated|twice"),
    "2**64 tensors": (head(n_tensors=2**64 - 1) + bytes(100), "expected 1 to 4 axes"),
    "key past the end": (head(n_keys=1) + struct.pack("<Q", 60_000), "truncated"),
    "key too long": (head(n_keys=1) + struct.pack("<Q", 2**40), "at most 65535 bytes"),
    "key not UTF-8": (head(n_keys=1) + gguf_string(b"\xff") + gguf_value(1), "expected UTF-8"),
    "key twice": (
        head(n_keys=2) + 2 * (gguf_string("k") + gguf_value(1)),
        "metadata key 'k': expected it once, found it twice",
    ),
    "value type": (key_value(struct.pack("<IQ", 13, 0)), "value type from 0 to 12, found 13"),
    "string past the end": (key_value(struct.pack("<IQ", 8, 2**63)), "expected a string to end"),
    "array past the end": (key_value(struct.pack("<IIQ", 9, 4, 2**62)), "truncated or damaged"),
    "array of arrays": (key_value(struct.pack("<IIQ", 9, 9, 1)), "numbers or strings, .* type 9"),
    "2**60 strings": (key_value(struct.pack("<IIQ", 9, 8, 2**60)), "expected a string to end"),
    "no axes": (entry(n_axes=0, axes=()), "tensor 't': expected 1 to 4 axes, found 0"),
    "5 axes": (entry(n_axes=5, axes=(1,) * 5), "expected 1 to 4 axes, found 5"),
    "axis of 0": (entry(axes=(0,)), "expected axes from 1 to"),
    "axis of 2**63": (entry(axes=(2**63,)), "expected axes from 1 to"),
    "axes that wrap": (entry(n_axes=4, axes=(2**32,) * 4), "it is truncated"),
    "ggml type": (entry(kind=999), "expected a ggml type the gguf package knows, found 999"),
    "rows of no block": (entry(kind=8), "rows of a multiple of 32 for Q8_0"),
    "unaligned offset": (entry(offset=4), "an offset that is a multiple of 32, found 4"),
    "offset past the end": (entry(offset=2**62), "it is truncated"),
    "alignment 0": (mini_gguf_bytes(general__alignment=0), "expected a power of two, found 0"),
    "alignment 48": (mini_gguf_bytes(general__alignment=48), "expected a power of two"),
    "alignment text": (mini_gguf_bytes(general__alignment="32"), "expected a power of two"),
    "truncated": (GOOD[:-33], "it is truncated"),
    "half": (GOOD[: len(GOOD) // 2], "truncated"),
    "overlap": (gguf_bytes(METADATA, TENSORS, offsets={NORM: 0}), "it overlaps"),
    "tensor twice": (
        gguf_bytes(METADATA, TENSORS | {"output_norm.weighT": floats(8)}).replace(
            b"weighT", b"weight"
        ),
        f"{NORM}.*expected it once, found it twice",
    ),
    "no architecture": (mini_gguf_bytes(general__architecture=...), "'llama', found 'nothing'"),
    "another architecture": (
        mini_gguf_bytes(general__architecture="qwen2"),
        "general.architecture: expected 'llama', found 'qwen2'; no other architecture",
    ),
    "a part under another name": (
        mini_gguf_bytes(split__count=3),
        "split.count: expected a file name that ends in -00001-of-00003.gguf, found part 1 of 3",
    ),
    "too many parts": (
        mini_gguf_bytes(split__count=10**6),
        "split.count: expected an integer from",
    ),
    "experts": (mini_gguf_bytes(llama__expert_count=8), "mixtures of experts"),
    "no layers": (
        mini_gguf_bytes(llama__block_count=...),
        "llama.block_count: expected an integer",
    ),
    "0 layers": (mini_gguf_bytes(llama__block_count=0), "llama.block_count"),
    "a layer too few": (mini_gguf_bytes(llama__block_count=2), "'blk.1.attn_norm.weight'.*none of"),
    "no context": (mini_gguf_bytes(llama__context_length=...), "llama.context_length"),
    "no eps": (mini_gguf_bytes(llama__attention__layer_norm_rms_epsilon=...), "rms_epsilon"),
    "text for a number": (mini_gguf_bytes(llama__embedding_length="8"), "embedding_length"),
    "0 heads": (mini_gguf_bytes(llama__attention__head_count=0), "head_count"),
    "3 key-value heads": (mini_gguf_bytes(llama__attention__head_count_kv=3), "found 2 and 3"),
    "heads that differ": (
        mini_gguf_bytes(llama__attention__head_count_kv=struct.pack("<IIQ2I", 9, 4, 2, 1, 2)),
        "head_count_kv: expected an integer",
    ),
    "heads that do not divide": (
        mini_gguf_bytes(llama__attention__head_count=3, llama__attention__key_length=...),
        "a multiple of the 3 heads",
    ),
    "value length": (mini_gguf_bytes(llama__attention__value_length=8), r"size of a head \(4\)"),
    "partial rotation": (mini_gguf_bytes(llama__rope__dimension_count=2), r"size of a head \(4\)"),
    "text for a vocabulary": (
        mini_gguf_bytes(llama__vocab_size="12"),
        "vocab_size: expected an int",
    ),
    "scaling kind": (mini_gguf_bytes(llama__rope__scaling__type="dynamic"), "none, linear, yarn"),
    "negative factor": (mini_gguf_bytes(llama__rope__scaling__factor=-1.0), "scaling.factor"),
    "yarn extrapolation": (
        mini_gguf_bytes(**YARN, llama__rope__scaling__yarn_ext_factor=0.5),
        "yarn_ext_factor: expected 1",
    ),
    "yarn log multiplier": (
        mini_gguf_bytes(**YARN, llama__rope__scaling__yarn_log_multiplier=0.1),
        "yarn_log_multiplier: expected 0",
    ),
    "factors and scaling": (
        tensors_with({"rope_freqs.weight": floats(2)}, **{"llama.rope.scaling.factor": 2.0}),
        "rope_freqs.weight.*expected none beside rope scaling 'linear'",
    ),
    "too many factors": (tensors_with({"rope_freqs.weight": floats(4)}), r"F32 \(2,\), found"),
    "factors of 0": (
        tensors_with({"rope_freqs.weight": ("F32", (2,), bytes(8))}),
        "finite factors above 0",
    ),
    "no norm": (tensors_with({NORM: ...}), f"{NORM}.*found none of that name"),
    "no embedding": (tensors_with({"token_embd.weight": ...}), "token_embd.weight.*no such"),
    "a bias of a norm": (
        tensors_with({"blk.0.attn_norm.bias": floats(8)}),
        "blk.0.attn_norm.bias.*found this one",
    ),
    "a short bias": (
        tensors_with({"blk.0.attn_q.bias": floats(7)}),
        r"blk.0.attn_q.bias.*expected shape \(8,\), found \(7,\)",
    ),
    "a shape": (tensors_with({Q: floats(4, 8)}), rf"{Q}.*expected shape \(8, 8\), found \(4, 8\)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path):
    content, message = BAD_FILES[name]
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "model.gguf")
    assert str(tmp_path / "model.gguf") in str(caught.value)


def test_no_embedding_and_no_vocabulary(tmp_path):
    metadata = {k: v for k, v in METADATA.items() if k != "tokenizer.ggml.tokens"}
    tensors = {k: v for k, v in TENSORS.items() if k != "token_embd.weight"}
    (tmp_path / "a").write_bytes(gguf_bytes(metadata, tensors))
    with pytest.raises(CheckpointError, match=r"expected tensor 'token_embd.weight'"):
        open_checkpoint(tmp_path / "a")
