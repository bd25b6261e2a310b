"""What a request gains in a step, as its caller gets it."""

from __future__ import annotations

from dataclasses import dataclass, field

from codellama_rt.engine.logprobs import Logprob, PromptLogprobs
from codellama_rt.engine.metrics import Measured, RequestMetrics


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
        measured: what `metrics` is made of.
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
    measured: Measured | None = field(default=None, repr=False)

    @property
    def metrics(self) -> RequestMetrics:
        """Times and counts of the request and the sample so far, computed when asked for."""
        clock, *measured = self.measured
        return clock.metrics(*measured)


def last_output(
    request_id: str, index: int, reason: str, text: str = "", error: Exception | None = None
) -> Output:
    """Return an output without tokens that ends its sample."""
    return Output(request_id, index, [], text, finished=True, finish_reason=reason, error=error)


def joined(outputs: list[Output]) -> list[Output]:
    """Return outputs of one request in their order, those of a sample as one: its first, longer."""
    if len(outputs) == 1:
        return outputs
    by_sample: dict[int, Output] = {}
    for output in outputs:
        first = by_sample.setdefault(output.index, output)
        if first is not output:
            extend_output(first, output)
    return list(by_sample.values())


def extend_output(output: Output, later: Output) -> None:
    """Add to an output what the same sample gained after it."""
    output.token_ids += later.token_ids
    output.text += later.text
    if later.logprobs is not None:
        output.logprobs = (output.logprobs or []) + later.logprobs
    output.measured = later.measured
    if later.finished:
        output.finished, output.error = True, later.error
        output.finish_reason, output.stop_reason = later.finish_reason, later.stop_reason
