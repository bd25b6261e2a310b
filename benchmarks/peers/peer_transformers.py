"""Transformers with PyTorch's scaled_dot_product_attention and its own growing cache."""

from __future__ import annotations

from time import perf_counter

import torch
import transformers
from orders import serve


class Transformers:
    """One model; one cache of random keys and values per depth."""

    def __init__(self) -> None:
        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        self.caches = {}

    def open(self, model: str, threads: int, dtype: str) -> dict:
        """Load a directory."""
        torch.set_num_threads(threads)
        self.dtype = getattr(torch, dtype)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=self.dtype, attn_implementation="sdpa"
        ).eval()
        return {"version": f"{transformers.__version__}, torch {torch.__version__}"}

    @torch.inference_mode()
    def decode(self, depth: int, steps: int) -> dict:
        """Return the seconds of each of `steps` tokens after `depth`."""
        if depth not in self.caches:
            self.caches = {depth: self._cache(depth)}
        cache, seconds = self.caches[depth], []
        for _ in range(steps):
            token = torch.randint(3, self.model.config.vocab_size, (1, 1))
            started = perf_counter()
            self.model(input_ids=token, past_key_values=cache, use_cache=True)
            seconds.append(perf_counter() - started)
        cache.crop(-steps)
        return {"seconds": seconds}

    @torch.inference_mode()
    def prefill(self, num_tokens: int) -> dict:
        """Return the seconds of one prompt."""
        tokens = torch.randint(3, self.model.config.vocab_size, (1, num_tokens))
        started = perf_counter()
        self.model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        return {"seconds": perf_counter() - started}

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> dict:
        """Return the logits after the last of the tokens."""
        out = self.model(input_ids=torch.tensor([token_ids]), logits_to_keep=1)
        return {"logits": out.logits[0, -1].float().tolist()}

    def forget(self) -> dict:
        """Free the caches."""
        self.caches = {}
        return {}

    def _cache(self, depth: int) -> object:
        config, cache = self.model.config, transformers.DynamicCache()
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (1, config.num_key_value_heads, depth, head_dim)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, dtype=self.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        return cache


if __name__ == "__main__":
    serve(Transformers())
