"""Llama: its configuration, weights, KV cache and forward pass, per device."""
