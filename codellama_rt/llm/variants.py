"""The twelve Code Llama models: their shapes, and what each was trained to do.

Sources: the README and model cards of facebookresearch/codellama, arXiv:2308.12950v3, and Meta's
answer in meta-llama/codellama issue 188 on the rotation's base and the context of 70B.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass, replace

from codellama_rt.model.config import ModelConfig

BASE, PYTHON, INSTRUCT = "base", "Python", "Instruct"
LONGEST_READ = 100_000  # tokens; the paper's figure of perplexity goes that far
_WITH_INFILLING, _WITHOUT = 32_016, 32_000  # pieces of the two vocabularies

_SIZES = {  # billions of weights: dim, layers, heads, key-value heads, hidden_dim
    7: (4096, 32, 32, 32, 11008),
    13: (5120, 40, 40, 40, 13824),
    34: (8192, 48, 64, 8, 22016),
    70: (8192, 80, 64, 8, 28672),
}


@dataclass(frozen=True)
class Variant:
    """One published model.

    Attributes:
        name: as in "CodeLlama-7b-Instruct".
        kind: "base", "Python" or "Instruct".
        config: its shape; max_position_embeddings is the length it was trained at.
        can_infill: it was trained to fill gaps.
        longest: tokens of context that it makes sense of.
    """

    name: str
    kind: str
    config: ModelConfig
    can_infill: bool
    longest: int

    @property
    def can_chat(self) -> bool:
        """Whether it was trained to answer."""
        return self.kind == INSTRUCT

    def warn_of_differences(self, config: ModelConfig) -> None:
        """Warns where a checkpoint of this name says otherwise, in what people get wrong."""
        names = ("vocab_size", "rope_theta", "n_layers", "n_kv_heads")
        said = [
            f"{name} {getattr(config, name):g} where it has {getattr(self.config, name):g}"
            for name in names
            if getattr(config, name) != getattr(self.config, name)
        ]
        if said:
            warnings.warn(
                f"the checkpoint is named like {self.name} and says {', '.join(said)}", stacklevel=3
            )


def _variant(size: int, kind: str) -> Variant:
    dim, n_layers, n_heads, n_kv_heads, hidden_dim = _SIZES[size]
    can_infill = size != 34 and kind != PYTHON
    # 70B Instruct and Python were never trained at 16,384 tokens, and keep the base of Llama 2.
    is_short = size == 70 and kind != BASE
    config = ModelConfig(
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=128,
        dim=dim,
        hidden_dim=hidden_dim,
        vocab_size=_WITH_INFILLING if can_infill else _WITHOUT,
        rope_theta=1e4 if is_short else 1e6,
        dtype="bfloat16",
        max_position_embeddings=4096 if is_short else 16384,
    )
    if size == 70:  # its Python model has the large vocabulary, too, but no infilling
        config = replace(config, vocab_size=_WITH_INFILLING)
    name = f"CodeLlama-{size}b" + (f"-{kind}" if kind != BASE else "")
    return Variant(name, kind, config, can_infill, 4096 if is_short else LONGEST_READ)


VARIANTS = {
    variant.name: variant
    for variant in (_variant(size, kind) for size in _SIZES for kind in (BASE, PYTHON, INSTRUCT))
}
SHAPES = {  # by size alone, with room for contexts beyond the 16,384 tokens of Meta's files
    f"{size}b": replace(VARIANTS[f"CodeLlama-{size}b"].config, max_position_embeddings=131072)
    for size in _SIZES
}
SHAPES["tiny"] = ModelConfig(
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    head_dim=32,
    dim=256,
    hidden_dim=688,
    vocab_size=512,
    rope_theta=1e6,
    dtype="bfloat16",
    max_position_embeddings=131072,
)
_COMPONENT = re.compile(
    r"(?:.*--)?code-?llama-(?P<size>\d+)b(?:-(?P<kind>python|instruct))?(?:-hf)?"
    r"(?:-gguf)?(?:[.:-](?:q\d\w*|f16|bf16|int8|int4))?(?:-\d{5}-of-\d{5})?(?:\.gguf)?",
    re.IGNORECASE,
)


def find_variant(model: str | os.PathLike[str]) -> Variant | None:
    """Return the variant that a path, file or hub id names; None for others, even fine-tuned ones.

    Example:
        >>> find_variant("models/codellama-70b-instruct.Q4_K_M.gguf").longest
        4096
    """
    for component in reversed(re.split(r"[/\\]", os.fspath(model))):
        match = _COMPONENT.fullmatch(component)
        if match:
            kind = (match["kind"] or "").capitalize()
            return VARIANTS.get(f"CodeLlama-{match['size']}b" + (f"-{kind}" if kind else ""))
    return None


def require_infilling(variant: Variant | None) -> None:
    """Raise ValueError if a known model was not trained to fill gaps."""
    if variant is not None and not variant.can_infill:
        able = ", ".join(v.name for v in VARIANTS.values() if v.can_infill)
        raise ValueError(f"{variant.name} cannot infill, it was not trained to; {able} can")


def require_chat(variant: Variant | None) -> None:
    """Raise ValueError if a known model was not trained to answer."""
    if variant is not None and not variant.can_chat:
        raise ValueError(
            f"{variant.name} cannot chat: it continues text; take an Instruct model, or give a "
            "chat_template if this one was fine-tuned"
        )


def require_length(variant: Variant | None, max_model_len: int | None) -> None:
    """Raise ValueError for a context beyond what a known model was trained for."""
    if variant is not None and max_model_len is not None and max_model_len > variant.longest:
        raise ValueError(
            f"{variant.name} makes sense of {variant.longest} tokens at most, got "
            f"max_model_len={max_model_len}"
        )
