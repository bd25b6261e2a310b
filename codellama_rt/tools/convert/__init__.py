"""Conversion of checkpoints: what is to be written, how far it got, and whether it is right."""
