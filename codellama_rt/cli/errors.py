"""How a command ends when something is wrong: one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

# What bad input, a missing file or too little memory raise; anything else is a fault of ours.
_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, MemoryError, ImportError)
_INTERRUPTED = 130
_UsageError = typer.BadParameter.__base__  # click's, or that of the copy which newer typers carry

# Parameters of the Python API, as the messages below the command line name them, and their options.
_OPTIONS = {
    "max_tokens": "--max-new-tokens",
    "stop_token_ids": "--stop-token-id",
    "allowed_token_ids": "--allowed-token-id",
    "bad_words": "--bad-word",
    "json": "--json-schema",
    "prompt_token_ids": "--prompt",
} | {
    name: f"--{name.replace('_', '-')}"
    for name in (
        *(
            "device",
            "dtype",
            "quantization",
            "repack",
            "adapter",
            "kv_dtype",
            "kv_memory",
            "block_size",
        ),
        *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_threads", "runtime"),
        "speculation",
        *("rope_theta", "rope_scaling", "prefix_cache_dir", "prefix_cache_bytes"),
        *("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "ignore_eos"),
        *("include_stop_str_in_output", "skip_special_tokens"),
        *("regex", "choice", "grammar", "json_object"),
        *("n", "logprobs", "prompt_logprobs", "shards", "context", "batch", "chat_template"),
    )
}
_ASSIGNED = "|".join(name for name in _OPTIONS if name != "n")
# The keys of config.json with these names are not meant.
_UNLIKE_PROSE = "|".join(name for name in _OPTIONS if "_" in name and "rope" not in name)
_PARAMETER = re.compile(
    rf"(?<![\w/.\\-])(?:(?P<assigned>{_ASSIGNED})(?:=| (?='))(?P<value>'[^']*'|[\w.+-]*\w)"
    rf"|(?P<named>{_UNLIKE_PROSE})(?![\w/\\])"
    rf"|^(?:(?:SamplingParams|StructuredOutputs): )?(?P<subject>{'|'.join(_OPTIONS)})(?= must))"
)


class CommandGroup(TyperGroup):
    """Commands whose mistaken options are told in one line, as all other mistakes are."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run the command line, and exit with its code where it stands alone."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        try:
            sys.exit(super().main(*args, standalone_mode=False, **options) or 0)
        except _UsageError as error:
            message = error.format_message().replace(": Value error, ", ": ")  # of newer typers
            is_help = "\n" in message  # what is printed where no command is given
            tell(message if is_help else f"codellama-rt: {message.rstrip('.')}{_hint(error)}")
            sys.exit(error.exit_code)
        except typer.Abort:
            tell("codellama-rt: aborted")
            sys.exit(1)


def _hint(error: Any) -> str:
    return f"; see {error.ctx.command_path} --help" if error.ctx is not None else ""


@contextlib.contextmanager
def reported_errors(debug: bool) -> Iterator[None]:
    """Turn what the user can mend into one line and exit code 2, an interrupt into 130."""
    try:
        yield
    except KeyboardInterrupt:
        tell("codellama-rt: interrupted")
        raise typer.Exit(_INTERRUPTED) from None
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except _EXPECTED as error:
        if debug:
            raise
        tell(f"codellama-rt: {in_options(reason(error))}")
        raise typer.Exit(2) from None


def in_options(message: str) -> str:
    """Name options instead of parameters of the Python API.

    Example:
        >>> in_options("kv_dtype must be one of auto, int8; use kv_dtype='int8'")
        '--kv-dtype must be one of auto, int8; use --kv-dtype int8'
        >>> in_options("use repack=False")
        'use --no-repack'
    """
    return _PARAMETER.sub(_option, message)


def _option(match: re.Match[str]) -> str:
    if match["assigned"] and match["value"] == "False":
        return _OPTIONS[match["assigned"]].replace("--", "--no-", 1)
    if match["assigned"]:
        return f"{_OPTIONS[match['assigned']]} {match['value'].strip(chr(39))}"
    return _OPTIONS[match["named"] or match["subject"]]


def reason(error: BaseException) -> str:
    """Return what an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def tell(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)
