"""What an editor's requests compute, in both orders of the infilling prompt.

    python benchmarks/bench_typing.py --tokenizer CodeLlama-7b-hf [--file FILE]

One types a line at three quarters of a file, and each three characters bring a request; or one
reads on, and the cursor goes down 20 lines. Each request computes what the prefix cache does not
have of its prompt. "whole blocks" is what would be computed if only whole blocks were shared.

No model runs: the tokenizer and the block manager decide, and there is no time in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from scripts import names, new_parser, numbers, parsed

from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.sequence import Sequence, int32_list
from codellama_rt.text.tokenizer import Tokenizer, load_tokenizer

Gap = tuple[str, str]  # the texts before and after it
KEYS = 3  # characters between two requests
LINES = 20  # that the cursor goes down
LENGTH = 1_040  # lines of this project's own code, if no file is given
ANSWER = 16  # tokens of a filling, which are not in the next prompt
ORDERS = {"PSM": False, "SPM": True}  # whether the suffix comes first
QUICK = {"block_size": [64]}


@dataclass(frozen=True)
class Counts:
    """What the requests of a trace but the first compute; tokens per request.

    Attributes:
        trace: "typing" or "reading on".
        order: of the prompt.
        block_size: of the KV cache.
        prompt: length of the last prompt.
        suffix: tokens behind the gap, there.
        computed: mean.
        most: of any.
        whole_blocks: mean, if only whole blocks were shared.
    """

    trace: str
    order: str
    block_size: int
    prompt: int
    suffix: int
    computed: float
    most: int
    whole_blocks: float


def typing(lines: list[str]) -> Iterator[Gap]:
    """Yield the gaps of someone who types the longest line near three quarters of a file."""
    first = len(lines) * 3 // 4
    at = max(range(first, min(first + LINES, len(lines))), key=lambda i: len(lines[i]))
    before, after = "".join(lines[:at]), "".join(["\n", *lines[at + 1 :]])
    line = lines[at].rstrip("\n")
    start = len(line) - len(line.lstrip())
    for end in range(start, len(line) + 1, KEYS):
        yield before + line[:end], after


def reading(lines: list[str]) -> Iterator[Gap]:
    """Yield the gaps of someone whose cursor goes down line by line."""
    first = len(lines) * 3 // 4
    for at in range(first, min(first + LINES, len(lines))):
        yield "".join(lines[:at]), "".join(lines[at:])


TRACES = {"typing": typing, "reading on": reading}


def serve(blocks: BlockManager, prompt: list[int]) -> tuple[int, int]:
    """Compute a prompt and an answer, as a request alone does.

    Returns:
        Tokens of the prompt that had to be computed, and how many more without heads of blocks.
    """
    token_ids = int32_list(prompt)
    sequence = Sequence(token_ids, len(prompt), (0, 0, 0), first_logit=len(prompt) - 1)
    partial = blocks.num_partial_hit_tokens
    if not blocks.allocate(sequence):
        raise ValueError(f"a prompt of {len(prompt)} tokens does not fit the blocks")
    computed = len(prompt) - sequence.num_computed
    for token_id in (None, *range(3, 3 + ANSWER)):
        if token_id is not None:
            token_ids.append(token_id)
            blocks.grow(sequence, 1)
        blocks.copied()
        sequence.num_computed = len(token_ids)
        blocks.index_blocks(sequence)
    blocks.release(sequence)
    return computed, blocks.num_partial_hit_tokens - partial


def count(
    tokenizer: Tokenizer, gaps: Iterable[Gap], trace: str, order: str, block_size: int
) -> Counts:
    """Serve the requests of a trace, one after another, and count what they compute."""
    gaps, found = list(gaps), []
    blocks = BlockManager(200_000 // block_size, block_size)
    for before, after in gaps:
        prompt = tokenizer.encode_infill(before, after, suffix_first=ORDERS[order])
        found.append(serve(blocks, prompt))
    computed = [its for its, _ in found[1:]]
    whole = [its + partial for its, partial in found[1:]]
    suffix = len(tokenizer.encode_continuation(gaps[-1][1]))
    return Counts(
        trace, order, block_size, len(prompt), suffix, mean(computed), max(computed), mean(whole)
    )


def counts(
    tokenizer: Tokenizer, text: str, traces: Iterable[str], block_sizes: Iterable[int]
) -> list[Counts]:
    """Return what all traces compute in both orders."""
    lines = text.splitlines(keepends=True)
    return [
        count(tokenizer, TRACES[trace](lines), trace, order, block_size)
        for trace in traces
        for block_size in block_sizes
        for order in ORDERS
    ]


def table(rows: Iterable[Counts]) -> str:
    """Return the counts as a table of Markdown."""
    lines = [
        "| trace | order | block size | prompt | suffix | computed, mean | most | whole blocks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            f"{its:.1f}" if isinstance(its, float) else str(its) for its in asdict(row).values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def own_text() -> str:
    """Return the beginning of this project's engine as one file."""
    folder = Path(__file__).resolve().parent.parent / "codellama_rt" / "engine"
    text = "".join(file.read_text() for file in sorted(folder.glob("*.py")))
    return "".join(text.splitlines(keepends=True)[:LENGTH])


def _arguments() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="with tokenizer.model")
    parser.add_argument("--file", type=Path, help="a text file; by default this project's engine")
    parser.add_argument("--trace", type=names, default=list(TRACES), help=", ".join(TRACES))
    parser.add_argument("--block-size", type=numbers, default=[16, 64], help="separated by commas")
    return parsed(parser, sys.argv[1:], QUICK)


def main() -> None:
    """Print the table."""
    args = _arguments()
    try:
        text = own_text() if args.file is None else args.file.read_text()
        rows = counts(load_tokenizer(args.tokenizer), text, args.trace, args.block_size)
    except (OSError, ValueError) as error:
        sys.exit(f"bench_typing.py: {error}")
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
