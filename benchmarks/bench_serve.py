"""What the server costs: tokens per second of its streams, beside those of engine.step alone.

    python benchmarks/bench_serve.py MODEL [--streams 1,16,64] [--tokens 200] [--rounds 5]
        [--stream-interval 0.02]

Both are measured in turn, in one process, with one thread per operator; the clients are another
process. The prompts are the same, and every answer has the same number of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from codellama_rt import LLM, SamplingParams
from codellama_rt.serve import Settings
from codellama_rt.serve.server import make_server, run
from codellama_rt.tools.bench.serving import Load, bodies

_WORDS = 24  # of a prompt


def engine_alone(llm: LLM, streams: int, tokens: int) -> float:
    """Return the output tokens per second of engine.step, all requests queued before."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    load = Load(requests=streams, input_words=_WORDS)
    prompts = [llm.tokenizer.encode(body["prompt"]) for body in bodies(load)]
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(f"alone-{i}", prompt, params)
    started = time.perf_counter()
    while llm.engine.has_unfinished():
        llm.engine.step()
    return streams * tokens / (time.perf_counter() - started)


def through_the_server(url: str, streams: int, tokens: int) -> float:
    """Return the output tokens per second that clients of the server see."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = ["--requests", streams, "--concurrency", streams, "--output-tokens", tokens]
        words += ["--input-words", _WORDS, "--json", file]
        command = [sys.executable, "-m", "codellama_rt", "bench", "serve", "--url", url]
        subprocess.run([*command, *map(str, words)], check=True, capture_output=True)
        return json.loads(file.read_text())["output_throughput"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream-interval", type=float, default=Settings.stream_interval_s)
    options = parser.parse_args()
    with LLM(options.model, num_threads=1, max_model_len=2048, kv_memory="256MB") as llm:
        settings = Settings(stream_interval_s=options.stream_interval)
        server = make_server(llm, settings, "127.0.0.1", 0)
        urls: list[str] = []
        thread = threading.Thread(target=lambda: asyncio.run(run(server, urls.append)))
        thread.start()
        while not server.started:
            time.sleep(0.05)
        for streams in map(int, options.streams.split(",")):
            pairs = [
                (
                    engine_alone(llm, streams, options.tokens),
                    through_the_server(urls[0], streams, options.tokens),
                )
                for _ in range(options.rounds)
            ]
            alone, served = (median(values) for values in zip(*pairs, strict=True))
            kept = median(b / a for a, b in pairs)
            print(
                f"{streams:3} streams: engine.step {alone:7.0f} tokens/s, server {served:7.0f}, "
                f"{100 * kept:.0f} % (median of {options.rounds} pairs)",
                flush=True,
            )
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
