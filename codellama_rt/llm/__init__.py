"""A checkpoint made ready to generate: `LLM` and `generate`."""
