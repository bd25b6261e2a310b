"""Exceptions and warnings of the package that are more specific than Python's own."""

import warnings


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message has file, tensor, expected and found."""


class CheckpointChangedError(CheckpointError, RuntimeError):
    """A file whose weights are in use has been written or cut; no request is at fault."""


class CheckpointWarning(UserWarning):
    """A checkpoint is used although something in it is wrong; the message has file and remedy."""


def warn_of_checkpoint(message: str) -> None:
    """Issue a `CheckpointWarning`."""
    warnings.warn(message, CheckpointWarning, stacklevel=3)
