"""Generation as Transformers does it: its configuration, processors, criteria and searches."""

from codellama_rt.generation.generation_config import GenerationConfig
from codellama_rt.generation.outputs import CausalLMOutput, GenerateOutput

__all__ = ["CausalLMOutput", "GenerateOutput", "GenerationConfig"]
