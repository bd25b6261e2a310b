"""Hold a short conversation; each answer becomes a part of the next prompt.

For example:

    python examples/chat.py smollm2-135m-instruct
"""

import argparse

import codellama_rt as clrt

QUESTIONS = ["Write a Python function that reverses a string.", "Now do it without slices."]


def main() -> None:
    """Ask the questions one after another, and print the answers while they are generated."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="directory, GGUF file, name or hub id of an Instruct model")
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()

    params = clrt.SamplingParams(max_tokens=args.max_tokens)
    messages = [{"role": "system", "content": "You are a helpful programmer."}]
    with clrt.LLM(args.model) as llm:
        for question in QUESTIONS:
            print(f"> {question}")
            messages.append({"role": "user", "content": question})
            answer = ""
            for piece in llm.stream(*llm.chat_prompt(messages, params)):
                print(piece, end="", flush=True)
                answer += piece
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
