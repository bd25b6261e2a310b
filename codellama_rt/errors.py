"""Exceptions of the package that are more precise than Python's own."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names file, tensor, what was expected and found."""
