"""A conversation with a model: its messages, its settings, and the commands that change them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.text.chat import Message, checked_messages


class ChatSession:
    """Remembers what was said, and answers.

    Args:
        llm: the model.
        params: how to sample.
        system: a system message, which stays when the conversation is reset.
        chat_template: as `LLM.chat` takes it.
        history: a JSON file; the conversation is read from it if it exists, and kept in it.

    Raises:
        ValueError, TypeError: the history is no conversation.

    Example:
        >>> session = ChatSession(llm, SamplingParams())  # doctest: +SKIP
        >>> print("".join(session.answer("What is a monad?")))  # doctest: +SKIP
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, *, system: str | None = None,
        chat_template: str | None = None, history: Path | None = None,
    ) -> None:  # fmt: skip
        self._llm, self._params, self._chat_template = llm, params, chat_template
        self._system, self._messages = system, []
        self._history = history
        self._commands: dict[str, Callable[[str], str | None]] = {
            "/help": self._help, "/exit": self._exit, "/reset": self._reset, "/undo": self._undo,
            "/system": self._set_system, "/set": self._set, "/show": self._show,
            "/save": self._save, "/load": self._load,
        }  # fmt: skip
        if history is not None and history.exists():
            self._load(str(history))
            if system is not None:
                self._system = system

    @property
    def messages(self) -> list[Message]:
        """The conversation so far."""
        system = [] if self._system is None else [Message("system", self._system)]
        return [*system, *self._messages]

    def answer(self, text: str) -> Iterator[str]:
        """Say something; the answer comes in pieces, without white space before it.

        A message that cannot be said is not remembered; an answer that is cut is, as far as it
        came.

        Raises:
            ValueError, TypeError: as `LLM.chat_prompt`, or the conversation is too long; when
                called, not when iterated.
        """
        question = Message("user", text)
        prompt = self._llm.chat_prompt(
            [*self.messages, question], self._params, chat_template=self._chat_template
        )
        return self._remembered(question, self._llm.stream(*prompt))

    def command(self, line: str) -> str | None:
        """Do what a line such as "/set temperature 0.2" says.

        Returns:
            What to tell the user; None: the conversation ends.

        Raises:
            ValueError, TypeError, OSError: it cannot be done; nothing has changed then.
        """
        name, _, rest = line.strip().partition(" ")
        if name not in self._commands:
            raise ValueError(f"no command {name}; there are {', '.join(self._commands)}")
        return self._commands[name](rest.strip())

    def _remembered(self, question: Message, pieces: Iterator[str]) -> Iterator[str]:
        said = ""
        try:
            for piece in pieces:
                shown = piece if said else piece.lstrip()
                said += shown
                if shown:
                    yield shown
        finally:
            pieces.close()
            self._messages += [question, Message("assistant", said.rstrip())]
            if self._history is not None:
                self._save(str(self._history))

    def _help(self, rest: str) -> str:
        """/help: this."""
        return "\n".join(str(command.__doc__) for command in self._commands.values())

    def _exit(self, rest: str) -> None:
        """/exit: end the conversation."""

    def _reset(self, rest: str) -> str:
        """/reset: forget everything but the system message."""
        self._messages.clear()
        return "forgotten"

    def _undo(self, rest: str) -> str:
        """/undo: forget the last message and its answer."""
        if not self._messages:
            raise ValueError("there is nothing to undo")
        question = self._messages[-2]
        del self._messages[-2:]
        return f"forgotten: {question.content:.60}"

    def _set_system(self, rest: str) -> str:
        """/system [TEXT]: another system message, or none."""
        self._system = rest or None
        return f"system message: {self._system or 'none'}"

    def _set(self, rest: str) -> str:
        """/set [NAME VALUE]: a sampling parameter, such as temperature 0.2; alone: all of them."""
        if rest:
            name, _, value = rest.partition(" ")
            if name not in {field.name for field in fields(SamplingParams)} - {"n"}:
                raise ValueError(f"no sampling parameter {name!r}; /set alone names them")
            self._params = replace(self._params, **{name: _parsed(value)})
        return "\n".join(
            f"{field.name} = {json.dumps(getattr(self._params, field.name))}"
            for field in fields(SamplingParams)
            if not rest or field.name == name
        )

    def _show(self, rest: str) -> str:
        """/show: the conversation."""
        return "\n".join(f"[{message.role}] {message.content}" for message in self.messages)

    def _save(self, rest: str) -> str:
        """/save FILE: keep the conversation as JSON."""
        path = _path(rest)
        if not self._messages:
            raise ValueError("nothing has been said yet")
        text = json.dumps([message._asdict() for message in self.messages], ensure_ascii=False)
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(text + "\n", "utf-8")
        beside.replace(path)
        return f"{len(self.messages)} messages in {path}"

    def _load(self, rest: str) -> str:
        """/load FILE: go on with a conversation that was kept."""
        path = _path(rest)
        try:
            messages = checked_messages(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no conversation: {error}") from None
        begins = messages[0].role == "system"
        if [message.role for message in messages[begins::2]] != ["user"] * (len(messages) // 2):
            raise ValueError(f"{path} is no conversation in which the assistant spoke last")
        self._system = messages[0].content if begins else None
        self._messages = messages[begins:]
        return f"{len(messages)} messages from {path}"


def _path(rest: str) -> Path:
    words = shlex.split(rest)
    if len(words) != 1:
        raise ValueError(f"one file name is needed, got {len(words)}")
    return Path(words[0]).expanduser()


def _parsed(value: str) -> object:
    """A number, list, true, false or null; anything else is a text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
