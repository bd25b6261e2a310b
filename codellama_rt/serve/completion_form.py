"""The answers of /v1/completions: the same choices, whole or as the events of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from codellama_rt.engine.output import Output
from codellama_rt.serve.generation import Gained, Generation
from codellama_rt.serve.protocol import CompletionRequest, Sampling
from codellama_rt.serve.token_texts import TokenTexts, likelihood


class CachedTokens(Struct):
    """How many of the prompt's tokens were not computed again."""

    cached_tokens: int


class Usage(Struct):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Logprobs(Struct):
    """Log-probabilities, an entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(Struct, kw_only=True):
    """What one sample gained."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: Any = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionAnswer(Struct, kw_only=True):
    """A completion, or an event of one."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET
    prompt_progress: dict[str, int] | UnsetType = UNSET


def usage_of(generation: Generation) -> Usage:
    """Return the counts as of now."""
    prompt, output = generation.num_prompt_tokens, generation.num_output_tokens
    cached = CachedTokens(generation.num_cached_tokens)
    return Usage(prompt, output, prompt + output, cached)


class StreamUsage:
    """Where a stream brings its counts: in each event, in one after the last, or nowhere."""

    def __init__(self, wanted: Sampling, generation: Generation) -> None:
        """Take what the request asks for."""
        options = wanted.stream_options
        self._at_end = bool(options and options.include_usage)
        self._always = bool(options and options.continuous_usage_stats)
        self._generation = generation

    def of_event(self) -> Usage | UnsetType | None:
        """Return the usage of an event: where one comes at the end, OpenAI has null before."""
        if self._always:
            return usage_of(self._generation)
        return None if self._at_end else UNSET

    def at_end(self) -> Usage | None:
        """Return that of the last event, or None for no such event."""
        return usage_of(self._generation) if self._at_end else None


class CompletionForm:
    """Make the answers to one request.

    Args:
        wanted: the request.
        tokenizer: None: texts of tokens are empty.
        generation: whose tokens are counted.
        prompts: token ids of each.
        head: id, model and created of all events.
    """

    def __init__(
        self,
        wanted: CompletionRequest,
        tokenizer: Any,
        generation: Generation,
        prompts: Sequence[list[int]],
        **head: Any,
    ) -> None:
        self._wanted, self._generation, self._prompts = wanted, generation, prompts
        self._texts = TokenTexts(tokenizer, as_ids=bool(wanted.return_tokens_as_token_ids))
        self._tokenizer, self._head = tokenizer, head
        self._usage = StreamUsage(wanted, generation)
        self._offsets: dict[int, int] = {}  # of the next token, by choice
        self._begun: set[int] = set()
        self._prompt_logprobs: dict[int, Any] = {}  # by prompt
        self._n = wanted.n or 1

    def whole(self, gained: Gained) -> CompletionAnswer:
        """Return the answer to a request that is not streamed."""
        usage = usage_of(self._generation)
        if self._wanted.best_of:
            gained = best(gained, self._wanted.n or 1)
        return CompletionAnswer(**self._head, choices=self._choices(gained), usage=usage)

    def chunks(self, gained: Gained) -> list[CompletionAnswer]:
        """Return an event per sample that has something to tell."""
        usage = self._usage.of_event()
        return [
            CompletionAnswer(**self._head, choices=[choice], usage=usage)
            for choice in self._choices(gained)
            if choice.text or choice.finish_reason or choice.logprobs or choice.token_ids
        ]

    def last(self) -> list[CompletionAnswer]:
        """Return the event of the usage, if it is wanted."""
        usage = self._usage.at_end()
        return [] if usage is None else [CompletionAnswer(**self._head, choices=[], usage=usage)]

    def progress(self) -> CompletionAnswer | None:
        """Return an event that says how far the prompt is."""
        progress = self._generation.progress()
        if progress is None:
            return None
        usage = self._usage.of_event()
        return CompletionAnswer(**self._head, choices=[], usage=usage, prompt_progress=progress)

    def _choices(self, gained: Gained) -> list[Choice]:
        return [self._choice(prompt, index, output) for (prompt, index), output in gained.items()]

    def _choice(self, prompt: int, index: int, output: Output) -> Choice:
        wanted, number = self._wanted, prompt * self._n + index
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = output.prompt_logprobs
        is_first = number not in self._begun
        self._begun.add(number)
        choice = Choice(
            index=number,
            text=output.text,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        logprobs = self._logprobs(prompt, number, output, with_prompt=is_first and wanted.echo)
        if wanted.echo and is_first:
            choice.text = self._prompt_text(prompt) + choice.text
        choice.logprobs = logprobs
        if wanted.return_token_ids:
            choice.token_ids = output.token_ids
            choice.prompt_token_ids = self._prompts[prompt] if is_first else UNSET
        if wanted.prompt_logprobs is not None and prompt in self._prompt_logprobs:
            choice.prompt_logprobs = self._texts.named(self._prompt_logprobs[prompt])
        return choice

    def _prompt_text(self, prompt: int) -> str:
        given = self._wanted.prompt
        if isinstance(given, str):
            return given
        if isinstance(given[prompt], str):
            return given[prompt]
        return "" if self._tokenizer is None else self._tokenizer.decode(self._prompts[prompt])

    def _logprobs(
        self, prompt: int, number: int, output: Output, *, with_prompt: bool | None
    ) -> Logprobs | None:
        if self._wanted.logprobs is None:
            return None
        ids, rows = output.token_ids, output.logprobs or [None] * len(output.token_ids)
        if with_prompt:
            before = self._prompt_logprobs.get(prompt, [None] * len(self._prompts[prompt]))
            ids, rows = [*self._prompts[prompt], *ids], [*before, *rows]
        found, offset = Logprobs([], [], [], []), self._offsets.get(number, 0)
        for token_id, row in zip(ids, rows, strict=True):
            text = self._texts[token_id]
            found.tokens.append(text)
            found.token_logprobs.append(None if row is None else likelihood(row[token_id]))
            found.top_logprobs.append(None if row is None else self._texts.by_text(row))
            found.text_offset.append(offset)
            offset += len(text)
        self._offsets[number] = offset
        return found


def best(gained: Gained, n: int) -> Gained:
    """Return the n samples of each prompt whose tokens are the likeliest on average."""
    kept: Gained = {}
    for prompt in sorted({prompt for prompt, _ in gained}):
        outputs = [output for (its, _), output in gained.items() if its == prompt]
        for index, output in enumerate(sorted(outputs, key=_mean_logprob, reverse=True)[:n]):
            kept[prompt, index] = replace(output, index=index)
    return kept


def _mean_logprob(output: Output) -> float:
    rows = zip(output.token_ids, output.logprobs or [], strict=False)
    chosen = [row[token_id].logprob for token_id, row in rows]
    return sum(chosen) / len(chosen) if chosen else 0.0
