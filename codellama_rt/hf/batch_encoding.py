"""Rows of token ids as Transformers' tokenizers return them: truncated, padded, as arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class BatchEncoding(dict):
    """A dictionary whose entries are also attributes.

    Example:
        >>> BatchEncoding(input_ids=[1, 822]).input_ids
        [1, 822]
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this encoding has {', '.join(self)}, not {name!r}") from None

    @property
    def data(self) -> dict[str, Any]:
        """The entries as a plain dictionary."""
        return dict(self)

    def to(self, device: str) -> "BatchEncoding":
        """Return the encoding itself: the model takes tensors from where they are.

        Raises:
            TypeError: not the name of a device.
        """
        if not isinstance(device, str):
            raise TypeError(f"a device must be a str, got {type(device).__name__}")
        return self


def row_limit(
    truncation: bool | str | None, max_length: int | None, padding: bool | str
) -> int | None:
    """Return the maximum tokens per row, None for no limit; max_length alone truncates too."""
    if truncation is None:
        truncation = not padding
    return max_length if is_chosen("truncation", truncation, "longest_first") else None


def truncate(texts: Sequence[list[int]], excess: int, side: str) -> list[list[int]]:
    """Remove `excess` ids ("longest_first"): from the longer text, then from each in turn.

    Args:
        texts: the ids of one text or two.
        excess: how many to remove; nothing is done unless it is positive.
        side: "right" cuts at the end, "left" at the start.
    """
    kept = [len(ids) for ids in texts]
    for _ in range(min(excess, sum(kept))):
        longest = max(kept)
        kept[len(kept) - 1 - kept[::-1].index(longest)] -= 1  # ties: the last one
    if check_side(side) == "right":
        return [ids[:count] for ids, count in zip(texts, kept, strict=True)]
    return [ids[len(ids) - count :] for ids, count in zip(texts, kept, strict=True)]


def padded_length(
    rows: Sequence[list[int]], padding: bool | str, max_length: int | None, multiple: int | None
) -> int:
    """Return the length to pad rows to, 0 if they are not to be padded."""
    if not is_chosen("padding", padding, "longest", "max_length"):
        return 0
    if padding == "max_length" and max_length is None:
        raise ValueError("padding='max_length' needs max_length")
    length = max_length if padding == "max_length" else max(map(len, rows), default=0)
    return -(-length // multiple) * multiple if multiple else length


def pad(
    rows: Sequence[list[int]], length: int, pad_id: int | None, side: str
) -> tuple[list[list[int]], list[list[int]]]:
    """Pad rows to `length` with `pad_id`, on the "left" or "right".

    Returns:
        The rows, and their attention masks: 1 for a token, 0 for padding.
    """
    left = check_side(side) == "left"
    if length and pad_id is None:
        raise ValueError("padding needs a pad token; set pad_token, for example to eos_token")
    gaps = [max(length - len(row), 0) for row in rows]
    filled, masks = [], []
    for row, gap in zip(rows, gaps, strict=True):
        filled.append([pad_id] * gap + row if left else row + [pad_id] * gap)
        masks.append([0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap)
    return filled, masks


def as_tensor(rows: list[list[int]], kind: str | None, single: bool) -> Any:
    """Convert rows to the type that the caller asked for.

    Args:
        rows: ids or masks.
        kind: None for lists, "np" for a NumPy array, "ms" for a MindSpore tensor.
        single: there is one row, and as a list it is returned without the batch axis.

    Returns:
        Lists; or (rows, length) arrays: int64 for NumPy, int32 for MindSpore as its models expect.

    Raises:
        ValueError: an unknown kind, or an array of rows with different lengths.
    """
    if kind not in (None, "np", "ms"):
        raise ValueError(f"return_tensors must be None, 'np' or 'ms', got {kind!r}")
    if kind is None:
        return rows[0] if single else rows
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"rows have lengths {lengths}; padding=True makes them one array")
    array = np.array(rows, np.int64).reshape(len(rows), -1)
    if kind == "np":
        return array
    import mindspore as ms

    return ms.Tensor(array.astype(np.int32))


def is_chosen(option: str, value: bool | str | None, *names: str) -> bool:
    """Return whether an option is on, by True or a name; ValueError if it is unknown."""
    if value not in (None, False, True, *names):
        raise ValueError(f"{option} must be True, False or in {names}, got {value!r}")
    return bool(value)


def check_side(side: str) -> str:
    """Return the side if it is valid."""
    if side not in ("left", "right"):
        raise ValueError(f"a side is 'left' or 'right', got {side!r}")
    return side
