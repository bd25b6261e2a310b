"""The tensors of a model: their names in each format, and the order of the rows of q and k.

Elsewhere a tensor goes by its name in Hugging Face's layout.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from codellama_rt.model.config import ModelConfig
from codellama_rt.model.weights import LayerWeights, LlamaWeights, Weight, layer_shapes

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class _Kind:
    """A tensor of the model, or of each layer; names are without the layer and ".weight".

    Attributes:
        field: of `LlamaWeights` or `LayerWeights`.
        hf: Hugging Face's name.
        gguf: llama.cpp's name.
        meta: Meta's name.
        cut: the axis along which Meta's shards cut it; None: each has the whole.
    """

    field: str
    hf: str
    gguf: str
    meta: str
    cut: int | None = None


_TOP = (
    _Kind("embedding", "model.embed_tokens", "token_embd", "tok_embeddings", COLUMNS),
    _Kind("norm", "model.norm", "output_norm", "norm"),
    _Kind("lm_head", "lm_head", "output", "output", ROWS),
)
_LAYER = (
    _Kind("attention_norm", "input_layernorm", "attn_norm", "attention_norm"),
    _Kind("q_proj", "self_attn.q_proj", "attn_q", "attention.wq", ROWS),
    _Kind("k_proj", "self_attn.k_proj", "attn_k", "attention.wk", ROWS),
    _Kind("v_proj", "self_attn.v_proj", "attn_v", "attention.wv", ROWS),
    _Kind("o_proj", "self_attn.o_proj", "attn_output", "attention.wo", COLUMNS),
    _Kind("mlp_norm", "post_attention_layernorm", "ffn_norm", "ffn_norm"),
    _Kind("gate_proj", "mlp.gate_proj", "ffn_gate", "feed_forward.w1", ROWS),
    _Kind("up_proj", "mlp.up_proj", "ffn_up", "feed_forward.w3", ROWS),
    _Kind("down_proj", "mlp.down_proj", "ffn_down", "feed_forward.w2", COLUMNS),
)
_PROJECTIONS = tuple(kind.field for kind in _LAYER if kind.cut is not None)
EMBEDDING, NORM, HEAD = (f"{kind.hf}.weight" for kind in _TOP)
_BY_HF = {kind.hf: kind for kind in (*_TOP, *_LAYER)}
_BY_META = {kind.meta: kind for kind in _LAYER}
_TOP_BY_META = {f"{kind.meta}.weight": f"{kind.hf}.weight" for kind in _TOP}


_RECOMPUTED = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "attn_rot_embd.weight",
    "rope.freqs",
)


def is_recomputed(name: str) -> bool:
    """Return whether a tensor follows from the configuration: old files carry rotary tables.

    Example:
        >>> is_recomputed("model.layers.0.self_attn.rotary_emb.inv_freq")
        True
    """
    return name.endswith(_RECOMPUTED)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List the tensors of a model by Hugging Face's names; weights of projections are (out, in).

    Args:
        config: the model.

    Returns:
        Name to shape, embedding first, in the order a token passes through the model.

    Example:
        >>> config = ModelConfig(n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, dim=64,
        ...                      hidden_dim=176, vocab_size=512)
        >>> expected_shapes(config)["model.layers.0.self_attn.k_proj.weight"]
        (32, 64)
    """
    layer, shapes = layer_shapes(config), {EMBEDDING: (config.vocab_size, config.dim)}
    for i in range(config.n_layers):
        shapes |= {name: layer[field] for field, name in _layer_names(i)}
        shapes |= {name: layer[field][:1] for field, name in _bias_names(i, config.biased)}
    shapes[NORM] = (config.dim,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.dim)
    return shapes


def assemble(arrays: Mapping[str, Weight], n_layers: int) -> LlamaWeights:
    """Return the weights of a model from its tensors by name; without a head it is tied."""
    layers = [
        LayerWeights(**{field: arrays[name] for field, name in _layer_names(i)})
        for i in range(n_layers)
    ]
    biases = [
        {field: arrays[name] for field, name in _bias_names(i, _PROJECTIONS) if name in arrays}
        for i in range(n_layers)
    ]
    embedding = arrays[EMBEDDING]
    return LlamaWeights(
        embedding,
        layers,
        arrays[NORM],
        arrays.get(HEAD, embedding),
        tuple(biases) if any(biases) else (),
    )


def named_weights(config: ModelConfig, weights: LlamaWeights) -> dict[str, Weight]:
    """Return the tensors by name that the weights of a model are made of."""
    named = {EMBEDDING: weights.embedding}
    for i, layer in enumerate(weights.layers):
        named |= {name: getattr(layer, field) for field, name in _layer_names(i)}
        named |= {name: weights.biases[i][field] for field, name in _bias_names(i, config.biased)}
    named[NORM] = weights.norm
    return named if config.tie_word_embeddings else named | {HEAD: weights.lm_head}


def _layer_names(layer: int) -> Iterator[tuple[str, str]]:
    """Yield the fields of `LayerWeights`, each with the tensor's name."""
    for kind in _LAYER:
        yield kind.field, f"model.layers.{layer}.{kind.hf}.weight"


def _bias_names(layer: int, fields: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield those of the fields that are projections, each with the name of its bias."""
    for kind in _LAYER:
        if kind.field in fields:
            yield kind.field, f"model.layers.{layer}.{kind.hf}.bias"


def gguf_name(name: str) -> str:
    """Return GGUF's name for a tensor.

    Example:
        >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
        'blk.3.attn_q.weight'
    """
    kind, layer = _find(name)
    return f"{'' if layer is None else f'blk.{layer}.'}{kind.gguf}.{name.rpartition('.')[2]}"


def names_in_gguf(n_layers: int) -> dict[str, str]:
    """Return the names of all tensors by those in GGUF."""
    names = [name for i in range(n_layers) for _, name in _layer_names(i)]
    names += [name for i in range(n_layers) for _, name in _bias_names(i, _PROJECTIONS)]
    return {gguf_name(name): name for name in (*names, EMBEDDING, NORM, HEAD)}


def meta_name(name: str) -> tuple[str, int | None]:
    """Return Meta's name for a tensor, and the axis along which its shards are cut.

    Example:
        >>> meta_name("model.layers.3.mlp.down_proj.weight")
        ('layers.3.feed_forward.w2.weight', 1)
    """
    kind, layer = _find(name)
    return f"{'' if layer is None else f'layers.{layer}.'}{kind.meta}.weight", kind.cut


def name_from_meta(name: str) -> str:
    """Return the name of a tensor by Meta's; a name that is not one of Meta's is returned as is.

    Example:
        >>> name_from_meta("layers.3.feed_forward.w2.weight")
        'model.layers.3.mlp.down_proj.weight'
    """
    match = re.fullmatch(r"layers\.(\d{1,4})\.([\w.]+)\.weight", name)
    if match and match[2] in _BY_META:
        return f"model.layers.{match[1]}.{_BY_META[match[2]].hf}.weight"
    return _TOP_BY_META.get(name, name)


def _find(name: str) -> tuple[_Kind, str | None]:
    stem = name.rpartition(".")[0]
    if stem in _BY_HF:
        return _BY_HF[stem], None
    _, _, layer, part = stem.split(".", 3)
    return _BY_HF[part], layer


def halves_first(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows whose pairs (2i, 2i + 1) rotate together, so that (i, i + head_dim / 2) do."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def pairs_first(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Invert `halves_first`.

    Example:
        >>> pairs_first(halves_first(np.arange(8), 4), 4)
        array([0, 1, 2, 3, 4, 5, 6, 7])
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def rotates(name: str) -> bool:
    """Return whether a tensor's rows are in one of these orders, by its Hugging Face name.

    Example:
        >>> rotates("model.layers.0.self_attn.v_proj.weight")
        False
    """
    return name.rpartition(".")[0].endswith(("q_proj", "k_proj"))
