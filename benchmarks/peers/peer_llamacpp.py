"""llama.cpp through llama-cpp-python; each depth has its own context."""

from __future__ import annotations

import ctypes
from time import perf_counter

import llama_cpp as llama
import numpy as np
from llamacpp_state import lengthened
from orders import serve

BATCH = 512  # tokens per llama_decode, like our chunks of a prompt
SEED_TOKENS = 256  # computed, then repeated up to the depth
KV_KINDS = {"float32": 0, "float16": 1, "q4_0": 2, "q8_0": 8, "bfloat16": 30}
FILE_KINDS = {"q4_0": 2, "q8_0": 7}  # llama_ftype


class LlamaCpp:
    """One model; sequence 0 of every context."""

    def __init__(self) -> None:
        self._quiet = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self.model, self.contexts, self.settings = None, {}, {}
        self.rng = np.random.default_rng(0)

    def quantize(self, source: str, target: str, kind: str, threads: int) -> dict:
        """Write a quantised file, as llama-quantize does: the head in q6_K for q4_0."""
        params = llama.llama_model_quantize_default_params()
        params.ftype, params.nthread = FILE_KINDS[kind], threads
        if llama.llama_model_quantize(source.encode(), target.encode(), params):
            raise RuntimeError(f"cannot quantise {source} to {kind}")
        return {}

    def open(self, model: str, threads: int) -> dict:
        """Map a GGUF file."""
        self._free()
        if self.model:
            llama.llama_model_free(self.model)
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot open {model}")
        self.threads = threads
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        info = llama.llama_print_system_info().decode()
        return {"version": llama.__version__, "system": " ".join(info.split())}

    def use(self, flash: bool, kv_dtype: str) -> dict:
        """Choose the attention kernel (`flash`: llama.cpp's own) and the cache's type."""
        self._free()
        self.settings = {
            "flash_attn_type": int(flash),
            "type_k": KV_KINDS[kv_dtype],
            "type_v": KV_KINDS[kv_dtype],
        }
        return {}

    def decode(self, depth: int, steps: int) -> dict:
        """Return the seconds of each of `steps` tokens after `depth`; each depth is filled once."""
        if depth not in self.contexts:
            self.contexts[depth] = self._context(depth + 2 * steps + BATCH)
            self._fill(self.contexts[depth], depth)
        context = self.contexts[depth]
        seconds = [self._run(context, self._tokens(1), depth + i) for i in range(steps)]
        llama.llama_memory_seq_rm(llama.llama_get_memory(context), 0, depth, -1)
        return {"seconds": seconds}

    def batch(self, num_seqs: int, depth: int, steps: int, shared: bool = False) -> dict:
        """Return the median seconds of a step of all sequences, each after `depth` tokens.

        Each has a cache of its own, or, with `shared`, all share the cells of those tokens.
        """
        name = f"{num_seqs} sequences of {depth}"
        if name not in self.contexts:
            own = steps + 1 if shared else depth + steps + 1
            context = self._context(own * num_seqs + shared * (depth + BATCH), num_seqs, shared)
            memory = llama.llama_get_memory(context)
            self._fill(context, depth) if shared else self._prompt(context, depth)
            for seq in range(1, num_seqs):
                llama.llama_memory_seq_cp(memory, 0, seq, -1, -1)
            self.contexts[name] = context
        context = self.contexts[name]
        seconds = [self._run_all(context, num_seqs, depth + i) for i in range(steps)]
        for seq in range(num_seqs):
            llama.llama_memory_seq_rm(llama.llama_get_memory(context), seq, depth, -1)
        return {"seconds": float(np.median(seconds))}

    def prefill(self, num_tokens: int) -> dict:
        """Return the seconds of one prompt."""
        return {"seconds": self._prompt(self._spare(num_tokens), num_tokens)}

    def logits(self, token_ids: list[int]) -> dict:
        """Return the logits after the last of the tokens."""
        context = self._spare(len(token_ids))
        self._run(context, token_ids, 0)
        last = llama.llama_get_logits_ith(context, -1)
        return {"logits": np.ctypeslib.as_array(last, (self.vocab_size,)).tolist()}

    def forget(self) -> dict:
        """Free the caches."""
        self._free()
        return {}

    def _free(self) -> None:
        for context in self.contexts.values():
            llama.llama_free(context)
        self.contexts = {}

    def _spare(self, num_tokens: int) -> object:
        """Return an empty context for prompts of that length."""
        name = f"prompts of {num_tokens}"
        if name not in self.contexts:
            self.contexts[name] = self._context(num_tokens)
        llama.llama_memory_clear(llama.llama_get_memory(self.contexts[name]), True)
        return self.contexts[name]

    def _context(self, num_tokens: int, num_seqs: int = 1, unified: bool = False) -> object:
        params = llama.llama_context_default_params()
        params.n_ctx = -(-num_tokens // 256 // num_seqs) * 256 * num_seqs
        params.n_seq_max, params.kv_unified = num_seqs, unified
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self.threads
        for name, value in self.settings.items():
            setattr(params, name, value)
        context = llama.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("llama.cpp rejects this context")
        return context

    def _fill(self, context: object, depth: int) -> None:
        """Compute some tokens and repeat their keys and values, which llama.cpp accepts."""
        self._prompt(context, min(SEED_TOKENS, depth))
        size = llama.llama_state_seq_get_size(context, 0)
        state = (ctypes.c_uint8 * size)()
        llama.llama_state_seq_get_data(context, state, size, 0)
        longer = lengthened(bytes(state), depth)
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        at = longer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if not llama.llama_state_seq_set_data(context, at, longer.size, 0):
            raise RuntimeError(f"llama.cpp rejects a cache of {depth} tokens")

    def _tokens(self, count: int) -> list[int]:
        return self.rng.integers(3, self.vocab_size, count).tolist()

    def _prompt(self, context: object, num_tokens: int) -> float:
        tokens = self._tokens(num_tokens)
        return sum(
            self._run(context, tokens[begin : begin + BATCH], begin)
            for begin in range(0, num_tokens, BATCH)
        )

    def _run(self, context: object, tokens: list[int], position: int) -> float:
        """Compute tokens of sequence 0 at their positions, logits for the last."""
        last = len(tokens) - 1
        cells = [(t, position + i, 0, i == last) for i, t in enumerate(tokens)]
        return self._decode(context, cells)

    def _run_all(self, context: object, num_seqs: int, position: int) -> float:
        """Compute one token of each sequence, with its logits."""
        tokens = self._tokens(num_seqs)
        return self._decode(context, [(t, position, seq, True) for seq, t in enumerate(tokens)])

    def _decode(self, context: object, cells: list[tuple[int, int, int, bool]]) -> float:
        """Return the seconds of a batch of (token, position, sequence, wants logits)."""
        batch = llama.llama_batch_init(len(cells), 0, 1)
        batch.n_tokens = len(cells)
        for i, (token, position, seq, wants_logits) in enumerate(cells):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = seq, wants_logits
        started = perf_counter()
        failed = llama.llama_decode(context, batch)
        llama.llama_get_logits_ith(context, -1)  # waits for the result
        seconds = perf_counter() - started
        llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        return seconds


if __name__ == "__main__":
    serve(LlamaCpp())
