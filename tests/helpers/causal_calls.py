"""Calls of LlamaForCausalLM with lists in place of tensors."""

import mindspore as ms
import numpy as np

PROMPT = [1, 309, 103, 28, 67]


def tensor(rows, dtype=np.int32):
    return ms.Tensor(np.array(rows, dtype))


def new_tokens(model, prompt, **options):
    output = model.generate(tensor([prompt]), **options).asnumpy()
    assert output[0, : len(prompt)].tolist() == prompt
    return output[0, len(prompt) :].tolist()


def log_probability(model, prompt, ids):
    logits = model.llm.logits(prompt + ids).astype(np.float64)[len(prompt) - 1 : -1]
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits[np.arange(len(ids)), ids].sum()
