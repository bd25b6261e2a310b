"""The commands `codellama-rt eval humaneval | mbpp | infilling | perplexity | needle`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codellama_rt.cli.errors import reported_errors, tell
from codellama_rt.cli.options import DebugOption, ModelOptions, with_options
from codellama_rt.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from codellama_rt.cli.progress import ProgressBar
    from codellama_rt.llm.llm import LLM

app = typer.Typer(
    help="Evaluate a model: scores on stdout, all details with --json, a picture with --plot.",
    no_args_is_help=True,
)

_EXECUTE = "Run what the model wrote, in a limited process; see docs/evaluate.md first."


@dataclass
class ResultOptions:
    """Where the result goes besides stdout."""

    json: Annotated[Path | None, typer.Option(help="Write the whole result to this file.")] = None
    plot: Annotated[Path | None, typer.Option(help="Draw a picture: .png, .svg or .pdf.")] = None
    debug: DebugOption = False


@dataclass
class SamplesOptions:
    """How many solutions of how many problems are written, how, and whether they are tested."""

    n: Annotated[int, typer.Option(help="Samples per problem.")] = 1
    k: Annotated[
        list[int] | None, typer.Option(help="The k of pass@k; may be repeated (default: 1).")
    ] = None
    temperature: Annotated[
        float, typer.Option(help="Randomness; 0: always the likeliest token.")
    ] = 0.0
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the likeliest tokens of this probability; 0.95 in the paper."
        ),
    ] = 1.0
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a completion at most.")] = 512
    limit: Annotated[int | None, typer.Option(help="Problems at most.")] = None
    execute: Annotated[bool, typer.Option("--execute", help=_EXECUTE)] = False
    timeout: Annotated[float, typer.Option(help="Seconds per test at most.")] = 10.0

    def params(self) -> SamplingParams:
        """Return how to sample; refuse values out of range."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            max_tokens=self.max_new_tokens,
        )

    def arguments(self, bar: ProgressBar) -> dict[str, Any]:
        """Return what the evaluations by tests take in common."""
        return {
            "params": self.params(),
            "n": self.n,
            "ks": tuple(self.k or (1,)),
            "limit": self.limit,
            "execute": self.execute,
            "timeout_s": self.timeout,
            "progress": bar.update,
            "execution_progress": _testing(bar),
        }


@app.command()
@with_options
def humaneval(
    model: ModelOptions,
    result: ResultOptions,
    samples: SamplesOptions,
) -> None:
    """Write 164 functions from their docstrings; with --execute their tests give pass@k."""
    with reported_errors(result.debug):
        samples.params()

    def evaluate(llm: LLM, bars: Callable) -> dict[str, Any]:
        from codellama_rt.tools.evaluation.humaneval import evaluate_humaneval

        with bars("completing") as bar:
            return evaluate_humaneval(llm, **samples.arguments(bar))

    _run(model, result, evaluate)


@app.command()
@with_options
def mbpp(
    model: ModelOptions,
    result: ResultOptions,
    problems: Annotated[
        Path, typer.Option(help="The published file: mbpp.jsonl or sanitized-mbpp.json.")
    ],
    samples: SamplesOptions,
) -> None:
    """Write 500 functions from a sentence, three tests and three examples; --execute tests them."""
    with reported_errors(result.debug):
        from codellama_rt.tools.evaluation.mbpp import evaluate_mbpp, read_problems

        samples.params()
        read = read_problems(problems)

    def evaluate(llm: LLM, bars: Callable) -> dict[str, Any]:
        with bars("completing") as bar:
            return evaluate_mbpp(llm, read, **samples.arguments(bar))

    _run(model, result, evaluate)


@app.command()
@with_options
def infilling(
    model: ModelOptions,
    result: ResultOptions,
    suffix_first: Annotated[
        bool, typer.Option("--suffix-first", help="Prompt in the order suffix, prefix (SPM).")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Lines at most, drawn by --seed.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of that drawing.")] = 0,
    execute: Annotated[bool, typer.Option("--execute", help=_EXECUTE)] = False,
    timeout: Annotated[float, typer.Option(help="Seconds per test at most.")] = 10.0,
) -> None:
    """Fill in each line of HumanEval's solutions, greedily."""

    def evaluate(llm: LLM, bars: Callable) -> dict[str, Any]:
        from codellama_rt.tools.evaluation.infilling import evaluate_infilling

        with bars("filling") as bar:
            return evaluate_infilling(
                llm,
                suffix_first=suffix_first,
                limit=limit,
                seed=seed,
                execute=execute,
                timeout_s=timeout,
                progress=bar.update,
                execution_progress=_testing(bar),
            )

    _run(model, result, evaluate)


@app.command()
@with_options
def perplexity(
    model: ModelOptions,
    result: ResultOptions,
    files: Annotated[list[Path], typer.Option("--file", help="A text; may be repeated.")],
    context: Annotated[
        int | None, typer.Option(help="Tokens of a sliding window (default: each file whole).")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens the window moves by (default: half of it).")
    ] = None,
) -> None:
    """Score every token of files, given those before it."""

    def evaluate(llm: LLM, bars: Callable) -> dict[str, Any]:
        from codellama_rt.tools.evaluation.perplexity import evaluate_perplexity

        with bars("reading") as bar:
            return evaluate_perplexity(
                llm, files, context=context, stride=stride, progress=bar.update
            )

    _run(model, result, evaluate)


@app.command()
@with_options
def needle(
    model: ModelOptions,
    result: ResultOptions,
    length: Annotated[list[int], typer.Option(help="Tokens of a prompt; may be repeated.")],
    depth: Annotated[
        list[float] | None,
        typer.Option(help="Where the function stands, 0 to 1 (default: 0, 0.25, 0.5, 0.75, 1)."),
    ] = None,
    trials: Annotated[int, typer.Option(help="Keys per length and depth.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the keys and the order of the functions.")] = 0,
    source: Annotated[
        list[Path] | None, typer.Option(help="A Python file to fill prompts with; may be repeated.")
    ] = None,
) -> None:
    """Find a function in a long Python file, by default made of the standard library."""

    def evaluate(llm: LLM, bars: Callable) -> dict[str, Any]:
        from codellama_rt.tools.evaluation.needle import evaluate_needle

        with bars("retrieving") as bar:
            return evaluate_needle(
                llm,
                lengths=length,
                depths=depth or (0.0, 0.25, 0.5, 0.75, 1.0),
                trials=trials,
                seed=seed,
                sources=source or (),
                progress=bar.update,
            )

    _run(model, result, evaluate)


def _testing(bar: ProgressBar) -> Callable[[int, int], None]:
    return lambda done, total: bar.update(done, total, "testing")


def _run(
    model: ModelOptions,
    options: ResultOptions,
    evaluate: Callable[[LLM, Callable], dict[str, Any]],
) -> None:
    """Open the model, evaluate it, and put the result where it is wanted."""
    with reported_errors(options.debug):
        from codellama_rt.cli import run as cli_run
        from codellama_rt.cli.progress import ProgressBar

        for path in (options.json, options.plot):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{path}: there is no directory {path.parent}")
        with cli_run.open_model(model) as llm:
            cli_run.require_tokenizer(llm, model.model)
            result = {"model": Path(model.model).name} | evaluate(llm, ProgressBar)
        if options.json is not None:
            options.json.write_text(
                json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8"
            )
        if options.plot is not None:
            from codellama_rt.tools.evaluation.plots import plot

            plot(result, options.plot)
        if not result["scores"]:
            tell("nothing was run, so there are no scores; --execute runs the tests")
        for name, score in result["scores"].items():
            print(f"{name} = {score:.4f}")
