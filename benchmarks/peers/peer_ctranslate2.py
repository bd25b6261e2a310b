"""CTranslate2: prompts only, because its cache cannot be set and deep ones would be computed."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import ctranslate2
import numpy as np
from ctranslate2.converters import TransformersConverter
from orders import serve


class _Converter(TransformersConverter):
    """Convert a directory without a tokenizer: the words are the numbers of the ids."""

    def load_tokenizer(self, *unused: object, **also_unused: object) -> SimpleNamespace:
        return SimpleNamespace(
            get_vocab=lambda: {},
            bos_token="<extra_id_1>",
            eos_token="<extra_id_2>",
            unk_token="<extra_id_0>",
        )


class CTranslate2:
    """One converted model."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def open(self, model: str, threads: int, dtype: str) -> dict:
        """Convert a directory beside itself, once, and load it."""
        folder = Path(f"{model}-ctranslate2-{dtype}")
        if not folder.exists():
            _Converter(model).convert(str(folder), quantization=dtype)
        self.model = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=dtype, intra_threads=threads, inter_threads=1
        )
        self.vocab_size = int(np.prod(self._forward([1]).shape[-1:]))
        return {"version": ctranslate2.__version__}

    def prefill(self, num_tokens: int) -> dict:
        """Return the seconds of one prompt, up to its first new token."""
        words = self._words(self.rng.integers(3, self.vocab_size, num_tokens))
        started = perf_counter()
        self.model.generate_batch(
            [words], max_length=1, min_length=1, sampling_topk=1, include_prompt_in_result=False
        )
        return {"seconds": perf_counter() - started}

    def logits(self, token_ids: list[int]) -> dict:
        """Return the logits after the last of the tokens."""
        return {"logits": self._forward(token_ids)[0, -1].tolist()}

    def forget(self) -> dict:
        """Do nothing: there is no cache."""
        return {}

    def _forward(self, token_ids: list[int]) -> np.ndarray:
        return np.array(self.model.forward_batch([self._words(token_ids)]))

    @staticmethod
    def _words(token_ids: list[int]) -> list[str]:
        return [f"<extra_id_{token}>" for token in token_ids]


if __name__ == "__main__":
    serve(CTranslate2())
