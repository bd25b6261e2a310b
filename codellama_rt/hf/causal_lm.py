"""The Transformers-style surface: `LlamaForCausalLM.from_pretrained(...).generate(tensor)`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.checkpoint.formats.generation_config import rejected
from codellama_rt.checkpoint.formats.hf_writer import write_directory
from codellama_rt.engine.branches import Branches
from codellama_rt.engine.request_checks import check_token_id
from codellama_rt.hf import CausalLMOutput, GenerateOutput, GenerationConfig
from codellama_rt.hf.arguments import CALL, FROM_PRETRAINED, GENERATE, supported
from codellama_rt.hf.beam_search import beam_search
from codellama_rt.hf.llama_config import LlamaConfig
from codellama_rt.hf.model_idioms import ModelIdioms
from codellama_rt.hf.processors import LogitsProcessor, make_processors
from codellama_rt.hf.sample import sample
from codellama_rt.hf.search import (
    AllowedTokens,
    Found,
    Search,
    StoppingCriterion,
    padded_rows,
    time_limit,
)
from codellama_rt.hf.tensors import as_mask, as_rows, dtype_name, label_loss, to_tensor
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.memory import parse_bytes
from codellama_rt.model.lora import LoraAdapter
from codellama_rt.text.tokenizer import Tokenizer
from codellama_rt.text.tokenizer.save_tokenizer import save_tokenizer

_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "paged_attention")


class LlamaForCausalLM(ModelIdioms):
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
        """Wrap an LLM; use `from_pretrained` to open a checkpoint."""
        self.llm = llm
        self.config = LlamaConfig(**vars(llm.config))
        try:
            self.generation_config = GenerationConfig.from_dict(llm.generation_config)
        except (ValueError, TypeError) as error:  # values that contradict one another
            raise rejected(llm.path, error) from None
        self._stored_ends = self.generation_config.eos_token_id
        self._adapters: dict[str, LoraAdapter] = {}
        self._adapter: LoraAdapter | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        dtype: Any = None,
        mindspore_dtype: Any = None,
        ms_dtype: Any = None,
        torch_dtype: Any = None,
        attn_implementation: str | None = None,
        **llm_options: Any,
    ) -> LlamaForCausalLM:
        """Open a checkpoint.

        Args:
            model: directory, GGUF file, built-in name or hub id.
            dtype: "auto", "float32", "float16", "bfloat16", or MindSpore's own (`ms.bfloat16`);
                mindspore_dtype, ms_dtype and torch_dtype are other names for it.
            attn_implementation: one of Transformers' names, accepted for compatibility: there is
                one implementation, paged attention, and the tokens are the same under every name.
            **llm_options: options of `LLM`. Arguments of Transformers that change nothing here are
                ignored with a warning.

        Raises:
            CheckpointError, ValueError, TypeError, RuntimeError: as for `LLM`; or two dtypes, or an
                argument of Transformers whose effect is not supported.
        """
        llm_options = supported("from_pretrained()", llm_options, FROM_PRETRAINED)
        if attn_implementation not in (None, *_IMPLEMENTATIONS):
            raise ValueError(
                f"attn_implementation must be one of {', '.join(_IMPLEMENTATIONS)}, got "
                f"{attn_implementation!r}"
            )
        given = [d for d in (dtype, mindspore_dtype, ms_dtype, torch_dtype) if d is not None]
        if len(given) > 1:
            raise TypeError(f"dtype is given {len(given)} times, under different names")
        return cls(LLM(model, dtype=dtype_name(given[0] if given else "auto"), **llm_options))

    def __call__(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        labels: Any = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        **others: Any,
    ) -> CausalLMOutput:
        """Compute the logits after every token, and the loss if labels are given.

        Args:
            input_ids: (batch, length) Tensor of int32 or int64.
            attention_mask: (batch, length), 0 where a row is padded, on either side.
            labels: (batch, length) expected token ids, -100 to ignore a position; each is compared
                with the logits before it.
            logits_to_keep: return only those of the last so many positions; 0: of all.
            output_hidden_states: return what the layers pass on as well.
            **others: arguments of Transformers that change nothing here, ignored with a warning.

        Returns:
            `logits`, (batch, length or logits_to_keep, vocab_size) float32, zeros at padding;
            `loss` if labels are given; `hidden_states`, if requested, n_layers + 1 times
            (batch, length, dim) float32, the embeddings first and the last one normalised.

        Raises:
            TypeError, ValueError: a wrong type or shape; an id outside the vocabulary; an argument
                that is not supported.
        """
        unknown = supported("the model", others, CALL)
        if unknown:
            raise TypeError(f"the model has no argument {', '.join(unknown)}")
        rows = as_rows(input_ids)
        mask = as_mask(attention_mask, rows)
        logits = np.zeros((*rows.shape, self.config.vocab_size), np.float32)
        for row, kept, out in zip(rows, mask, logits, strict=True):
            out[kept] = self.llm.logits(row[kept].tolist(), adapter=self._adapter)
        loss = None if labels is None else label_loss(logits, labels)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return CausalLMOutput(
            loss=None if loss is None else to_tensor(loss),
            logits=to_tensor(logits),
            hidden_states=self._hidden_states(rows, mask) if output_hidden_states else None,
        )

    forward = construct = __call__  # Transformers' and MindSpore's names

    def generate(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriterion] | None = None,
        prefix_allowed_tokens_fn: AllowedTokens | None = None,
        *,
        inputs: Any = None,
        attention_mask: Any = None,
        streamer: Any = None,
        tokenizer: Any = None,
        seed: int | None = None,
        **fields: Any,
    ) -> Any:
        """Continue every row; explicit arguments override the configuration.

        Args:
            input_ids: (batch, length) Tensor of int32 or int64; rows are padded on the left. None:
                one row that holds the begin token.
            generation_config: None: the checkpoint's.
            logits_processor: called with (input_ids, scores), NumPy (rows, length) int64 and
                (rows, vocab_size) float64, after the built-in ones; returns scores.
            stopping_criteria: called with (input_ids, scores) after each token; True, or an array
                with one bool per row, ends rows. Scores are those of output_scores, or None.
            prefix_allowed_tokens_fn: called for each row and token with (index of the prompt,
                NumPy (length,) int64); returns the token ids that may come next.
            inputs: another name of input_ids.
            attention_mask: (batch, length), 0 where a row is padded; None: where pad_token_id
                stands, unless that is an end token.
            streamer: gets the prompt by `put`, then each token, then `end()`, also when the call
                raises: its reader may be in another thread; one row, no beams.
            tokenizer: decodes rows to look for stop_strings; None: the checkpoint's own.
            seed: makes sampling repeatable; row i of a batch draws from seed + i.
            **fields: of `GenerationConfig`: max_new_tokens, do_sample, num_beams, ... Arguments of
                Transformers that change nothing here are ignored with a warning.

        Returns:
            Tensor (rows, length + new tokens) in input_ids' dtype, prompts and continuations; a
            GenerateOutput if return_dict_in_generate. The default end tokens are the checkpoint's,
            and <EOT> in a row that asks for infilling; eos_token_id=None or [] means none.

        Raises:
            TypeError: input_ids is not a Tensor of integers, or an unknown argument or one whose
                effect is not supported.
            ValueError: a shape, mask or parameter out of range.
        """
        with _ended(streamer):
            fields = supported("generate()", fields, GENERATE)
            rows = as_rows(self._inputs(input_ids, inputs))
            config = (generation_config or self.generation_config).replaced(**fields)
            is_given = generation_config is not None or "eos_token_id" in fields
            is_given |= self.generation_config.eos_token_id != self._stored_ends
            search = self._search(
                config, rows, attention_mask, config.eos_token_id if is_given else None, tokenizer
            )
            all_ends = frozenset().union(*search.ends)
            search.processors = make_processors(
                config, rows.shape[1], all_ends, search.max_new_tokens
            )
            search.allowed, search.callers_processors = (
                prefix_allowed_tokens_fn,
                logits_processor or (),
            )
            search.criteria = [*(stopping_criteria or ()), *time_limit(config.max_time)]
            search.seed = secrets.randbits(63) if seed is None else seed
            num_rows = len(rows) * config.num_beams * config.num_return_sequences
            if streamer is not None and num_rows > 1:
                raise ValueError(
                    "a streamer shows one row: no batch, beams or num_return_sequences"
                )
            search.streamer = streamer
            with Branches(self.llm.engine) as branches:
                found = (sample if config.num_beams == 1 else beam_search)(search, branches)
            return self._result(search, found, rows.dtype)

    def _inputs(self, input_ids: Any, inputs: Any) -> Any:
        """Return the rows to continue, given under one of their names."""
        if input_ids is not None and inputs is not None:
            raise TypeError("input_ids and inputs are two names of one argument; give one")
        given = inputs if input_ids is None else input_ids
        if given is None and self.config.bos_token_id is None:
            raise ValueError("this model has no begin token to start from; give input_ids")
        return np.array([[self.config.bos_token_id]]) if given is None else given

    def load_adapter(self, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
        """Load a LoRA adapter in PEFT's format and apply it from now on.

        Raises:
            CheckpointError: it is damaged or belongs to another model.
        """
        self._adapters[adapter_name] = self.llm.load_adapter(path)
        self.set_adapter(adapter_name)

    def set_adapter(self, adapter_name: str | None) -> None:
        """Apply another loaded adapter from now on; None: no adapter.

        Raises:
            ValueError: no adapter of this name is loaded.
        """
        if adapter_name is not None and adapter_name not in self._adapters:
            raise ValueError(
                f"no adapter {adapter_name!r} is loaded; loaded: {sorted(self._adapters)}"
            )
        self._adapter = None if adapter_name is None else self._adapters[adapter_name]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write a directory for `from_pretrained`, also that of Transformers.

        It holds safetensors, configuration and tokenizer.

        Args:
            save_directory: created if it does not exist; files in it are replaced.
            max_shard_size: maximum bytes per file of weights, an int or a str like "2GB".

        Raises:
            ValueError: the weights are quantised, or config.json cannot express the RoPE scaling.
            OSError: a file cannot be written.
            CheckpointError: a file of the model has been written or cut since it was opened.
        """
        self.llm.engine.admission.check_files()
        write_directory(
            Path(save_directory),
            self.config,
            self.llm.model.weights,
            max_shard_bytes=parse_bytes(max_shard_size),
        )
        self.llm.engine.admission.check_files()
        self.generation_config.save_pretrained(save_directory)
        if self.llm.tokenizer is not None:
            save_tokenizer(self.llm.tokenizer, Path(save_directory), self.llm.chat_template)

    def _hidden_states(self, rows: np.ndarray, mask: np.ndarray) -> tuple[Any, ...]:
        """Return the states of every layer, Tensors (batch, length, dim), zeros at padding."""
        shape = (self.config.n_layers + 1, *rows.shape, self.config.dim)
        states = np.zeros(shape, np.float32)
        for i, (row, kept) in enumerate(zip(rows, mask, strict=True)):
            states[:, i, kept] = self.llm.hidden_states(row[kept].tolist(), adapter=self._adapter)
        return tuple(map(to_tensor, states))

    def _search(
        self,
        config: GenerationConfig,
        rows: np.ndarray,
        attention_mask: Any,
        ends: tuple[int, ...] | None,
        tokenizer: Any,
    ) -> Search:
        """Return the search for continuations that end with `ends` (None: the checkpoint's)."""
        vocab_size = self.config.vocab_size
        all_ends = self.llm.engine.admission.eos_token_ids if ends is None else ends
        if attention_mask is None and config.pad_token_id not in (None, *all_ends):
            attention_mask = rows != config.pad_token_id
        mask = as_mask(attention_mask, rows)
        if not mask[:, -1].all():
            raise ValueError(
                "rows to continue must be padded on the left; set the tokenizer's padding_side to "
                "'left'"
            )
        prompts = [row[kept].tolist() for row, kept in zip(rows, mask, strict=True)]
        pad_id = config.pad_token_id
        if pad_id is None:
            pad_id = next(iter(ends or self.llm.engine.admission.eos_token_ids), 0)
        for token_id in ends or ():
            check_token_id(token_id, vocab_size, "eos_token_id")
        check_token_id(pad_id, vocab_size, "pad_token_id")
        reader = self._reader(tokenizer) if config.stop_strings else None
        named = [reader.control_id(name) for name in config.stop_strings]  # they have no text
        return Search(
            config,
            prompts,
            rows.astype(np.int64),
            [
                frozenset((*(self._usual_ends(prompt) if ends is None else ends), *named))
                & frozenset(range(vocab_size))
                for prompt in prompts
            ],
            pad_id,
            config.new_tokens(rows.shape[1]),
            self.llm.max_model_len,
            tokenizer=reader,
            adapter=self._adapter,
        )

    def _reader(self, tokenizer: Any) -> Tokenizer:
        """Return the tokenizer that decodes rows: the caller's, or the checkpoint's own."""
        if tokenizer is None and self.llm.tokenizer is None:
            raise ValueError("stop_strings need a tokenizer, and this checkpoint has none")
        found = self.llm.tokenizer if tokenizer is None else getattr(tokenizer, "runtime", None)
        if not isinstance(found, Tokenizer):
            raise TypeError(
                f"tokenizer must be a CodeLlamaTokenizer, got {type(tokenizer).__name__}"
            )
        found.pad_vocabulary(self.config.vocab_size)
        return found

    def _usual_ends(self, prompt: list[int]) -> tuple[int | None, ...]:
        """Return the checkpoint's end tokens, and <EOT> for a prompt that asks for infilling."""
        ends, tokenizer = self.llm.engine.admission.eos_token_ids, self.llm.tokenizer
        return ends if tokenizer is None else (*ends, tokenizer.filling_end(prompt))

    @staticmethod
    def _result(search: Search, found: Found, dtype: np.dtype) -> Any:
        """Return the value that `generate` returns."""
        new = padded_rows(found.rows, search.pad_id)
        sequences = to_tensor(np.hstack([search.padded[found.parents], new]).astype(dtype))
        if not search.config.return_dict_in_generate:
            return sequences
        beams = None if found.beams is None else padded_rows(found.beams, -1).astype(np.int32)
        best = found.sequences_scores
        return GenerateOutput(
            sequences=sequences,
            scores=tuple(map(to_tensor, found.scores)) or None,
            logits=tuple(map(to_tensor, found.logits)) or None,
            sequences_scores=None if best is None else to_tensor(np.float32(best)),
            beam_indices=None if beams is None else to_tensor(beams),
        )


@contextmanager
def _ended(streamer: Any) -> Iterator[None]:
    """End a streamer, if it is one, whatever happens."""
    try:
        yield
    finally:
        if hasattr(streamer, "end"):
            streamer.end()
