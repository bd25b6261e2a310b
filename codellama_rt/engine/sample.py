"""One of the n outputs of a request: its tokens, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import numpy as np

from codellama_rt.engine.grammar import Grammar
from codellama_rt.engine.logprobs import PromptLogprobs
from codellama_rt.engine.metrics import RequestClock
from codellama_rt.engine.output import Output, extend_output, last_output
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
        self.last_token: float | None = None  # when it was chosen
        self.drafter: Drafter | None = None
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

    @property
    def has_text(self) -> bool:
        """Whether its tokens become text."""
        return self._stream is not None

    @property
    def text_of(self) -> Callable[[int], str] | None:
        """What takes a token that ends nothing and returns its text; None: stops are looked for."""
        return None if self._stream is None else self._stream.text_of

    def accept(self, choice: Choice | Exception) -> Output:
        """Append a token that `choose` has chosen.

        Returns:
            The token, its text, and whether and why it was the last one.

        Raises:
            Exception: there is no token, for this reason; or of the grammar or the tokenizer.
        """
        if isinstance(choice, Exception):
            raise choice
        request, sequence, token_id = self.request, self.sequence, choice.token_id
        sequence.token_ids.append(token_id)
        self.sampler.record(token_id)
        output = Output(request.request_id, self.index, [token_id], "")
        if choice.logprobs is not None:
            output.logprobs = [choice.logprobs]
        if sequence.num_generated == 1:
            output.prompt_logprobs = request.prompt_logprobs
        self.read(token_id, output)
        return output

    def accept_draft(self, draft: Collection[int], logits: np.ndarray) -> Output:
        """Choose a token after the last one, and further ones for as long as they were proposed.

        Args:
            draft: the tokens that were proposed.
            logits: (1 + len(draft), vocab_size) float32 after the sample's last token and those.

        Returns:
            All of them as one output; each is the token that would come without a draft.

        Raises:
            Exception: of the first token, or in taking any; the caller goes back by `undo`.
        """
        first, gained, choices = len(self.sequence.token_ids), None, []
        if not self.sampler.has_memory:  # else what comes after a token depends on it
            count = len(logits)
            choices = choose([self.sampler] * count, logits, range(first, first + count))
        for i, proposed in enumerate([*draft, None]):
            choice = choices[i] if choices else choose([self.sampler], logits, [first + i], [i])[0]
            if gained is not None and isinstance(choice, Exception):
                break  # it is met again as a first one
            output = self.accept(choice)
            if gained is None:
                gained = output
            else:
                extend_output(gained, output)
            if output.finished or choice.token_id != proposed:
                break
        return gained

    def end(self, reason: str, error: Exception | None = None) -> Output:
        """Return the last output of a sample that is ended from outside: "abort" or "error"."""
        text = "" if error is not None or self._stream is None else self._stream.flush()
        return last_output(self.request.request_id, self.index, reason, text, error)

    def read(self, token_id: int, output: Output) -> bool:
        """Fill in the text of a token that was appended, and whether it ends the output."""
        request, stream, sequence = self.request, self._stream, self.sequence
        stop = None
        if token_id in request.end_ids and self._may_stop():
            name = request.stop_names.get(token_id)
            output.finish_reason, output.stop_reason = "stop", token_id if name is None else name
            if request.params.include_stop_str_in_output and stream is not None:
                if name is None:
                    output.text, _ = stream.push(token_id, may_stop=False)
                else:  # as the caller has written it
                    output.text = stream.flush() + name
        elif stream is not None:
            output.text, stop = stream.push(token_id, may_stop=self._may_stop())
            if stop is not None:
                output.finish_reason, output.stop_reason = "stop", stop
        if output.finish_reason is None:
            if len(sequence.token_ids) < request.max_len:
                return False
            output.finish_reason = "length"
        output.finished = self.is_finished = True
        if stream is not None and stop is None:  # nothing after a stop string is part of the text
            output.text += stream.flush()
        return True

    def _may_stop(self) -> bool:
        return self.sequence.num_generated >= self.request.params.min_tokens
