"""Measure what docs/measurements.md shows, one command after another, and make the report.

    python benchmarks/run_all.py --peer-python PYTHON [--out docs] [--quick]

About forty minutes. Without --peer-python the pairs are left out.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

OPS = (
    "ops --shape 7b --dtype bfloat16,int8,int4 --tokens 1,512 --keys 512,16384 --seconds 0.3",
    "ops --shape 34b --dtype bfloat16,int8,int4 --op paged_attention --tokens 1 --keys 100000",
)
GENERATE = (
    "generate --layers 4 --weights bfloat16,int8 --depth 1024,4096,16384 --prefill 512 --steps 12",
    "generate --layers 4 --weights int4 --kv-dtype int8,int4 --depth 1024,4096,16384,32768,100000 "
    "--steps 12",
    "generate --layers 4 --weights bfloat16 --kv-dtype bfloat16,int8 --depth 512 --prefill 4096 "
    "--steps 4 --repeats 2",
    "generate --weights int4 --kv-dtype int4 --depth 100000 --steps 4",
)
PREFILL = ("--weights bfloat16 --kv-dtype bfloat16", "--weights int8,int4 --kv-dtype int8,int4")
PEERS = (
    "--weights bfloat16 --kv-dtype bfloat16 --depth 512,4096,16384,32768 --rounds 5 --steps 5",
    "--weights int8 --kv-dtype int8 --depth 512,4096,16384,32768 --rounds 5 --steps 6",
    "--weights int4 --kv-dtype int4 --depth 512,4096,16384,32768 --rounds 5 --steps 6",
    "--kv-dtype float16,int8,int4 --attention 100000 --depth '' --prefill '' --rounds 3 --steps 2",
    "--shape 34b --kv-dtype float16 --attention 100000 --depth '' --prefill '' --rounds 3 "
    "--steps 2",
    "--peer ctranslate2 --weights int8 --depth '' --prefill 512,4096 --rounds 3",
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", metavar="PYTHON", help="interpreter that has the peers")
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work?")
    args = parser.parse_args()
    bench = [sys.executable, "-m", "codellama_rt.cli.main", "bench"]
    commands = [[*bench, *shlex.split(command)] for command in (*OPS, *GENERATE)]
    commands += [[*script("bench_prefill.py"), *shlex.split(command)] for command in PREFILL]
    if args.peer_python:
        peers = [*script("bench_peers.py"), "--peer-python", args.peer_python]
        commands += [[*peers, *shlex.split(command)] for command in PEERS]
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{i}.json") for i in range(len(commands))]
        for command, file in zip(commands, files, strict=True):
            words = [*command, *["--quick"] * args.quick]
            print(shlex.join(words), flush=True)
            run([*words, "--json", file])
        run([*script("report.py"), *files, "--out", str(args.out)])


def script(name):
    return [sys.executable, str(Path(__file__).with_name(name))]


def run(words):
    if subprocess.run(words).returncode:
        sys.exit(f"run_all.py: {shlex.join(words)} failed")


if __name__ == "__main__":
    main()
