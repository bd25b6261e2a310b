"""Exceptions of the package that are more specific than Python's own."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message has file, tensor, expected and found."""
