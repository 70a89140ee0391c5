"""How far an evaluation is: a bar on a terminal, and a line now and then where nobody could see a bar move."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS = 30
"""Between two lines, at least."""


class EvaluationProgress:
    """Counts rows. name: of the evaluation. total, done: rows in all, and those that an earlier run has made."""

    def __init__(self, name: str, total: int, done: int, console: Console | None, *, quiet: bool) -> None:
        self._name, self._total, self._done = name, total, done
        self._console = console or Console()
        self._quiet = quiet
        self._lines = not quiet and not self._console.is_terminal
        self._began = self._told = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or self._lines,
        )
        self._task = self._bar.add_task(name, total=total, completed=done)

    def __enter__(self) -> EvaluationProgress:
        if self._done and not self._quiet:
            self._say(f"{self._name}: {self._done} of {self._total} done in an earlier run")
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, what: str) -> None:
        """Say what is being measured now."""
        self._bar.update(self._task, description=what)

    def advance(self) -> None:
        """One row more."""
        self._done += 1
        self._bar.advance(self._task)
        now = time.monotonic()
        if self._lines and (now - self._told >= _SECONDS or self._done == self._total):
            self._told = now
            self._say(f"{self._name}: {self._done} of {self._total} done, {now - self._began:.0f} s")

    def interrupted(self, kept_in: str | None) -> None:
        """Say how to go on after Ctrl-C. kept_in: the file with the results."""
        if self._quiet:
            return
        self._bar.stop()
        kept = (
            f"kept in {kept_in}: the same command goes on from there"
            if kept_in is not None
            else "lost: name a file with --out, and an interrupted run goes on where it stopped"
        )
        self._say(f"interrupted: {self._done} of {self._total} done, {kept}.")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
