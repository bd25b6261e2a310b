"""Fill the gap between two pieces of code, with a model that has infilling tokens.

For example:

    python examples/infill.py CodeLlama-7b-hf
"""

import argparse

import codellama_rt as clrt

PREFIX = '''def remove_non_ascii(s: str) -> str:
    """ '''
SUFFIX = """
    return result
"""


def main() -> None:
    """Print the function with its gap filled in."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="directory, GGUF file, name or hub id")
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()

    with clrt.LLM(args.model) as llm:
        filling = llm.infill(PREFIX, SUFFIX, clrt.SamplingParams(max_tokens=args.max_tokens))
        print(PREFIX + filling.text + SUFFIX)


if __name__ == "__main__":
    main()
