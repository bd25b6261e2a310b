"""Exceptions of the package that are more specific than Python's own."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message has file, tensor, expected and found."""


class CheckpointChangedError(CheckpointError, RuntimeError):
    """A file whose weights are in use has been written or cut; no request is at fault."""
