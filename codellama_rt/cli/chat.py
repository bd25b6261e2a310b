"""The command `codellama-rt chat`: reads messages and commands, writes answers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codellama_rt.cli.errors import reason, reported_errors, tell
from codellama_rt.cli.options import ModelOptions, SamplingOptions
from codellama_rt.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from codellama_rt.cli.chat_session import ChatSession

_QUESTION, _MORE = ">>> ", "... "
_FENCE = '"""'


def chat(
    model: ModelOptions,
    sampling: SamplingOptions,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Answer this alone; - is all of stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="code-llama, code-llama-70b, or a file with Jinja.")
    ] = None,
    history: Annotated[
        Path | None, typer.Option(help="A file the conversation is read from and kept in (JSON).")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with their traceback.")] = False,
) -> None:
    """Talk with an Instruct model.

    A line is a message; several lines stand between lines of three double quotes. Lines that begin
    with / are commands: /help names them. Without a terminal the same is read from stdin.
    """
    with reported_errors(debug):
        if sampling.needs_json:
            raise ValueError(f"chat takes no --{sampling.needs_json[0].replace('_', '-')}")
        sampling.resolve(SamplingParams())
        from codellama_rt.cli import run as cli_run
        from codellama_rt.cli.chat_session import ChatSession

        with cli_run.open_model(model) as llm:
            cli_run.require_tokenizer(llm, model.model)
            session = ChatSession(
                llm, sampling.resolve(llm.default_params()), system=system,
                chat_template=_template(chat_template), history=history,
            )  # fmt: skip
            if message is not None:
                _print(session.answer(sys.stdin.read() if message == "-" else message))
            else:
                _converse(session)


def _converse(session: ChatSession) -> None:
    """Take messages and commands until there are no more."""
    if sys.stdin.isatty():
        tell("Type a message, or /help. Ctrl-D ends, Ctrl-C stops an answer or drops a message.")
    for text in _messages():
        try:
            if text.startswith("/") and not text.startswith("//"):
                reply = session.command(text)
                if reply is None:
                    return
                tell(reply)
            elif text.strip():
                _print(session.answer(text[1:] if text.startswith("//") else text))
        except (ValueError, TypeError, OSError) as error:  # the conversation goes on
            if isinstance(error, BrokenPipeError):
                raise
            tell(reason(error))


def _messages() -> Iterator[str]:
    """Messages and commands of stdin; Ctrl-C in a terminal drops the one that is being typed."""
    while True:
        try:
            text = _message()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            tell("")
            continue
        if text is None:
            return
        yield text


def _message() -> str | None:
    """The next line, lines between two fences as one; None at the end of the input."""
    line = _line(_QUESTION)
    if line is None or line.strip() != _FENCE:
        return line
    block = []
    while (line := _line(_MORE)) is not None and line.strip() != _FENCE:
        block.append(line)
    return "\n".join(block)


def _line(prompt: str) -> str | None:
    """The next line without its end; None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    with contextlib.suppress(ImportError):  # gives `input` a history and keys to edit with
        import_module("readline")
    if not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        tell("")
        return None


def _print(pieces: Iterator[str]) -> None:
    """Write an answer as it comes; Ctrl-C in a terminal ends it, and the conversation goes on."""
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        pieces.close()
    print(flush=True)


def _template(given: str | None) -> str | None:
    from codellama_rt.text.chat.chat_format import NATIVE

    if given is None or given in NATIVE:
        return given
    return Path(given).read_text("utf-8")
