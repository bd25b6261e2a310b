"""Parse JSON objects from untrusted files: bounded size, unique keys, CheckpointError on faults."""

import json
from pathlib import Path
from typing import Any

from codellama_rt.errors import CheckpointError

# Parsed, JSON takes up to 40 times its size. The index of the largest models has 10 MB; a
# tokenizer.json of 260,000 pieces has 33 MB.
MAX_JSON_BYTES = 2**24
MAX_TOKENIZER_BYTES = 2**26


class _DuplicateKeyError(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build one JSON object; Python's json would silently keep the last of two equal keys."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return unique


def parse_object(raw: bytes, source: str) -> dict[str, Any]:
    """Parse UTF-8 JSON that must be one object.

    Args:
        raw: the JSON text.
        source: its name in error messages, for example its path.

    Returns:
        The object as a dictionary.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, nested too deeply, or a duplicate key.

    Example:
        >>> parse_object(b'{"a": 1}', "example")
        {'a': 1}
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except _DuplicateKeyError as error:
        raise CheckpointError(
            f"{source}: expected every name once, found {str(error)!r} twice"
        ) from None
    except RecursionError:
        raise CheckpointError(
            f"{source}: expected plain JSON, found it nested too deeply"
        ) from None
    except (
        ValueError
    ) as error:  # JSONDecodeError, UnicodeDecodeError, integers with thousands of digits
        raise CheckpointError(f"{source}: expected JSON in UTF-8, found {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{source}: expected a JSON object, found {type(value).__name__} at the top level"
        )
    return value


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that must hold one object.

    Args:
        path: the file.
        max_bytes: a larger file is refused.

    Returns:
        The object as a dictionary.

    Raises:
        CheckpointError: the file is missing, unreadable, too large, or `parse_object` rejects it.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size > max_bytes:
            raise CheckpointError(
                f"{path}: expected a JSON file of at most {max_bytes} bytes, "
                f"found {f'{size} bytes' if path.is_file() else 'no regular file'}"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a readable JSON file, found {error.strerror}"
        ) from None
    return parse_object(raw, str(path))
