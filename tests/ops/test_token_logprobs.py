"""token_logprobs: a log softmax in float64, ranks and the likeliest tokens."""

import numpy as np
import pytest

from codellama_rt import ops
from codellama_rt.ops import reference

VOCAB_SIZES = (1, 3, 63, 64, 65, 500, 5000)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("num_top", [0, 1, 20])
@pytest.mark.usefixtures("isa")
def test_values(rng, vocab_size, num_top):
    for scale, decimals in ((0.1, 9), (3, 1), (20, 9)):  # rounded: with equals
        logits = rng.normal(0, scale, (4, vocab_size)).round(decimals).astype(np.float32)
        rows = rng.integers(0, 4, 6).astype(np.int32)
        token_ids = rng.integers(0, vocab_size, 6).astype(np.int32)
        ours = ops.token_logprobs(logits, token_ids, num_top, rows=rows)
        theirs = reference.token_logprobs(logits, token_ids, num_top, rows=rows)
        assert ours.ranks.tolist() == theirs.ranks.tolist()
        assert ours.top_ids.tolist() == theirs.top_ids.tolist()
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=1e-13, atol=1e-13)


def test_minus_infinity_is_a_logit():
    logits = np.float32([[0, -np.inf, 0, -np.inf]])
    found = ops.token_logprobs(logits, np.int32([3]), 4)
    assert found.logprobs[0, 0] == -np.inf
    assert found.ranks[0] == 4
    assert found.top_ids.tolist() == [[0, 2, 1, 3]]
    np.testing.assert_allclose(found.logprobs[0, 1:3], -np.log(2))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_row_gives_nan_alone(rng, bad):
    logits = rng.normal(0, 1, (3, 70)).astype(np.float32)
    logits[1, 66] = bad
    found = ops.token_logprobs(logits, np.int32([5, 5, 5]), 3)
    assert np.isnan(found.logprobs).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(found.logprobs[[0, 2]]).all()
    assert found.top_ids[1].tolist() == [-1, -1, -1]


def test_a_row_depends_on_nothing_else(rng, threads):
    logits = rng.normal(0, 1, (9, 3000)).astype(np.float32)
    token_ids = rng.integers(0, 3000, 9).astype(np.int32)
    together = ops.token_logprobs(logits, token_ids, 5)
    for num_threads in (1, 3):
        threads(num_threads)
        for i in range(9):
            alone = ops.token_logprobs(logits[i : i + 1], token_ids[i : i + 1], 5)
            for ours, theirs in zip(alone, together, strict=True):
                assert ours[0].tobytes() == theirs[i].tobytes()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"token_ids": np.int32([9, 0])}, ValueError, r"token_ids\[0\] must be in \[0, vocab"),
        ({"rows": np.int32([0, -1])}, ValueError, r"rows\[1\] must be in \[0, num_logits=2"),
        ({"rows": np.int32([0])}, ValueError, "token_ids must be int32"),
        ({"token_ids": np.zeros(2, np.int64)}, TypeError, "token_ids must be int32"),
        ({"logits": np.zeros((2, 9), np.float16)}, TypeError, "logits must be float32"),
    ],
)
def test_refusals(arguments, error, message):
    given = {"logits": np.zeros((2, 9), np.float32), "token_ids": np.int32([0, 0]), **arguments}
    with pytest.raises(error, match=f"^token_logprobs: {message}"):
        ops.token_logprobs(**given)
