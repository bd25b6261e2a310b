"""Gaps to fill: POST /v1/fim/completions, as Mistral's, and /infill, as llama.cpp's."""

from __future__ import annotations

from dataclasses import replace
from time import time
from typing import Any

from starlette.requests import Request

from codellama_rt.serve.answers import stream_or_whole
from codellama_rt.serve.chat_form import ChatForm
from codellama_rt.serve.completions import fill
from codellama_rt.serve.fields import llama_cpp_params, openai_params
from codellama_rt.serve.llama_cpp import answer_llama_cpp
from codellama_rt.serve.long_work import beside_loop
from codellama_rt.serve.protocol import ExtraText, FimRequest, InfillRequest
from codellama_rt.serve.service import Service, answer_id


async def fim_completions(request: Request) -> Any:
    """Fill a gap; the answer has the form of a chat's."""
    service: Service = request.app.state.service
    wanted = await service.read(request, FimRequest)
    name, adapter = service.find(wanted.model)
    head = {"id": answer_id("fim", request, wanted.request_id), "model": name}
    params = openai_params(wanted, service.defaults)
    suffix = wanted.suffix or ""
    prompt = await beside_loop(
        len(wanted.prompt) + len(suffix),
        lambda: fill(service, wanted.prompt, suffix, wanted.suffix_first, params),
    )
    generation = await service.start([prompt], adapter=adapter, wanted=wanted)
    form = ChatForm(wanted, service.tokenizer, generation, **head, created=int(time()))
    return await stream_or_whole(request, generation, form, wanted)


async def infill(request: Request) -> Any:
    """Fill a gap as llama.cpp's server does, but with Meta's ids and without cutting texts."""
    service: Service = request.app.state.service
    wanted = await service.read(request, InfillRequest)
    _, adapter = service.find(wanted.model)
    defaults = replace(service.defaults, max_tokens=None)
    params = llama_cpp_params(wanted, defaults, temperature=_temperature(wanted))
    prefix = joined_context(wanted.input_extra or []) + (wanted.input_prefix or "")
    prefix += wanted.prompt or ""
    suffix = wanted.input_suffix or ""
    prompt = await beside_loop(
        len(prefix) + len(suffix),
        lambda: fill(service, prefix, suffix, wanted.suffix_first, params),
    )
    generation = await service.start([prompt], adapter=adapter)
    return await answer_llama_cpp(request, service, wanted, generation, prompt)


def joined_context(texts: list[ExtraText]) -> str:
    """Return texts of other files as what comes before the prefix.

    Code Llama has no token between files; each one is headed by its name, in a comment.
    """
    return "".join(
        f"# {one.filename}\n{one.text}\n\n" if one.filename else f"{one.text}\n\n"
        for one in texts
        if one.text
    )


def _temperature(wanted: InfillRequest) -> float:
    """Return the temperature of a filling: greedy, unless the request has one that counts.

    llama.cpp's `infill` sampler takes the likeliest text, and knows no temperature without the
    sampler of that name.
    """
    counts = wanted.samplers is None or "temperature" in wanted.samplers
    return wanted.temperature if counts and wanted.temperature is not None else 0.0
