"""Conversion between MindSpore tensors and NumPy arrays, with checks."""

from __future__ import annotations

from typing import Any

import numpy as np

_IGNORED_LABEL = -100


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype: "bfloat16" for `mindspore.bfloat16` or `torch.bfloat16`."""
    return str(dtype).lower().removeprefix("torch.")


def to_array(tensor: Any) -> np.ndarray:
    """Convert a MindSpore Tensor, or anything NumPy understands, to an array."""
    return tensor.asnumpy() if hasattr(tensor, "asnumpy") else np.asarray(tensor)


def to_tensor(array: np.ndarray) -> Any:
    """Convert an array to a MindSpore Tensor."""
    import mindspore

    return mindspore.Tensor(array)


def as_rows(input_ids: Any) -> np.ndarray:
    """Return token ids as (batch, length).

    Raises:
        TypeError: they are not integers.
        ValueError: another number of axes, or an empty batch.
    """
    rows = to_array(input_ids)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"input_ids must be a Tensor of int32 or int64, got {rows.dtype}")
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"input_ids must be (batch, length), got {rows.shape}")
    return rows


def as_mask(attention_mask: Any, rows: np.ndarray) -> np.ndarray:
    """Return which tokens count, (batch, length) bool: one run of at least one per row.

    Raises:
        ValueError: another shape, or a gap inside a row.
    """
    if attention_mask is None:
        return np.ones(rows.shape, bool)
    mask = to_array(attention_mask) != 0
    if mask.shape != rows.shape:
        raise ValueError(f"attention_mask must be {rows.shape} like input_ids, got {mask.shape}")
    begins = np.diff(mask.astype(np.int8), axis=1, prepend=0) == 1
    if (begins.sum(axis=1) != 1).any():
        raise ValueError("attention_mask must be 1 for one run of tokens in each row")
    return mask


def label_loss(logits: np.ndarray, labels: Any) -> np.ndarray:
    """Compute the mean negative log-probability of the labels, each from the logits before it.

    Args:
        logits: (batch, length, vocab_size) float32.
        labels: (batch, length) integers; -100 is ignored.

    Returns:
        A float32 number; NaN if no label counts, as in Transformers.

    Raises:
        TypeError, ValueError: labels of a wrong type or shape, or outside the vocabulary.
    """
    labels = to_array(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be a Tensor of int32 or int64, got {labels.dtype}")
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels must be {logits.shape[:2]} like input_ids, got {labels.shape}")
    counted = labels[:, 1:] != _IGNORED_LABEL
    expected = labels[:, 1:][counted]
    if expected.size and not 0 <= expected.min() <= expected.max() < logits.shape[2]:
        raise ValueError(f"labels must be -100 or token ids below {logits.shape[2]}")
    if not expected.size:
        return np.float32("nan")
    total = 0.0
    for row, label in zip(logits[:, :-1][counted], expected, strict=True):
        scores = row.astype(np.float64)
        highest = scores.max()
        total += highest + np.log(np.exp(scores - highest).sum()) - scores[label]
    return np.float32(total / expected.size)
