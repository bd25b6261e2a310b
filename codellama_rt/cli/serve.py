"""`codellama-rt serve`: the HTTP server of one model."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codellama_rt.cli.errors import reported_errors, tell
from codellama_rt.cli.options import DebugOption, ModelOptions

if TYPE_CHECKING:
    from codellama_rt.llm.llm import LLM
    from codellama_rt.serve.settings import Settings

_KEY_VARIABLE = "CODELLAMA_RT_API_KEY"


def serve(
    *,
    model: ModelOptions,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any that is free.")] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name of the model for clients; may be repeated."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR", help="LoRA adapter, served as a model NAME; may be repeated."
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar=_KEY_VARIABLE,
            metavar="KEY",
            help="Serve clients with this key only; may be repeated. Others see it in the list of "
            "processes: rather set the environment variable.",
        ),
    ] = None,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="Serve /metrics without a key.")
    ] = False,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Web pages that may call the server; *: all; may be repeated."
        ),
    ] = None,
    suffix_first: Annotated[
        bool,
        typer.Option("--suffix-first", help="Infill in the order SPM unless a request says."),
    ] = False,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="Jinja template of conversations."
        ),
    ] = None,
    max_queued_tokens: Annotated[
        int | None, typer.Option(help="Prompt tokens that may wait; further requests get 503.")
    ] = None,
    max_requests: Annotated[
        int, typer.Option(help="Unfinished generations; further requests get 503.")
    ] = 1024,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.")] = 4 * 2**20,
    stream_interval: Annotated[
        float,
        typer.Option(
            help="Seconds between two events of a stream, except the first and the last; 0: an "
            "event per step."
        ),
    ] = 0.02,
    keep_alive_interval: Annotated[
        float, typer.Option(help="Seconds of silence after which a stream gets a comment.")
    ] = 10.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that requests have to end after SIGTERM.")
    ] = 60.0,
    metrics_prefix: Annotated[
        str, typer.Option(help="Prefix of the names of metrics; vllm for routers that read these.")
    ] = "codellama_rt",
    debug: DebugOption = False,
) -> None:
    """Serve a model over HTTP, to clients of OpenAI's, vLLM's and llama.cpp's APIs."""
    with reported_errors(debug):
        if port not in range(2**16):
            raise ValueError(f"--port must be 0 to 65535, got {port}")
        try:
            from codellama_rt.serve import Settings
            from codellama_rt.serve.loading import answering
            from codellama_rt.serve.server import address_of, listen
            from codellama_rt.serve.server import serve as run_server
        except ImportError as error:
            raise ImportError(f"{error}; install the server: codellama_rt[server]") from None
        from codellama_rt.cli.run import open_model

        settings = Settings(
            names=tuple(served_model_name or ()),
            api_keys=tuple(filter(None, api_key or ())),
            open_metrics=open_metrics,
            allowed_origins=tuple(allowed_origin or ()),
            suffix_first=suffix_first,
            chat_template=chat_template.read_text("utf-8") if chat_template else None,
            metrics_prefix=metrics_prefix,
            stream_interval_s=_not_negative("--stream-interval", stream_interval),
            keep_alive_s=_positive("--keep-alive-interval", keep_alive_interval),
            max_body_bytes=max_body,
            max_requests=max_requests,
        )
        drain_timeout_s = _positive("--drain-timeout", drain_timeout)
        most = _checked_tokens(max_queued_tokens)
        _warn(host, settings)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        with listen(host, port) as listener, contextlib.ExitStack() as stack:
            with answering(listener):
                llm = stack.enter_context(open_model(model))
                adapters = _adapters(llm, lora or [])
            llm.engine.max_queued_tokens = most
            tell(f"codellama-rt: serving at {address_of(listener)}")
            settings = replace(settings, adapters=adapters)
            run_server(llm, settings, listener, drain_timeout_s=drain_timeout_s)


def _adapters(llm: LLM, given: list[str]) -> dict:
    found = {}
    for pair in given:
        name, _, folder = pair.partition("=")
        if not name or not folder:
            raise ValueError(f"--lora takes NAME=DIR, got {pair!r}")
        found[name] = llm.load_adapter(folder)
    return found


def _checked_tokens(count: int | None) -> int | None:
    if count is not None and count < 1:
        raise ValueError(f"--max-queued-tokens must be at least 1, got {count}")
    return count


def _positive(name: str, seconds: float) -> float:
    if not seconds > 0:
        raise ValueError(f"{name} must be above 0, got {seconds:g}")
    return seconds


def _not_negative(name: str, seconds: float) -> float:
    if not seconds >= 0:
        raise ValueError(f"{name} must be at least 0, got {seconds:g}")
    return seconds


def _warn(host: str, settings: Settings) -> None:
    if not settings.api_keys and host not in ("127.0.0.1", "::1", "localhost"):
        tell(f"codellama-rt: without {_KEY_VARIABLE} whoever reaches {host} can use the model")
