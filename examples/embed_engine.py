"""Drive the engine from a loop of your own: requests arrive while others are running.

For example:

    python examples/embed_engine.py smollm2-135m-instruct
"""

import argparse
from collections import defaultdict

import codellama_rt as clrt

ARRIVALS = {  # step -> the prompt that arrives before it
    0: "def quicksort(a):",
    3: "class Stack:",
    5: "import ",
}


def main() -> None:
    """Serve three requests that arrive at different steps, and print what each received."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="directory, GGUF file, name or hub id")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    params = clrt.SamplingParams(max_tokens=args.max_tokens)
    texts: defaultdict[str, str] = defaultdict(str)
    with clrt.LLM(args.model, max_num_seqs=8) as llm:
        engine, step = llm.engine, 0
        while engine.has_unfinished() or step <= max(ARRIVALS):
            if step in ARRIVALS:
                prompt = ARRIVALS[step]
                engine.add_request(prompt, llm.tokenizer.encode(prompt), params)
            for output in engine.step():
                texts[output.request_id] += output.text
                if output.finished:
                    print(f"# step {step}: {output.request_id!r} ended by {output.finish_reason}")
            step += 1
        stats = engine.stats()

    for prompt, text in texts.items():
        print(f"{prompt}{text}\n")
    print(f"# {stats['generated_tokens']} tokens in {stats['steps']} steps")


if __name__ == "__main__":
    main()
