"""POST /v1/chat/completions: the assistant's next message."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import time
from typing import Any

from starlette.requests import Request

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.engine.structured_outputs import StructuredOutputs
from codellama_rt.serve.answers import stream_or_whole
from codellama_rt.serve.chat_form import ChatForm
from codellama_rt.serve.errors import invalid
from codellama_rt.serve.fields import openai_params
from codellama_rt.serve.protocol import ChatRequest, Tool
from codellama_rt.serve.service import Service, answer_id


async def chat_completions(request: Request) -> Any:
    """Answer a conversation."""
    service: Service = request.app.state.service
    wanted = await service.read(request, ChatRequest)
    name, adapter = service.find(wanted.model)
    head = {"id": answer_id("chatcmpl", request, wanted.request_id), "model": name}
    tool = required_tool(wanted)
    params = _params(wanted, service.defaults, tool)
    # In a thread, however short they are: a template may run for a while.
    prompt = await asyncio.to_thread(encode_messages, service, wanted.messages, params)
    generation = await service.start([prompt], adapter=adapter, wanted=wanted)
    form = ChatForm(
        wanted,
        service.tokenizer,
        generation,
        **head,
        created=int(time()),
        function=tool.function.name if tool else None,
    )
    return await stream_or_whole(request, generation, form, wanted)


def encode_messages(
    service: Service, messages: list[dict[str, Any]], params: SamplingParams
) -> tuple[list[int], SamplingParams]:
    """Return the prompt of a conversation, and parameters that end the answer.

    Raises:
        ApiError: 400: a message that cannot be, or a model without a chat format.
    """
    try:
        return service.prompts.conversation(messages, params, service.chat_template)
    except (ValueError, TypeError) as error:
        raise invalid(str(error), "messages") from None


def _params(wanted: ChatRequest, defaults: SamplingParams, tool: Tool | None) -> SamplingParams:
    if wanted.stream and wanted.prompt_logprobs is not None:
        raise invalid("prompt_logprobs cannot be streamed", "prompt_logprobs")
    if wanted.top_logprobs is not None and not wanted.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    limit = wanted.max_completion_tokens
    given: dict[str, Any] = {"max_tokens": wanted.max_tokens if limit is None else limit}
    if wanted.logprobs:
        given["logprobs"] = wanted.top_logprobs or 0
    if tool is not None:
        given["structured_outputs"] = StructuredOutputs(json=tool.function.parameters or _ANY)
    try:
        return openai_params(wanted, replace(defaults, max_tokens=None), **given)
    except ValueError as error:
        if wanted.top_logprobs is not None and ": logprobs must" in str(error):
            raise invalid(
                str(error).replace("logprobs", "top_logprobs", 1), "top_logprobs"
            ) from None
        raise


_ANY = {"type": "object"}


def required_tool(wanted: ChatRequest) -> Tool | None:
    """Return the tool that the answer must call: a schema makes sure that it does.

    Code Llama has no form of its own for calls. Where they are left to the model it makes none.

    Raises:
        ApiError: 400: an unknown tool, or one of several that the model would have to choose.
    """
    choice, tools = wanted.tool_choice, wanted.tools or []
    if choice is None or choice in ("none", "auto"):
        return None
    if wanted.response_format is not None or wanted.structured_outputs is not None:
        raise invalid("a required tool has a form of its own; leave the other out", "tool_choice")
    if choice == "required" and len(tools) == 1:
        return tools[0]
    if choice == "required":
        raise invalid(
            f"tool_choice 'required' needs one tool, got {len(tools)}; name the function to call",
            "tool_choice",
        )
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    found = [tool for tool in tools if tool.function.name == name]
    if len(found) != 1:
        raise invalid(
            "tool_choice must be none, auto, required, or name a function of tools", "tool_choice"
        )
    return found[0]
