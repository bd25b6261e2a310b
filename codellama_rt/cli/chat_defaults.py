"""How `codellama-rt chat` samples where neither the checkpoint nor an option says it."""

from __future__ import annotations

from dataclasses import replace

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.model.config import ModelConfig

_SMALL = 10**9  # weights
# SmolLM2-135M, 4 questions with 3 seeds each, answers of at most 600 tokens: of all 12-grams 0.3 %
# are repetitions and 11 of 12 answers end by themselves; greedily 43 % and 2 of 4.
SMALL_MODEL_SAMPLING = {"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.1}


def chat_defaults(llm: LLM, *, greedy_is_meant: bool = False) -> SamplingParams:
    """Return how to sample answers where no option says it.

    That is what the checkpoint's generation_config.json says. Without one, answers are as long as
    the model makes them, and a model under 1B parameters samples with `SMALL_MODEL_SAMPLING`.

    Args:
        llm: the model.
        greedy_is_meant: an option says how tokens are chosen, so a small model gets no defaults.
    """
    params = llm.default_params()
    if not llm.generation_config.get("max_new_tokens"):
        params = replace(params, max_tokens=None)
    is_greedy = params.temperature == 0.0 and params.repetition_penalty == 1.0
    if is_greedy and not greedy_is_meant and _layer_weights(llm.config) < _SMALL:
        params = replace(params, **SMALL_MODEL_SAMPLING)
    return params


def _layer_weights(config: ModelConfig) -> int:
    attention = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim * config.dim
    return config.n_layers * (attention + 3 * config.dim * config.hidden_dim)
