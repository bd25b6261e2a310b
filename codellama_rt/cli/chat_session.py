"""A conversation with a model: its messages, its settings, and the commands that change them."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

from codellama_rt.engine.completion import Completion
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.text.chat import Message, checked_messages

_HELP = {
    "/help, /?": "list the commands",
    "/exit, /bye": "end the conversation",
    "/reset": "forget everything but the system message",
    "/undo": "forget the last message and its answer",
    "/system [TEXT]": "set another system message, or none",
    "/set [NAME VALUE]": "set a sampling parameter, such as temperature 0.2; alone: show all",
    "/show": "show the conversation",
    "/stats": "show the tokens and speed of the last answer, and how full the context is",
    "/save FILE": "keep the conversation as JSON",
    "/load FILE": "continue a conversation that was kept",
}
_NOT_SETTABLE = ("n", "logits_processors")  # one answer at a time; functions cannot be typed
_SETTABLE = tuple(field.name for field in fields(SamplingParams) if field.name not in _NOT_SETTABLE)


class ChatSession:
    """Remembers what was said, and answers.

    Args:
        llm: the model.
        params: how to sample.
        system: a system message, which stays when the conversation is reset.
        chat_template: as `LLM.chat` takes it.
        history: a JSON file; the conversation is read from it if it exists, and kept in it.

    Attributes:
        notice: what the user should know about the last answer; "" if nothing.

    Raises:
        ValueError, TypeError: the history does not hold a conversation.

    Example:
        >>> session = ChatSession(llm, SamplingParams())  # doctest: +SKIP
        >>> print("".join(session.answer("What is a monad?")))  # doctest: +SKIP
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        *,
        system: str | None = None,
        chat_template: str | None = None,
        history: Path | None = None,
    ) -> None:
        self.notice = ""
        self._llm, self._params, self._chat_template = llm, params, chat_template
        self._messages: list[Message] = []
        self._system_message = system
        self._history = history
        self._last: Completion | None = None
        self._commands: dict[str, Callable[[str], str | None]] = {
            "/help": self._help,
            "/?": self._help,
            "/exit": self._exit,
            "/bye": self._exit,
            "/reset": self._reset,
            "/undo": self._undo,
            "/system": self._system,
            "/set": self._set,
            "/show": self._show,
            "/stats": self._stats,
            "/save": self._save,
            "/load": self._load,
        }
        if history is not None and history.exists():
            self._load(str(history))
            if system is not None:
                self._system_message = system

    @property
    def messages(self) -> list[Message]:
        """The conversation so far."""
        said = self._system_message
        return [*([] if said is None else [Message("system", said)]), *self._messages]

    def answer(self, text: str) -> Iterator[str]:
        """Say something; the answer comes in pieces, without white space before it.

        A message that is refused is not remembered; an answer that is cut is, as far as it came.

        Raises:
            ValueError, TypeError: as `LLM.chat_prompt`, or the conversation is too long; when
                called, not when iterated.
        """
        question = Message("user", text)
        prompt, params = self._llm.chat_prompt(
            [*self.messages, question], self._params, chat_template=self._chat_template
        )
        self._require_room(len(prompt))
        job = self._llm.jobs.submit(prompt, params)
        pieces = self._llm.jobs.stream(job)
        return self._remembered(question, job.completions[0], pieces, params.max_tokens)

    def is_command(self, line: str) -> bool:
        """Return whether a line is a command that exists."""
        return "\n" not in line and line.partition(" ")[0].rstrip() in self._commands

    def command(self, line: str) -> str | None:
        """Do what a line such as "/set temperature 0.2" says.

        Returns:
            What to tell the user; None: the conversation ends.

        Raises:
            ValueError, TypeError, OSError: it cannot be done; nothing has changed then.
        """
        name, _, rest = line.strip().partition(" ")
        if name not in self._commands:
            close = difflib.get_close_matches(name, self._commands, n=1)
            meant = f", did you mean {close[0]}?" if close else ""
            raise ValueError(f"no command {name}{meant}; there are {', '.join(self._commands)}")
        return self._commands[name](rest.strip())

    def complete(self, line: str) -> list[str]:
        """Return what the beginning of a command may become."""
        known = (
            [f"/set {name} " for name in _SETTABLE] if line.startswith("/set ") else self._commands
        )
        return [words for words in known if words.startswith(line)]

    def _require_room(self, prompt_len: int) -> None:
        """Refuse a conversation that leaves no room for an answer, and say what helps."""
        max_model_len = self._llm.max_model_len
        in_cache = self._llm.engine.scheduler.max_computed_tokens
        if prompt_len > min(max_model_len - 1, in_cache):
            limit = f"max_model_len={max_model_len}"
            if prompt_len < max_model_len:
                limit = f"the KV cache, which holds {in_cache}"
            remedy = "shorten the message"
            if self._messages:
                remedy += ", or forget the last exchange with /undo or everything with /reset"
            raise ValueError(
                f"the conversation of {prompt_len} tokens does not fit {limit}; {remedy}"
            )

    def _remembered(
        self,
        question: Message,
        completion: Completion,
        pieces: Iterator[str],
        max_tokens: int | None,
    ) -> Iterator[str]:
        said, self.notice, self._last = "", "", completion
        try:
            for piece in pieces:
                shown = piece if said else piece.lstrip()
                said += shown
                if shown:
                    yield shown
            if completion.finish_reason == "length":
                self.notice = _why_cut(completion, max_tokens)
        finally:
            pieces.close()
            self._messages += [question, Message("assistant", said.rstrip())]
            if self._history is not None:
                self._save(str(self._history))

    def _help(self, rest: str) -> str:
        return "\n".join(f"{usage:<18}{what}" for usage, what in _HELP.items())

    def _exit(self, rest: str) -> None:
        """Tell the caller to end."""

    def _reset(self, rest: str) -> str:
        self._messages.clear()
        self._last = None
        return "forgotten"

    def _undo(self, rest: str) -> str:
        if not self._messages:
            raise ValueError("there is nothing to undo")
        question = self._messages[-2]
        del self._messages[-2:]
        return f"forgotten: {question.content:.60}"

    def _system(self, rest: str) -> str:
        self._system_message = rest or None
        return f"system message: {self._system_message or 'none'}"

    def _set(self, rest: str) -> str:
        name, _, value = rest.partition(" ")
        if rest:
            if name not in _SETTABLE:
                raise ValueError(f"no sampling parameter {name!r}; /set alone names them")
            self._params = replace(self._params, **{name: _parsed(value)})
        return "\n".join(
            f"{shown} = {json.dumps(getattr(self._params, shown))}"
            for shown in _SETTABLE
            if not rest or shown == name
        )

    def _stats(self, rest: str) -> str:
        last = self._last
        if last is None:
            raise ValueError("nothing has been answered yet")
        prompt, new, stats = len(last.prompt_token_ids), len(last.token_ids), last.stats
        lines = [f"context      {prompt + new} of {self._llm.max_model_len} tokens"]
        first_s = stats.get("first_token_s", 0.0)
        lines.append(f"prompt       {prompt} tokens, {first_s:.2f} s to the first token")
        speed = ""
        if "total_s" in stats and new > 1:
            seconds = stats["total_s"] - first_s
            speed = f" in {seconds:.2f} s, {(new - 1) / seconds:.1f} tokens/s"
        lines.append(f"last answer  {new} tokens{speed}, ended by {last.finish_reason or 'Ctrl-C'}")
        return "\n".join(lines)

    def _show(self, rest: str) -> str:
        return "\n".join(f"[{message.role}] {message.content}" for message in self.messages)

    def _save(self, rest: str) -> str:
        path = _path(rest)
        if not self._messages:
            raise ValueError("nothing has been said yet")
        text = json.dumps([message.as_dict() for message in self.messages], ensure_ascii=False)
        target = path.resolve()  # a link keeps pointing to the file
        beside = target.with_name(f".{target.name}.new")
        beside.write_text(text + "\n", "utf-8")
        beside.replace(target)
        return f"{len(self.messages)} messages in {path}"

    def _load(self, rest: str) -> str:
        path = _path(rest)
        try:
            messages = checked_messages(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} does not hold a conversation: {error}") from None
        begins = messages[0].role == "system"
        if [message.role for message in messages[begins::2]] != ["user"] * (len(messages) // 2):
            raise ValueError(
                f"{path} does not hold a conversation in which the assistant spoke last"
            )
        self._system_message = messages[0].content if begins else None
        self._messages = messages[begins:]
        self._last = None
        return f"{len(messages)} messages from {path}"


def _why_cut(completion: Completion, max_tokens: int | None) -> str:
    num_tokens = len(completion.token_ids)
    if num_tokens == max_tokens:
        return f"[cut after {num_tokens} tokens; /set max_tokens null removes this limit]"
    total = len(completion.prompt_token_ids) + num_tokens
    return f"[cut: the context of {total} tokens is full; /undo or /reset makes room]"


def _path(rest: str) -> Path:
    words = shlex.split(rest)
    if len(words) != 1:
        raise ValueError(f"one file name is needed, got {len(words)}")
    return Path(words[0]).expanduser()


def _parsed(value: str) -> object:
    """Read a number, list, true, false or null; anything else is a text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
