"""The two orders of the rows of q and k: which elements of a head rotate together."""

import numpy as np


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
    return name.endswith(("q_proj.weight", "k_proj.weight"))
