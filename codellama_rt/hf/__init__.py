"""The interface of Transformers: models, tokenizers, configuration, processors, searches."""

from codellama_rt.hf.generation_config import GenerationConfig
from codellama_rt.hf.outputs import CausalLMOutput, GenerateOutput

__all__ = ["CausalLMOutput", "GenerateOutput", "GenerationConfig"]
