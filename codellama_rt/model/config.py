"""The shape of a Llama model, read from a Hugging Face config.json and checked in full."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from codellama_rt.errors import CheckpointError, warn_of_checkpoint
from codellama_rt.model.config_fields import ConfigFields
from codellama_rt.ops.dtypes import FLOAT_DTYPES

ARCHITECTURE = "LlamaForCausalLM"
MISTRAL = "MistralForCausalLM"  # the same without biases; its sliding window is not supported
_MODEL_TYPES = {ARCHITECTURE: "llama", MISTRAL: "mistral"}
ROPE_KINDS = ("linear", "dynamic", "yarn", "llama3", "longrope")

ATTENTION_BIASES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_BIASES = ("gate_proj", "up_proj", "down_proj")

# Larger than any Llama yet made and small enough that no product of two overflows 64 bits.
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_DIM = 2**18
MAX_HIDDEN_DIM = 2**20
MAX_VOCAB_SIZE = 2**22
MAX_POSITIONS = 2**30


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched; fields a kind does not use keep their defaults.

    `kind` is one of "linear", "dynamic", "yarn", "llama3", "longrope" (as transformers 4.57
    computes them) or "factors": a divisor for each frequency, as GGUF files of Llama 3 carry in
    `rope_freqs.weight`. "longrope" has divisors for sequences up to the original length,
    `frequency_factors`, and for longer ones, `long_factors`.

    Example:
        >>> RopeScaling("linear", 4.0).factor
        4.0
    """

    kind: str
    factor: float
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    frequency_factors: tuple[float, ...] | None = None  # (head_dim / 2)
    long_factors: tuple[float, ...] | None = None  # (head_dim / 2)

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on the length of its sequence, not its place alone."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model that is not a weight.

    Example:
        >>> ModelConfig.from_hf({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        ...     "num_attention_heads": 4, "intermediate_size": 176, "vocab_size": 512}).head_dim
        16
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int
    hidden_dim: int
    vocab_size: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_position_embeddings: int = 16384
    tie_word_embeddings: bool = False
    rope_scaling: RopeScaling | None = None
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: str = "float32"  # of the projections
    biased: tuple[str, ...] = ()  # projections that add a bias, fields of `LayerWeights`
    rope_interleaved: bool = False  # True: GGUF's row order, pairs (2i, 2i + 1) rotate together

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Build the configuration from a Hugging Face config.json of a Llama model.

        Args:
            values: the parsed file, with `rope_theta` and `rope_scaling` or `rope_parameters`.
            source: what an error message calls the file.

        Returns:
            The checked configuration; absent keys take the defaults of transformers' LlamaConfig.

        Raises:
            CheckpointError: another architecture, an unsupported feature, or a bad size.
        """
        fields = ConfigFields(values, source)
        _check_architecture(fields)
        n_heads = fields.integer("num_attention_heads", high=MAX_HEADS)
        dim = fields.integer("hidden_size", high=MAX_DIM)
        vocab_size = fields.integer("vocab_size", high=MAX_VOCAB_SIZE)
        bos = fields.token_ids("bos_token_id", (1,), vocab_size=vocab_size)
        head_dim = _head_dim(fields, dim, n_heads)
        rope_theta, rope_scaling = _read_rope(fields, head_dim)
        config = cls(
            n_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
            n_heads=n_heads,
            n_kv_heads=fields.integer("num_key_value_heads", n_heads, high=MAX_HEADS),
            head_dim=head_dim,
            dim=dim,
            hidden_dim=fields.integer("intermediate_size", high=MAX_HIDDEN_DIM),
            vocab_size=vocab_size,
            rope_theta=rope_theta,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=fields.integer(
                "max_position_embeddings", 2048, high=MAX_POSITIONS
            ),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            rope_scaling=rope_scaling,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=fields.token_ids("eos_token_id", (2,), vocab_size=vocab_size),
            dtype=_read_dtype(fields),
            biased=_read_biases(fields),
        )
        check_consistency(config, source)
        return config

    def with_rope(
        self, theta: float | None = None, scaling: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Return the configuration with another base or scaling of RoPE.

        Args:
            theta: the base; None keeps the checkpoint's.
            scaling: as `rope_scaling` in config.json; {"rope_type": "default"} is no scaling, None
                keeps the checkpoint's.

        Raises:
            CheckpointError: a value is missing or out of range.

        Example:
            >>> config = ModelConfig(n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, dim=4,
            ...                      hidden_dim=4, vocab_size=4)
            >>> config.with_rope(1e6, {"rope_type": "linear", "factor": 2.0}).rope_scaling.factor
            2.0
        """
        if scaling is not None and not isinstance(scaling, Mapping):
            raise TypeError(f"rope_scaling must be a dict, got {type(scaling).__name__}")
        fields = ConfigFields(scaling or {}, "rope_scaling")
        if theta is not None:
            base = ConfigFields({"rope_theta": theta}, "argument").number("rope_theta", above=1.0)
        else:
            base = fields.number("rope_theta", self.rope_theta, above=1.0)
        if scaling is None:
            return replace(self, rope_theta=base)
        original = fields.integer(
            "original_max_position_embeddings", self.max_position_embeddings, high=MAX_POSITIONS
        )
        known = _read_scaling(fields, original, self.head_dim)
        config = replace(self, rope_theta=base, rope_scaling=known)
        check_consistency(config, "rope_scaling")
        return config

    def rope_class(self, length: int) -> int:
        """Return what tells prompts of this length apart from others in how they are rotated.

        Args:
            length: tokens of the prompt.
        """
        scaling = self.rope_scaling
        if scaling is None or not scaling.depends_on_length:
            return 0
        if scaling.kind == "longrope":
            return int(length > scaling.original_max_position_embeddings)
        return max(0, length - self.max_position_embeddings)


def check_consistency(config: ModelConfig, source: str) -> None:
    """Check the sizes of a configuration against one another.

    Raises:
        CheckpointError: the sizes contradict one another.
    """
    if config.n_heads % config.n_kv_heads:
        raise CheckpointError(
            f"{source}: expected the number of attention heads to be a multiple of the number of "
            f"key-value heads, found {config.n_heads} and {config.n_kv_heads}"
        )
    if config.head_dim % 2:
        raise CheckpointError(
            f"{source}: expected an even head_dim (rotary embedding turns pairs), found "
            f"{config.head_dim}"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and config.head_dim < 4:
        raise CheckpointError(
            f"{source}: expected head_dim of at least 4 for dynamic rope scaling, found "
            f"{config.head_dim}"
        )


def _head_dim(fields: ConfigFields, dim: int, n_heads: int) -> int:
    given = fields.integer("head_dim", None, high=MAX_HEAD_DIM)
    if given is not None:
        return given
    if dim % n_heads:
        raise fields.fault(
            "hidden_size", f"a multiple of num_attention_heads ({n_heads})", "or give head_dim"
        )
    if dim // n_heads > MAX_HEAD_DIM:
        raise fields.fault("hidden_size", f"at most {MAX_HEAD_DIM} for each of {n_heads} heads")
    return dim // n_heads


def _check_architecture(fields: ConfigFields) -> None:
    architectures, model_type = fields.values.get("architectures"), fields.values.get("model_type")
    if not architectures and model_type is None:
        raise fields.fault("architectures", f"[{ARCHITECTURE!r}]")
    supported = f"only {' and '.join(_MODEL_TYPES)} are supported"
    if architectures and not _is_known(fields, architectures):
        raise fields.fault("architectures", f"[{ARCHITECTURE!r}]", supported)
    types = [_MODEL_TYPES[MISTRAL if architectures == [MISTRAL] else ARCHITECTURE]]
    if not architectures:
        types = [*_MODEL_TYPES.values()]
    if model_type not in (None, *types):
        raise fields.fault("model_type", " or ".join(map(repr, types)), supported)
    if "mistral" in (model_type, types[0]):
        _check_mistral(fields)
    _check_features(fields)


def _is_known(fields: ConfigFields, architectures: Any) -> bool:
    """Return whether it is a list of one supported name, or warn of an old one."""
    if architectures in ([name] for name in _MODEL_TYPES):
        return True
    name = architectures[0] if isinstance(architectures, list) else None
    # the first conversions said LLaMAForCausalLM
    is_old = isinstance(name, str) and name.lower() == ARCHITECTURE.lower()
    if is_old and len(architectures) == 1:
        warn_of_checkpoint(
            f"{fields.source}: architectures: {name} is an old name of {ARCHITECTURE}"
        )
        return True
    return False


def _check_mistral(fields: ConfigFields) -> None:
    """Reject a sliding window, and defaults of Mistral's that are not Llama's."""
    if fields.values.get("sliding_window", 4096) is not None:  # the default of MistralConfig
        raise fields.fault("sliding_window", "null", "attention in a window is not supported")
    for key in ("num_key_value_heads", "max_position_embeddings"):
        if fields.values.get(key) is None:
            raise fields.fault(key, "an integer")


def _check_features(fields: ConfigFields) -> None:
    """Reject what would change the result and is not implemented; Code Llama uses none of it."""
    if fields.values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.fault("hidden_act", "'silu'")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.fault(
            "partial_rotary_factor", "1.0", "partial rotary embedding is not supported"
        )
    if fields.values.get("quantization_config") is not None:
        raise fields.fault(
            "quantization_config",
            "nothing, or quant_method awq or gptq",
            "give the unquantised weights or a GGUF file",
        )


def _read_biases(fields: ConfigFields) -> tuple[str, ...]:
    attention = ATTENTION_BIASES if fields.flag("attention_bias", False) else ()
    return attention + (MLP_BIASES if fields.flag("mlp_bias", False) else ())


def _read_dtype(fields: ConfigFields) -> str:
    key = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    value = fields.values.get(key)
    if value is None:
        return "float32"
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name == "float64":  # computed with as float32, see `DoubleTensor`
        return "float32"
    if name not in FLOAT_DTYPES:
        raise fields.fault(key, f"one of {', '.join(FLOAT_DTYPES)}")
    return name


def _read_rope(fields: ConfigFields, head_dim: int) -> tuple[float, RopeScaling | None]:
    """Read base and scaling from `rope_parameters` (transformers 5) or the two older keys."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(fields.values.get(key, None), (dict, type(None))):
            raise fields.fault(key, "an object or null")
    old, new = fields.values.get("rope_scaling"), fields.values.get("rope_parameters")
    if old is not None and new is not None and old != new:
        raise fields.fault("rope_scaling", f"nothing beside rope_parameters or the same ({new!r})")
    key = "rope_parameters" if new is not None else "rope_scaling"
    nested = ConfigFields(fields.values.get(key) or {}, f"{fields.source}: {key}")
    # exp(log(theta)) is divided by in yarn, so a base of exactly 1 would have no meaning
    theta = fields.number("rope_theta", None, above=1.0)
    nested_theta = nested.number("rope_theta", None, above=1.0)
    if theta is not None and nested_theta not in (None, theta):
        raise nested.fault("rope_theta", f"the same as rope_theta beside it ({theta:g})")
    if nested.number("partial_rotary_factor", 1.0) != 1.0:
        raise nested.fault(
            "partial_rotary_factor", "1.0", "partial rotary embedding is not supported"
        )
    positions = fields.integer("max_position_embeddings", 2048, high=MAX_POSITIONS)
    original = fields.integer("original_max_position_embeddings", None, high=MAX_POSITIONS)
    scaling = _read_scaling(nested, positions, head_dim, original)
    return nested_theta or theta or 10000.0, scaling


def _read_scaling(
    fields: ConfigFields, max_position_embeddings: int, head_dim: int, original: int | None = None
) -> RopeScaling | None:
    """Read a scaling; `original` is what config.json says beside it, which only longrope uses."""
    values = fields.values
    if not values:
        return None
    # "type" is the older name and wins, as in 4.57; "su" is what Phi-3 called longrope at first
    kind = values.get("type") or values.get("rope_type")
    kind = "longrope" if kind == "su" else kind
    if kind == "default" or (kind is None and set(values) <= {"rope_theta"}):
        return None
    if kind not in ROPE_KINDS:
        raise fields.fault(
            "type" if values.get("type") else "rope_type",
            f"one of default, {', '.join(ROPE_KINDS)}",
        )
    if kind == "longrope":
        return _read_longrope(fields, max_position_embeddings, head_dim, original)
    factor = fields.number("factor")
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, factor)
    original = fields.integer("original_max_position_embeddings", None, high=MAX_POSITIONS)
    if kind == "llama3":
        return _read_llama3(fields, factor, original)
    return RopeScaling(
        kind,
        factor,
        original or max_position_embeddings,
        beta_fast=_unless_zero(fields, "beta_fast", 32.0),
        beta_slow=_unless_zero(fields, "beta_slow", 1.0),
        attention_factor=fields.number("attention_factor", None),
        mscale=_unless_zero(fields, "mscale", None),
        mscale_all_dim=_unless_zero(fields, "mscale_all_dim", None),
        truncate=fields.flag("truncate", True),
    )


def _unless_zero(fields: ConfigFields, key: str, default: float | None) -> Any:
    """Read a number of which 0 means absent, as transformers' `get(key) or default` has it."""
    return default if fields.values.get(key) == 0 else fields.number(key, default)


def _read_llama3(fields: ConfigFields, factor: float, original: int | None) -> RopeScaling:
    if original is None:
        raise fields.fault("original_max_position_embeddings", "an integer")
    low = fields.number("low_freq_factor")
    high = fields.number("high_freq_factor")
    if high <= low:
        raise fields.fault("high_freq_factor", f"a number above low_freq_factor ({low:g})")
    return RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)


def _read_longrope(
    fields: ConfigFields, positions: int, head_dim: int, original: int | None
) -> RopeScaling:
    """Read LongRoPE (arXiv:2402.13753): the ratio of the lengths goes before a given factor."""
    if original is None:
        original, factor = positions, fields.number("factor", None)
    else:
        factor = positions / original
    attention_factor = fields.number("attention_factor", None)
    if attention_factor is None:
        if factor is None:
            raise fields.fault("factor", "a number, or attention_factor beside it")
        attention_factor = longrope_attention_factor(factor, original)
    return RopeScaling(
        "longrope",
        factor or 1.0,
        original,
        attention_factor=attention_factor,
        frequency_factors=fields.numbers("short_factor", head_dim // 2),
        long_factors=fields.numbers("long_factor", head_dim // 2),
    )


def longrope_attention_factor(factor: float, original: int) -> float:
    """Return the factor of cos and sin that the paper suggests.

    Args:
        factor: of the stretched to the original length.
        original: the original length.
    """
    if factor <= 1.0 or original <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))
