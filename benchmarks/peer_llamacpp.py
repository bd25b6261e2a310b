"""llama.cpp in a process of its own: orders on stdin, answers on stdout, a line of JSON each.

Started by bench_peers.py with an interpreter that has llama-cpp-python; imports nothing of this
project. Orders: {"do": name of a method of Peer below, ...its arguments}.
"""

from __future__ import annotations

import ctypes
import json
import sys
from time import perf_counter

import llama_cpp as llama
import numpy as np

BATCH = 512  # tokens of one llama_decode, as our chunks of a prompt


class Peer:
    """One model and one context; sequence 0."""

    def __init__(self) -> None:
        self._quiet = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self.model = self.context = None
        self.num_tokens = 0  # in the cache
        self.rng = np.random.default_rng(0)

    def open(self, model: str) -> dict:
        """Map a GGUF file."""
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot open {model}")
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        info = llama.llama_print_system_info().decode()
        return {"version": llama.__version__, "system": " ".join(info.split())}

    def make_context(self, num_tokens: int, threads: int, flash: bool, kv_dtype: str) -> dict:
        """Take a cache for `num_tokens`; `flash` is llama.cpp's own attention kernel."""
        if self.context:
            llama.llama_free(self.context)
        params = llama.llama_context_default_params()
        params.n_ctx = -(-num_tokens // 256) * 256
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash)
        kinds = {"float32": 0, "float16": 1, "bfloat16": 30}
        params.type_k = params.type_v = kinds[kv_dtype]
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp refuses this context")
        self.num_tokens = 0
        return {}

    def decode(self, depth: int, steps: int) -> dict:
        """Seconds of each of `steps` tokens after `depth`; the cache is filled once."""
        if self.num_tokens != depth:
            self._compute_prompt(depth)
        seconds = [self._run(self._tokens(1), depth + i) for i in range(steps)]
        llama.llama_memory_seq_rm(llama.llama_get_memory(self.context), 0, depth, -1)
        return {"seconds": seconds}

    def prefill(self, num_tokens: int) -> dict:
        """Seconds of one prompt."""
        return {"seconds": self._compute_prompt(num_tokens)}

    def logits(self, token_ids: list[int]) -> dict:
        """Logits after the last of the tokens."""
        self._clear()
        self._run(token_ids, 0)
        last = llama.llama_get_logits_ith(self.context, -1)
        return {"logits": np.ctypeslib.as_array(last, (self.vocab_size,)).tolist()}

    def _tokens(self, count: int) -> list[int]:
        return self.rng.integers(3, self.vocab_size, count).tolist()

    def _clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        self.num_tokens = 0

    def _compute_prompt(self, num_tokens: int) -> float:
        self._clear()
        tokens = self._tokens(num_tokens)
        seconds = sum(
            self._run(tokens[begin : begin + BATCH], begin) for begin in range(0, num_tokens, BATCH)
        )
        self.num_tokens = num_tokens
        return seconds

    def _run(self, tokens: list[int], position: int) -> float:
        """Compute tokens at their positions, logits for the last."""
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
        started = perf_counter()
        failed = llama.llama_decode(self.context, batch)
        llama.llama_get_logits_ith(self.context, -1)  # waits for the result
        seconds = perf_counter() - started
        llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        return seconds


def main() -> None:
    peer = Peer()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(peer, order.pop("do"))(**order)
        except RuntimeError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
