"""The command line: `codellama-rt generate | infill | chat | serve | eval | convert | estimate |
doctor | bench`.

Text goes to stdout, everything else to stderr. A mistake ends in one line and exit code 2; Ctrl-C
in exit code 130.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from codellama_rt import __version__
from codellama_rt.cli import evaluate as cli_eval
from codellama_rt.cli import models as cli_models
from codellama_rt.cli.bench import bench_app
from codellama_rt.cli.chat import chat
from codellama_rt.cli.errors import CommandGroup, reported_errors, tell
from codellama_rt.cli.options import (
    DebugOption,
    ModelOptions,
    OutputOptions,
    SamplingOptions,
    with_options,
)
from codellama_rt.cli.serve import serve
from codellama_rt.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from codellama_rt.cli.run import Prompt, Report

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench_app, name="bench")
Write = Callable[[str], None]


def main() -> None:
    """Run the command line."""
    app(prog_name="codellama-rt")


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"codellama-rt {__version__}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Run Code Llama models."""


@app.command()
@with_options
def generate(
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue; -: stdin.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read that text from a file.")] = None,
    model: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
) -> None:
    """Continue a text, or fill it in where it says <FILL_ME>.

    Without --prompt and --prompt-file the text comes from stdin.
    """
    with reported_errors(output.debug):
        from codellama_rt.cli.run import Prompt

        source = "--prompt-file" if prompt_file is not None else "--prompt"
        request = Prompt(source, _read_prompt(prompt, prompt_file))
        _run(model, sampling, output, request, _to_stdout)


@app.command()
@with_options
def infill(
    *,
    prefix: Annotated[
        Path | None, typer.Option(help="A file with the text before the gap.")
    ] = None,
    suffix: Annotated[Path | None, typer.Option(help="A file with the text after the gap.")] = None,
    suffix_first: Annotated[
        bool,
        typer.Option(
            "--suffix-first",
            help="Prompt in the order suffix, prefix (SPM): less to compute while one types.",
        ),
    ] = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Write the filling into FILE, not to stdout.")
    ] = False,
    model: ModelOptions,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="A file with <FILL_ME> where text is missing; -: stdin."
        ),
    ] = None,
    sampling: SamplingOptions,
    output: OutputOptions,
) -> None:
    """Write what is missing in a text; only the filling goes to stdout."""
    with reported_errors(output.debug):
        from codellama_rt.cli.run import Prompt

        before, after = _read_gap(file, prefix, suffix)
        if in_place and (file is None or str(file) == "-" or output.json):
            raise ValueError("--in-place takes a FILE with <FILL_ME>, and no --json")
        source = "--prefix and --suffix" if file is None else str(file)
        request = Prompt(source, prefix=before, suffix=after, suffix_first=suffix_first)
        report = _run(model, sampling, output, request, _discard if in_place else _to_stdout)
        if in_place:
            _replace_file(file, before + report.completions[0].text + after)


app.command()(with_options(chat))
app.command()(with_options(serve))
app.add_typer(cli_eval.app, name="eval")


app.command()(cli_models.convert)
app.command()(cli_models.estimate)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Tell what is installed, what the kernels run on, and what this machine gives them."""
    with reported_errors(debug):
        from codellama_rt.cli.doctor import examine, render

        found = examine()
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            render(found)


def _run(
    model: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    prompt: Prompt,
    write: Write,
) -> Report:
    """Open the model, answer the prompt, and tell what was asked about it."""
    from codellama_rt.cli import run as cli_run

    sampling.resolve(SamplingParams())  # rejects values out of range before the model is opened
    if not output.json and sampling.needs_json:
        raise ValueError(f"--{sampling.needs_json[0].replace('_', '-')} needs --json")
    started = perf_counter()
    with cli_run.open_model(model) as llm:
        load_s = perf_counter() - started
        params = sampling.resolve(llm.default_params())
        cli_run.require_tokenizer(llm, model.model)
        token_ids, params = prompt.encode(llm.prompt_encoder, params)
        report = cli_run.follow(llm, token_ids, params, _discard if output.json else write)
        report.load_s = load_s
        if output.json:
            for completion in report.completions:
                print(cli_run.as_json(completion))
        elif sys.stdout.isatty() and not report.completions[0].text.endswith("\n"):
            write("\n")
        if output.stats:
            tell(cli_run.describe(llm, report))
    return report


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ValueError("the prompt is given twice, by --prompt and by --prompt-file")
    if prompt_file is not None:
        return _read_text(prompt_file)
    if prompt is None and sys.stdin.isatty():
        raise ValueError("no prompt; give --prompt TEXT, --prompt-file FILE, or text on stdin")
    return _read_text(Path("-")) if prompt in (None, "-") else prompt


def _read_gap(file: Path | None, prefix: Path | None, suffix: Path | None) -> tuple[str, str]:
    """Return the text before and after the gap."""
    if (file is None) == (prefix is None and suffix is None):
        raise ValueError("infill takes a FILE with <FILL_ME>, or --prefix and --suffix")
    if file is None:
        return tuple("" if path is None else _read_text(path) for path in (prefix, suffix))
    from codellama_rt.text.tokenizer import split_fill

    parts = split_fill(_read_text(file))
    if parts is None:
        raise ValueError(f"{file}: no <FILL_ME> in it; write it where text is missing")
    return parts


def _read_text(path: Path) -> str:
    """Read a UTF-8 file, or stdin for -, without changing line endings."""
    raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        name = "stdin" if str(path) == "-" else path
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None


def _replace_file(path: Path, text: str) -> None:
    """Replace a file at once, so that an interrupt leaves the old one or the new one.

    A link keeps pointing to the file, whose text is replaced.
    """
    path = path.resolve()
    beside = path.with_name(f".{path.name}.filled")
    try:
        beside.write_bytes(text.encode())
        beside.chmod(path.stat().st_mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _discard(text: str) -> None:
    """Write nowhere."""


if __name__ == "__main__":
    main()
