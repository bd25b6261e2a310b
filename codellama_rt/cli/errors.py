"""How a command ends when something is wrong: one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import typer

# What bad input, a missing file or too little memory raise; anything else is a fault of ours.
_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, MemoryError, ImportError)
_INTERRUPTED = 130


@contextlib.contextmanager
def reported_errors(debug: bool) -> Iterator[None]:
    """Turn what the user can mend into one line and exit code 2, an interrupt into 130."""
    try:
        yield
    except KeyboardInterrupt:
        tell("codellama-rt: interrupted")
        raise typer.Exit(_INTERRUPTED) from None
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except _EXPECTED as error:
        if debug:
            raise
        tell(f"codellama-rt: {reason(error)}")
        raise typer.Exit(2) from None


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def tell(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)
