"""The two orders of the rows of q and k: which elements of a head rotate together."""

import numpy as np


def halves_first(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows whose pairs (2i, 2i + 1) rotate together, so ordered that (i, i + head_dim / 2) do."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def pairs_first(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `halves_first`.

    Example:
        >>> pairs_first(halves_first(np.arange(8), 4), 4)
        array([0, 1, 2, 3, 4, 5, 6, 7])
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def rotates(name: str) -> bool:
    """Whether the order of a tensor's rows is one of these, by its name in Hugging Face's layout.

    Example:
        >>> rotates("model.layers.0.self_attn.v_proj.weight")
        False
    """
    return name.endswith(("q_proj.weight", "k_proj.weight"))
