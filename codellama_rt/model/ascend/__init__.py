"""Llama on Ascend."""
