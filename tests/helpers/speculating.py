"""A model whose outputs repeat themselves, and speculation that depends on no clock."""

from array import array
from collections.abc import Callable

import numpy as np

from helpers.paged_fakes import HashModel


class RepeatingModel(HashModel):
    """Mostly, one of a few tokens follows each, whatever came before it."""

    def _logits(self, batch, row, kv_cache):
        logits = super()._logits(batch, row, kv_cache)
        token_id = int(batch.token_ids[row])
        likely = 3 + (token_id * 7 + 3) % 11
        logits[likely] += 7.5
        return logits


def speculate_always(engine) -> None:
    """Propose all tokens that were found, at each step."""
    engine.steps.speculation._best_count = lambda sequences, chances: len(chances)


def speculate_at_random(engine, rng: np.random.Generator) -> None:
    """Propose any number of tokens, of those that were found, at each step."""

    def best_count(sequences, chances):
        return int(rng.integers(len(chances) + 1))

    engine.steps.speculation._best_count = best_count


def propose_right_and_wrong(engine, rng: np.random.Generator, outputs: Callable) -> None:
    """Propose some tokens that will come, then some at random.

    Args:
        engine: has `speculation`.
        rng: decides how many.
        outputs: of a sequence: all tokens of its output.
    """

    def proposal(sequence, most):
        left = outputs(sequence)[sequence.num_generated : -1]
        count = min(int(rng.integers(8)), most, len(left))
        right = int(rng.integers(count + 1))
        return array("i", left[:right] + rng.integers(3, 500, count - right).tolist())

    def propose(sequences, drafters, most):
        most //= max(1, len(sequences))
        pairs = zip(sequences, drafters, strict=True)
        return [proposal(one, most) if drafter else array("i") for one, drafter in pairs]

    engine.steps.speculation.propose = propose
