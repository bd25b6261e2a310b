"""Write what each step of the engine computed as a trace for Chrome (about:tracing, Perfetto).

    python examples/trace_steps.py MODEL

The trace is written to trace.json in the current directory.
"""

import json
import sys

import codellama_rt as clrt
from codellama_rt.engine.metrics import StepRecord


def events(step: StepRecord) -> list[dict]:
    """Return the parts of a step, one after another, in Chrome's trace event format."""
    parts, at = [], step.started
    details = {"chunks": step.chunks, "running": step.running, "waiting": step.waiting}
    for name in ("schedule", "model", "sample"):
        seconds = getattr(step, f"{name}_seconds")
        parts.append(
            {
                "name": name,
                "ph": "X",
                "pid": 0,
                "tid": 0,
                "ts": at * 1e6,
                "dur": seconds * 1e6,
                "args": details,
            }
        )
        at += seconds
    return parts


def main(model: str, path: str = "trace.json") -> None:
    """Generate from a few prompts and write the trace."""
    llm = clrt.LLM(model, max_model_len=1024)
    trace = []
    engine = llm.engine
    engine.on_step = lambda step: trace.extend(events(step))
    for i, prompt in enumerate(["def fibonacci(n):", "class Stack:", "import numpy as np\n" * 20]):
        ids = llm.tokenizer.encode(prompt)
        engine.add_request(str(i), ids, clrt.SamplingParams(max_tokens=16))
    while engine.has_unfinished():
        engine.step()
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": trace}, file)
    print(f"{len(trace)} events in {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
