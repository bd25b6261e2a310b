"""The formats of checkpoints, one module each."""
