"""Every operator of the schema at Code Llama's shapes: sizes, dtypes, bytes, FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from codellama_rt.llm.variants import SHAPES
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.weights import layer_shapes
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.ops.quantized import (
    CACHE_DTYPES,
    GGUF_BLOCKS,
    TILED,
    WEIGHT_DTYPES,
    cache_row_bytes,
    weight_num_bytes,
)
from codellama_rt.ops.schema import ITEM_SIZE, OPS, Op, Tensor

BLOCK_SIZE = 64
DTYPES = (*FLOAT_DTYPES, *dict.fromkeys((*CACHE_DTYPES, *WEIGHT_DTYPES)))
CACHES = ("key_cache", "value_cache")
MATRICES = (
    "table",
    "weight",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
NORMS = ("attention_norm", "mlp_norm")
_PRODUCTS = ("linear", "flash_attention", "paged_attention", "decoder_layer")
_ROW_WISE = tuple(name for name in OPS if name not in (*_PRODUCTS, "copy_blocks"))


@dataclass(frozen=True)
class Case:
    """One operator with sizes for its axes.

    Attributes:
        op: an op of the schema.
        model: a name of `SHAPES`.
        label: the sizes as text.
        dtype: of weights and cache; activations are float32, as in the model.
        sizes: by axis name.
    """

    op: Op
    model: str
    label: str
    dtype: str
    sizes: dict[str, int] = field(hash=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Arguments and results by name."""
        return {**self.op.inputs, **self.op.outputs}

    def dtype_of(self, name: str) -> str:
        """Return the dtype of an argument or a result."""
        tensor = self.tensors[name]
        if tensor.dtypes in (("int32",), ("float32",)):
            return tensor.dtypes[0]
        if isinstance(tensor.dtypes, str):
            return self.dtype_of(tensor.dtypes[1:])
        if name in CACHES:
            return self.dtype if self.dtype in (*FLOAT_DTYPES, *CACHE_DTYPES) else "bfloat16"
        if name in MATRICES and len(tensor.axes) == 2:
            return self.dtype
        is_stored = name in (*NORMS, "weight") or (self.op.name, name) == ("flash_attention", "key")
        return self.dtype if is_stored and self.dtype in FLOAT_DTYPES else "float32"

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of an argument or a result."""
        return tuple(
            int(eval(axis, {"__builtins__": {}}, self.sizes)) for axis in self.tensors[name].axes
        )

    @property
    def num_bytes(self) -> int:
        """Bytes by the schema; a written byte counts like a read one."""
        return int(self.op.num_bytes(self.sizes, {n: self._item_size(n) for n in self.tensors}))

    @property
    def flops(self) -> int:
        """Multiplications and additions by the schema."""
        return self.op.flops(self.sizes)

    @property
    def product_dtype(self) -> str:
        """The dtype of the products, a key of `limits.USABLE`.

        Those of a quantised weight or cache are int8. Queries of quantised caches have more bits,
        which takes several instructions: attention can then reach a part of that limit only.
        """
        if self.op.name not in _PRODUCTS:
            return "float32"
        return self.dtype if self.dtype in FLOAT_DTYPES else "int8"

    def _item_size(self, name: str) -> float:
        """Return the bytes per element, scales included."""
        dtype = self.dtype_of(name)
        if dtype in ITEM_SIZE:
            return ITEM_SIZE[dtype]
        if name in CACHES:
            both = cache_row_bytes(dtype, self.sizes["head_dim"])  # of a key and of a value
            return sum(both) / 2 / self.sizes["head_dim"]
        rows, columns = self.shape_of(name)
        return weight_num_bytes(dtype, (rows, columns)) / (rows * columns)


@dataclass(frozen=True)
class Selection:
    """Which rows to measure.

    Attributes:
        ops: names in the schema; empty: all.
        models: names of `SHAPES`.
        dtypes: of weights and cache, of `DTYPES`.
        tokens: tokens per step: 1 is decoding, 512 a chunk of a prompt.
        keys: context lengths that attention reads.
    """

    ops: Sequence[str] = ()
    models: Sequence[str] = ("7b",)
    dtypes: Sequence[str] = ("bfloat16",)
    tokens: Sequence[int] = (1, 16, 512)
    keys: Sequence[int] = (2048, 16384, 100_000)

    def __post_init__(self) -> None:
        """Reject unknown names.

        Raises:
            ValueError: an unknown op, model or dtype, or a size that is not positive.
        """
        known = {"ops": OPS, "models": SHAPES, "dtypes": DTYPES}
        for what, names in known.items():
            for name in getattr(self, what):
                if name not in names:
                    raise ValueError(f"{what}: expected some of {', '.join(names)}, got {name!r}")
        if min((*self.tokens, *self.keys), default=1) < 1:
            raise ValueError(f"tokens and keys must be positive, got {self.tokens}, {self.keys}")

    def cases(self) -> Iterator[Case]:
        """Yield the cases, without the combinations that an op does not support."""
        for model in self.models:
            for dtype in self.dtypes:
                for case in _cases(model, dtype, self.tokens, self.keys):
                    if (not self.ops or case.op.name in self.ops) and _accepts(case):
                        yield case


def _accepts(case: Case) -> bool:
    """Return whether the dtype matters to this op, and its rows are whole blocks of it."""
    if case.dtype in FLOAT_DTYPES:
        return True
    stored = [name for name in case.op.inputs if case.dtype_of(name) == case.dtype]
    block, _ = GGUF_BLOCKS.get(case.dtype.removesuffix(TILED), (1, 0))
    return bool(stored) and not any(case.shape_of(name)[-1] % block for name in stored)


def _cases(model: str, dtype: str, tokens: Sequence[int], keys: Sequence[int]) -> Iterator[Case]:
    config = SHAPES[model]
    for num_tokens in tokens:
        for name, (n, k) in _linear_shapes(config).items():
            sizes = {"num_tokens": num_tokens, "out_features": n, "in_features": k}
            yield Case(OPS["linear"], model, f"{name} {num_tokens}x{k}x{n}", dtype, sizes)
        sizes = _sizes(config, num_tokens, num_tokens)
        for name in _ROW_WISE:
            yield Case(OPS[name], model, f"{num_tokens} tokens", dtype, sizes)
        for num_keys in (count for count in keys if count >= num_tokens):
            label = f"{num_tokens} of {num_keys} tokens"
            sizes = _sizes(config, num_tokens, num_keys)
            for name in ("paged_attention", "flash_attention", "decoder_layer"):
                yield Case(OPS[name], model, label, dtype, sizes)
    yield Case(OPS["copy_blocks"], model, "8 blocks", dtype, _sizes(config, 1, 32 * BLOCK_SIZE))


def _sizes(config: ModelConfig, num_tokens: int, num_keys: int) -> dict[str, int]:
    num_blocks = -(-num_keys // BLOCK_SIZE)
    return {
        "num_tokens": num_tokens,
        "num_keys": num_keys,
        "num_seqs": 1,
        "num_positions": num_keys,
        "num_scores": num_tokens * (num_keys - num_tokens) + num_tokens * (num_tokens + 1) // 2,
        "num_blocks": num_blocks,
        "max_blocks": num_blocks,
        "block_size": BLOCK_SIZE,
        "num_pairs": 8,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "dim": config.dim,
        "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
    }


def _linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of each matrix product of a step of the model."""
    layer = layer_shapes(config)
    fused = {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "o": ("o_proj",),
        "gate_up": ("gate_proj", "up_proj"),
        "down": ("down_proj",),
    }
    shapes = {
        name: (sum(layer[part][0] for part in parts), layer[parts[0]][1])
        for name, parts in fused.items()
    }
    return shapes | {"lm_head": (config.vocab_size, config.dim)}
