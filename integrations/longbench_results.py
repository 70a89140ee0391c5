"""Results on LongBench: prediction files that its own `eval.py` scores, and the mean scores of its tables.

A row is a mapping with the keys `label` (of the run), `task`, `index`, and what each function names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from kvprune.errors import EvaluationError
from kvprune.integrations.longbench_tasks import TASKS

Row = Mapping[str, Any]

BINS = {"0-4k": 4000, "4-8k": 8000, "8k+": float("inf")}
"""LongBench-E's bins of length, by the length (words, or characters of Chinese) that they end below."""


def write_predictions(rows: Iterable[Row], folder: str | Path, extended: bool = False) -> list[Path]:
    """Writes `folder/pred/LABEL/TASK.jsonl` (`pred_e` if extended), in the order of index; returns the paths.

    LongBench's `python eval.py --model LABEL` (with `--e` if extended), run in `folder`, scores them. Rows have
    `prediction`, `answers`, `all_classes` and `length`. Files of the same names are replaced. Raises EvaluationError.
    """
    paths = []
    for label, tasks in _by_label_and_task(rows).items():
        model = Path(folder) / ("pred_e" if extended else "pred") / _relative(label)
        model.mkdir(parents=True, exist_ok=True)
        for task, answered in tasks.items():
            lines = [
                {
                    "pred": _get(row, "prediction"),
                    "answers": list(_get(row, "answers")),
                    "all_classes": _get(row, "all_classes"),
                    "length": _get(row, "length"),
                }
                for row in answered
            ]
            path = model / f"{task}.jsonl"
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
            paths.append(path)
    return paths


def summary(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Mean score of each task, by label: 0 to 100, to two digits, as in LongBench's `result.json`.

    Rows have `score`, 0 to 1. Raises EvaluationError.
    """
    return {
        label: {task: _mean([_get(row, "score") for row in answered]) for task, answered in tasks.items()}
        for label, tasks in _by_label_and_task(rows).items()
    }


def summary_by_length(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Mean score of each task in each of LongBench-E's `BINS`, by label; None where no sample has such a length.

    Rows have `score` and `length`. Raises EvaluationError.
    """
    return {
        label: {task: _means_by_length(answered) for task, answered in tasks.items()}
        for label, tasks in _by_label_and_task(rows).items()
    }


def _means_by_length(rows: list[Row]) -> dict[str, float | None]:
    scores: dict[str, list[float]] = {name: [] for name in BINS}
    for row in rows:
        length = _get(row, "length")
        if length is None:
            raise EvaluationError(f"row {row['index']} of {row['task']} has no length: only LongBench-E is binned.")
        scores[next(name for name, end in BINS.items() if length < end)].append(_get(row, "score"))
    # numpy adds and rounds differently from Python, which can change the last digit; LongBench uses numpy only here.
    return {name: float(round(100 * np.mean(bin), 2)) if bin else None for name, bin in scores.items()}


def _mean(scores: list[float]) -> float:
    total = 0.0
    for score in scores:  # not sum(), which compensates for rounding since Python 3.12
        total += score
    return round(100 * total / len(scores), 2)


def _by_label_and_task(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Tasks in LongBench's order, rows by index."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: (_place(row), _get(row, "index"))):
        groups.setdefault(_get(row, "label"), {}).setdefault(row["task"], []).append(row)
    return groups


def _place(row: Row) -> int:
    task = _get(row, "task")
    if task not in TASKS:
        raise EvaluationError(f"{task!r} is not a task of LongBench: these are not its results.")
    return list(TASKS).index(task)


def _get(row: Row, key: str) -> Any:
    if key not in row:
        raise EvaluationError(f"a result of LongBench has {key!r}; this one: {', '.join(map(repr, row)) or 'nothing'}.")
    return row[key]


def _relative(label: str) -> PurePosixPath:
    """A label as a folder; one with slashes, as of a model on the hub, is a folder in a folder."""
    path = PurePosixPath(label)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise EvaluationError(f"predictions of {label!r} would lie outside their folder: use another label.")
    return path
