"""Time to first token after a restart with the prompt on disk, and what writing it costs.

    python -m codellama_rt.tools.bench.synthetic --shape 7b --layers 4 --out 7b-4l
    python benchmarks/bench_prefix_restore.py 7b-4l --folder prefixes [--tokens 16384]

The model is opened anew for each part, which does not count:

compute  a prompt, from the request to its first token, into an empty folder that is then written;
restore  the same prompt: its blocks are read from the folder, with the system's copy of the files
         in memory dropped first (--warm: with it; --direct: and what the disk gives to reads of the
         same files that pass the system's memory by, just before and after);
decode   runs of 64 steps of --sequences sequences, in each of which every sequence fills a block;
         in turn the blocks are written behind and are not. `writer` is the CPU time of writing.

--part runs one of them, where a time limit is too short for all; `restore` then compares with what
`compute` left in the folder.
"""

import argparse
import json
import mmap
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from time import perf_counter, thread_time

import numpy as np
from scripts import names, new_parser, parsed

from codellama_rt import LLM, SamplingParams
from codellama_rt.engine.disk_cache.write_behind import WriteBehind
from codellama_rt.engine.engine import Engine
from codellama_rt.tools.bench.measure import Row, save

BLOCK_SIZE = 64
DIRECT_BYTES, DIRECT_THREADS = 2**20, 8
RECORD = "computed.json"  # in the folder, beside the prefixes
QUICK = {"tokens": 200, "depth": 80, "runs": 1, "sequences": 2}


def opened(args: argparse.Namespace, *, folder: Path, num_tokens: int, num_seqs: int) -> LLM:
    """Open the model with room for what a part needs."""
    return LLM(
        args.model,
        kv_dtype=args.kv_dtype,
        max_model_len=num_tokens,
        max_num_seqs=num_seqs,
        num_threads=args.threads,
        block_size=BLOCK_SIZE,
        prefix_cache_dir=folder,
        prefix_cache_bytes="100GB",
    )


def prompt_of(llm: LLM, num_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, llm.config.vocab_size, num_tokens).tolist()


def first_token(llm: LLM, prompt: list[int]) -> tuple[float, int]:
    """Return the seconds from a request to its first token, and the token."""
    started = perf_counter()
    [completion] = llm.generate(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
    return perf_counter() - started, completion.token_ids[0]


def compute(args: argparse.Namespace) -> Row:
    shutil.rmtree(args.folder, ignore_errors=True)
    with opened(args, folder=args.folder, num_tokens=args.tokens + 1, num_seqs=1) as llm:
        seconds, token = first_token(llm, prompt_of(llm, args.tokens))
        started = perf_counter()
    written = llm.engine.stats()["prefix_written_bytes"]
    (args.folder / RECORD).write_text(json.dumps({"seconds": seconds, "token": token}))
    return {"seconds": seconds, "flush_seconds": perf_counter() - started, "bytes": written}


def restore(args: argparse.Namespace) -> Row:
    computed = json.loads((args.folder / RECORD).read_text())
    disk = [direct_rate(args.folder)] if args.direct else []
    if not args.warm:
        drop_from_memory(args.folder)
    with opened(args, folder=args.folder, num_tokens=args.tokens + 1, num_seqs=1) as llm:
        seconds, token = first_token(llm, prompt_of(llm, args.tokens))
        stats = llm.engine.stats()
    if token != computed["token"]:
        sys.exit("the restored prefix gave another token: this is a bug")
    num_bytes = sum(path.stat().st_size for path in args.folder.glob("*.kv"))
    row = {
        "seconds": seconds,
        "restored_tokens": stats["prefix_restored_tokens"],
        "bytes": num_bytes,
        "gb_per_s": num_bytes / seconds / 1e9,
        "times_as_fast": computed["seconds"] / seconds,
    }
    if args.direct:
        rate = mean([*disk, direct_rate(args.folder)])
        row |= {"disk_gb_per_s": rate, "share_of_disk": row["gb_per_s"] / rate}
    return row


def direct_rate(folder: Path) -> float:
    """Return the GB/s of 8 threads that read the files past the system's memory."""
    pieces = []
    for path in sorted(folder.glob("*.kv")):
        pieces += [(path, at) for at in range(0, path.stat().st_size, DIRECT_BYTES)]

    def read(pieces: list[tuple[Path, int]]) -> int:
        count = 0
        with mmap.mmap(-1, DIRECT_BYTES) as memory:  # begins with a page, as such reads must
            for path, at in pieces:
                file = os.open(path, os.O_RDONLY | os.O_DIRECT)
                try:
                    count += os.preadv(file, [memory], at)
                finally:
                    os.close(file)
        return count

    started = perf_counter()
    with ThreadPoolExecutor(DIRECT_THREADS) as threads:
        shares = [pieces[i::DIRECT_THREADS] for i in range(DIRECT_THREADS)]
        count = sum(threads.map(read, shares))
    return count / (perf_counter() - started) / 1e9


def decode(args: argparse.Namespace) -> Row:
    """Alternate runs with and without writing, on one engine and the same sequences."""
    num_steps = 2 * args.runs * BLOCK_SIZE
    num_tokens, folder = args.depth + num_steps + 2, args.folder / "decode"
    with opened(args, folder=folder, num_tokens=num_tokens, num_seqs=args.sequences) as llm:
        engine = llm.engine
        params = SamplingParams(max_tokens=num_steps + 2, ignore_eos=True)
        for i in range(args.sequences):
            engine.add_request(str(i), prompt_of(llm, args.depth, seed=i + 1), params)
        while engine.scheduler.num_pending_tokens:
            engine.step()
        blocks, seconds = engine.scheduler.blocks, {True: [], False: []}
        offer = blocks.on_full_block
        with cpu_seconds_of_writing() as writing:
            for run in range(2 * args.runs):
                is_writing = run % 2 == 0
                blocks.on_full_block = offer if is_writing else None
                seconds[is_writing].append(timed_steps(engine))
        for i in range(args.sequences):
            engine.abort(str(i))
        stats = engine.stats()
    shutil.rmtree(folder)
    return {
        "seconds": median(seconds[True]),
        "seconds_without": median(seconds[False]),
        "slowdown": median(a / b for a, b in zip(*seconds.values(), strict=True)) - 1,
        "writer": sum(writing) / sum(seconds[True]),
        "bytes": stats["prefix_written_bytes"],
        "dropped_blocks": stats["prefix_dropped_blocks"],
    }


def timed_steps(engine: Engine) -> float:
    """Return the seconds in which every sequence gains a block."""
    started = perf_counter()
    for _ in range(BLOCK_SIZE):
        engine.step()
    return perf_counter() - started


@contextmanager
def cpu_seconds_of_writing() -> Iterator[list[float]]:
    """Collect the CPU time of each block that is written meanwhile."""
    write, seconds = WriteBehind._write, []

    def timed(self: WriteBehind, *entry: object) -> None:
        started = thread_time()
        write(self, *entry)
        seconds.append(thread_time() - started)

    WriteBehind._write = timed
    try:
        yield seconds
    finally:
        WriteBehind._write = write


def drop_from_memory(folder: Path) -> None:
    """Have the system forget its copy of the files, so that they are read from the disk."""
    for path in folder.glob("*.kv"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("model", help="directory of a model")
    add("--folder", type=Path, required=True, help="for the prefixes; what is in it is deleted")
    add("--part", type=names, default=list(PARTS), metavar="LIST", help=", ".join(PARTS))
    add("--tokens", type=int, default=16384, metavar="N", help="of the prompt")
    add("--kv-dtype", default="auto", help="of the cache")
    add("--warm", action="store_true", help="leave the system's copy of the files in memory")
    add("--direct", action="store_true", help="measure the disk besides")
    add("--sequences", type=int, default=8, metavar="N", help="of `decode`")
    add("--depth", type=int, default=512, metavar="N", help="of `decode`: tokens of the prompts")
    add("--runs", type=int, default=6, metavar="N", help="of `decode`: with writing, and without")
    add("--threads", type=int, metavar="N", help="of each operator")
    args = parsed(parser, sys.argv[1:], QUICK)
    rows = []
    for part in args.part:
        row = {"what": part, "kv": args.kv_dtype, "tokens": args.tokens, **PARTS[part](args)}
        rows.append(row)
        print(" ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                       for name, value in row.items()), flush=True)  # fmt: skip
    if args.json is not None:
        save(args.json, "prefix_restore", rows, "python benchmarks/bench_prefix_restore.py")


PARTS = {"compute": compute, "restore": restore, "decode": decode}

if __name__ == "__main__":
    main()
