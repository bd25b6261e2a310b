"""A request in the engine: its samples, when each one ends, and its outputs."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from numbers import Integral
from time import perf_counter

import numpy as np

from codellama_rt.engine.grammar import Grammar
from codellama_rt.engine.logprobs import Logprob, PromptLogprobs
from codellama_rt.engine.metrics import RequestClock, RequestMetrics
from codellama_rt.engine.sampler import Choice, TokenSampler, choose
from codellama_rt.engine.sampling_params import LogitsProcessor, SamplingParams
from codellama_rt.engine.sequence import Chunk, Sequence, int32_list
from codellama_rt.engine.stop_strings import (
    TextStream,
    Tokenizer,
    bad_word_runs,
    control_tokens,
)


@dataclass(slots=True)
class Output:
    """What one sample of one request gained in a step.

    Args:
        request_id: as given to `add_request`.
        index: which of the request's n samples.
        token_ids: new tokens, including one that ended the output.
        text: new text that is final; without stop strings, stop tokens and special tokens, unless
            the parameters say otherwise.
        logprobs: one dict per new token, or None if not asked for.
        prompt_logprobs: with a sample's first output, if asked for; one entry per prompt token.
        finished: whether this is the sample's last output.
        finish_reason: "stop" | "length" | "abort" | "error" when finished.
        stop_reason: the token id or the string that stopped it.
        error: the exception when `finish_reason` is "error".
        metrics: times and counts of the request and the sample so far.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    finished: bool = False
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None
    metrics: RequestMetrics | None = None


class Request:
    """n samples of one prompt. The first computes the prompt; the others fork from it."""

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        sequence: Sequence,
        *,
        seed: int,
        max_len: int,
        eos_token_ids: Iterable[int],
        vocab_size: int,
        tokenizer: Tokenizer | None,
        inbox: deque[Output] | None = None,
        grammar: Grammar | None = None,
        processors: Collection[LogitsProcessor] = (),
    ) -> None:
        """Start with the first sample; its first logits add the others.

        Args:
            request_id: unique among the unfinished requests.
            params: how to sample.
            sequence: the prompt.
            seed: of all draws.
            max_len: tokens of prompt and output at which a sample ends.
            eos_token_ids: the model's ends of sequence.
            vocab_size: of the model.
            tokenizer: for the text; None: tokens only.
            inbox: where its outputs go; None: to whoever calls `Engine.step`.
            grammar: of `params.structured_outputs`.
            processors: the engine's, called before the request's own.

        Raises:
            ValueError: a grammar, and no token that ends the output.
        """
        self.request_id = request_id
        self.params = params
        self.seed = seed
        self.max_len = max_len
        self.stop_names = control_tokens(params.stop, tokenizer, vocab_size)
        filling_end = None if tokenizer is None else tokenizer.filling_end(sequence.token_ids)
        ends = [i for i in (*eos_token_ids, filling_end) if i is not None]
        self.end_ids = frozenset(params.stop_token_ids).union(
            self.stop_names, () if params.ignore_eos else ends
        )
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.bad_runs = bad_word_runs(params.bad_words, tokenizer, vocab_size)
        self.prompt_logprobs = None if params.prompt_logprobs is None else PromptLogprobs()
        self.inbox = inbox
        self.clock = RequestClock(perf_counter())
        self.grammar, self.processors = grammar, processors
        if grammar is not None and not self.end_ids:
            raise ValueError(
                "structured_outputs need a token that ends the output; leave ignore_eos off or "
                "give stop_token_ids"
            )
        self.samples = [Sample(self, sequence)]
        self._has_ended = False

    @property
    def is_finished(self) -> bool:
        """Whether every sample has had its last output."""
        is_forked = len(self.samples) == self.params.n
        return self._has_ended or (is_forked and all(s.is_finished for s in self.samples))

    def takes_one_token(self, chunk: Chunk) -> bool:
        """Whether the only thing to do with a chunk's last logits is to choose a token."""
        return chunk.samples and self.params.max_tokens != 0 and len(self.samples) == self.params.n

    def take(
        self,
        sample: Sample,
        chunk: Chunk,
        logits: np.ndarray,
        choice: Choice | Exception | None = None,
    ) -> list[Output]:
        """Use the logits of a chunk's last tokens.

        Args:
            sample: one of this request's; with its first token it creates the other samples.
            chunk: of the sample's sequence.
            logits: (chunk.num_logits, vocab_size) float32.
            choice: of the sample's token by the last of them, if `takes_one_token`; None: choose.

        Returns:
            What the samples gained.

        Raises:
            Exception: of sampling or decoding; the caller goes back by `undo`.
        """
        num_prompt_logits = len(logits) - chunk.samples
        if num_prompt_logits:
            first = chunk.stop - len(logits)
            self._take_prompt_logits(logits[:num_prompt_logits], first)
        if not chunk.samples:
            return []
        if self.params.max_tokens == 0:
            return self._end_prompt(sample)
        forks = [
            Sample(self, sample.sequence.fork(i, first_logit=chunk.stop))
            for i in range(len(self.samples), self.params.n)
        ]
        self.samples += forks
        samples = [sample, *forks]
        choices = [choice]
        if choice is None:
            samplers = [one.sampler for one in samples]
            choices = choose(samplers, logits[-1:], [chunk.stop] * len(samples), [0] * len(samples))
        return [one.accept(its) for one, its in zip(samples, choices, strict=True)]

    def _end_prompt(self, sample: Sample) -> list[Output]:
        """Return the outputs of a request that wanted nothing but its prompt computed."""
        outputs = [_last_output(self.request_id, i, "length") for i in range(self.params.n)]
        outputs[0].prompt_logprobs = self.prompt_logprobs
        sample.is_finished = self._has_ended = True
        return outputs

    def measure(self, outputs: Iterable[Output], now: float) -> None:
        """Give outputs, which are made at `now`, their metrics."""
        prompt_tokens = self.samples[0].sequence.prompt_len
        for output in outputs:
            sample = self.samples[min(output.index, len(self.samples) - 1)]
            output.metrics = self.clock.metrics(
                now,
                sample.last_token if output.token_ids else None,
                prompt_tokens=prompt_tokens,
                output_tokens=sample.sequence.num_generated,
                steps=sample.num_steps,
            )
            if output.token_ids:
                sample.last_token = now

    def undo(self, sample: Sample, num_tokens: int, num_samples: int) -> None:
        """Go back to before `take`: to so many tokens of this sample, and so many samples."""
        del self.samples[num_samples:]
        del sample.sequence.token_ids[num_tokens:]
        sample.restart()
        self._has_ended = False

    def end(self, reason: str) -> list[Output]:
        """Return the last output of each unfinished sample, with the text held back so far."""
        outputs = [sample.end(reason) for sample in self.samples if not sample.is_finished]
        return outputs + self._end_forks(reason)

    def fail(self, sample: Sample, error: Exception) -> list[Output]:
        """Return the last output of a sample, and of all if they waited for this one's prompt."""
        forks = self._end_forks("error", error)
        self._has_ended = bool(forks)
        sample.is_finished = True
        return [sample.end("error", error), *forks]

    def _end_forks(self, reason: str, error: Exception | None = None) -> list[Output]:
        missing = range(len(self.samples), self.params.n)
        return [_last_output(self.request_id, i, reason, error=error) for i in missing]

    def _take_prompt_logits(self, logits: np.ndarray, first_position: int) -> None:
        """Record the log-probabilities of the prompt's tokens after the given positions.

        Args:
            logits: (rows, vocab_size) float32 of consecutive prompt tokens.
            first_position: of the first row's token.
        """
        token_ids = self.samples[0].sequence.token_ids
        self.prompt_logprobs.truncate(first_position + 1)  # what an exception has cut short
        after = token_ids[first_position + 1 : first_position + 1 + len(logits)]
        self.prompt_logprobs.extend(logits, after, self.params.prompt_logprobs)


class Sample:
    """One of a request's n outputs."""

    def __init__(self, request: Request, sequence: Sequence) -> None:
        """Start after the prompt.

        Args:
            request: what was asked for.
            sequence: the sample's tokens.
        """
        self.request = request
        self.sequence = sequence
        self.index = sequence.order[-1]
        self.num_steps = 0
        self.last_token: float | None = None  # when it was chosen
        self.restart()

    def restart(self) -> None:
        """Bring what follows from the tokens to where they are."""
        request, sequence, params = self.request, self.sequence, self.request.params
        prompt_ids = sequence.token_ids[: sequence.prompt_len]
        grammar = None
        if request.grammar is not None:
            drops_lead = params.skip_special_tokens and request.tokenizer.begins_text(prompt_ids)
            grammar = request.grammar.start(request.end_ids, drops_lead=drops_lead)
        self.sampler = TokenSampler(
            params,
            request.seed,
            self.index,
            prompt_ids,
            request.vocab_size,
            request.end_ids,
            request.request_id,
            request.bad_runs,
            grammar,
            request.processors,
        )
        self._stream = None
        if request.tokenizer is not None:
            detokenizer = request.tokenizer.detokenizer(
                prompt_ids, skip_special_tokens=params.skip_special_tokens
            )
            keeps_stop = params.include_stop_str_in_output
            self._stream = TextStream(detokenizer, params.stop, keeps_stop=keeps_stop)
        for i, token_id in enumerate(sequence.token_ids[sequence.prompt_len :], start=1):
            self.sampler.record(token_id)
            if self._stream is not None:
                self._stream.push(token_id, may_stop=i >= params.min_tokens)
        self.is_finished = False

    def prepare(self) -> None:
        """Begin to compute what `accept` needs besides logits, while the model computes those."""
        self.sampler.prepare()

    def accept(self, choice: Choice | Exception) -> Output:
        """Append a token that `choose` has chosen.

        Returns:
            The token, its text, and whether and why it was the last one.

        Raises:
            Exception: there is no token, for this reason; or of the grammar or the tokenizer.
        """
        if isinstance(choice, Exception):
            raise choice
        sequence, params = self.sequence, self.request.params
        num_generated = sequence.num_generated
        token_id = choice.token_id
        sequence.token_ids.append(token_id)
        self.sampler.record(token_id)
        output = Output(self.request.request_id, self.index, [token_id], "")
        if choice.logprobs is not None:
            output.logprobs = [choice.logprobs]
        if num_generated == 0:
            output.prompt_logprobs = self.request.prompt_logprobs
        self._read(token_id, num_generated + 1 >= params.min_tokens, output)
        self.is_finished = output.finished
        return output

    def end(self, reason: str, error: Exception | None = None) -> Output:
        """Return the last output of a sample that is ended from outside: "abort" or "error"."""
        text = "" if error is not None or self._stream is None else self._stream.flush()
        return _last_output(self.request.request_id, self.index, reason, text, error)

    def _read(self, token_id: int, may_stop: bool, output: Output) -> None:
        """Fill in the text of a new token, and whether it ends the output."""
        if token_id in self.request.end_ids and may_stop:
            name = self.request.stop_names.get(token_id)
            output.finish_reason, output.stop_reason = "stop", token_id if name is None else name
            if self.request.params.include_stop_str_in_output and self._stream is not None:
                if name is None:
                    output.text, _ = self._stream.push(token_id, may_stop=False)
                else:  # as the caller has written it
                    output.text = self._stream.flush() + name
        elif self._stream is not None:
            output.text, stop = self._stream.push(token_id, may_stop=may_stop)
            if stop is not None:
                output.finish_reason, output.stop_reason, output.finished = "stop", stop, True
                return  # nothing after a stop string is part of the text
        if output.finish_reason is None and len(self.sequence.token_ids) >= self.request.max_len:
            output.finish_reason = "length"
        if output.finish_reason is not None:
            output.finished = True
            if self._stream is not None:
                output.text += self._stream.flush()


def _last_output(
    request_id: str, index: int, reason: str, text: str = "", error: Exception | None = None
) -> Output:
    return Output(request_id, index, [], text, finished=True, finish_reason=reason, error=error)


def checked_prompt(prompt_token_ids: object, vocab_size: int) -> array:
    """Return the prompt as an int32 list.

    Args:
        prompt_token_ids: a list or a 1-D integer array.
        vocab_size: of the model.

    Raises:
        TypeError: not integers.
        ValueError: empty, or a token outside the vocabulary.
    """
    if isinstance(prompt_token_ids, np.ndarray):
        prompt_token_ids = prompt_token_ids.tolist()
    if not isinstance(prompt_token_ids, (list, tuple, array)):
        kind = type(prompt_token_ids).__name__
        raise TypeError(f"prompt_token_ids must be a list of int, got {kind}; encode text first")
    if not prompt_token_ids:
        raise ValueError("prompt_token_ids must hold at least one token, got none; begin with BOS")
    if set(map(type, prompt_token_ids)) != {int}:
        for position, token_id in enumerate(prompt_token_ids):
            if not isinstance(token_id, Integral) or isinstance(token_id, bool):
                kind = type(token_id).__name__
                raise TypeError(f"prompt_token_ids[{position}] must be an int, got {kind}")
    if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= vocab_size:
        for position, token_id in enumerate(prompt_token_ids):
            check_token_id(token_id, vocab_size, f"prompt_token_ids[{position}]")
    return int32_list(map(int, prompt_token_ids))


def check_params(params: SamplingParams, vocab_size: int, has_tokenizer: bool) -> None:
    """Check what SamplingParams alone cannot check.

    Raises:
        TypeError: not SamplingParams.
        ValueError: a token outside the vocabulary, or what needs a tokenizer without one.
    """
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
    ids: Collection[int] = params.stop_token_ids
    for i, token_id in enumerate(ids):
        check_token_id(token_id, vocab_size, f"stop_token_ids[{i}]")
    for i, token_id in enumerate(params.allowed_token_ids or ()):
        check_token_id(token_id, vocab_size, f"allowed_token_ids[{i}]")
    for token_id in params.logit_bias or ():
        check_token_id(token_id, vocab_size, f"logit_bias[{token_id}]")
    if params.stop and not has_tokenizer:
        raise ValueError("stop strings need a tokenizer; give the engine one or use stop_token_ids")
    if params.bad_words and not has_tokenizer:
        raise ValueError("bad_words need a tokenizer; give the engine one or use logit_bias")
    if params.structured_outputs is not None and not has_tokenizer:
        raise ValueError("structured_outputs need a tokenizer; give the engine one")


def check_token_id(token_id: int, vocab_size: int, name: str) -> None:
    """Raise ValueError if a token is outside the vocabulary."""
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"{name} must be a token id in [0, {vocab_size}), got {token_id}")
