"""A model whose outputs repeat themselves, and speculation that depends on no clock."""

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


def speculate_at_random(engine, rng: np.random.Generator) -> None:
    """Propose any number of tokens, of those that were found, at each step."""

    def best_count(sequences, chances):
        return int(rng.integers(len(chances) + 1))

    engine.steps.speculation._best_count = best_count
