"""An evaluation from its first row to its last: resumed, split over processes, with its progress shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rich.console import Console

from kvprune.errors import EvaluationError
from kvprune.evaluation.contenders import Contender
from kvprune.evaluation.processes import Processes
from kvprune.evaluation.progress import EvaluationProgress
from kvprune.evaluation.results import Results, Row


class Item(Protocol):
    """What a row of results is about."""

    @property
    def task(self) -> str: ...

    @property
    def index(self) -> int: ...


class Work(Protocol):
    """Something to measure, in units that are measured for all contenders before the next one begins."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Row:
        """What must be equal for rows to be compared with each other."""

    def units(self) -> Sequence[Sequence[Any]]:
        """Lists of items, in an order that is always the same."""

    def measure(self, unit: Any, contenders: list[Contender]) -> Iterator[Row]:
        """Rows of the items of a unit, with their task, index and label."""


def run(
    work: Work,
    contenders: Sequence[Contender],
    results: Results,
    *,
    model: str,
    processes: Processes | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Measure what is missing in `results`, and return all rows of these contenders and items, in order.

    model: the name that goes into every row. Each process measures every n-th unit; the first one puts all together
    and returns it, the others return nothing. Raises EvaluationError where `results` holds rows of other settings.
    """
    processes = processes or Processes()
    results.check(work.name, model, work.settings)
    units = work.units()
    if not units:
        raise EvaluationError(f"there is nothing to evaluate: {work.name} has no examples with these settings.")
    mine = [unit for number, unit in enumerate(units) if processes.owns(number)]
    labels = [contender.label for contender in contenders]
    missing = [
        (unit, [c for c in contenders if any(not results.has(item.task, item.index, c.label) for item in unit)])
        for unit in mine
    ]
    total = sum(len(unit) for unit in mine) * len(contenders)
    left = sum(len(unit) * len(who) for unit, who in missing)
    with EvaluationProgress(work.name, total, total - left, console, quiet=not processes.is_first) as progress:
        try:
            for unit, who in missing:
                if who:
                    progress.begin(f"{unit[0].task} {unit[0].index}")
                for row in work.measure(unit, who) if who else ():
                    results.add({"suite": work.name, "model": model, **row, "settings": work.settings})
                    progress.advance()
        except KeyboardInterrupt:
            progress.interrupted(None if results.path is None else str(results.path))
            raise
    processes.wait()
    if not processes.is_first:
        return []
    wanted = {(item.task, item.index) for unit in units for item in unit}
    tasks = dict.fromkeys(item.task for unit in units for item in unit)
    rows = results.finish(tasks, labels)
    return [row for row in rows if row["label"] in labels and (row["task"], row["index"]) in wanted]
