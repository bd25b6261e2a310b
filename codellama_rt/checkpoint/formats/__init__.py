"""The file formats of checkpoints, one module each."""
