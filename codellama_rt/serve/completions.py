"""POST /v1/completions: texts to continue, and gaps to fill."""

from __future__ import annotations

from dataclasses import replace
from time import time
from typing import Any

from starlette.requests import Request

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.serve.answers import stream_or_whole
from codellama_rt.serve.completion_form import CompletionForm
from codellama_rt.serve.errors import invalid
from codellama_rt.serve.fields import openai_params
from codellama_rt.serve.long_work import beside_loop
from codellama_rt.serve.protocol import CompletionRequest
from codellama_rt.serve.service import Service, answer_id

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
Encoded = tuple[list[int], SamplingParams]


async def completions(request: Request) -> Any:
    """Answer a request for completions."""
    service: Service = request.app.state.service
    wanted = await service.read(request, CompletionRequest)
    name, adapter = service.find(wanted.model)
    head = {"id": answer_id("cmpl", request, wanted.request_id), "model": name}
    params = _params(wanted, service.defaults)
    texts = checked_prompts(wanted.prompt, service.settings.max_prompts)
    size = sum(map(len, texts)) + len(wanted.suffix or "")
    prompts = await beside_loop(
        size, lambda: [_encode(service, wanted, text, params) for text in texts]
    )
    generation = await service.start(prompts, adapter=adapter, wanted=wanted)
    form = CompletionForm(
        wanted,
        service.tokenizer,
        generation,
        [ids for ids, _ in prompts],
        **head,
        created=int(time()),
    )
    return await stream_or_whole(request, generation, form, wanted)


def _params(wanted: CompletionRequest, defaults: SamplingParams) -> SamplingParams:
    """Return the parameters of all prompts; those that the endpoint makes of its own fields."""
    given: dict[str, Any] = {"logprobs": wanted.logprobs}
    n = wanted.n or 1
    if wanted.best_of is not None:
        if wanted.best_of < n:
            raise invalid(f"best_of must be at least n, {n}", "best_of")
        if wanted.stream and wanted.best_of > n:
            raise invalid("best_of cannot be streamed: the best is known at the end", "best_of")
        given |= {"n": wanted.best_of, "logprobs": wanted.logprobs or 0}
    if wanted.echo and wanted.suffix is not None:
        raise invalid("echo and suffix do not go together: the gap is in the middle", "echo")
    if wanted.echo and wanted.logprobs is not None and wanted.prompt_logprobs is None:
        given["prompt_logprobs"] = wanted.logprobs
    if wanted.stream and wanted.prompt_logprobs is not None:
        raise invalid("prompt_logprobs cannot be streamed", "prompt_logprobs")
    defaults = replace(defaults, max_tokens=_DEFAULT_MAX_TOKENS)
    return openai_params(wanted, defaults, **given)


def checked_prompts(prompt: str | list[Any], most: int) -> list[str | list[int]]:
    """Return the prompts of a field that is a text, token ids, or a list of either.

    Raises:
        ApiError: 400.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt must not be an empty list", "prompt")
    items = prompt if isinstance(prompt[0], (str, list)) else [prompt]
    if len(items) > most:
        raise invalid(f"a request has at most {most} prompts, got {len(items)}", "prompt")
    for i, item in enumerate(items):
        is_text = isinstance(item, str)
        if not is_text and not (isinstance(item, list) and set(map(type, item)) <= {int}):
            raise invalid(f"prompt[{i}] must be a text or a list of token ids", "prompt")
        if not item and not is_text:
            raise invalid(f"prompt[{i}] must hold a token", "prompt")
    return items


def _encode(
    service: Service, wanted: CompletionRequest, prompt: str | list[int], params: SamplingParams
) -> Encoded:
    if isinstance(prompt, str):
        ids, params = _encode_text(service, wanted, prompt, params)
    elif wanted.suffix is not None:
        raise invalid("suffix needs a prompt that is a text", "suffix")
    else:
        ids = prompt
    return list(_truncated(service, wanted, ids)), params


def _encode_text(
    service: Service, wanted: CompletionRequest, prompt: str, params: SamplingParams
) -> Encoded:
    if wanted.suffix is not None:
        return fill(service, prompt, wanted.suffix, wanted.suffix_first, params)
    if wanted.add_special_tokens is False:
        ids = service.prompts.require_tokenizer().encode_plain(prompt)
        if not ids:
            raise invalid("prompt has no tokens", "prompt")
        return ids, params
    return service.prompts.completion(prompt, params)


def fill(
    service: Service, prefix: str, suffix: str, suffix_first: bool | None, params: SamplingParams
) -> Encoded:
    """Encode the gap between two texts; None: in the order of the server's settings.

    Raises:
        ApiError: 400: this model has no infilling tokens.
    """
    order = service.settings.suffix_first if suffix_first is None else suffix_first
    try:
        return service.prompts.infilling(prefix, suffix, params, suffix_first=order)
    except ValueError as error:
        raise invalid(str(error), "suffix") from None


def _truncated(service: Service, wanted: CompletionRequest, ids: list[int]) -> list[int]:
    most = wanted.truncate_prompt_tokens
    if most is None:
        return ids
    if wanted.suffix is not None:
        raise invalid("an infilling prompt is not truncated", "truncate_prompt_tokens")
    if most == -1:
        most = service.max_model_len - 1
    if most < 1:
        raise invalid("truncate_prompt_tokens must be -1 or at least 1", "truncate_prompt_tokens")
    return ids[-most:]
