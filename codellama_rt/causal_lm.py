"""The Transformers-style surface: `LlamaForCausalLM.from_pretrained(...).generate(tensor)`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from codellama_rt.llm import LLM
from codellama_rt.sampling_params import SamplingParams

_HF_TOP_K = 50  # what Transformers samples from when neither call nor checkpoint says otherwise


class LlamaForCausalLM:
    """A model that takes and returns MindSpore Tensors of token ids.

    Example:
        >>> import mindspore as ms  # doctest: +SKIP
        >>> model = LlamaForCausalLM.from_pretrained("CodeLlama-7b-hf")  # doctest: +SKIP
        >>> ids = ms.Tensor(tokenizer(prompt, return_tensors="np").input_ids, ms.int32)
        ... # doctest: +SKIP
        >>> output = model.generate(ids, max_new_tokens=128)  # doctest: +SKIP
        >>> tokenizer.batch_decode(output[:, ids.shape[1]:])  # doctest: +SKIP
    """

    def __init__(self, llm: LLM) -> None:
        """Wrap an LLM; `from_pretrained` makes one."""
        self.llm = llm
        self.config = llm.config
        self.generation_config = llm.generation_config

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike[str], *, dtype: Any = "auto", **llm_options: Any
    ) -> LlamaForCausalLM:
        """Open a checkpoint.

        Args:
            model: directory, GGUF file, built-in name or hub id.
            dtype: "auto", "float32", "float16", "bfloat16", or MindSpore's own (`ms.bfloat16`).
            **llm_options: as `LLM` takes them.

        Raises:
            CheckpointError, ValueError, TypeError, RuntimeError: as `LLM`.
        """
        return cls(LLM(model, dtype=str(dtype).lower(), **llm_options))

    def generate(
        self, input_ids: Any, *, attention_mask: Any = None, max_new_tokens: int | None = None,
        min_new_tokens: int = 0, do_sample: bool | None = None, temperature: float | None = None,
        top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        repetition_penalty: float | None = None, eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None, seed: int | None = None,
    ) -> Any:  # fmt: skip
        """Continue every row; explicit arguments win over generation_config.json.

        Args:
            input_ids: (batch, length) Tensor of int32 or int64; rows are padded on the left.
            attention_mask: (batch, length), 0 where a row is padded; None: nowhere.
            max_new_tokens: upper bound; the checkpoint's, or 128.
            min_new_tokens: no end before so many.
            do_sample: sample instead of taking the likeliest token.
            temperature: of the sampling, 1.0 by default.
            top_k: 50 by default when sampling, 0: all.
            top_p: 1.0 by default.
            min_p: 0.0 by default.
            repetition_penalty: 1.0 by default.
            eos_token_id: what ends a row; the checkpoint's by default, and <EOT> in a row that asks
                for infilling.
            pad_token_id: fills rows that ended early; the checkpoint's, or the end token.
            seed: makes sampling repeatable; row i of a batch draws from seed + i.

        Returns:
            Tensor (batch, length + new tokens) in input_ids' dtype: prompts and continuations.

        Raises:
            TypeError: input_ids is no Tensor of integers.
            ValueError: a shape, mask or parameter out of range.
        """
        import mindspore

        rows = _as_rows(input_ids)
        prompts = _without_padding(rows, attention_mask)
        sampling = self._sampling(do_sample, temperature, top_k, top_p, min_p)
        if repetition_penalty is None:
            repetition_penalty = self.generation_config.get("repetition_penalty", 1.0)
        if max_new_tokens is None:
            max_new_tokens = self.generation_config.get("max_new_tokens", 128)
        params = [
            SamplingParams(
                max_tokens=max_new_tokens, min_tokens=min_new_tokens,
                repetition_penalty=repetition_penalty, seed=None if seed is None else seed + i,
                stop_token_ids=self._ends(prompt, eos_token_id),
                ignore_eos=eos_token_id is not None, **sampling,
            )
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        new = [completion.token_ids for completion in self.llm.generate(prompts, params)]
        padded = np.full((len(rows), max(map(len, new))), self._pad(pad_token_id), rows.dtype)
        for row, ids in zip(padded, new, strict=True):
            row[: len(ids)] = ids
        return mindspore.Tensor(np.concatenate([rows, padded], axis=1))

    def _sampling(
        self, do_sample: bool | None, temperature: float | None, top_k: int | None,
        top_p: float | None, min_p: float | None,
    ) -> dict[str, float]:  # fmt: skip
        config = self.generation_config
        if not (config.get("do_sample", False) if do_sample is None else do_sample):
            return {"temperature": 0.0}
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        usual = {"temperature": 1.0, "top_k": _HF_TOP_K, "top_p": 1.0, "min_p": 0.0}
        for name, value in given.items():
            if value is None:
                value = config.get(name)
            usual[name] = usual[name] if value is None else value
        return usual

    def _ends(self, prompt: list[int], eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
        if eos_token_id is not None:
            return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        tokenizer = self.llm.tokenizer
        if tokenizer is not None and tokenizer.can_infill and tokenizer.middle_id in prompt:
            return (tokenizer.eot_id,)
        return ()

    def _pad(self, pad_token_id: int | None) -> int:
        if pad_token_id is None:
            pad_token_id = self.generation_config.get("pad_token_id")
        if pad_token_id is None:
            pad_token_id = next(iter(self.llm.engine.eos_token_ids), 0)
        return pad_token_id


def _as_rows(input_ids: Any) -> np.ndarray:
    rows = input_ids.asnumpy() if hasattr(input_ids, "asnumpy") else np.asarray(input_ids)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"input_ids must be a Tensor of int32 or int64, got {rows.dtype}")
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"input_ids must be (batch, length), got {rows.shape}")
    return rows


def _without_padding(rows: np.ndarray, attention_mask: Any) -> list[list[int]]:
    if attention_mask is None:
        return rows.tolist()
    mask = attention_mask.asnumpy() if hasattr(attention_mask, "asnumpy") else attention_mask
    mask = np.asarray(mask) != 0
    if mask.shape != rows.shape or (mask[:, :-1] & ~mask[:, 1:]).any() or not mask[:, -1].all():
        raise ValueError(
            f"attention_mask must be {rows.shape} and zero only on the left of each row; "
            "set the tokenizer's padding_side to 'left'"
        )
    return [row[keep].tolist() for row, keep in zip(rows, mask, strict=True)]
