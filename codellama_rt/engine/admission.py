"""What is checked of a request, and made of it, before it has its turn on the engine."""

from __future__ import annotations

import itertools
import math
import secrets
from array import array
from collections import deque
from collections.abc import Callable, Collection, Mapping
from numbers import Real

from codellama_rt.engine.grammar import Grammars
from codellama_rt.engine.output import Output
from codellama_rt.engine.request import Request
from codellama_rt.engine.request_checks import check_params, checked_prompt
from codellama_rt.engine.sampling_params import (
    LogitsProcessor,
    SamplingParams,
    checked_processors,
)
from codellama_rt.engine.scheduler import Scheduler
from codellama_rt.engine.sequence import CacheSalt, Sequence
from codellama_rt.engine.stop_strings import Tokenizer, end_token_ids
from codellama_rt.model.interface import Decoder
from codellama_rt.model.lora import LoraAdapter, check_adapter


class Admission:
    """Make the requests and sequences of an engine; may be used in any thread, without waiting."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None,
        scheduler: Scheduler,
        max_model_len: int,
        *,
        generation_config: Mapping | None,
        check_files: Callable[[], None] | None,
        logits_processors: Collection[LogitsProcessor],
    ) -> None:
        """Take the engine's parts; arguments are those of `Engine`."""
        if max_model_len < 2:
            raise ValueError(f"max_model_len must be >= 2 (one in, one out), got {max_model_len}")
        self.max_model_len = max_model_len
        self.check_files = check_files or (lambda: None)
        self._model, self._tokenizer, self._scheduler = model, tokenizer, scheduler
        self.eos_token_ids = end_token_ids(model.config, generation_config or {}, tokenizer)
        self._processors = checked_processors(logits_processors)
        self._grammars = Grammars(tokenizer, model.config.vocab_size)
        self._adapter_numbers: dict[LoraAdapter, int] = {}  # never reused: blocks outlive requests
        self._numbers = itertools.count(1)
        # How many leading blocks of a sequence are on disk; None: prefixes are not kept there.
        self.num_stored_blocks: Callable[[Sequence], int] | None = None
        scaling = model.config.rope_scaling
        self.has_dynamic_rope = scaling is not None and scaling.depends_on_length

    def make_request(
        self,
        request_id: str,
        prompt_token_ids: Collection[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: LoraAdapter | None = None,
        cache_salt: str | None = None,
        inbox: deque[Output] | None = None,
    ) -> Request:
        """Check a request and return it for `Engine.submit`.

        Arguments and errors are those of `Engine.add_request`.
        """
        _check_names(request_id, priority)
        params = SamplingParams() if params is None else params
        vocab_size = self._model.config.vocab_size
        check_params(params, vocab_size, self._tokenizer is not None)
        token_ids = checked_prompt(prompt_token_ids, vocab_size)
        self.check_length(len(token_ids), generates=params.max_tokens != 0)
        self._scheduler.check_length(len(token_ids))
        sequence = self.make_sequence(token_ids, (priority, 0, 0), adapter, cache_salt)
        if params.prompt_logprobs is not None:
            sequence.first_logit = 0
        if self.num_stored_blocks is not None:
            sequence.num_stored_blocks = self.num_stored_blocks(sequence)
        wanted = params.structured_outputs
        return Request(
            request_id,
            params,
            sequence,
            max_len=self._max_len(sequence.prompt_len, params),
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            eos_token_ids=self.eos_token_ids,
            vocab_size=vocab_size,
            tokenizer=self._tokenizer,
            inbox=inbox,
            grammar=None if wanted is None else self._grammars.get(wanted),
            processors=self._processors,
        )

    def make_sequence(
        self,
        token_ids: array,
        order: tuple[int, int, int],
        adapter: LoraAdapter | None = None,
        cache_salt: str | None = None,
    ) -> Sequence:
        """Return a prompt as a sequence whose last token's logits are needed.

        Raises:
            ValueError: an adapter of another model, or an empty cache_salt.
            TypeError: a cache_salt that is not a str.
            RuntimeError: a file with weights has changed.
        """
        _check_salt(cache_salt)
        self.check_files()
        number = 0
        if adapter is not None:  # its keys and values differ from those of the plain model
            check_adapter(adapter, self._model)
            number = self._adapter_numbers.setdefault(adapter, next(self._numbers))
        salt = CacheSalt(cache_salt, number, self._rope_class(prompt_len := len(token_ids)))
        return Sequence(token_ids, prompt_len, order, prompt_len - 1, salt, adapter)

    def check_length(self, prompt_len: int, *, generates: bool = True) -> None:
        """Raise ValueError if a prompt is too long, or leaves no room for a token it is to have."""
        if prompt_len > self.max_model_len - generates:
            raise ValueError(
                f"prompt of {prompt_len} tokens does not fit max_model_len={self.max_model_len}"
                f"{' with a token to generate' if generates else ''}: "
                f"at most {self.max_model_len - generates}; "
                "shorten the prompt or raise max_model_len"
            )

    def _max_len(self, prompt_len: int, params: SamplingParams) -> int:
        # The last token is never computed, so it needs no room in the cache.
        limit = min(self.max_model_len, self._scheduler.max_computed_tokens + 1)
        return limit if params.max_tokens is None else min(limit, prompt_len + params.max_tokens)

    def _rope_class(self, prompt_len: int) -> int:
        # Under dynamic RoPE scaling the keys of a prompt longer than the trained length depend on
        # its length; such prompts share cached prefixes only with those that are rotated alike.
        return self._model.config.rope_class(prompt_len) if self.has_dynamic_rope else 0


def _check_names(request_id: object, priority: object) -> None:
    if not isinstance(request_id, str) or not request_id:
        raise TypeError(f"request_id must be a non-empty str, got {request_id!r}")
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise TypeError(f"priority must be an int, got {type(priority).__name__}")


def _check_salt(cache_salt: object) -> None:
    if cache_salt is None:
        return
    if not isinstance(cache_salt, str):
        raise TypeError(f"cache_salt must be a str or None, got {type(cache_salt).__name__}")
    if not cache_salt:
        raise ValueError("cache_salt must not be empty; None shares with all that have none")


def checked_seconds(name: str, seconds: object) -> float:
    """Return a limit of time; infinity for None.

    Raises:
        TypeError: not a number.
        ValueError: not above 0.
    """
    if seconds is None:
        return math.inf
    if not isinstance(seconds, Real) or isinstance(seconds, bool):
        raise TypeError(f"{name} must be a number of seconds or None, got {seconds!r}")
    if not seconds > 0:
        raise ValueError(f"{name} must be > 0, got {seconds}; None means no limit")
    return float(seconds)


def checked_tokens(name: str, count: object) -> int | None:
    """Return a limit of tokens, or None.

    Raises:
        TypeError: not an int.
        ValueError: below 1.
    """
    if count is None:
        return None
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name} must be an int or None, got {count!r}")
    if count < 1:
        raise ValueError(f"{name} must be >= 1, got {count}; None means no limit")
    return count
