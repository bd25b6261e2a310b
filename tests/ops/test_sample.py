"""sample: its definition's tokens and distribution, whatever the batch, threads and CPU."""

import numpy as np
import pytest
from helpers.builders import running_on
from scipy import stats

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.reference_sampling import distribution, process, uniform

VOCAB_SIZES = (1, 2, 31, 32, 33, 63, 64, 65, 300, 5000)
PER_SAMPLE = ("temperature", "top_k", "top_p", "min_p", "seed", "index", "position")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
# What may be set, each beside what it is without; for the tests of distributions.
CHOICES = {
    "temperature": (1.0, 0.7),
    "top_k": (0, 12),
    "top_p": (1.0, 0.8),
    "min_p": (0.0, 0.03),
    "repetition_penalty": (1.0, 1.3),
    "presence_penalty": (0.0, 0.4),
    "frequency_penalty": (0.0, 0.2),
    "bias": (False, True),
    "mask": (False, True),
}


def lists_of(rng, num_samples, vocab_size, values):
    """Distinct tokens for each sample, and `values(n)` for all of them."""
    most = min(vocab_size, 30)
    own = [rng.permutation(vocab_size)[: rng.integers(0, most + 1)] for _ in range(num_samples)]
    offsets = np.cumsum([0, *map(len, own)], dtype=np.int32)
    return ops.TokenLists(offsets, np.concatenate(own).astype(np.int32), values(offsets[-1]))


def settings_of(rng, num_samples):
    def some(*values, dtype=np.float64):
        return rng.choice(np.array(values, dtype), num_samples)

    return {
        "temperature": some(0, 0.2, 0.7, 1, 2.5, 1e-300),
        "top_k": some(0, 1, 5, 40, 700, dtype=np.int32),
        "top_p": some(1, 0.1, 0.5, 0.9, 0.95, 0.999, 1e-9, 1 - 2.0**-53),
        "min_p": some(0, 0.02, 0.5, 1),
        "seed": rng.integers(0, 2**64, num_samples, np.uint64),
        "index": rng.integers(0, 64, num_samples).astype(np.uint64),
        "position": rng.integers(0, 100_000, num_samples).astype(np.uint64),
        "repetition_penalty": some(1, 1.3, 0.7),
        "presence_penalty": some(0, 0.5, -1),
        "frequency_penalty": some(0, 0.3),
    }


def random_case(rng, vocab_size, num_samples=8):
    """Arguments of `sample`, with equal logits, -inf, lists and masks in some."""
    logits = rng.normal(0, rng.choice([0.05, 1, 3, 10]), (num_samples, vocab_size))
    if rng.random() < 0.3:
        logits = logits.round(1)
    if rng.random() < 0.2:
        logits[rng.random(logits.shape) < 0.1] = -np.inf
    case = {"logits": logits.astype(np.float32), **settings_of(rng, num_samples)}
    if rng.random() < 0.5:
        counts = lambda n: rng.integers(0, 4, n).astype(np.int32)  # noqa: E731
        case["seen"] = lists_of(rng, num_samples, vocab_size, counts)
    if rng.random() < 0.5:
        biases = lambda n: np.where(rng.random(n) < 0.3, -np.inf, rng.normal(0, 5, n))  # noqa: E731
        case["bias"] = lists_of(rng, num_samples, vocab_size, biases)
    if rng.random() < 0.5:
        case["masks"] = rng.integers(0, 2**32, (3, -(-vocab_size // 32)), np.uint32)
        case["mask_rows"] = rng.integers(-1, 3, num_samples).astype(np.int32)
    return case


def call(function, case):
    return function(case["logits"], **{name: v for name, v in case.items() if name != "logits"})


def only(case, s):
    """The arguments of one sample of a case, alone."""
    own = {name: case[name][s : s + 1] for name in (*PER_SAMPLE, *PENALTIES)}
    own["logits"], own["rows"] = case["logits"], np.array([s], np.int32)
    for name in ("seen", "bias"):
        if name in case:
            offsets, token_ids, values = case[name]
            part = slice(offsets[s], offsets[s + 1])
            ends = np.array([0, part.stop - part.start], np.int32)
            own[name] = ops.TokenLists(ends, token_ids[part], values[part])
    if "masks" in case:
        own["masks"], own["mask_rows"] = case["masks"], case["mask_rows"][s : s + 1]
    return own


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.usefixtures("isa")
def test_tokens(rng, vocab_size):
    for _ in range(20):
        case = random_case(rng, vocab_size)
        ours, theirs = call(ops.sample, case), call(reference.sample, case)
        assert ours.has_token.tolist() == theirs.has_token.tolist()
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("is_restricted", [False, True])
def test_draws_at_the_ends_of_intervals(rng, is_restricted):
    """Within 1e-6 of where the next token begins: there float32 cannot tell which one it is."""
    num_rows, size = 300, 700
    logits = rng.normal(0, 2, (num_rows, size)).astype(np.float32)
    bits = rng.integers(0, 2**32, (num_rows, -(-size // 32)), np.uint32)
    masks = bits if is_restricted else np.full_like(bits, 2**32 - 1)
    allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :size]
    distances = []
    for position, (row, weighted) in enumerate(zip(logits, allowed, strict=True)):
        u, end = uniform(7, 0, position), rng.integers(size // 4, size * 3 // 4)
        weights = np.exp(row.astype(np.float64)) * weighted
        before, after = weights[:end].sum(), weights[end:].sum()
        row[:end] += np.float32(np.log(u * after / ((1 - u) * before)))
        weights = np.exp(row.astype(np.float64)) * weighted
        distances.append(weights[:end].sum() / weights.sum() - u)
    assert 1e-13 < np.abs(distances).min() < np.abs(distances).max() < 1e-6
    settings = {"seed": 7, "position": np.arange(num_rows, dtype=np.uint64)}
    if is_restricted:  # biases of 0: some blocks have scores of their own, in float64
        offsets = np.arange(num_rows + 1, dtype=np.int32) * 3
        some = np.tile(np.array([5, 70, 699], np.int32), num_rows)
        settings |= {"masks": masks, "bias": ops.TokenLists(offsets, some, np.zeros(len(some)))}
    expected = reference.sample(logits, **settings).token_ids.tolist()
    assert ops.sample(logits, **settings).token_ids.tolist() == expected


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-9, 1e9, 1e30, 1e300])
@pytest.mark.parametrize("magnitude", [0, 1e-40, 1, 1e6, 3e38])
def test_extreme_scores(rng, temperature, magnitude):
    """Temperatures and scores that float32 cannot hold the quotient of."""
    logits = (rng.uniform(-1, 1, (8, 200)) * magnitude).astype(np.float32)
    penalties = {"repetition_penalty": 1.0 + 1e-9, "seen": seen_everywhere(8, 200)}
    for settings in ({}, penalties):
        settings = {
            "temperature": temperature,
            "position": np.arange(8, dtype=np.uint64),
            **settings,
        }
        expected = reference.sample(logits, **settings).token_ids.tolist()
        assert ops.sample(logits, **settings).token_ids.tolist() == expected


def seen_everywhere(num_rows, size):
    """Lists of one token in each block of 64."""
    some = np.arange(3, size, 64, dtype=np.int32)
    offsets = np.arange(num_rows + 1, dtype=np.int32) * len(some)
    token_ids = np.tile(some, num_rows)
    return ops.TokenLists(offsets, token_ids, np.ones(len(token_ids), np.int32))


@pytest.mark.usefixtures("isa")
def test_greedy_and_forbidden_tokens(rng):
    """Greedy exactly, with equal logits; of what is forbidden nothing ever comes."""
    logits = rng.normal(0, 2, (2000, 200)).astype(np.float32).round(1)
    assert ops.sample(logits, temperature=0).token_ids.tolist() == logits.argmax(axis=1).tolist()
    masks = rng.integers(0, 2**32, (2000, 7), np.uint32)
    masks[:, 0] |= 1
    allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :200]
    expected = np.where(allowed, logits, -np.inf).argmax(axis=1)
    assert ops.sample(logits, temperature=0, masks=masks).token_ids.tolist() == expected.tolist()
    for settings in ({}, {"top_k": 20}, {"top_p": 0.9}, {"temperature": 50.0}):
        drawn = ops.sample(logits, masks=masks, seed=5, **settings).token_ids
        assert allowed[np.arange(2000), drawn].all()


def combinations():
    """All settings at once, each alone, and some together."""
    names = list(CHOICES)
    sets = [names, *([name] for name in names)]
    sets += [["top_k", "top_p"], ["top_p", "min_p", "mask"], ["bias", "mask", "temperature"]]
    return [{name: CHOICES[name][name in chosen] for name in names} for chosen in sets]


def assert_follows(combination, num_draws, seed=7):
    """Draws of one row have the probabilities of the definition."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, 50).astype(np.float32)
    settings = {name: v for name, v in combination.items() if name not in ("bias", "mask")}
    seen = np.arange(20, dtype=np.int32), np.arange(20, dtype=np.int32) % 4
    bias = np.array([3, 21, 40], np.int32), np.array([1.0, -1.0, -np.inf])
    mask = np.array([0xF0F0F0FF, 0x0003FFFF], np.uint32) if combination["mask"] else None
    if not combination["bias"]:
        bias = np.empty(0, np.int32), np.empty(0)
    penalties = {name: settings[name] for name in PENALTIES}
    scores = process(logits, seen, bias, mask, **penalties)
    cuts = {name: v for name, v in settings.items() if name not in PENALTIES}
    token_ids, probs = distribution(scores, **cuts)

    def for_all(token_ids, values):
        offsets = np.arange(num_draws + 1, dtype=np.int32) * len(token_ids)
        return ops.TokenLists(offsets, np.tile(token_ids, num_draws), np.tile(values, num_draws))

    zeros = np.zeros(num_draws, np.int32)
    drawn = ops.sample(
        logits[None],
        rows=zeros,
        seed=99,
        position=np.arange(num_draws, dtype=np.uint64),
        seen=for_all(*seen),
        bias=for_all(*bias),
        masks=None if mask is None else mask[None],
        mask_rows=None if mask is None else zeros,
        **settings,
    )
    assert drawn.has_token.all()
    counts = np.bincount(drawn.token_ids, minlength=50)
    assert counts.sum() == counts[token_ids].sum()
    if len(token_ids) > 1:
        assert stats.chisquare(counts[token_ids], probs * num_draws).pvalue > 1e-4, combination


@pytest.mark.parametrize("combination", combinations())
def test_draws_follow_the_distribution(combination):
    assert_follows(combination, 20_000)


def test_a_sample_depends_on_nothing_else(rng, threads):
    """Alone, in any order, on any number of threads."""
    for vocab_size in (50, 3000):
        for _ in range(5):
            case = random_case(rng, vocab_size)
            together = call(ops.sample, case).token_ids.tolist()
            for num_threads in (1, 2, 7):
                threads(num_threads)
                assert call(ops.sample, case).token_ids.tolist() == together
            alone = [call(ops.sample, only(case, s)).token_ids[0] for s in reversed(range(8))]
            assert alone[::-1] == together


def test_every_instruction_set_gives_the_same_tokens(rng):
    """Flat rows of many tokens, where the slightest difference of a sum would show soonest."""
    logits = rng.normal(0, 0.1, (40, 32016)).astype(np.float32)
    settings = {**settings_of(rng, 40), "temperature": np.full(40, 1.3)}
    tokens, logprobs = set(), set()
    for name in ops.available_isas():
        with running_on(isa=name):
            token_ids = ops.sample(logits, **settings).token_ids
            tokens.add(token_ids.tobytes())
            logprobs.add(ops.token_logprobs(logits, token_ids, 5).logprobs.tobytes())
    assert len(tokens) == len(logprobs) == 1


def test_samples_of_one_row(rng):
    """They share its logits and differ by their index."""
    logits = rng.normal(0, 1, (3, 500)).astype(np.float32)
    rows = np.array([2, 0, 2, 2], np.int32)
    index = np.array([0, 0, 1, 2], np.uint64)
    ours = ops.sample(logits, rows=rows, index=index, seed=3, position=9)
    for s, (row, own) in enumerate(zip(rows, index.tolist(), strict=True)):
        alone = ops.sample(logits[row : row + 1], index=own, seed=3, position=9)
        assert alone.token_ids[0] == ours.token_ids[s]
    assert len(set(ours.token_ids[[0, 2, 3]].tolist())) == 3


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("change", "token_id"),
    [
        ({3: np.nan, 7: np.nan}, 3),
        ({70: np.inf, 80: np.inf}, 70),
        ({5: np.inf, 99: -np.nan}, 99),
        (dict.fromkeys(range(100), -np.inf), 0),
    ],
)
def test_rows_without_a_token(rng, temperature, change, token_id):
    logits = rng.normal(0, 1, (3, 100)).astype(np.float32)
    for i, value in change.items():
        logits[1, i] = value
    result = ops.sample(logits, temperature=temperature)
    assert result.has_token.tolist() == [True, False, True]
    assert result.token_ids[1] == token_id


def test_every_token_forbidden():
    logits, token_ids = np.float32([[1, 2, 3]]), np.arange(3, dtype=np.int32)
    bias = ops.TokenLists(np.int32([0, 3]), token_ids, np.full(3, -np.inf))
    for settings in ({"masks": np.zeros((1, 1), np.uint32)}, {"bias": bias}):
        for temperature in (0.0, 1.0):
            result = ops.sample(logits, temperature=temperature, **settings)
            assert not result.has_token[0]


@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-17])
def test_the_highest_is_kept_however_small_top_p(top_p):
    """Equal weights: what may be left out of each rounds to the whole of it."""
    for vocab_size in VOCAB_SIZES:
        logits = np.zeros((1, vocab_size), np.float32)
        for position in range(4):
            sampled = ops.sample(logits, top_p=top_p, position=position)
            assert sampled.token_ids.tolist() == [0]


@pytest.mark.parametrize("vocab_size", [3000, 32016])
def test_nuclei_of_many_equal_and_of_ordered_weights(rng, vocab_size):
    """Orders that a choice of pivots might be slow at, or lose ties in."""
    ascending = np.linspace(-4, 4, vocab_size).astype(np.float32)
    rows = [
        ascending,
        ascending[::-1],
        np.concatenate([ascending[::2], ascending[1::2][::-1]]),
        rng.integers(0, 3, vocab_size).astype(np.float32),
        np.where(np.arange(vocab_size) % 7 == 3, 1e-3, 0).astype(np.float32),
    ]
    logits, count = np.stack(rows), len(rows)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        for position in range(5):
            settings = dict(
                top_p=np.full(count, top_p), position=np.full(count, position, np.uint64)
            )
            expected = reference.sample(logits, **settings)
            assert np.array_equal(ops.sample(logits, **settings).token_ids, expected.token_ids)


def test_zero_and_minus_zero_are_equal():
    logits = np.zeros((1, 200), np.float32) - 1
    logits[0, 70], logits[0, 150] = -0.0, 0.0
    assert ops.sample(logits, temperature=0).token_ids[0] == 70


def test_no_samples():
    assert ops.sample(np.zeros((0, 9), np.float32)).token_ids.shape == (0,)


def test_logits_may_be_read_only_and_do_not_change(rng):
    case = random_case(rng, 300)
    before = case["logits"].copy()
    case["logits"].flags.writeable = False
    call(ops.sample, case)
    np.testing.assert_array_equal(case["logits"], before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, r"temperature\[0\] must be finite and not negative"),
        ({"temperature": np.nan}, ValueError, r"temperature\[0\] must be finite"),
        ({"temperature": np.ones(2, np.float32)}, TypeError, "temperature must be float64"),
        ({"temperature": np.ones(3)}, ValueError, "temperature must be float64"),
        ({"top_k": -1}, ValueError, r"top_k\[0\] must be in \[0"),
        ({"top_p": 0.0}, ValueError, r"top_p\[0\] must be in \(0, 1\]"),
        ({"min_p": 1.5}, ValueError, r"min_p\[0\] must be in \[0, 1\]"),
        ({"seed": np.zeros(2, np.int64)}, TypeError, "seed must be uint64"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty"),
        ({"presence_penalty": np.inf}, ValueError, r"presence_penalty\[0\] must be finite"),
        ({"rows": np.int32([0, 2])}, ValueError, r"rows\[1\] must be in \[0, num_logits=2\)"),
        ({"masks": np.zeros((2, 3), np.uint32)}, ValueError, "masks must be uint32"),
        ({"masks": np.zeros((2, 1), np.int32)}, TypeError, "masks must be uint32"),
        ({"mask_rows": np.int32([0, 0])}, ValueError, r"mask_rows\[0\] must be in \[-1"),
        ({"logits": np.zeros((2, 0), np.float32)}, ValueError, "logits must have a token"),
        ({"logits": np.zeros((2, 9))}, TypeError, "logits must be float32"),
    ],
)
def test_refusals(arguments, error, message):
    logits = arguments.pop("logits", np.zeros((2, 9), np.float32))
    with pytest.raises(error, match=f"^sample: .*{message}"):
        ops.sample(logits, **arguments)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([0, 1], [3], [1.0]), "bias_offsets must be int32"),
        (([0, 2, 1], [3], [1.0]), "bias_offsets must rise from 0 to num_biases=1"),
        (([0, 1, 1], [9], [1.0]), r"bias_ids\[0\] must be in \[0, vocab_size=9\)"),
        (([0, 1, 1], [3], [np.nan]), r"bias_values\[0\] must be a number below infinity"),
        (([0, 1, 1], [3], [1.0, 2.0]), "bias_values must be float64"),
    ],
)
def test_refused_lists(lists, message):
    offsets, token_ids, values = lists
    bias = ops.TokenLists(np.int32(offsets), np.int32(token_ids), np.float64(values))
    with pytest.raises(ValueError, match=f"^sample: {message}"):
        ops.sample(np.zeros((2, 9), np.float32), bias=bias)
