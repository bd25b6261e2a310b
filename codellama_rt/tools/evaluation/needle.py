"""Key retrieval (Code Llama paper, section 3.3): recall a function from a long file.

The file consists of real Python functions and classes; one function among them returns a number,
and the file ends with `assert key() ==`.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.text.tokenizer import Tokenizer
from codellama_rt.tools.evaluation.completing import Progress, complete, fingerprint

_ANSWER_TOKENS = 12
_SLACK, _MOST_SLACK = 0.02, 0.2  # unused share of a prompt's length: acceptable, and maximum
_NEEDLE = '''def key_{name}() -> int:
    """Note that this function is used at the end of the file."""
    return {value}
'''
_QUESTION = "assert key_{name}() =="


@dataclass(frozen=True)
class Haystack:
    """A prompt and the value it asks for."""

    token_ids: list[int]
    value: int
    place: int  # approximate tokens before the needle


def evaluate_needle(
    llm: LLM,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 1,
    seed: int = 0,
    sources: Sequence[Path] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask for keys at several depths of files of several lengths.

    Args:
        llm: the model.
        lengths: maximum tokens of the prompts; the last functions are left out to fit.
        depths: where the key is, from 0 (beginning) to 1 (end).
        trials: keys per length and depth.
        seed: of the keys and of the order of the functions.
        sources: Python files to build the long files from; default: the standard library.
        progress: called with answers done and total answers.

    Raises:
        ValueError: a length over the model's limit, or more than the sources provide; a depth
            outside [0, 1].
        OSError: a source cannot be read.
    """
    for depth in depths:
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"depths are from 0 to 1, got {depth}")
    tokenizer = llm.prompt_encoder.require_tokenizer()
    blocks = _Blocks(tokenizer, read_blocks(sources or standard_library()), seed)
    samples, requests = [], []
    params = SamplingParams(max_tokens=_ANSWER_TOKENS, stop=("\n",))
    for length in lengths:
        if not 256 <= length <= llm.max_model_len - _ANSWER_TOKENS:
            raise ValueError(
                f"a length is from 256 to max_model_len - {_ANSWER_TOKENS} = "
                f"{llm.max_model_len - _ANSWER_TOKENS} tokens, got {length}"
            )
        for depth in depths:
            for trial in range(trials):
                hay = blocks.haystack(length, depth, random.Random(f"{seed}/{trial}"))
                requests.append((hay.token_ids, params))
                samples.append(
                    {
                        "length": length,
                        "depth": depth,
                        "trial": trial,
                        "tokens": len(hay.token_ids),
                        "tokens_before": hay.place,
                        "expected": hay.value,
                    }
                )
    for sample, (completion,) in zip(samples, complete(llm, requests, progress), strict=True):
        answer = completion.text.strip()
        sample |= {"answer": answer, "found": _first_number(answer) == str(sample["expected"])}
    grid = [
        {
            "length": length,
            "depth": depth,
            "found": sum(
                s["found"] for s in samples if (s["length"], s["depth"]) == (length, depth)
            )
            / trials,
        }
        for length in lengths
        for depth in depths
    ]
    return {
        "task": "needle",
        "settings": {
            "lengths": list(lengths),
            "depths": list(depths),
            "trials": trials,
            "seed": seed,
        },
        "scores": {"found": sum(sample["found"] for sample in samples) / max(len(samples), 1)},
        "grid": grid,
        "fingerprint": fingerprint([sample["answer"] for sample in samples]),
        "samples": samples,
    }


def standard_library() -> list[Path]:
    """Return the modules that come with Python, sorted by name."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def read_blocks(paths: Sequence[Path]) -> list[str]:
    """Return the top-level functions and classes of Python files; unparsable files are skipped."""
    blocks = []
    for path in paths:
        source = path.read_text("utf-8", errors="replace")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes in the sources
                statements = ast.parse(source).body
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines()
        for statement in statements:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                first = min([statement.lineno, *(d.lineno for d in statement.decorator_list)])
                blocks.append("\n".join(lines[first - 1 : statement.end_lineno]) + "\n")
    return blocks


class _Blocks:
    """Functions and classes in a random order, and about how many tokens each has."""

    def __init__(self, tokenizer: Tokenizer, blocks: list[str], seed: int) -> None:
        self._tokenizer = tokenizer
        self._blocks = blocks
        random.Random(seed).shuffle(self._blocks)
        self._counts: dict[int, int] = {}  # counted when first needed

    def haystack(self, length: int, depth: float, rng: random.Random) -> Haystack:
        """Build a file of at most `length` tokens with a key at `depth`."""
        name, value = rng.randrange(100, 1000), rng.randrange(10_000, 100_000)
        needle = _NEEDLE.format(name=name, value=value)
        question = _QUESTION.format(name=name)
        chosen = self._fill(length - self._count(needle) - self._count(question))
        while True:
            place = self._place(chosen, depth)
            texts = [self._blocks[i] for i in chosen]
            parts = [*texts[:place], needle, *texts[place:], question]
            token_ids = self._tokenizer.encode("\n\n".join(parts))
            if len(token_ids) <= length:
                return Haystack(token_ids, value, sum(self._counts[i] for i in chosen[:place]))
            chosen.pop()  # counts ignore merges across the borders of blocks

    def _fill(self, room: int) -> list[int]:
        """Choose blocks that nearly fill so many tokens; those that are too long are skipped.

        Raises:
            ValueError: there are not enough.
        """
        chosen, left = [], room
        for i, block in enumerate(self._blocks):
            if i not in self._counts:
                self._counts[i] = self._count(block)
            if self._counts[i] <= left:
                chosen.append(i)
                left -= self._counts[i]
            if left <= room * _SLACK:
                break
        if left <= room * _MOST_SLACK:
            return chosen
        raise ValueError(
            f"the sources have functions for {room - left} tokens, too few for a prompt of {room}"
        )

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, bos=False)) + 1

    def _place(self, chosen: list[int], depth: float) -> int:
        """Return the number of blocks that hold about `depth` of the tokens."""
        counts = [self._counts[i] for i in chosen]
        wanted, before = depth * sum(counts), 0
        for place, size in enumerate(counts):
            if before + size / 2 > wanted:
                return place
            before += size
        return len(counts)


def _first_number(text: str) -> str:
    digits = len(text) - len(text.lstrip("0123456789"))
    return text[:digits]
