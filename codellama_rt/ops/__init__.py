"""The operators, called directly, on tensors of NumPy, MindSpore, or any framework with DLPack.

Shapes, dtypes and costs of each op: `ops.schema`; NumPy definitions: `ops.reference`; MindSpore
primitives of the same kernels: `ops.graph`. Every op checks all its arguments before it writes
anything and raises ValueError for shapes and values, TypeError for dtypes. `out=` takes
preallocated results; without it they are MindSpore Tensors if the first argument is one, else
NumPy arrays. Calls run synchronously in the caller's thread and release the GIL.
"""

from __future__ import annotations

import importlib
from typing import Any

from codellama_rt.ops.attention import (
    apply_rotary_pos_emb,
    copy_blocks,
    flash_attention,
    merge_attention,
    paged_attention,
    reshape_and_cache,
    rope_and_cache,
)
from codellama_rt.ops.dense import *  # noqa: F403 (its __all__: a new op there is one here)
from codellama_rt.ops.dense import __all__ as _dense
from codellama_rt.ops.native import (
    available,
    available_isas,
    isa,
    num_threads,
    set_isa,
    set_num_threads,
)
from codellama_rt.ops.quantized import Quantized, empty_caches
from codellama_rt.ops.results import as_dlpack
from codellama_rt.ops.sampling import (
    Sampled,
    TokenLists,
    TokenLogprobs,
    sample,
    token_logprobs,
)

__all__ = [
    *_dense,
    "Quantized",
    "Sampled",
    "TokenLists",
    "TokenLogprobs",
    "apply_rotary_pos_emb",
    "as_dlpack",
    "available",
    "available_isas",
    "copy_blocks",
    "empty_caches",
    "flash_attention",
    "isa",
    "merge_attention",
    "num_threads",
    "paged_attention",
    "reshape_and_cache",
    "rope_and_cache",
    "sample",
    "set_isa",
    "set_num_threads",
    "token_logprobs",
]

_FACES = {
    "graph": "codellama_rt.ops.graph",
    "ascend": "codellama_rt.model.ascend.ops",
    "ascend_graph": "codellama_rt.model.ascend.graph",
}


def __getattr__(name: str) -> Any:
    """Import the faces that need MindSpore when they are first used."""
    if name not in _FACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(_FACES[name])
