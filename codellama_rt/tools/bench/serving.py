"""Load on a server, and what its clients see: `codellama-rt bench serve`.

Names and meanings of the results are those of `vllm bench serve`: TTFT is the time to the first
token, TPOT the mean time per token after it, ITL each time between two events with text.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from codellama_rt.tools.bench.http_stream import Endpoint

_WORDS = ("def", "return", "self", "for", "in", "range(", "if", "else:", "x =", "lambda", "import")
_TYPED = "    result = compute_total(items, discount=0.1, currency=default)\n"
_CHARACTERS_PER_REQUEST = 3


@dataclass(frozen=True)
class Load:
    """What clients ask.

    Attributes:
        requests: how many.
        input_words: of each prompt, of its own.
        shared_words: with which all prompts begin.
        output_tokens: of each answer, exactly.
        concurrency: clients, each of which asks again when it has an answer; used without `rate`.
        rate: requests per second, at random times; None: as `concurrency` has it.
        typing: each request fills a gap in one file, three characters after the one before.
        model: the name that is asked for; None: the server's.
        seed: of all that is random.
    """

    requests: int = 64
    input_words: int = 128
    shared_words: int = 0
    output_tokens: int = 64
    concurrency: int = 8
    rate: float | None = None
    typing: bool = False
    model: str | None = None
    seed: int = 0


@dataclass
class Seen:
    """What a client saw of one request; seconds.

    Attributes:
        started: when it was sent.
        ttft: until the first event with text, or the end.
        gaps: between the events with text.
        total: until the end.
        prompt_tokens, output_tokens, cached_tokens: as the server counts them.
        error: what went wrong.
    """

    started: float
    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)
    total: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None


def bodies(load: Load) -> Iterator[dict[str, Any]]:
    """Yield the requests of a load."""
    rng = random.Random(load.seed)
    shared = _text(rng, load.shared_words)
    around = _text(rng, load.input_words), _text(rng, load.input_words)
    for i in range(load.requests):
        body: dict[str, Any] = {
            "max_tokens": load.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if load.typing:
            line = _TYPED * (1 + (i + 1) * _CHARACTERS_PER_REQUEST // len(_TYPED))
            typed = line[: (i + 1) * _CHARACTERS_PER_REQUEST]
            body |= {"prompt": shared + around[0] + "\n" + typed, "suffix": "\n" + around[1]}
        else:
            body["prompt"] = shared + _text(rng, load.input_words)
        yield body if load.model is None else {**body, "model": load.model}


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def measure(
    endpoint: Endpoint, load: Load, on_done: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Put a load on a server and return what was seen, as `summary` has it.

    Args:
        endpoint: the server.
        load: what is asked.
        on_done: called with (answers so far, requests).

    Raises:
        RuntimeError: no request was answered; the message has the first error.
    """
    started = perf_counter()
    seen = asyncio.run(_run(endpoint, load, on_done or (lambda done, total: None)))
    answered = [one for one in seen if one.error is None]
    if not answered:
        raise RuntimeError(f"no request was answered: {seen[0].error if seen else 'none was sent'}")
    return summary(seen, perf_counter() - started)


async def _run(endpoint: Endpoint, load: Load, on_done: Callable[[int, int], None]) -> list[Seen]:
    seen: list[Seen] = []
    waiting = bodies(load)

    async def ask(body: dict[str, Any]) -> None:
        seen.append(await _ask(endpoint, body))
        on_done(len(seen), load.requests)

    async def client() -> None:
        for body in waiting:
            await ask(body)

    if load.rate is None:
        await asyncio.gather(*(client() for _ in range(1 if load.typing else load.concurrency)))
        return seen
    rng, tasks = random.Random(load.seed + 1), []
    for body in waiting:
        tasks.append(asyncio.create_task(ask(body)))
        await asyncio.sleep(rng.expovariate(load.rate))
    await asyncio.gather(*tasks)
    return seen


async def _ask(endpoint: Endpoint, body: dict[str, Any]) -> Seen:
    one = Seen(perf_counter())
    last = one.started
    try:
        async for event in endpoint.events("/v1/completions", body):
            now = perf_counter()
            if event["choices"] and event["choices"][0]["text"]:
                if one.ttft == 0.0:
                    one.ttft = now - one.started
                else:
                    one.gaps.append(now - last)
                last = now
            if usage := event.get("usage"):
                one.prompt_tokens = usage["prompt_tokens"]
                one.output_tokens = usage["completion_tokens"]
                one.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    except (OSError, RuntimeError, asyncio.IncompleteReadError) as error:
        one.error = str(error) or type(error).__name__
    one.total = perf_counter() - one.started
    one.ttft = one.ttft or one.total
    return one


def summary(seen: list[Seen], seconds: float) -> dict[str, Any]:
    """Return the results under the names of `vllm bench serve`.

    Args:
        seen: all requests.
        seconds: from the first request to the last answer.
    """
    done = [one for one in seen if one.error is None]
    tokens_in, tokens_out = (sum(getattr(one, name) for one in done) for name in
                             ("prompt_tokens", "output_tokens"))  # fmt: skip
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(seen) - len(done),
        "total_input_tokens": tokens_in,
        "total_cached_tokens": sum(one.cached_tokens for one in done),
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / seconds,
        "output_throughput": tokens_out / seconds,
        "total_token_throughput": (tokens_in + tokens_out) / seconds,
    }
    times = {
        "ttft": [one.ttft for one in done],
        "tpot": [(o.total - o.ttft) / (o.output_tokens - 1) for o in done if o.output_tokens > 1],
        "itl": [gap for one in done for gap in one.gaps],
        "e2el": [one.total for one in done],
    }
    for name, values in times.items():
        milliseconds = 1e3 * np.array(values or [0.0])
        found[f"mean_{name}_ms"] = float(milliseconds.mean())
        found[f"median_{name}_ms"] = float(np.median(milliseconds))
        found[f"p99_{name}_ms"] = float(np.percentile(milliseconds, 99))
    return found


def table(found: dict[str, Any]) -> str:
    """Return the results as lines for people."""
    lines = [
        f"{found['completed']} requests in {found['duration']:.1f} s, {found['failed']} failed",
        f"{found['request_throughput']:.2f} requests/s, {found['output_throughput']:.1f} output "
        f"tokens/s, {found['total_token_throughput']:.1f} tokens/s in all",
        f"{found['total_input_tokens']} prompt tokens, {found['total_cached_tokens']} cached; "
        f"{found['total_output_tokens']} output tokens",
        "           mean    median       p99   (ms)",
    ]
    names = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "whole"}
    for name, title in names.items():
        values = [found[f"{kind}_{name}_ms"] for kind in ("mean", "median", "p99")]
        lines.append(f"{title:6}" + "".join(f"{value:10.1f}" for value in values))
    return "\n".join(lines)
