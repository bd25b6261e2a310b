"""Exceptions and warnings more specific than Python's own, and what is said of devices."""

import warnings


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message has file, tensor, expected and found."""


class CheckpointChangedError(CheckpointError, RuntimeError):
    """A file whose weights are in use has been written or cut; no request is at fault."""


class CorruptLogitsError(RuntimeError):
    """A model's logits are NaN or infinite, so that no token can be chosen."""


class QueueFullError(RuntimeError):
    """More prompt tokens wait than `max_queued_tokens`; the request can be made again later.

    Attributes:
        pending_tokens: prompt tokens that wait to be computed.
        retry_after_s: seconds that these will take, as far as known, or None.
    """

    def __init__(self, pending_tokens: int, limit: int, retry_after_s: float | None) -> None:
        """Say how full the queue is."""
        super().__init__(
            f"{pending_tokens} prompt tokens wait already and max_queued_tokens={limit}; "
            "try again later"
        )
        self.pending_tokens = pending_tokens
        self.retry_after_s = retry_after_s


class CheckpointWarning(UserWarning):
    """A checkpoint is used although something in it is wrong; the message has file and remedy."""


def warn_of_checkpoint(message: str) -> None:
    """Issue a `CheckpointWarning`."""
    warnings.warn(message, CheckpointWarning, stacklevel=3)


def unavailable(missing: str, remedy: str = "") -> str:
    """Return the one sentence that is said of a device that cannot be used.

    Args:
        missing: what this build or machine has, and what it lacks.
        remedy: in the imperative; empty if `missing` says it.

    Example:
        >>> unavailable("no NPU found", "install its driver")
        'no NPU found; install its driver; available: cpu'
    """
    return "; ".join(part for part in (missing, remedy, "available: cpu") if part)
