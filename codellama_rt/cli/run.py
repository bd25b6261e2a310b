"""What `generate` and `infill` do: open the model, follow one request, tell how it went."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from codellama_rt.cli.options import ModelOptions
from codellama_rt.cli.progress import ProgressBar
from codellama_rt.engine.completion import Completion
from codellama_rt.engine.output import Output
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.memory_plan import weight_bytes
from codellama_rt.llm.prompts import PromptEncoder
from codellama_rt.model.kv_cache import bytes_per_token
from codellama_rt.text.tokenizer import Tokenizer
from codellama_rt.tools.limits import MOST_OF_ROOF, of_roof, read_bandwidth


@dataclass
class Prompt:
    """What to complete: a text, or the gap between two.

    Attributes:
        source: the option or argument that gave it, for errors.
        text: what to continue; None: fill the gap between `prefix` and `suffix`.
        suffix_first: the SPM order of the prompt instead of PSM.
    """

    source: str
    text: str | None = None
    prefix: str = ""
    suffix: str = ""
    suffix_first: bool = False

    def encode(
        self, encoder: PromptEncoder, params: SamplingParams
    ) -> tuple[list[int], SamplingParams]:
        """Return token ids, and parameters that end a filling at its end.

        Raises:
            ValueError: two gaps, a text that is not Unicode, or a model that cannot fill in; the
                message begins with the source.
        """
        try:
            if self.text is not None:
                return encoder.completion(self.text, params)
            return encoder.infilling(
                self.prefix, self.suffix, params, suffix_first=self.suffix_first
            )
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from error


@dataclass
class Report:
    """The outputs of a request and what they cost.

    Attributes:
        completions: one per sample.
        load_s: seconds to open the model.
        prefill_s: seconds from the request to its first token.
        decode_s: seconds of the steps after it.
        decode_steps: how many those were.
        decode_keys: keys (and values) they read, of all samples.
    """

    completions: list[Completion]
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    decode_keys: int = 0


def open_model(options: ModelOptions) -> LLM:
    """Open the model behind a progress bar."""
    given = dict(vars(options))
    model = given.pop("model")
    with ProgressBar(f"opening {model}") as bar:
        return LLM(model, **given, progress=bar.update)


def require_tokenizer(llm: LLM, model: str) -> Tokenizer:
    """Return the model's tokenizer.

    Raises:
        ValueError: it has none.
    """
    if llm.tokenizer is None:
        raise ValueError(f"{model} brings no tokenizer; put its tokenizer.model beside the weights")
    return llm.tokenizer


def follow(
    llm: LLM, token_ids: list[int], params: SamplingParams, write: Callable[[str], None]
) -> Report:
    """Run one request to its end.

    Args:
        llm: the model.
        token_ids: the prompt.
        params: how to sample.
        write: called with the text of the first sample as it comes.

    Raises:
        ValueError, TypeError: the request is not valid.
    """
    job = llm.jobs.submit(token_ids, params)
    report = Report(job.completions)
    steps = _timed(llm.jobs.follow([job]))
    try:
        with ProgressBar("reading the prompt") as bar:
            for outputs, seconds in steps:
                report.prefill_s += seconds
                if outputs:
                    break
                bar.update(*llm.engine.progress(job.name))
        write(_first_text(outputs))
        for outputs, seconds in steps:
            report.decode_s += seconds
            report.decode_steps += 1
            report.decode_keys += sum(_keys_read(report, output) for output in outputs)
            write(_first_text(outputs))
    finally:
        llm.jobs.dismiss(job)
    return report


def _timed(steps: Iterator[list[Output]]) -> Iterator[tuple[list[Output], float]]:
    """Yield each step's outputs and its seconds, without the time the caller takes for them."""
    started = perf_counter()
    for outputs in steps:
        yield outputs, perf_counter() - started
        started = perf_counter()


def _first_text(outputs: Sequence[Output]) -> str:
    return "".join(output.text for output in outputs if output.index == 0)


def _keys_read(report: Report, output: Output) -> int:
    """Return how many tokens came before the one that a decode step gave."""
    completion = report.completions[output.index]
    before = len(completion.token_ids) - len(output.token_ids)
    return len(completion.prompt_token_ids) + before


def describe(llm: LLM, report: Report) -> str:
    """Return the lines of --stats; measures the read bandwidth."""
    prompt = len(report.completions[0].prompt_token_ids)
    new = sum(len(completion.token_ids) for completion in report.completions)
    decoded = max(0, new - len(report.completions))
    prompt_speed = prompt / report.prefill_s
    lines = [
        f"opened in {report.load_s:.2f} s",
        f"prompt {prompt} tokens in {report.prefill_s:.2f} s, {prompt_speed:.1f} tok/s",
        f"output {new} tokens, ended by {_endings(report.completions)}",
    ]
    if report.decode_steps:
        num_bytes = report.decode_steps * weight_bytes(llm.model.weights)
        num_bytes += report.decode_keys * bytes_per_token(llm.config, llm.kv_cache.dtype)
        speed, roof = num_bytes / report.decode_s, read_bandwidth()
        lines.append(
            f"decode {decoded} tokens in {report.decode_s:.2f} s, "
            f"{decoded / report.decode_s:.1f} tok/s, {speed / 1e9:.1f} GB/s = "
            f"{of_roof(speed / roof)} of the {roof / 1e9:.1f} GB/s read here"
        )
        if speed / roof > MOST_OF_ROOF:
            lines.append(
                ">100%: more than the measured limit; the machine's speed changed during the run, "
                "or a cache gave the bytes"
            )
    return "\n".join(lines)


def _endings(completions: list[Completion]) -> str:
    reasons = [
        completion.finish_reason
        if completion.stop_reason is None
        else f"{completion.finish_reason} {completion.stop_reason!r}"
        for completion in completions
    ]
    return ", ".join(dict.fromkeys(reasons))


def as_json(completion: Completion) -> str:
    """Return one line of JSON; token ids are keys of the logprobs."""
    values = dict(vars(completion))
    for name in ("logprobs", "prompt_logprobs"):
        if values[name] is not None:
            values[name] = [
                {token_id: logprob._asdict() for token_id, logprob in position.items()}
                if position is not None
                else None
                for position in values[name]
            ]
    return json.dumps(values, ensure_ascii=False)
