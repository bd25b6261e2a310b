"""A few problems of our own in the form of MBPP's two files."""

import json


def problem(number, word="add", operator="+"):
    """Return a problem in the form of mbpp.jsonl."""
    return {
        "text": f"Write a function to {word} {number} and a number.",
        "code": f"def {word}_{number}(x):\r\n\treturn {number} {operator} x \r\n",
        "task_id": number,
        "test_setup_code": "",
        "test_list": [f"assert {word}_{number}({x}) == {eval(f'{number}{operator}{x}')}"
                      for x in range(3)],
        "challenge_test_list": [],
    }  # fmt: skip


def trees():
    """Return a problem whose setup uses a class that the code defines."""
    return {
        "text": "Write a function to count the leaves of a tree.",
        "code": "class Tree:\n    def __init__(self, *below): self.below = below\n\n\n"
                "def leaves(tree):\n    return sum(map(leaves, tree.below)) or 1\n",
        "task_id": 510,
        "test_setup_code": "tree = Tree(Tree(), Tree(Tree(), Tree()))",
        "test_list": ["assert leaves(tree) == 3", "assert leaves(Tree()) == 1"],
        "challenge_test_list": ["assert leaves(Tree(Tree())) == 1"],
    }  # fmt: skip


PROBLEMS = [
    *(problem(number) for number in (1, 2, 3, 4, 10)),
    *(problem(number, "multiply", "*") for number in (11, 12)),
    trees(),
    problem(511),
    problem(601),
]


def sanitized(its):
    """Return a problem in the form of sanitized-mbpp.json."""
    return {
        "source_file": "problems",
        "task_id": its["task_id"],
        "prompt": its["text"],
        "code": its["code"],
        "test_imports": ["import math"],
        "test_list": its["test_list"],
    }


def write_mbpp(path, problems=PROBLEMS):
    """Write problems as mbpp.jsonl and return the path."""
    path.write_text("".join(json.dumps(one) + "\n" for one in problems))
    return path
