"""A checkpoint made ready to generate: weights, tokenizer, KV cache and engine in one object."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from codellama_rt import ops
from codellama_rt.checkpoint import load_checkpoint
from codellama_rt.checkpoint.adapter import load_adapter
from codellama_rt.checkpoint.formats.generation_config import rejected
from codellama_rt.checkpoint.open import resolve
from codellama_rt.engine.completion import Completion, Job
from codellama_rt.engine.disk_cache.transfer import export_prefix, import_prefix
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.follow import Jobs
from codellama_rt.engine.request_checks import check_params
from codellama_rt.engine.sampling_params import (
    LogitsProcessor,
    SamplingParams,
    checked_processors,
)
from codellama_rt.engine.speculation import check_speculation
from codellama_rt.llm.arguments import (
    Prompt,
    as_prompts,
    default_params,
    only_one,
    prompt_content,
    require_options,
)
from codellama_rt.llm.memory_plan import settle
from codellama_rt.llm.placement import default_block_size, place, require_runtime
from codellama_rt.llm.plan import Plan
from codellama_rt.llm.prefix_cache import PrefixFiles, require_prefix_cache
from codellama_rt.llm.prompts import PromptEncoder
from codellama_rt.llm.scoring import pooled, sequence_hidden_states, sequence_logits
from codellama_rt.llm.variants import find_variant, require_length
from codellama_rt.model.batch import Batch
from codellama_rt.model.interface import KVCache
from codellama_rt.model.lora import LoraAdapter, merged, merged_config, require_applicable
from codellama_rt.text.chat import read_chat_template
from codellama_rt.text.tokenizer import has_tokenizer, load_tokenizer


class LLM:
    """A model to generate with, from any thread.

    Calls of several threads are computed together, each with the result that it has alone.

    Example:
        >>> with LLM("smollm2-135m-instruct") as llm:  # doctest: +SKIP
        ...     print(llm.generate("def fibonacci(n):")[0].text)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "auto",
        quantization: str | None = None,
        repack: bool = True,
        kv_dtype: str = "auto",
        max_model_len: int | None = None,
        kv_memory: int | str | None = None,
        block_size: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        num_threads: int | None = None,
        prefix_caching: bool = True,
        prefix_cache_dir: str | os.PathLike[str] | None = None,
        prefix_cache_bytes: int | str = "16GB",
        adapter: str | os.PathLike[str] | None = None,
        rope_theta: float | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        attention: str = "custom",
        runtime: str = "direct",
        check: str | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        max_step_seconds: float | None = 1.0,
        logits_processors: Sequence[LogitsProcessor] = (),
        speculation: str | None = None,
    ) -> None:
        """Open a checkpoint; weights are mapped, not copied, but for GGUF's and small models'.

        Args:
            model: directory, GGUF file, built-in name or hub id.
            device: "cpu", or where there is one "cuda" or "ascend".
            dtype: of the weights: "auto" (as stored), "float32", "float16", "bfloat16".
            quantization: "int8" or "int4" quantises the projections and the head as they are
                loaded; None takes them as stored, quantised ones included.
            repack: copy GGUF's blocks, and those made of AWQ and GPTQ, into the order in which the
                CPU's kernels read them, and other weights of at most 1 GB into huge memory pages,
                which is faster; False reads them in the file's mapping, which opens at once and
                shares memory with other processes. The results are the same to the bit.
            kv_dtype: of the KV cache: "auto" (that of the weights, bfloat16 beside GGUF's
                quantised ones), "float32", "float16", "bfloat16", "int8", "int4"; on cuda "fp8",
                but no "int4".
            max_model_len: tokens of prompt and output together; the checkpoint's by default. More
                is allowed: Code Llama's files say 16,384 and the model reads 100,000.
            kv_memory: bytes, or a str like "8GB", for the KV cache; by default what max_num_seqs
                sequences can use, at most 80 % of the memory that the weights leave, or 95 % where
                one of max_model_len tokens takes as much.
            block_size: tokens per KV block, a multiple of 16; 64 by default, 128 on Ascend.
            max_num_seqs: sequences in one step.
            max_num_batched_tokens: tokens in one step; longer prompts are computed in chunks.
            num_threads: threads per op, for the whole process; by default what the environment
                says, else the CPUs within the quota of the container.
            prefix_caching: whether equal prefixes are computed once.
            prefix_cache_dir: directory in which keys and values are kept beyond this process, for
                it and others; they are restored with the bits that computing them would give. It
                holds the prompts, too, and may be deleted at any time.
            prefix_cache_bytes: bytes, or a str like "16GB", that all files in it may take; what was
                not used for longest is deleted.
            attention: on Ascend "custom" (this project's kernels) or "vendor" (MindSpore's).
            runtime: "direct" calls the kernels one after another; "graph" runs the model as a
                MindSpore cell of the graph ops under `@ms.jit`, with the same bits (CPU only, and
                without adapters of single requests).
            adapter: directory of a LoRA adapter that is merged into the weights; `load_adapter`
                applies one to single requests.
            rope_theta: base of RoPE; None: the checkpoint's.
            rope_scaling: how RoPE is stretched, as `rope_scaling` in config.json, for example
                {"rope_type": "yarn", "factor": 4.0}; {"rope_type": "default"} is no scaling, None
                the checkpoint's. Give max_model_len as well where contexts are to be longer.
            check: "finite" rejects weights with NaN or infinity (reads every byte).
            progress: called with (bytes done, bytes in all, what) while weights are converted,
                quantised, repacked or copied.
            max_step_seconds: how long a step with prompts may take while others wait, as for
                `Engine`; None: `max_num_batched_tokens` alone bounds it.
            logits_processors: as those of `SamplingParams`, for every request, before its own.
            speculation: "suffix" computes tokens that followed the same text before together with
                the next one, and takes those that would have come (docs/speculation.md): the same
                tokens, sooner, where an output copies. None: one token at a time.

        Raises:
            CheckpointError: the checkpoint cannot be used.
            ValueError, TypeError: an argument out of range.
            RuntimeError: no such device here, or not the memory for max_model_len tokens (the
                message says which kv_dtype or length would fit).
        """
        require_options(
            device,
            kv_dtype,
            quantization,
            max_model_len=max_model_len,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_threads=num_threads,
        )
        require_runtime(runtime, device)
        require_prefix_cache(
            prefix_cache_dir, prefix_cache_bytes, device=device, prefix_caching=prefix_caching
        )
        checked_processors(logits_processors)
        check_speculation(speculation)
        if num_threads is not None:
            ops.set_num_threads(num_threads)
        opened = resolve(model)
        self.name_or_path, self.device = os.fspath(model), device
        opened = replace(opened, config=opened.config.with_rope(rope_theta, rope_scaling))
        self.variant = find_variant(model)
        require_length(self.variant, max_model_len)
        asked = Plan(
            device=device,
            dtype=dtype,
            quantization=quantization,
            repack=repack,
            kv_dtype=kv_dtype,
            block_size=block_size or default_block_size(device),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_memory=kv_memory,
            attention=attention,
            runtime=runtime,
        )
        plan = settle(opened, asked)
        checkpoint = load_checkpoint(
            opened,
            dtype=dtype,
            quantization=None if device == "cuda" else quantization,  # there in formats of its own
            repack=plan.repacks,
            check=check,
            progress=progress,
        )
        self.config, self.generation_config = checkpoint.config, checkpoint.generation_config
        self.path = checkpoint.path
        try:
            self.default_params()
        except (ValueError, TypeError) as error:  # values of its generation_config.json
            raise rejected(self.path, error) from None
        self.stored_bytes = checkpoint.stored_bytes
        self.tokenizer = self.chat_template = None
        if has_tokenizer(opened.path, opened.metadata):
            self.tokenizer = load_tokenizer(
                opened.path, self.config.vocab_size, metadata=opened.metadata
            )
            self.chat_template = read_chat_template(opened.path, opened.metadata)
        self.prompt_encoder = PromptEncoder(self.tokenizer, self.chat_template, self.variant)
        if self.variant is not None:
            self.variant.warn_of_differences(self.config)
        self.max_model_len = max_model_len or self.config.max_position_embeddings
        weights = checkpoint.weights
        if adapter is not None:
            change = load_adapter(adapter, self.config, weights)
            weights = merged(weights, change)
            self.config = merged_config(self.config, weights, change)
        self.model, self.kv_cache = place(plan, self.config, weights)
        checkpoint.files.check()  # the device may have copied what was just being written
        self._prefix_files = PrefixFiles(self.config, weights, self.kv_cache)
        self.engine = Engine(
            self.model,
            self.kv_cache,
            self.tokenizer,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=self.max_model_len,
            prefix_caching=prefix_caching,
            generation_config=self.generation_config,
            max_step_seconds=max_step_seconds,
            check_files=checkpoint.files.check,
            logits_processors=logits_processors,
            speculation=speculation,
            prefix_store=self._prefix_files.open_store(prefix_cache_dir, prefix_cache_bytes),
        )
        self.jobs = Jobs(self.engine)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: LoraAdapter | None = None,
        cache_salt: str | None = None,
    ) -> list[Completion]:
        """Complete prompts, all together; a str with <FILL_ME> is filled in.

        Args:
            prompts: a str, token ids, or a list of either; also as {"prompt": str} or
                {"prompt_token_ids": ids}. Special tokens written out in a str stay text, but for a
                str that is Code Llama's whole infilling template.
            params: for all, or one a prompt; None: `default_params()`.
            sampling_params: vLLM's name of `params`.
            adapter: applied to these prompts; from `load_adapter`.
            cache_salt: these prompts share cached prefixes only with others of an equal salt; None:
                with all that have none.

        Returns:
            params.n completions a prompt, in the order of the prompts.

        Raises:
            ValueError, TypeError: a prompt or parameter that cannot be; nothing was computed then.
            CheckpointError: a file of the model has been written or cut since it was opened.
        """
        prompts, _ = as_prompts(prompts)
        params = only_one(params, sampling_params)
        if not isinstance(params, (list, tuple)):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many params, got {len(params)}")
        jobs: list[Job] = []
        try:
            for prompt, its_params in zip(prompts, params, strict=True):
                jobs.append(self._submit(prompt, its_params, adapter, cache_salt))
            self.jobs.finish(jobs)
        finally:
            for job in jobs:
                self.jobs.dismiss(job)
        return [completion for job in jobs for completion in job.completions]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: LoraAdapter | None = None,
        cache_salt: str | None = None,
    ) -> Iterator[str]:
        """Complete one prompt and yield its text as it comes; closing the iterator aborts it.

        Raises:
            ValueError, TypeError: as `generate`, when called, not when iterated; also params.n > 1.
        """
        prompt = prompt_content(prompt)
        params = self._checked(params)
        if params.n != 1:
            raise ValueError(f"a stream has one sample, got params.n={params.n}")
        return self.jobs.stream(self._submit(prompt, params, adapter, cache_salt))

    def infill(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        *,
        suffix_first: bool = False,
        adapter: LoraAdapter | None = None,
        cache_salt: str | None = None,
    ) -> Completion:
        """Fill the gap between `prefix` and `suffix`; the text is the filling alone.

        Args:
            prefix: text before the gap.
            suffix: text after it.
            params: as in `generate`; params.n must be 1.
            suffix_first: the SPM order of the prompt instead of PSM. Both are Meta's, and their
                fillings differ. A cached prefix reaches to the first token that has changed: SPM is
                right where one types at the gap, PSM where the gap moves on through the text.
            adapter: as in `generate`.
            cache_salt: as in `generate`.

        Raises:
            ValueError: the model has no infilling tokens (34B and Python models have none),
                or params.n is not 1.
        """
        params = self._checked(params)
        if params.n != 1:
            raise ValueError(
                f"infill gives one sample, got params.n={params.n}; "
                "for more give generate a prompt with <FILL_ME>"
            )
        request = self.prompt_encoder.infilling(prefix, suffix, params, suffix_first=suffix_first)
        [filling] = self.generate([request[0]], request[1], adapter=adapter, cache_salt=cache_salt)
        return filling

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        chat_template: str | None = None,
        adapter: LoraAdapter | None = None,
        cache_salt: str | None = None,
    ) -> Completion:
        """Answer a conversation; the text is the assistant's next message.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": str} in order.
            params: as in `generate`; params.n must be 1.
            sampling_params: vLLM's name of `params`.
            chat_template: "code-llama", "code-llama-70b" or Jinja; the checkpoint's own if None.
            adapter: as in `generate`.
            cache_salt: as in `generate`.

        Raises:
            ValueError, TypeError: as `chat_prompt`; also params.n is not 1.
        """
        params = only_one(params, sampling_params)
        prompt, params = self.chat_prompt(messages, params, chat_template=chat_template)
        if params.n != 1:
            raise ValueError(f"chat gives one answer, got params.n={params.n}")
        return self.generate([prompt], params, adapter=adapter, cache_salt=cache_salt)[0]

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        chat_template: str | None = None,
    ) -> tuple[list[int], SamplingParams]:
        """Return the prompt of a conversation, and parameters that stop at the end of an answer.

        Both can be passed to `generate` and `stream`.

        Raises:
            ValueError, TypeError: an invalid message, order of roles or template;
                or the checkpoint has no chat format.
        """
        return self.prompt_encoder.conversation(messages, self._checked(params), chat_template)

    def load_adapter(self, path: str | os.PathLike[str]) -> LoraAdapter:
        """Load a LoRA adapter in PEFT's format, to be passed to `generate` and the others.

        Raises:
            CheckpointError: it is damaged, for another model, or can only be merged.
        """
        weights = self.model.weights if self.model.applies_adapters else None
        adapter = load_adapter(path, self.config, weights)
        require_applicable(adapter)
        return adapter

    def logits(
        self,
        token_ids: Sequence[int],
        first_position: int = 0,
        *,
        adapter: LoraAdapter | None = None,
    ) -> np.ndarray:
        """Return the logits after every token of one sequence, computed in chunks.

        Args:
            token_ids: the sequence, at least one token.
            first_position: position of the first token for RoPE.
            adapter: as in `generate`.

        Returns:
            (len(token_ids), vocab_size) float32.

        Raises:
            ValueError: no token, or one outside the vocabulary.
            CheckpointError: as `generate`.
            RuntimeError: the LLM is closed.
        """
        self.engine.check_open()
        self.engine.admission.check_files()
        return sequence_logits(
            self.model,
            token_ids,
            first_position=first_position,
            kv_dtype=self.kv_cache.dtype,
            chunk_size=self.engine.scheduler.max_num_batched_tokens,
            adapter=adapter,
            forward=self.engine.forward,
        )

    def hidden_states(
        self, token_ids: Sequence[int], *, adapter: LoraAdapter | None = None
    ) -> np.ndarray:
        """Return what the layers pass on for every token of one sequence, as Transformers has it.

        Args:
            token_ids: the sequence, at least one token.
            adapter: as in `generate`.

        Returns:
            (n_layers + 1, len(token_ids), dim) float32: the embeddings, the residual stream after
            each layer but the last, and after the last one normalised.

        Raises:
            ValueError: no token, one outside the vocabulary, or a device or runtime that has none.
        """
        return self._hidden_states(token_ids, adapter)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "last",
        normalize: bool = True,
        adapter: LoraAdapter | None = None,
    ) -> np.ndarray:
        """Return one vector per prompt, made of the last hidden states of its tokens.

        Args:
            prompts: as in `generate`.
            pooling: "last" takes the last token's, "mean" the mean of all tokens'.
            normalize: divide each vector by its length.
            adapter: as in `generate`.

        Returns:
            (number of prompts, dim) float32.

        Raises:
            ValueError: an unknown pooling, an empty prompt, or as `hidden_states`.
            TypeError: as `generate`.
        """
        prompts, _ = as_prompts(prompts)
        ids = [self.prompt_encoder.tokens(prompt) for prompt in prompts]
        states = (self._hidden_states(one, adapter, last_only=True)[0] for one in ids)
        return pooled(states, len(ids), self.config.dim, pooling, normalize)

    def export_prefix(
        self,
        prompt: Prompt,
        path: str | os.PathLike[str],
        *,
        adapter: LoraAdapter | None = None,
        cache_salt: str | None = None,
    ) -> int:
        """Write the keys and values of a prompt to a file, for `import_prefix`; compute them first.

        Args:
            prompt: as in `generate`; of its tokens, those that fill whole blocks are written.
            path: of the file, which appears when it is complete.
            adapter: as in `generate`.
            cache_salt: as in `generate`; it stands in the file.

        Returns:
            The number of tokens in the file.

        Raises:
            ValueError, TypeError: as `generate`; the prompt is shorter than a block; or the KV
                cache is not in host memory.
            RuntimeError: other requests took the memory of the KV cache meanwhile.
            OSError: the file cannot be written.
        """
        identity = self._prefix_files.identity
        prompt, params = self.prompt_encoder.completion(
            prompt_content(prompt), SamplingParams(max_tokens=0)
        )
        self.generate([prompt], params, adapter=adapter, cache_salt=cache_salt)
        return export_prefix(self.engine, identity, prompt, path, adapter, cache_salt)

    def import_prefix(
        self,
        path: str | os.PathLike[str],
        *,
        adapter: LoraAdapter | None = None,
        cache_salt: str | None = None,
    ) -> int:
        """Read a file of `export_prefix` into the prefix cache.

        Args:
            path: of the file.
            adapter: of the requests that are to find it there.
            cache_salt: of these requests; that of the file.

        Returns:
            The number of tokens that the cache has now: fewer than in the file if it is too small.

        Raises:
            ValueError: the file is damaged; or other kernels, weights or options than these have
                computed it, so that its bits might differ; or the KV cache is not in host memory.
            OSError: the file cannot be read.
        """
        identity = self._prefix_files.identity
        return import_prefix(self.engine, identity, path, adapter, cache_salt)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, as vLLM's method of this name; outputs do not change by it.

        Requests under way in other threads keep what they have computed, but nobody finds it.

        Returns:
            Whether the whole KV cache is free now: no request holds a part of it.

        Example:
            >>> llm.reset_prefix_cache()  # doctest: +SKIP
            True
        """
        return self.engine.reset_prefix_cache()

    def default_params(self) -> SamplingParams:
        """Greedy, or what the checkpoint's generation_config.json says."""
        return default_params(self.generation_config)

    def close(self) -> None:
        """Abort what runs, in any thread, and give the KV cache's memory back."""
        self.engine.close()
        self.kv_cache.close()

    def __enter__(self) -> LLM:
        """Return the model itself; it is closed at the end of the `with` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def _hidden_states(
        self, token_ids: Sequence[int], adapter: LoraAdapter | None, *, last_only: bool = False
    ) -> np.ndarray:
        self.engine.check_open()
        self.engine.admission.check_files()

        def run(batch: Batch, kv_cache: KVCache) -> np.ndarray:
            with self.engine.owner:  # between two steps
                self.engine.check_open()
                return self.model.hidden_states(batch, kv_cache, last_only=last_only)

        return sequence_hidden_states(
            self.model,
            token_ids,
            hidden_states=run,
            kv_dtype=self.kv_cache.dtype,
            chunk_size=self.engine.scheduler.max_num_batched_tokens,
            adapter=adapter,
        )

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        adapter: LoraAdapter | None,
        cache_salt: str | None,
    ) -> Job:
        prompt, params = self.prompt_encoder.completion(prompt, self._checked(params))
        return self.jobs.submit(prompt, params, adapter=adapter, cache_salt=cache_salt)

    def _checked(self, params: SamplingParams | None) -> SamplingParams:
        params = self.default_params() if params is None else params
        check_params(params, self.config.vocab_size, self.tokenizer is not None)
        return params
