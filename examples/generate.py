"""Complete prompts: all together, then one of them piece by piece.

For example:

    python examples/generate.py smollm2-135m-instruct
"""

import argparse

import codellama_rt as clrt

PROMPTS = ["def quicksort(a):", "def fibonacci(n):"]


def main() -> None:
    """Print two completions, then stream a third."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="directory, GGUF file, name or hub id")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    params = clrt.SamplingParams(max_tokens=args.max_tokens)
    with clrt.LLM(args.model) as llm:
        for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
            speed = completion.stats["generated_tokens"] / completion.stats["total_s"]
            print(
                f"{prompt}{completion.text}\n# {completion.finish_reason}, {speed:.1f} tokens/s\n"
            )

        sampled = clrt.SamplingParams(max_tokens=args.max_tokens, temperature=0.8, seed=1)
        for piece in llm.stream(PROMPTS[0], sampled):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
