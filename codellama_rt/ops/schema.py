"""One description per operator: axes, dtypes, what is written, attributes, cost, source.

The MindSpore registration (`graph.py`), the op table in `csrc/README.md`, the tests of rejected
arguments and the benchmark rows are generated from these descriptions. This module imports no
other module of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

FLOATS = ("float32", "float16", "bfloat16")
CACHED = (*FLOATS, "int8", "int4")  # the last two as `Quantized`
GGUF = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
)
WEIGHTS = (*CACHED, *GGUF, *(f"{name}_tiled" for name in GGUF))  # all but floats as `Quantized`
ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}


@dataclass(frozen=True)
class Tensor:
    """One tensor argument or result.

    Attributes:
        axes: axis names or arithmetic over them; equal names have equal sizes.
        dtypes: the allowed dtypes; `"=name"` means the dtype of argument `name`.
        doc: its contents.
        written: the op writes it in place.
        repeated: one to three tensors may be given (as a tuple).
    """

    axes: tuple[str, ...]
    dtypes: tuple[str, ...] | str
    doc: str = ""
    written: bool = False
    repeated: bool = False


@dataclass(frozen=True)
class Attribute:
    """One scalar argument; in graph mode, fixed when the op is created."""

    type: str
    default: float | bool
    doc: str = ""


@dataclass(frozen=True)
class Op:
    """One operator; `num_bytes` and `flops` take axis sizes (and item sizes by argument name).

    The item size of a quantised cache is `quantized.cache_item_size`, a fraction.
    """

    name: str
    doc: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    num_bytes: Callable[[Mapping[str, int], Mapping[str, float]], float]
    flops: Callable[[Mapping[str, int]], int]
    source: str
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    constraints: tuple[str, ...] = ()

    @property
    def written(self) -> tuple[str, ...]:
        """Return the names of the arguments that the op writes in place."""
        return tuple(name for name, tensor in self.inputs.items() if tensor.written)


INT32 = ("int32",)
FLOAT32 = ("float32",)
EPS = Attribute("float", 1e-5, "added to the mean square")
INTERLEAVED = Attribute(
    "bool", False, "pairs (2i, 2i+1) rotate (Meta); else (i, i+head_dim/2) (HF)"
)
SCALE = Attribute("float", 0.0, "factor of the scores; 0 means head_dim ** -0.5")
ROPE_TABLE = Tensor(("num_positions", "head_dim / 2"), FLOAT32, "row p: position p")
POSITIONS = Tensor(("num_tokens",), INT32, "absolute positions")
SLOTS = Tensor(("num_tokens",), INT32, "block_id * block_size + offset; -1: not written")
CACHE_AXES = ("num_blocks", "n_kv_heads", "block_size", "head_dim")
ROPE_SOURCE = "RoFormer, arXiv:2104.09864"
PAGED_SOURCE = "PagedAttention, arXiv:2309.06180"
FLASH_SOURCE = "FlashAttention-2, arXiv:2307.08691; Flash-Decoding"
HEADS_DIVIDE = "n_heads % n_kv_heads == 0"
BLOCK_SIZE = "block_size % 16 == 0"
EVEN = "head_dim % 2 == 0"


def _caches(written: bool) -> dict[str, Tensor]:
    return {
        "key_cache": Tensor(CACHE_AXES, CACHED, "blocks of keys, head-major", written),
        "value_cache": Tensor(CACHE_AXES, "=key_cache", "blocks of values", written),
    }


FIRST_QUERIES = Tensor(("num_seqs + 1",), INT32, "first query of each sequence")
_SEQUENCES = {
    "block_tables": Tensor(("num_seqs", "max_blocks"), INT32, "unused entries are not read"),
    "seq_lens": Tensor(("num_seqs",), INT32, "keys, including those of the queries"),
    "cu_seqlens_q": FIRST_QUERIES,
}


def _layer_weights(a: Mapping[str, int]) -> int:
    """Return the number of elements of one layer's projections."""
    attention = 2 * (a["n_heads"] + a["n_kv_heads"]) * a["head_dim"]
    return a["dim"] * (attention + 3 * a["hidden_dim"])


def _lse(doc: str = "log-sum-exp of the scores; -inf without keys") -> Tensor:
    return Tensor(("num_tokens", "n_heads"), FLOAT32, doc)


_OPS = [
    Op(
        "embedding",
        "Rows of a table.",
        {
            "token_ids": Tensor(("num_tokens",), INT32, "each in [0, vocab_size)"),
            "table": Tensor(("vocab_size", "dim"), WEIGHTS),
        },
        {"out": Tensor(("num_tokens", "dim"), FLOATS, "float32 unless `out` says otherwise")},
        lambda a, s: a["num_tokens"] * a["dim"] * (s["table"] + s["out"]),
        lambda a: 0,
        "",
    ),
    Op(
        "rms_norm",
        "x / sqrt(mean(x^2) + eps) * weight, statistics in float32.",
        {
            "x": Tensor(("num_tokens", "dim"), FLOATS),
            "weight": Tensor(("dim",), FLOATS),
        },
        {"out": Tensor(("num_tokens", "dim"), "=x")},
        lambda a, s: 2 * a["num_tokens"] * a["dim"] * s["x"] + a["dim"] * s["weight"],
        lambda a: 4 * a["num_tokens"] * a["dim"],
        "RMSNorm, arXiv:1910.07467",
        {"eps": EPS},
    ),
    Op(
        "add_rms_norm",
        "rms_norm of x + residual; returns that sum as well.",
        {
            "x": Tensor(("num_tokens", "dim"), FLOATS),
            "residual": Tensor(("num_tokens", "dim"), "=x"),
            "weight": Tensor(("dim",), FLOATS),
        },
        {
            "out": Tensor(("num_tokens", "dim"), "=x"),
            "residual_out": Tensor(("num_tokens", "dim"), "=x", "x + residual"),
        },
        lambda a, s: 4 * a["num_tokens"] * a["dim"] * s["x"] + a["dim"] * s["weight"],
        lambda a: 5 * a["num_tokens"] * a["dim"],
        "RMSNorm, arXiv:1910.07467",
        {"eps": EPS},
    ),
    Op(
        "linear",
        "x times weight transposed; up to three weights act as one with all their rows.",
        {
            "x": Tensor(("num_tokens", "in_features"), FLOATS),
            "weight": Tensor(
                ("out_features", "in_features"), WEIGHTS, "as in the checkpoint", repeated=True
            ),
        },
        {"out": Tensor(("num_tokens", "out_features"), "=x", "accumulated in float32")},
        lambda a, s: (
            a["out_features"] * a["in_features"] * s["weight"]
            + a["num_tokens"] * (a["in_features"] + a["out_features"]) * s["x"]
        ),
        lambda a: 2 * a["num_tokens"] * a["out_features"] * a["in_features"],
        "",
    ),
    Op(
        "apply_rotary_pos_emb",
        "Rotate queries and keys by their positions, in place.",
        {
            "query": Tensor(("num_tokens", "n_heads", "head_dim"), FLOATS, written=True),
            "key": Tensor(("num_tokens", "n_kv_heads", "head_dim"), "=query", written=True),
            "cos": ROPE_TABLE,
            "sin": ROPE_TABLE,
            "positions": POSITIONS,
        },
        {},
        lambda a, s: (
            a["num_tokens"]
            * a["head_dim"]
            * (2 * (a["n_heads"] + a["n_kv_heads"]) * s["query"] + s["cos"])
        ),
        lambda a: 3 * a["num_tokens"] * (a["n_heads"] + a["n_kv_heads"]) * a["head_dim"],
        ROPE_SOURCE,
        {"interleaved": INTERLEAVED},
        (EVEN,),
    ),
    Op(
        "reshape_and_cache",
        "Write keys and values into their slots of the cache.",
        {
            "key": Tensor(("num_tokens", "n_kv_heads", "head_dim"), FLOATS),
            "value": Tensor(("num_tokens", "n_kv_heads", "head_dim"), "=key"),
            **_caches(written=True),
            "slot_mapping": SLOTS,
        },
        {},
        lambda a, s: (
            a["num_tokens"]
            * a["n_kv_heads"]
            * a["head_dim"]
            * (2 * s["key"] + s["key_cache"] + s["value_cache"])
        ),
        lambda a: 0,
        PAGED_SOURCE,
        constraints=(BLOCK_SIZE,),
    ),
    Op(
        "rope_and_cache",
        "Rotate query and key, write key and value into their slots: one pass over qkv.",
        {
            "qkv": Tensor(("num_tokens", "(n_heads + 2 * n_kv_heads) * head_dim"), FLOATS),
            "cos": ROPE_TABLE,
            "sin": ROPE_TABLE,
            "positions": POSITIONS,
            **_caches(written=True),
            "slot_mapping": SLOTS,
        },
        {"query": Tensor(("num_tokens", "n_heads", "head_dim"), "=qkv", "rotated")},
        lambda a, s: (
            a["num_tokens"]
            * a["head_dim"]
            * (
                2 * (a["n_heads"] + a["n_kv_heads"]) * s["qkv"]
                + a["n_kv_heads"] * (s["key_cache"] + s["value_cache"])
                + s["cos"]
            )
        ),
        lambda a: 3 * a["num_tokens"] * (a["n_heads"] + a["n_kv_heads"]) * a["head_dim"],
        f"{ROPE_SOURCE}; {PAGED_SOURCE}",
        {"interleaved": INTERLEAVED},
        (EVEN, BLOCK_SIZE),
    ),
    Op(
        "flash_attention",
        "Attention over contiguous keys and values of several sequences, causal from the end.",
        {
            "query": Tensor(("num_tokens", "n_heads", "head_dim"), FLOATS),
            "key": Tensor(("num_keys", "n_kv_heads", "head_dim"), FLOATS),
            "value": Tensor(("num_keys", "n_kv_heads", "head_dim"), "=key"),
            "cu_seqlens_q": FIRST_QUERIES,
            "cu_seqlens_k": Tensor(("num_seqs + 1",), INT32, "first key of each sequence"),
        },
        {"out": Tensor(("num_tokens", "n_heads", "head_dim"), "=query"), "lse": _lse()},
        lambda a, s: (
            a["head_dim"]
            * (
                2 * a["num_keys"] * a["n_kv_heads"] * s["key"]
                + 2 * a["num_tokens"] * a["n_heads"] * s["query"]
            )
        ),
        lambda a: 4 * a["num_scores"] * a["n_heads"] * a["head_dim"],
        FLASH_SOURCE,
        {
            "causal": Attribute("bool", True, "query i sees keys up to length - queries + i"),
            "scale": SCALE,
        },
        (HEADS_DIVIDE,),
    ),
    Op(
        "paged_attention",
        "Causal attention of one or more queries per sequence over its blocks of keys and values.",
        {
            "query": Tensor(
                ("num_tokens", "n_heads", "head_dim"),
                FLOATS,
                "rounded to bfloat16 over a bfloat16 cache, to int16 over int8 and int4",
            ),
            **_caches(written=False),
            **_SEQUENCES,
        },
        {"out": Tensor(("num_tokens", "n_heads", "head_dim"), "=query"), "lse": _lse()},
        lambda a, s: (
            a["head_dim"]
            * (
                a["num_keys"] * a["n_kv_heads"] * (s["key_cache"] + s["value_cache"])
                + 2 * a["num_tokens"] * a["n_heads"] * s["query"]
            )
        ),
        lambda a: 4 * a["num_scores"] * a["n_heads"] * a["head_dim"],
        f"{PAGED_SOURCE}; {FLASH_SOURCE}",
        {"scale": SCALE},
        (HEADS_DIVIDE, BLOCK_SIZE),
    ),
    Op(
        "merge_attention",
        "Merge two attentions of the same queries over disjoint keys.",
        {
            "out_a": Tensor(("num_tokens", "n_heads", "head_dim"), FLOATS),
            "lse_a": _lse(),
            "out_b": Tensor(("num_tokens", "n_heads", "head_dim"), "=out_a"),
            "lse_b": _lse(),
        },
        {"out": Tensor(("num_tokens", "n_heads", "head_dim"), "=out_a"), "lse": _lse()},
        lambda a, s: 3 * a["num_tokens"] * a["n_heads"] * (a["head_dim"] * s["out_a"] + 4),
        lambda a: 3 * a["num_tokens"] * a["n_heads"] * a["head_dim"],
        "Cascade attention, FlashInfer, arXiv:2501.01005",
    ),
    Op(
        "silu_and_mul",
        "silu(gate) * up.",
        {"gate_up": Tensor(("num_tokens", "2 * hidden_dim"), FLOATS, "gate, then up")},
        {"out": Tensor(("num_tokens", "hidden_dim"), "=gate_up")},
        lambda a, s: 3 * a["num_tokens"] * a["hidden_dim"] * s["gate_up"],
        lambda a: 5 * a["num_tokens"] * a["hidden_dim"],
        "SwiGLU, arXiv:2002.05202",
    ),
    Op(
        "copy_blocks",
        "Copy blocks of both caches, pair after pair (copy-on-write).",
        {
            **_caches(written=True),
            "block_pairs": Tensor(("num_pairs", "2"), INT32, "source, destination"),
        },
        {},
        lambda a, s: (
            2
            * a["num_pairs"]
            * a["n_kv_heads"]
            * a["block_size"]
            * a["head_dim"]
            * (s["key_cache"] + s["value_cache"])
        ),
        lambda a: 0,
        PAGED_SOURCE,
    ),
    Op(
        "decoder_layer",
        "A whole layer as one op, for graphs: bit for bit the result of its single ops.",
        {
            "x": Tensor(("num_tokens", "dim"), FLOAT32, "the residual stream"),
            "attention_norm": Tensor(("dim",), FLOATS),
            "q_proj": Tensor(("n_heads * head_dim", "dim"), WEIGHTS),
            "k_proj": Tensor(("n_kv_heads * head_dim", "dim"), "=q_proj"),
            "v_proj": Tensor(("n_kv_heads * head_dim", "dim"), "=q_proj"),
            "o_proj": Tensor(("dim", "n_heads * head_dim"), WEIGHTS),
            "mlp_norm": Tensor(("dim",), FLOATS),
            "gate_proj": Tensor(("hidden_dim", "dim"), WEIGHTS),
            "up_proj": Tensor(("hidden_dim", "dim"), "=gate_proj"),
            "down_proj": Tensor(("dim", "hidden_dim"), WEIGHTS),
            "cos": ROPE_TABLE,
            "sin": ROPE_TABLE,
            "positions": POSITIONS,
            **_caches(written=True),
            "slot_mapping": SLOTS,
            **_SEQUENCES,
        },
        {"out": Tensor(("num_tokens", "dim"), FLOAT32)},
        lambda a, s: (
            _layer_weights(a) * s["q_proj"]
            + a["num_keys"] * a["n_kv_heads"] * a["head_dim"] * (s["key_cache"] + s["value_cache"])
        ),
        lambda a: (
            2 * a["num_tokens"] * _layer_weights(a)
            + 4 * a["num_scores"] * a["n_heads"] * a["head_dim"]
        ),
        "Llama, arXiv:2302.13971",
        {"eps": EPS, "interleaved": INTERLEAVED},
        (HEADS_DIVIDE, EVEN, BLOCK_SIZE),
    ),
]

OPS: dict[str, Op] = {op.name: op for op in _OPS}
