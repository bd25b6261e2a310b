"""The command `codellama-rt chat`: reads messages and commands, writes answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codellama_rt.cli.errors import reason, reported_errors, tell
from codellama_rt.cli.options import DebugOption, ModelOptions, SamplingOptions
from codellama_rt.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from codellama_rt.cli.chat_session import ChatSession


def chat(
    *,
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", help="Answer only this message; -: all of stdin."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="code-llama, code-llama-70b, or a file with a Jinja template."
        ),
    ] = None,
    history: Annotated[
        Path | None, typer.Option(help="Read the conversation from this JSON file and keep it.")
    ] = None,
    model: ModelOptions,
    sampling: SamplingOptions,
    debug: DebugOption = False,
) -> None:
    """Talk with an Instruct model.

    A line is a message; a pasted block is one message, and so are the lines between two lines of
    three double quotes. Lines that begin with / are commands: /help lists them. Without a terminal
    the same is read from stdin, line by line.

    Answers end when the model ends them or the context is full. Models under 1B parameters repeat
    themselves when decoded greedily; where neither the checkpoint nor an option says how to sample,
    they are sampled with temperature 0.3, top-p 0.9 and repetition penalty 1.1.
    """
    with reported_errors(debug):
        if sampling.needs_json:
            raise ValueError(f"chat takes no --{sampling.needs_json[0].replace('_', '-')}")
        sampling.resolve(SamplingParams())
        from codellama_rt.cli import run as cli_run
        from codellama_rt.cli.chat_defaults import chat_defaults
        from codellama_rt.cli.chat_session import ChatSession

        with cli_run.open_model(model) as llm:
            cli_run.require_tokenizer(llm, model.model)
            defaults = chat_defaults(llm, greedy_is_meant=sampling.chooses_tokens)
            session = ChatSession(
                llm,
                sampling.resolve(defaults),
                system=system,
                chat_template=_template(chat_template),
                history=history,
            )
            if message is not None:
                _answer(session, sys.stdin.read() if message == "-" else message)
            else:
                _converse(session)


def _converse(session: ChatSession) -> None:
    """Take messages and commands until there are no more."""
    from codellama_rt.cli.chat_input import messages, set_up_editing

    if sys.stdin.isatty():
        set_up_editing(session.complete)
        tell("Type a message, or /help. Ctrl-D ends, Ctrl-C stops an answer or drops a message.")
    for text in messages(session.is_command):
        try:
            if session.is_command(text) or _looks_like_command(text):
                reply = session.command(text)
                if reply is None:
                    return
                tell(reply)
            elif text.strip():
                is_escaped = text.startswith("//") and "\n" not in text
                _answer(session, text[1:] if is_escaped else text)
        except (ValueError, TypeError, OSError) as error:  # the conversation goes on
            if isinstance(error, BrokenPipeError):
                raise
            tell(reason(error))


def _looks_like_command(text: str) -> bool:
    """Return whether a text is a command, perhaps mistyped; several lines never are."""
    return text.startswith("/") and not text.startswith("//") and "\n" not in text


def _answer(session: ChatSession, text: str) -> None:
    """Write an answer as it comes; Ctrl-C in a terminal ends it, and the conversation goes on."""
    pieces: Iterator[str] = session.answer(text)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        pieces.close()
    print(flush=True)
    if session.notice:
        tell(session.notice)


def _template(given: str | None) -> str | None:
    from codellama_rt.text.chat.chat_format import NATIVE

    if given is None or given in NATIVE:
        return given
    return Path(given).read_text("utf-8")
