"""Inference runtime for Code Llama: hand-written kernels, paged KV cache, contexts up to 100k.

    import codellama_rt as clrt
    clrt.generate("smollm2-135m-instruct", "def fibonacci(n):")

Names are imported on first use: importing the package loads NumPy and nothing else.
"""

from importlib import import_module
from pathlib import Path

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

__all__ = ["__version__", "get_cmake_dir", "get_include", *_HOME]


def get_include() -> str:
    """Return the directory of `codellama_rt.h`, for programs in C and C++ (docs/embedding.md).

    Example:
        >>> get_include().endswith("include")
        True
    """
    return str(Path(__file__).resolve().parent / "include")


def get_cmake_dir() -> str:
    """Return the directory of the CMake package: `-Dcodellama_rt_DIR=`.

    Example:
        >>> get_cmake_dir().endswith("cmake")
        True
    """
    return str(Path(__file__).resolve().parent / "cmake")


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
