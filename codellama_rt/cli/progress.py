"""A progress bar on stderr, gone when its work is done; nothing where stderr is no terminal."""

from __future__ import annotations


class ProgressBar:
    """One line: what is being done, how far it is, how long it will take.

    Example:
        >>> with ProgressBar("reading") as bar:
        ...     bar.update(3, 10)
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._progress = self._task = None

    def __enter__(self) -> ProgressBar:
        """Show the bar, at first without an end."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._progress.start()
        self._task = self._progress.add_task(self._what, total=None)
        return self

    def update(self, done: int, total: int, what: str | None = None) -> None:
        """Show that `done` of `total` is done; `what` replaces the description."""
        self._progress.update(
            self._task, completed=done, total=total, description=what or self._what
        )

    def __exit__(self, *exception: object) -> None:
        """Take the bar away."""
        self._progress.stop()
