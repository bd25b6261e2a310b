"""The CUDA device: tensors, operators, and the model."""
