"""The answers of /v1/chat/completions: the same messages, whole or as the events of a stream."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from codellama_rt.engine.output import Output
from codellama_rt.serve.completion_form import StreamUsage, Usage, usage_of
from codellama_rt.serve.generation import Gained, Generation
from codellama_rt.serve.protocol import Sampling
from codellama_rt.serve.token_texts import TokenTexts, likelihood


class FunctionCall(Struct, omit_defaults=True):
    """A call, whole or a piece of its arguments."""

    arguments: str
    name: str | None = None


class ToolCall(Struct, kw_only=True, omit_defaults=True):
    """A call of a tool; in a stream its first event has the id and the name."""

    function: FunctionCall
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class Message(Struct, kw_only=True):
    """A message, or what one gained."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class TopLogprob(Struct):
    """One of the likeliest tokens of a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    """A token of the answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log-probabilities, an entry per token."""

    content: list[TokenLogprob]


class ChatChoice(Struct, kw_only=True):
    """One sample."""

    index: int
    message: Message | UnsetType = UNSET
    delta: Message | UnsetType = UNSET
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatAnswer(Struct, kw_only=True):
    """A chat completion, or an event of one."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_progress: dict[str, int] | UnsetType = UNSET
    prompt_logprobs: Any = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatForm:
    """Make the answers to one request.

    Args:
        wanted: the request, of a chat or of a gap to fill.
        tokenizer: of the model.
        generation: whose tokens are counted.
        function: the name of the function that the answer calls; None: it is a text.
        head: id, model and created of all events.
    """

    def __init__(
        self,
        wanted: Sampling,
        tokenizer: Any,
        generation: Generation,
        *,
        function: str | None = None,
        **head: Any,
    ) -> None:
        self._wanted, self._generation, self._head = wanted, generation, head
        self._texts = TokenTexts(tokenizer, as_ids=bool(wanted.return_tokens_as_token_ids))
        self._usage = StreamUsage(wanted, generation)
        self._function = function
        self._begun: set[int] = set()

    def whole(self, gained: Gained) -> ChatAnswer:
        """Return the answer to a request that is not streamed."""
        answer = ChatAnswer(
            **self._head,
            object="chat.completion",
            choices=[self._choice(i, output) for (_, i), output in gained.items()],
            usage=usage_of(self._generation),
        )
        rows = next(iter(gained.values())).prompt_logprobs if gained else None
        if rows is not None:
            answer.prompt_logprobs = self._texts.named(rows)
        if self._wanted.return_token_ids:
            sequence = self._generation.streams[0].request.samples[0].sequence
            answer.prompt_token_ids = sequence.token_ids[: sequence.prompt_len].tolist()
        return answer

    def chunks(self, gained: Gained) -> list[ChatAnswer]:
        """Return the events of what samples gained."""
        events = []
        for (_, index), output in gained.items():
            if index not in self._begun:
                self._begun.add(index)
                events.append(self._event(ChatChoice(index=index, delta=self._first(index))))
            logprobs = self._logprobs(output)
            if output.text or logprobs or (self._wanted.return_token_ids and output.token_ids):
                choice = ChatChoice(index=index, delta=self._delta(output.text), logprobs=logprobs)
                choice.token_ids = output.token_ids if self._wanted.return_token_ids else UNSET
                events.append(self._event(choice))
            if output.finished:
                choice = ChatChoice(
                    index=index,
                    delta=Message(),
                    finish_reason=self._reason(output),
                    stop_reason=output.stop_reason,
                )
                events.append(self._event(choice))
        return events

    def last(self) -> list[ChatAnswer]:
        """Return the event of the usage, if it is wanted."""
        usage = self._usage.at_end()
        if usage is None:
            return []
        event = self._event(None)
        event.usage = usage
        return [event]

    def progress(self) -> ChatAnswer | None:
        """Return an event that says how far the prompt is."""
        progress = self._generation.progress()
        if progress is None:
            return None
        event = self._event(None)
        event.prompt_progress = progress
        return event

    def _event(self, choice: ChatChoice | None) -> ChatAnswer:
        return ChatAnswer(
            **self._head,
            object="chat.completion.chunk",
            choices=[] if choice is None else [choice],
            usage=self._usage.of_event(),
        )

    def _first(self, index: int) -> Message:
        if self._function is None:
            return Message(role="assistant", content="")
        return Message(role="assistant", content=None, tool_calls=[self._call(index, "", 0)])

    def _delta(self, text: str) -> Message:
        if self._function is None:
            return Message(content=text)
        return Message(tool_calls=[ToolCall(index=0, function=FunctionCall(text))])

    def _call(self, index: int, arguments: str, position: int | UnsetType = UNSET) -> ToolCall:
        return ToolCall(
            index=position,
            id=f"call-{self._head['id']}-{index}",
            type="function",
            function=FunctionCall(arguments, self._function),
        )

    def _choice(self, index: int, output: Output) -> ChatChoice:
        if self._function is None:
            message = Message(role="assistant", content=output.text)
        else:
            calls = [self._call(index, output.text)]
            message = Message(role="assistant", content=None, tool_calls=calls)
        choice = ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs(output),
            finish_reason=self._reason(output),
            stop_reason=output.stop_reason,
        )
        if self._wanted.return_token_ids:
            choice.token_ids = output.token_ids
        return choice

    def _reason(self, output: Output) -> str | None:
        is_call = self._function is not None and output.finish_reason == "stop"
        return "tool_calls" if is_call else output.finish_reason

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        if output.logprobs is None:
            return None
        rows = zip(output.token_ids, output.logprobs, strict=True)
        most = getattr(self._wanted, "top_logprobs", None) or 0
        content = []
        for token_id, row in rows:
            top = sorted(row.items(), key=lambda item: item[1].rank)[:most]
            named = [TopLogprob(*self._named(i, one)) for i, one in top]
            content.append(TokenLogprob(*self._named(token_id, row[token_id]), named))
        return ChatLogprobs(content)

    def _named(self, token_id: int, one: Any) -> tuple[str, float, list[int]]:
        text = self._texts.bytes(token_id)
        return self._texts[token_id], likelihood(one), list(text)
