"""Speculation without a draft model: propose the tokens that followed the same text before.

The longest suffix of prompt and output that has occurred earlier, in them or in an output that has
ended, tells what may follow; a step then computes these tokens behind the last one, and a sample
takes as many as it would have chosen without them. Nothing here changes what is generated.

How many are proposed is a question of time alone. Each token, proposed or not, shows whether the
guess for it was right; that, by the length of the suffix, is how likely the next one is. `RowCost`
knows what rows cost. As many are proposed as make the most tokens per second.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from itertools import takewhile

from codellama_rt.engine.row_cost import TRIED, RowCost
from codellama_rt.engine.sequence import Sequence as Tokens
from codellama_rt.engine.sequence import int32_list
from codellama_rt.engine.step_cost import StepCost
from codellama_rt.model.batch import Batch
from codellama_rt.model.config import ModelConfig
from codellama_rt.ops.suffixes import SuffixAutomaton, SuffixDrafter

SPECULATIONS = ("suffix",)
MAX_DRAFT = 63  # tokens proposed for a sequence: with the last one, 64 rows
MAX_CORPUS_TOKENS = 2**18  # of outputs that have ended, at 110 bytes each
_LEAST_CHANCE = 0.02  # of a token that is worth a thought
_LEAST_GAIN = 1.03  # of tokens per second: what is predicted is not exact
_TEXT_END = -1


def check_speculation(name: object) -> None:
    """Raise ValueError unless it names a kind of speculation; None is none."""
    if name is not None and name not in SPECULATIONS:
        raise ValueError(f"speculation must be None or one of {SPECULATIONS}, got {name!r}")


class Acceptance:
    """How often guesses were right lately, by the length of the suffix that they rest on.

    Lengths are taken together by powers of two: 1, 2 to 3, 4 to 7, 8 to 15, 16 to 31, and more.

    Example:
        >>> lately = Acceptance([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], window=20, weight=1)
        >>> for _ in range(3):
        ...     lately.note(9, is_hit=True)
        >>> lately.rates[length_class(9)] > 0.8, lately.rates[length_class(3)]
        (True, 0.2)
    """

    def __init__(self, prior: Sequence[float], *, window: float, weight: float) -> None:
        """Start with rates.

        Args:
            prior: by the class of the length; entry 0 is not used.
            window: how many guesses of a class count.
            weight: of the prior, in guesses.
        """
        self.rates = list(prior)
        self._kept = 1.0 - 1.0 / window
        self._hits = [weight * rate for rate in prior]
        self._guesses = [weight] * len(self.rates)

    def note(self, length: int, *, is_hit: bool) -> None:
        """Take a guess into account."""
        i = length_class(length)
        self._hits[i] = self._hits[i] * self._kept + is_hit
        self._guesses[i] = self._guesses[i] * self._kept + 1.0
        self.rates[i] = self._hits[i] / self._guesses[i]


_FIRST_RATES = (0.0, 0.2, 0.35, 0.55, 0.7, 0.8, 0.9)


def length_class(length: int) -> int:
    """Return which entry of `Acceptance` counts a suffix of this length."""
    return min(length.bit_length(), len(_FIRST_RATES) - 1)


class Drafter:
    """What may follow one sample; follows from its tokens, and from what has ended before it."""

    def __init__(
        self,
        sequence: Tokens,
        max_len: int,
        prompt: SuffixAutomaton,
        others: Collection[SuffixAutomaton],
        acceptance: Acceptance,
    ) -> None:
        """Start after the prompt.

        Args:
            sequence: the sample's tokens.
            max_len: of prompt and output.
            prompt: the sequence's prompt.
            others: outputs that may be copied.
            acceptance: of all samples.
        """
        self._sequence, self._max_len, self._everyone = sequence, max_len, acceptance
        self._suffixes = SuffixDrafter(prompt, others)
        self._acceptance = Acceptance(acceptance.rates, window=50, weight=2)
        self._num_read = 0

    def propose(self) -> tuple[array, list[float]]:
        """Return tokens that may follow, and how likely each is to be reached and right."""
        self._read()
        most = min(MAX_DRAFT, self._max_len - 1 - len(self._sequence.token_ids))
        length, tokens = self._suffixes.propose(most)
        if not length:
            return int32_list(), []
        chance, chances, rates = 1.0, [], self._acceptance.rates
        for suffix in range(length, length + len(tokens)):
            chance *= rates[length_class(suffix)]
            if chance < _LEAST_CHANCE:
                break
            chances.append(chance)
        return int32_list(tokens[: len(chances)]), chances

    def _read(self) -> None:
        """Read the tokens that have come since the last time."""
        sequence = self._sequence
        for token_id in sequence.token_ids[sequence.prompt_len + len(self._suffixes) :]:
            length, is_hit = self._suffixes.push(token_id)
            if length:
                self._acceptance.note(length, is_hit=is_hit)
                self._everyone.note(length, is_hit=is_hit)


class Corpora:
    """Outputs that have ended, per salt; those of least recent use go when there are too many.

    An output that copies another one brings its text back. So each salt has two texts, and when
    the younger one is full, the older one goes, with what nobody has copied meanwhile.
    """

    def __init__(self, max_tokens: int = MAX_CORPUS_TOKENS) -> None:
        """Start empty; `max_tokens` is the limit of all."""
        self._max_tokens = max_tokens
        self._texts: OrderedDict[Hashable, list[SuffixAutomaton]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of tokens."""
        return sum(len(text) for texts in self._texts.values() for text in texts)

    def clear(self) -> None:
        """Forget all texts."""
        self._texts.clear()

    def get(self, salt: Hashable) -> list[SuffixAutomaton]:
        """Return the texts of a salt, at most two, the younger one first."""
        return self._texts.get(salt, [])

    def add(self, salt: Hashable, token_ids: array) -> None:
        """Add an output."""
        half = self._max_tokens // 2
        text = token_ids[-(half - 1) :] + int32_list([_TEXT_END])
        texts = self._texts.pop(salt, None) or [SuffixAutomaton()]
        if len(texts[0]) + len(text) > half:
            texts = [SuffixAutomaton(), texts[0]]
        texts[0].extend(text)
        self._texts[salt] = texts
        while len(self) > self._max_tokens:
            self._texts.popitem(last=False)


class Speculation:
    """Decide what an engine's steps compute beyond the tokens that are known."""

    def __init__(self, config: ModelConfig, cost: StepCost | None = None) -> None:
        """Start with no text.

        Args:
            config: of the model.
            cost: one that learns from the steps anyway; None: it has one of its own.
        """
        self._own_cost = StepCost(config) if cost is None else None
        self.rows = RowCost(cost or self._own_cost)
        self.corpora = Corpora()
        self.acceptance = Acceptance(_FIRST_RATES, window=200, weight=8)

    def drafter(self, sequence: Tokens, max_len: int, prompt: SuffixAutomaton) -> Drafter:
        """Return what proposes for a sample; see `Drafter`."""
        others = self.corpora.get(sequence.cache_salt)
        return Drafter(sequence, max_len, prompt, others, self.acceptance)

    def propose(
        self, sequences: Sequence[Tokens], drafters: Sequence[Drafter | None], most: int
    ) -> list[array]:
        """Choose the tokens that are worth computing.

        Args:
            sequences: those of a step, one token each without what is proposed.
            drafters: of the sequences; None: one that gets no proposal.
            most: tokens in all.

        Returns:
            Per sequence, possibly empty, int32.
        """
        nothing = int32_list(), []
        proposals = [nothing if drafter is None else drafter.propose() for drafter in drafters]
        ranked = [(chance, i) for i, (_, chances) in enumerate(proposals) for chance in chances]
        if not ranked:
            return [tokens for tokens, _ in proposals]
        if len(sequences) > 1:
            ranked.sort(key=_by_chance)  # stable: a sequence's own stay in order
        count = self._best_count(sequences, [chance for chance, _ in ranked[: max(0, most)]])
        counts = [0] * len(sequences)
        for _, i in ranked[:count]:
            counts[i] += 1
        return [tokens[:its] for (tokens, _), its in zip(proposals, counts, strict=True)]

    def learn(self, batch: Batch, seconds: float) -> None:
        """Take a step that has been computed into account."""
        if self._own_cost is not None:
            self._own_cost.learn(batch.positions, batch.seq_lens, seconds)
        self.rows.learn(batch, seconds)

    def remember(self, sequence: Tokens) -> None:
        """Keep an output that has ended, to be copied by others of its salt."""
        output = sequence.token_ids[sequence.prompt_len :]
        if output:
            self.corpora.add(sequence.cache_salt, output)

    def _best_count(self, sequences: Sequence[Tokens], chances: Sequence[float]) -> int:
        """Return how many of the likeliest tokens make a step with the most tokens per second."""
        if not chances:
            return 0
        rows, cost = len(sequences), self.rows
        keys = sum(len(sequence.token_ids) for sequence in sequences)
        fixed = cost.attention(keys, 1)
        row = cost.attention(keys // rows, 1) - cost.attention(keys // rows, 0)  # of one more
        tried = takewhile(len(chances).__ge__, (n - rows for n in TRIED if n > rows))
        best, most = 0, _LEAST_GAIN * rows / (cost.seconds(rows) + fixed)
        expected, counted = float(rows), 0
        for count in dict.fromkeys((*tried, len(chances))):
            expected += sum(chances[counted:count])
            counted = count
            speed = expected / (cost.seconds(rows + count) + fixed + row * count)
            if speed > most:
                best, most = count, speed
        return best


def _by_chance(ranked: tuple[float, int]) -> float:
    return -ranked[0]
