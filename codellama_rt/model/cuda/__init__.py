"""The CUDA device: its tensors, its operators, and a model that runs on it."""
