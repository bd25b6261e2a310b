"""Inference runtime for Code Llama: hand-written kernels, paged KV cache, contexts up to 100k."""
