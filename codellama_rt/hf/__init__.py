"""Generation as Transformers does it: its configuration, processors, criteria and searches."""

from codellama_rt.hf.generation_config import GenerationConfig
from codellama_rt.hf.outputs import CausalLMOutput, GenerateOutput

__all__ = ["CausalLMOutput", "GenerateOutput", "GenerationConfig"]
