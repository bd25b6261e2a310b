"""Typed, bounded access to the values of a model configuration that came from a file."""

import math
from collections.abc import Mapping
from typing import Any

from codellama_rt.errors import CheckpointError, warn_of_checkpoint

_REQUIRED: Any = object()


class ConfigFields:
    """Read numbers out of a configuration; each fault names the file, the key, and what was found.

    Args:
        values: the configuration; a key with the value None counts as absent.
        source: what an error message calls it, for example "config.json".

    Example:
        >>> ConfigFields({"hidden_size": 64}, "config.json").integer("hidden_size", high=4096)
        64
    """

    def __init__(self, values: Mapping[str, Any], source: str):
        """Keep both arguments as attributes."""
        self.values = values
        self.source = source

    def fault(self, key: str, expected: str, remedy: str = "") -> CheckpointError:
        """Build the error for a value that cannot be used."""
        found = repr(self.values.get(key, "nothing"))
        found = found if len(found) <= 200 else found[:200] + "..."
        return CheckpointError(
            f"{self.source}: {key}: expected {expected}, found {found}{remedy and '; ' + remedy}"
        )

    def integer(self, key: str, default: Any = _REQUIRED, *, low: int = 1, high: int) -> Any:
        """Return an integer in low..high, or the default when the key is absent."""
        value = self.values.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.fault(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, above: float = 0.0) -> Any:
        """Return a finite float greater than `above`, or the default when the key is absent."""
        value = self.values.get(key)
        if value is None and default is not _REQUIRED:
            return default
        expected = f"a finite number above {above:g}"
        if type(value) not in (int, float):
            raise self.fault(key, expected)
        try:
            number = float(value)
        except OverflowError:
            raise self.fault(key, expected) from None
        if not math.isfinite(number) or number <= above:
            raise self.fault(key, expected)
        return number

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Return a list of so many finite floats greater than 0."""
        values = self.values.get(key)
        if not isinstance(values, list) or len(values) != count:
            raise self.fault(key, f"a list of {count} numbers")
        each = (ConfigFields({key: value}, self.source).number(key) for value in values)
        return tuple(each)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean, or the default when the key is absent."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.fault(key, "true or false")
        return value

    def token_ids(
        self, key: str, default: tuple[int, ...] = (), *, vocab_size: int
    ) -> tuple[int, ...]:
        """Return the ids of a key that holds one id, a list or null; absent gives the default.

        An integer that is no row of the vocabulary (-1, 32000 of 32000, 2**32 - 1) is how many
        files say "none": it is left out, with a warning.
        """
        if key not in self.values:
            return default
        value = self.values[key]
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > 1024 or any(type(i) is not int or not -(2**63) <= i < 2**64 for i in ids):
            raise self.fault(key, "a token id or a list of token ids")
        return tuple(i for i in dict.fromkeys(ids) if self._is_token(key, i, vocab_size))

    def token_id(self, key: str, *, vocab_size: int) -> int | None:
        """Return the first of `token_ids`, or None."""
        return next(iter(self.token_ids(key, vocab_size=vocab_size)), None)

    def _is_token(self, key: str, token_id: int, vocab_size: int) -> bool:
        if not 0 <= token_id < vocab_size:
            warn_of_checkpoint(
                f"{self.source}: {key}: {token_id} is none of the {vocab_size} tokens of the "
                "vocabulary; it is taken as not given"
            )
            return False
        return True
