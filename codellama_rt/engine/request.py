"""A request in the engine: its samples, when each one ends, and its outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from time import perf_counter

import numpy as np

from codellama_rt.engine.grammar import Grammar
from codellama_rt.engine.logprobs import PromptLogprobs
from codellama_rt.engine.metrics import RequestClock
from codellama_rt.engine.output import Output, last_output
from codellama_rt.engine.sample import Sample
from codellama_rt.engine.sampler import choose
from codellama_rt.engine.sampling_params import LogitsProcessor, SamplingParams
from codellama_rt.engine.sequence import Chunk, Sequence
from codellama_rt.engine.stop_strings import Tokenizer, bad_word_runs, control_tokens
from codellama_rt.ops.suffixes import SuffixAutomaton


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
        self.clock = RequestClock(perf_counter(), sequence.prompt_len)
        self.grammar, self.processors = grammar, processors
        if grammar is not None and not self.end_ids:
            raise ValueError(
                "structured_outputs need a token that ends the output; leave ignore_eos off or "
                "give stop_token_ids"
            )
        self.samples = [Sample(self, sequence)]
        self._has_ended = False
        self._prompt_text: SuffixAutomaton | None = None

    @property
    def is_finished(self) -> bool:
        """Whether every sample has had its last output."""
        is_forked = len(self.samples) == self.params.n
        return self._has_ended or (is_forked and all(s.is_finished for s in self.samples))

    def prompt_text(self) -> SuffixAutomaton:
        """Return the prompt as a text in which suffixes are looked for; one for all samples."""
        if self._prompt_text is None:
            sequence, text = self.samples[0].sequence, SuffixAutomaton()
            text.extend(sequence.token_ids[: sequence.prompt_len])
            self._prompt_text = text
        return self._prompt_text

    def takes_one_token(self, chunk: Chunk) -> bool:
        """Whether the only thing to do with a chunk's logits is to choose a token."""
        return (
            chunk.num_logits == 1
            and chunk.samples
            and self.params.max_tokens != 0
            and len(self.samples) == self.params.n
        )

    def take(self, sample: Sample, chunk: Chunk, logits: np.ndarray) -> list[Output]:
        """Use the logits of a chunk's last tokens.

        Args:
            sample: one of this request's; with its first token it creates the other samples.
            chunk: of the sample's sequence.
            logits: (chunk.num_logits, vocab_size) float32.

        Returns:
            What the samples gained.

        Raises:
            Exception: of sampling or decoding; the caller goes back by `undo`.
        """
        num_prompt_logits = len(logits) - len(chunk.draft) - chunk.samples
        if num_prompt_logits:
            first = chunk.stop - len(logits)
            self._take_prompt_logits(logits[:num_prompt_logits], first)
        if not chunk.samples:
            return []
        if chunk.draft:
            return [sample.accept_draft(chunk.draft, logits)]
        if self.params.max_tokens == 0:
            return self._end_prompt(sample)
        forks = [
            Sample(self, sample.sequence.fork(i, first_logit=chunk.stop))
            for i in range(len(self.samples), self.params.n)
        ]
        self.samples += forks
        samples = [sample, *forks]
        samplers = [one.sampler for one in samples]
        choices = choose(samplers, logits[-1:], [chunk.stop] * len(samples), [0] * len(samples))
        return [one.accept(its) for one, its in zip(samples, choices, strict=True)]

    def _end_prompt(self, sample: Sample) -> list[Output]:
        """Return the outputs of a request that wanted nothing but its prompt computed."""
        outputs = [last_output(self.request_id, i, "length") for i in range(self.params.n)]
        outputs[0].prompt_logprobs = self.prompt_logprobs
        sample.is_finished = self._has_ended = True
        return outputs

    def measure(self, outputs: Iterable[Output], now: float) -> None:
        """Note of outputs that are made at `now` when that is, and how far their samples are."""
        for output in outputs:
            sample = self.samples[min(output.index, len(self.samples) - 1)]
            last_token = sample.last_token if output.token_ids else None
            output.measured = (
                self.clock,
                now,
                last_token,
                sample.sequence.num_generated,
                sample.num_steps,
                sample.sequence.num_preemptions,
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
        return [last_output(self.request_id, i, reason, error=error) for i in missing]

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
