"""Three problems in the form of HumanEval's, and answers that no model gave."""

PROBLEMS = [
    {
        "task_id": f"T/{i}", "entry_point": "add", "prompt": 'def add(a, b):\n    """Add."""\n',
        "canonical_solution": "    total = a + b\n\n    return total\n",
        "test": f"def check(f):\n    assert f({i}, 2) == {i + 2}\n",
    }
    for i in range(3)
]  # fmt: skip


class Answer:
    """A completion of a given text."""

    finish_reason = "stop"

    def __init__(self, text):
        self.text = text
