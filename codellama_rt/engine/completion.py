"""The results of `LLM.generate`, and how they grow from the engine's outputs."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from codellama_rt.engine.output import Output


@dataclass
class Completion:
    """One finished output.

    Attributes:
        text: the continuation, or the filling; without the string that stopped it.
        token_ids: the generated ids, including one that ended the output.
        finish_reason: "stop", "length" or "abort".
        stop_reason: the token id or the string that stopped it, if one did.
        logprobs: one dict {token id: Logprob} per generated token, if requested.
        prompt_logprobs: one per prompt token (None for the first), if requested.
        prompt_token_ids: the ids of the prompt.
        index: which of the prompt's n samples.
        stats: prompt_tokens, cached_tokens (of these, how many the prefix cache had),
            generated_tokens, first_token_s and total_s (seconds from submission).
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list | None = None
    prompt_logprobs: list | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    index: int = 0
    stats: dict[str, float] = field(default_factory=dict)


class Job:
    """A request that is followed, and its completions as they grow."""

    def __init__(
        self, name: str, prompt_token_ids: list[int], n: int, inbox: deque[Output]
    ) -> None:
        """Start with n empty completions; the engine puts outputs into the inbox."""
        self.name, self.prompt_token_ids, self.unfinished = name, prompt_token_ids, n
        self.inbox = inbox
        self.started = time.perf_counter()
        self.completions = [
            Completion(prompt_token_ids=prompt_token_ids, index=i) for i in range(n)
        ]

    def take(self) -> list[Output]:
        """Move what has come from the inbox to the completions, and return it.

        Raises:
            Exception: what ended the request with "error".
        """
        taken = []
        while self.inbox:
            output = self.inbox.popleft()
            if output.error is not None:
                self.unfinished -= 1
                raise output.error
            self._add(output, self.completions[output.index])
            taken.append(output)
        return taken

    def _add(self, output: Output, completion: Completion) -> None:
        now = time.perf_counter() - self.started
        completion.text += output.text
        completion.token_ids += output.token_ids
        completion.stats.setdefault("first_token_s", now)
        if output.logprobs is not None:
            completion.logprobs = (completion.logprobs or []) + output.logprobs
        if output.prompt_logprobs is not None:
            completion.prompt_logprobs = output.prompt_logprobs
        if output.finished:
            self.unfinished -= 1
            completion.finish_reason = output.finish_reason
            completion.stop_reason = output.stop_reason
            completion.stats |= {
                "prompt_tokens": len(self.prompt_token_ids),
                "cached_tokens": output.metrics.cached_tokens,
                "generated_tokens": len(completion.token_ids),
                "total_s": now,
            }
