"""Every public way to use one model, as functions of a number: what a call gives is comparable."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.hf.causal_lm import LlamaForCausalLM
from codellama_rt.hf.text_streamer import TextIteratorStreamer
from helpers.causal_calls import tensor

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=5, ignore_eos=True, n=2, temperature=1.0, seed=7, logprobs=2)


def calls(model: LlamaForCausalLM) -> dict[str, Callable[[int], object]]:
    """Entries of an LLM, its engine and the Transformers surface."""
    llm = model.llm

    def ids(i):
        return [1, 5 + i % 7, 9, 11, *[20 + i % 5] * (i % 23)]

    def text(i):
        return "def add(first, second):"[: 8 + i % 12]

    def generate(i):
        return [(c.token_ids, c.text, c.logprobs) for c in llm.generate([ids(i), text(i)], SAMPLED)]

    def hf(i, **options):
        return model.generate(tensor([ids(i)]), max_new_tokens=4, **options).asnumpy().tolist()

    def streamer(i):
        pieces = TextIteratorStreamer(StreamTokenizer(llm), skip_prompt=True, timeout=60)
        thread = threading.Thread(target=hf, args=(i,), kwargs={"streamer": pieces})
        thread.start()
        found = "".join(pieces)
        thread.join()
        return found

    messages = [{"role": "user", "content": "a"}]
    return {
        "generate": generate,
        "stream": lambda i: "".join(llm.stream(text(i), SHORT)),
        "infill": lambda i: llm.infill(text(i), "return", SHORT).token_ids,
        "chat": lambda i: llm.chat(messages, SHORT, chat_template="code-llama").text,
        "logits": lambda i: llm.logits(ids(i)).tobytes(),
        "forward": lambda i: model(tensor([ids(i)])).logits.asnumpy().tobytes(),
        "greedy": hf,
        "sample": lambda i: hf(i, do_sample=True, seed=i, num_return_sequences=2),
        "beams": lambda i: hf(i, num_beams=3, num_return_sequences=2),
        "streamer": streamer,
    }


class StreamTokenizer:
    """What a streamer asks of a tokenizer, over an LLM's."""

    def __init__(self, llm):
        self._decode = llm.tokenizer.decode

    def decode(self, token_ids, **options):
        return self._decode([int(i) for i in np.ravel(token_ids)])
