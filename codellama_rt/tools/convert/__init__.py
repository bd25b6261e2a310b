"""Conversion of checkpoints: what to write, how far it got, and whether the result is right."""
