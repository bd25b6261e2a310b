"""Beam search against one written down plainly, and what it returns."""

import numpy as np
import pytest
from helpers.causal_calls import PROMPT, log_probability, new_tokens, tensor


def test_beams_are_scored_by_their_log_probabilities(model):
    output = model.generate(
        tensor([PROMPT, PROMPT[::-1]]), num_beams=4, num_return_sequences=3, max_new_tokens=6,
        length_penalty=0.5, output_scores=True, output_logits=True, return_dict_in_generate=True,
        eos_token_id=[],
    )  # fmt: skip
    rows, scores = output.sequences.asnumpy(), output.sequences_scores.asnumpy()
    assert rows.shape == (6, len(PROMPT) + 6)
    assert (np.diff(scores.reshape(2, 3)) <= 0).all()
    for row, score in zip(rows.tolist(), scores, strict=True):
        total = log_probability(model, row[: len(PROMPT)], row[len(PROMPT) :])
        assert abs(total / 6**0.5 - score) < 1e-5
    assert [step.shape for step in output.scores] == [(8, 512)] * 6
    beams = output.beam_indices.asnumpy()
    for row, origins, score in zip(rows, beams, scores, strict=True):  # compute_transition_scores
        new = row[len(PROMPT) :]
        steps = [output.scores[i].asnumpy()[origins[i], new[i]] for i in range(6)]
        assert abs(sum(steps) / 6**0.5 - score) < 1e-5


def exhaustive_beam_search(model, prompt, num_beams, length, end):
    """The same search written down plainly, on whole prefixes."""
    beams, results = [([], 0.0)], []
    for _ in range(length):
        candidates = []
        for ids, total in beams:
            logits = model.llm.logits(prompt + ids)[-1].astype(np.float64)
            scores = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()) + total
            best = np.argsort(-scores)[: 2 * num_beams]
            candidates += [([*ids, int(i)], float(scores[i])) for i in best]
        candidates = sorted(candidates, key=lambda c: -c[1])[: 2 * num_beams]
        ended = [c for c in candidates[:num_beams] if c[0][-1] == end or len(c[0]) == length]
        results += [(total / len(ids), ids) for ids, total in ended]
        results = sorted(results, key=lambda r: -r[0])[:num_beams]
        beams = [c for c in candidates if c[0][-1] != end][:num_beams]
        best_possible = beams[0][1] / len(beams[0][0])
        if len(results) == num_beams and best_possible <= results[-1][0]:
            break
    return results[0][1]


@pytest.mark.parametrize("end", [439, 75, 211])
def test_beams_that_end(model, end):
    for prompt in (PROMPT, PROMPT[::-1], [1, 5]):
        expected = exhaustive_beam_search(model, prompt, 3, 8, end)
        found = new_tokens(model, prompt, num_beams=3, max_new_tokens=8, eos_token_id=end)
        assert found[: len(expected)] == expected
        assert set(found[len(expected) :]) <= {end}


def test_early_stopping(model):
    """Half of all tokens end a row: results come at once, and only True leaves it at those."""
    steps = {}
    for early_stopping in (True, False, "never"):
        output = model.generate(
            tensor([PROMPT]), num_beams=3, max_new_tokens=30, eos_token_id=list(range(0, 512, 2)),
            early_stopping=early_stopping, length_penalty=2.0, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        steps[early_stopping] = len(output.scores)
    assert steps[True] < steps[False] < steps["never"]
