"""Inference runtime for Code Llama: hand-written kernels, paged KV cache, contexts up to 100k.

    import codellama_rt as clrt
    clrt.generate("smollm2-135m-instruct", "def fibonacci(n):")

Names are imported on first use: importing the package loads NumPy and nothing else.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "generate": "llm.generate",
    "LLM": "llm.llm",
    "Completion": "engine.completion",
    "SamplingParams": "engine.sampling_params",
    "StructuredOutputs": "engine.structured_outputs",
    "Engine": "engine.engine",
    "AsyncEngine": "engine.async_engine",
    "Output": "engine.request",
    "CodeLlamaTokenizer": "hf.code_llama_tokenizer",
    "LlamaForCausalLM": "hf.causal_lm",
    "GenerationConfig": "hf.generation_config",
    "TextStreamer": "hf.text_streamer",
    "TextIteratorStreamer": "hf.text_streamer",
    "VARIANTS": "llm.variants",
    "CheckpointError": "errors",
    "QueueFullError": "errors",
    "ops": "ops",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    """Import a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module 'codellama_rt' has no attribute {name!r}")
    module = import_module(f"codellama_rt.{_HOME[name]}")
    value = module if name == "ops" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
