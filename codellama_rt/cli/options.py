"""Options of the command line, each written once, and commands that take them by the group."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, get_type_hints

import typer

from codellama_rt.engine.sampling_params import SamplingParams


@dataclass
class ModelOptions:
    """Which model, and how it is held."""

    model: Annotated[
        str, typer.Argument(help="Directory, GGUF file, 'smollm2-135m-instruct' or hub id.")
    ]
    device: Annotated[str, typer.Option(help="cpu.")] = "cpu"
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto, float32, float16, bfloat16.")
    ] = "auto"
    quantization: Annotated[
        str | None, typer.Option(help="Of the weights, made when loaded: int8, int4.")
    ] = None
    kv_dtype: Annotated[
        str, typer.Option(help="Of the KV cache: auto, float32, float16, bfloat16, int8, int4.")
    ] = "auto"
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and output; the checkpoint's by default.")
    ] = None
    kv_memory: Annotated[str | None, typer.Option(help="Memory for the KV cache, such as 8GB.")] = (
        None
    )
    num_threads: Annotated[
        int | None, typer.Option(help="Threads an operator; the CPUs by default.")
    ] = None


@dataclass
class SamplingOptions:
    """How tokens are chosen and when the output ends; None: as the checkpoint says."""

    max_new_tokens: Annotated[int | None, typer.Option(help="At most; 128 by default.")] = None
    min_tokens: Annotated[int | None, typer.Option(help="No end before so many.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None
    top_p: Annotated[
        float | None, typer.Option(help="Likeliest tokens of this total probability.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="So many likeliest tokens; 0: all.")] = None
    min_p: Annotated[
        float | None, typer.Option(help="Least probability, as a fraction of the likeliest's.")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Over 1: tokens of prompt and output are less likely.")
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtracted once from tokens of the output.")
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Subtracted for each occurrence in the output.")
    ] = None
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to a token's logit.")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ends the output.")] = None
    stop_token_id: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Token id that ends the output.")
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence.")
    ] = False
    n: Annotated[int | None, typer.Option(help="Samples of the prompt; needs --json.")] = None
    logprobs: Annotated[
        int | None, typer.Option(help="Report so many likeliest tokens; needs --json.")
    ] = None
    prompt_logprobs: Annotated[
        int | None, typer.Option(help="The same for the prompt; needs --json.")
    ] = None

    @property
    def needs_json(self) -> list[str]:
        """Options given whose results are no text."""
        names = ("logprobs", "prompt_logprobs")
        return ["n"] * ((self.n or 1) > 1) + [x for x in names if getattr(self, x) is not None]

    def resolve(self, defaults: SamplingParams) -> SamplingParams:
        """The checkpoint's parameters, with those replaced that were given.

        Raises:
            ValueError: one is out of range.
        """
        given: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) not in (None, [])
        }
        names = {"max_new_tokens": "max_tokens", "stop_token_id": "stop_token_ids"}
        if "logit_bias" in given:
            given["logit_bias"] = dict(map(_token_and_bias, given["logit_bias"]))
        return replace(defaults, **{names.get(name, name): x for name, x in given.items()})


@dataclass
class OutputOptions:
    """What is told besides the text."""

    stats: Annotated[
        bool, typer.Option("--stats", help="Tokens, speed and bandwidth, on stderr.")
    ] = False
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object a sample instead of the text.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Errors with their traceback.")] = False


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses: each of their fields becomes an argument or option.

    Args:
        command: its parameters are annotated for typer, or with one of the classes above.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: cls for name, cls in hints.items() if is_dataclass(cls)}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _parameters(groups[parameter.name])
        else:
            parameters.append(
                parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
            )

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, cls in groups.items():
            values[name] = cls(**{field.name: values.pop(field.name) for field in fields(cls)})
        command(**values)

    call.__signature__ = inspect.Signature(parameters)
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _parameters(cls: type) -> list[inspect.Parameter]:
    hints = get_type_hints(cls, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(cls)
    ]


def _token_and_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise ValueError(
            f"--logit-bias takes a token id and a number, such as 13=-2.5, got {text!r}"
        ) from None
