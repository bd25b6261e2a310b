"""Options of the command line, each written once, and commands that take them by the group."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.engine.structured_outputs import StructuredOutputs


def checked_size(text: str | None) -> str | None:
    """Refuse what is not a size such as 8GB, before anything is opened.

    Raises:
        typer.BadParameter: it is not.
    """
    from codellama_rt.llm.memory import parse_bytes

    try:
        if text is not None:
            parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def parsed_scaling(text: str) -> dict[str, Any]:
    """Return the object that a text is in JSON.

    Raises:
        typer.BadParameter: it is not.
    """
    import json

    try:
        scaling = json.loads(text)
    except (ValueError, RecursionError):
        scaling = None
    if not isinstance(scaling, dict):
        raise typer.BadParameter(
            f"""expected JSON such as '{{"rope_type": "linear", "factor": 4}}', got {text!r:.80}"""
        )
    return scaling


# Parameters that say which token comes next.
CHOOSING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_FORMS = ("json_schema", "json_object", "regex", "choice", "grammar")  # of StructuredOutputs

# The choices are written out here because the modules that define them load NumPy; a test compares.
DeviceName = Literal["cpu", "cuda", "ascend"]
DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
QuantizationName = Literal["int8", "int4"]
RuntimeName = Literal["direct", "graph"]
SpeculationName = Literal["suffix"]
KvDtypeName = Literal["auto", "float32", "float16", "bfloat16", "int8", "int4", "fp8"]

DeviceOption = Annotated[
    DeviceName, typer.Option(help="Where to run; `codellama-rt doctor` says which are usable.")
]
DtypeOption = Annotated[DtypeName, typer.Option(help="Dtype of the weights; auto: as stored.")]
QuantizationOption = Annotated[
    QuantizationName | None, typer.Option(help="Quantise the weights while they are loaded.")
]
KvDtypeOption = Annotated[
    KvDtypeName,
    typer.Option(help="Dtype of the KV cache; auto: that of the weights; fp8: cuda only."),
]
RuntimeOption = Annotated[
    RuntimeName,
    typer.Option(help="Direct calls of the kernels, or a MindSpore graph of them; the same bits."),
]
RepackOption = Annotated[
    bool,
    typer.Option(
        help="Copy GGUF's blocks into the kernels' order, small models into huge pages; else read "
        "them in the file."
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show errors with their traceback.")]


@dataclass
class ModelOptions:
    """Which model, and how it is held; the names are those of `LLM`."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Directory, GGUF file, hub id, or a short name: smollm2-135m-instruct, "
            "CodeLlama-7b-hf.",
            show_default=False,
        ),
    ]
    device: DeviceOption = "cpu"
    dtype: DtypeOption = "auto"
    quantization: QuantizationOption = None
    repack: RepackOption = True
    kv_dtype: KvDtypeOption = "auto"
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Tokens of prompt and output together (default: the checkpoint's)."),
    ] = None
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", callback=checked_size, help="Memory for the KV cache, such as 8GB."
        ),
    ] = None
    block_size: Annotated[
        int | None,
        typer.Option(help="Tokens per block of the KV cache (default: 64; ascend: 128)."),
    ] = None
    max_num_seqs: Annotated[int, typer.Option(help="Sequences per step.")] = 64
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Tokens per step; longer prompts are computed in chunks.")
    ] = 512
    num_threads: Annotated[
        int | None, typer.Option(help="Threads per operator (default: all CPUs).")
    ] = None
    prefix_cache_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            file_okay=False,
            help="Keep the keys and values of prompts there, for later runs.",
        ),
    ] = None
    prefix_cache_bytes: Annotated[
        str,
        typer.Option(metavar="SIZE", callback=checked_size, help="Most that it may take."),
    ] = "16GB"
    runtime: RuntimeOption = "direct"
    speculation: Annotated[
        SpeculationName | None,
        typer.Option(help="Propose what followed the same text before: the same tokens, sooner."),
    ] = None
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", exists=True, file_okay=False, help="LoRA adapter to merge into weights."
        ),
    ] = None
    rope_theta: Annotated[
        float | None, typer.Option(help="Base of RoPE (default: the checkpoint's).")
    ] = None
    rope_scaling: Annotated[
        dict | None,
        typer.Option(
            metavar="JSON",
            parser=parsed_scaling,
            help="""Scaling of RoPE, as in config.json: '{"rope_type": "linear", "factor": 4}'.""",
        ),
    ] = None


@dataclass
class SamplingOptions:
    """How tokens are chosen and when the output ends; None: as the checkpoint says."""

    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the output at most (default: 128; chat: no limit)")
    ] = None
    min_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the output at least, before it may end.")
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="Randomness; 0: always the likeliest token.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this probability.")
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Sample from this many likeliest tokens; 0: all.")
    ] = None
    min_p: Annotated[
        float | None, typer.Option(help="Least probability, as a fraction of the likeliest's.")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens that occurred become less likely.")
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtract once from the logits of output tokens.")
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Subtract per occurrence in the output.")
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=BIAS", help="Add to a token's logit; may be repeated."),
    ] = None
    allowed_token_id: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="Choose among these token ids only; may be repeated."),
    ] = None
    bad_word: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Never write the tokens of this text; may be repeated."),
    ] = None
    json_schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="Write JSON that fits this schema."
        ),
    ] = None
    json_object: Annotated[bool, typer.Option("--json-object", help="Write a JSON object.")] = False
    regex: Annotated[
        str | None, typer.Option(help="Write what this regular expression matches.")
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Write one of these texts; may be repeated."),
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="Follow a grammar of Lark or GBNF."
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Make sampling repeatable.")] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End the output before this text; may be repeated."),
    ] = None
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="End the output at this token id; may be repeated."),
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue after end-of-sequence.")
    ] = False
    include_stop_str_in_output: Annotated[
        bool, typer.Option("--include-stop-str-in-output", help="Keep the text that ends it.")
    ] = False
    skip_special_tokens: Annotated[
        bool, typer.Option(help="Leave the names of control tokens out of the text.")
    ] = True
    n: Annotated[int | None, typer.Option(help="Samples of the prompt; needs --json.")] = None
    logprobs: Annotated[
        int | None, typer.Option(help="Report this many likeliest tokens; needs --json.")
    ] = None
    prompt_logprobs: Annotated[
        int | None, typer.Option(help="The same for the prompt; needs --json.")
    ] = None

    @property
    def chooses_tokens(self) -> bool:
        """Whether an option says how tokens are chosen."""
        return any(getattr(self, name) is not None for name in CHOOSING)

    @property
    def needs_json(self) -> list[str]:
        """The options given whose results need more than text."""
        names = ("logprobs", "prompt_logprobs")
        return ["n"] * ((self.n or 1) > 1) + [x for x in names if getattr(self, x) is not None]

    def resolve(self, defaults: SamplingParams) -> SamplingParams:
        """Return the checkpoint's parameters, with those replaced that were given.

        Raises:
            ValueError: one is out of range.
        """
        given: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) not in (None, []) and field.name not in _FORMS
        }
        given["structured_outputs"] = self._structured_outputs()
        names = {
            "max_new_tokens": "max_tokens",
            "stop_token_id": "stop_token_ids",
            "allowed_token_id": "allowed_token_ids",
            "bad_word": "bad_words",
        }
        if "logit_bias" in given:
            given["logit_bias"] = dict(map(_token_and_bias, given["logit_bias"]))
        return replace(defaults, **{names.get(name, name): x for name, x in given.items()})

    def _structured_outputs(self) -> StructuredOutputs | None:
        given = {name: getattr(self, name) for name in _FORMS if getattr(self, name)}
        for name in ("json_schema", "grammar"):
            if name in given:
                given[name] = given[name].read_text(encoding="utf-8")
        if "json_schema" in given:
            given["json"] = given.pop("json_schema")
        return StructuredOutputs(**given) if given else None


@dataclass
class OutputOptions:
    """What is told besides the text."""

    stats: Annotated[
        bool, typer.Option("--stats", help="Report tokens, speed and bandwidth on stderr.")
    ] = False
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per sample instead of the text.")
    ] = False
    debug: DebugOption = False


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
