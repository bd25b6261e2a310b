"""One of the n outputs of a request: its tokens, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

from codellama_rt.engine.grammar import Grammar
from codellama_rt.engine.logprobs import Logprob, PromptLogprobs
from codellama_rt.engine.metrics import RequestClock
from codellama_rt.engine.output import Output, last_output
from codellama_rt.engine.sampler import Choice, TokenSampler, choose
from codellama_rt.engine.sampling_params import LogitsProcessor, SamplingParams
from codellama_rt.engine.sequence import Sequence
from codellama_rt.engine.speculation import Drafter
from codellama_rt.engine.stop_strings import TextStream, Tokenizer


class Asked(Protocol):
    """What was asked for, the same for all samples of a request; attributes as of `Request`."""

    request_id: str
    params: SamplingParams
    seed: int
    max_len: int
    end_ids: Collection[int]
    stop_names: Mapping[int, str]
    vocab_size: int
    tokenizer: Tokenizer | None
    bad_runs: Collection[list[int]]
    prompt_logprobs: PromptLogprobs | None
    clock: RequestClock
    grammar: Grammar | None
    processors: Collection[LogitsProcessor]


class Sample:
    """One of a request's n outputs."""

    def __init__(self, request: Asked, sequence: Sequence) -> None:
        """Start after the prompt.

        Args:
            request: what was asked for.
            sequence: the sample's tokens.
        """
        self.request = request
        self.sequence = sequence
        self.index = sequence.order[-1]
        self.num_steps = 0
        self.num_drafted = self.num_accepted = 0  # tokens proposed, and taken
        self.drafter: Drafter | None = None
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

    @property
    def has_grammar(self) -> bool:
        """Whether a grammar constrains its tokens."""
        return self.request.grammar is not None

    def take(self, choice: Choice | Exception, now: float) -> Output:
        """Accept what `choose` has chosen; raise it if it is an exception."""
        if isinstance(choice, Exception):
            raise choice
        return self.accept(choice.token_id, now, choice.logprobs)

    def accept(
        self, token_id: int, now: float, logprobs: dict[int, Logprob] | None = None
    ) -> Output:
        """Append a chosen token.

        Args:
            token_id: the token.
            now: when it was chosen.
            logprobs: if asked for.

        Returns:
            The token, its text, and whether and why it was the last one.

        Raises:
            Exception: of the grammar or the tokenizer.
        """
        request, sequence = self.request, self.sequence
        sequence.token_ids.append(token_id)
        length = len(sequence.token_ids)
        if self.sampler.has_memory:
            self.sampler.record(token_id)
        output = Output(
            request.request_id,
            self.index,
            [token_id],
            "",
            None if logprobs is None else [logprobs],
            clock=request.clock,
            made=now,
            before=self.last_token,
            output_tokens=length - sequence.prompt_len,
            steps=self.num_steps,
            draft_tokens=self.num_drafted,
            accepted_tokens=self.num_accepted,
        )
        if length == sequence.prompt_len + 1:
            output.prompt_logprobs = request.prompt_logprobs
        if self._stream is not None or length >= request.max_len or token_id in request.end_ids:
            self._read(token_id, output.output_tokens >= request.params.min_tokens, output)
            self.is_finished = output.finished
        return output

    def accept_draft(self, draft: Collection[int], logits: np.ndarray, now: float) -> Output:
        """Choose a token after the last one, and further ones for as long as they were proposed.

        Args:
            draft: the tokens that were proposed.
            logits: (1 + len(draft), vocab_size) float32 after the sample's last token and those.
            now: when they were computed.

        Returns:
            All of them as one output; each is the token that would come without a draft.

        Raises:
            Exception: of the first token; at a later one the output ends before it.
        """
        first, gained, choices = len(self.sequence.token_ids), None, []
        if not self.sampler.has_memory:  # else what comes after a token depends on it
            count = len(logits)
            choices = choose([self.sampler] * count, logits, range(first, first + count))
        for i, proposed in enumerate([*draft, None]):
            choice = choices[i] if choices else choose([self.sampler], logits, [first + i], [i])[0]
            if gained is not None and isinstance(choice, Exception):
                break  # it is met again as a first one
            output = self.take(choice, now)
            if gained is None:
                gained = output
            else:
                gained.add(output)
            if output.finished or choice.token_id != proposed:
                break
        return gained

    def end(self, reason: str, error: Exception | None = None) -> Output:
        """Return the last output of a sample that is ended from outside: "abort" or "error"."""
        text = "" if error is not None or self._stream is None else self._stream.flush()
        return last_output(self.request.request_id, self.index, reason, text, error)

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
