"""What a step without prompts costs by its rows: measured, because it is no line.

A CPU multiplies a few rows in the time of one, as long as that is the time of reading the weights;
how many, and what each further one costs, depends on the weights' format, the model and the
machine. What has been measured fades towards nothing, so that it is measured again at times; what
has not is taken for as cheap as it can be beside its neighbours, so that it is tried.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from codellama_rt.engine.step_cost import StepCost
from codellama_rt.model.batch import Batch

# The numbers of rows that are tried: each has to be measured, and costs a step to try in vain.
TRIED = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
_FADING = 0.999  # of what was measured, per step
_MOST_CHANGE = 2.0  # of a value by one measurement: another program may have had the CPU
_UP, _DOWN = 0.3, 0.5  # how far a value follows a measurement
_CHEAPEST, _DEAREST = 0.5, 1.5  # a row that was not measured, in those of a prompt
_LEAST = 0.05  # of a step's time is not attention
_REFRESHED = 64  # steps between two looks at what `StepCost` has learned; at first fewer


class RowCost:
    """Learn and predict the seconds of steps without prompts.

    Example:
        >>> from codellama_rt.llm.variants import SHAPES
        >>> rows = RowCost(StepCost(SHAPES["7b"]))
        >>> rows.note(1, 0.1); rows.note(8, 0.2)
        >>> 0.09 < rows.seconds(4) <= 0.2 < rows.seconds(16)
        True
    """

    def __init__(self, cost: StepCost) -> None:
        """Start with what `cost` says, which learns by itself; attention is known by it alone."""
        self._cost = cost
        self._parts = cost.parts()
        self._counts: list[int] = []  # of rows, ascending
        self._measured: dict[int, tuple[float, int]] = {}  # seconds, and in which step
        self._step = self._next_look = 0

    def learn(self, batch: Batch, seconds: float) -> None:
        """Take a step that has been computed into account; one with prompts says nothing."""
        rows = len(batch.token_ids)
        if rows > len(batch.logit_rows):
            return
        if self._step >= self._next_look:
            self._parts = self._cost.parts()
            self._next_look += min(self._step + 1, _REFRESHED)
        # As if all sequences had equally many rows.
        attention = self.attention(int(batch.seq_lens.sum()), rows / len(batch.seq_lens))
        self.note(rows, max(seconds - attention, _LEAST * seconds))

    def attention(self, keys: int, rows: float) -> float:
        """Return the seconds of the attention of the last rows of a sequence, or of several."""
        _, _, pair, key = self._parts
        return (pair * rows + key) * keys

    def note(self, rows: int, seconds: float) -> None:
        """Take a measurement into account."""
        expected = self.seconds(rows)
        self._step += 1
        if rows in self._measured:
            seconds = min(seconds, _MOST_CHANGE * expected)
            seconds = expected + (_UP if seconds > expected else _DOWN) * (seconds - expected)
        else:
            if self._counts:
                seconds = min(seconds, _MOST_CHANGE * expected)
            insort(self._counts, rows)
        self._measured[rows] = seconds, self._step

    def seconds(self, rows: int) -> float:
        """Return what the products of so many rows take, as far as is known."""
        place = bisect_left(self._counts, rows)
        above = self._counts[place] if place < len(self._counts) else None
        if above == rows:
            return self._value(rows)
        fixed, row, _, _ = self._parts
        if not self._counts:
            return fixed + row * rows
        least = 0.0
        if place:
            below = self._counts[place - 1]
            least = self._value(below)
            if above is None:
                return least + _CHEAPEST * row * (rows - below)
        return max(least, self._value(above) - _DEAREST * row * (above - rows))

    def _value(self, rows: int) -> float:
        seconds, step = self._measured[rows]
        return seconds * _FADING ** (self._step - step)
