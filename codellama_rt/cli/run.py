"""What `generate` and `infill` do: open the model, follow one request, tell how it went."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from codellama_rt.cli.options import ModelOptions
from codellama_rt.cli.progress import ProgressBar
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.completion import Completion, Job
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.memory_plan import weight_bytes
from codellama_rt.llm.prompts import PromptEncoder
from codellama_rt.model.kv_cache import bytes_per_token
from codellama_rt.text.tokenizer import Tokenizer
from codellama_rt.tools.limits import read_bandwidth

_REQUEST = "command-line"


@dataclass
class Prompt:
    """What to complete: a text, or the gap between two."""

    text: str | None = None
    prefix: str = ""
    suffix: str = ""
    suffix_first: bool = False

    def encode(
        self, encoder: PromptEncoder, params: SamplingParams
    ) -> tuple[list[int], SamplingParams]:
        """Token ids, and parameters that end a filling at its end.

        Raises:
            ValueError: two gaps, or a model that cannot fill in.
        """
        if self.text is not None:
            return encoder.completion(self.text, params)
        return encoder.infilling(self.prefix, self.suffix, params, suffix_first=self.suffix_first)


@dataclass
class Report:
    """The outputs of a request and what they cost.

    Attributes:
        completions: one a sample.
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
    with ProgressBar(f"opening {options.model}") as bar:
        return LLM(
            options.model, device=options.device, dtype=options.dtype,
            quantization=options.quantization, kv_dtype=options.kv_dtype,
            max_model_len=options.max_model_len, kv_memory=options.kv_memory,
            num_threads=options.num_threads, progress=bar.update,
        )  # fmt: skip


def require_tokenizer(llm: LLM, model: str) -> Tokenizer:
    """The model's tokenizer.

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
        ValueError, TypeError: the request cannot be.
    """
    job = Job(_REQUEST, token_ids, params.n)
    report = Report(job.completions)
    llm.engine.add_request(_REQUEST, token_ids, params)
    try:
        outputs = _prefill(llm, report)
        while True:
            write("".join(output.text for output in outputs if output.index == 0))
            job.take(outputs)
            if not job.unfinished:
                return report
            outputs = _decode(llm, report, len(token_ids))
    finally:
        llm.engine.abort(_REQUEST)


def _prefill(llm: LLM, report: Report) -> deque:
    """Compute the prompt behind a progress bar; the first outputs."""
    started = perf_counter()
    with ProgressBar("reading the prompt") as bar:
        while not (outputs := deque(llm.engine.step())):
            bar.update(*llm.engine.progress(_REQUEST))
    report.prefill_s = perf_counter() - started
    return outputs


def _decode(llm: LLM, report: Report, prompt_len: int) -> deque:
    """One more step, and what it read."""
    started = perf_counter()
    outputs = deque(llm.engine.step())
    report.decode_s += perf_counter() - started
    report.decode_steps += 1
    report.decode_keys += sum(
        prompt_len + len(report.completions[output.index].token_ids) for output in outputs
    )
    return outputs


def describe(llm: LLM, report: Report) -> str:
    """Lines for --stats; measures the read bandwidth."""
    prompt = len(report.completions[0].prompt_token_ids)
    new = sum(len(completion.token_ids) for completion in report.completions)
    decoded = max(0, new - len(report.completions))
    lines = [
        f"opened in {report.load_s:.2f} s",
        f"prompt {prompt} tokens in {report.prefill_s:.2f} s, "
        f"{prompt / report.prefill_s:.1f} tok/s",
        f"output {new} tokens, ended by {_endings(report.completions)}",
    ]
    if report.decode_steps:
        num_bytes = report.decode_steps * weight_bytes(llm.model.weights)
        num_bytes += report.decode_keys * bytes_per_token(llm.config, llm.kv_cache.dtype)
        speed, roof = num_bytes / report.decode_s, read_bandwidth()
        lines.append(
            f"decode {decoded} tokens in {report.decode_s:.2f} s, "
            f"{decoded / report.decode_s:.1f} tok/s, "
            f"{speed / 1e9:.1f} GB/s = {speed / roof:.0%} of the {roof / 1e9:.1f} GB/s read here"
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
    """One line; token ids are keys of the logprobs."""
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
