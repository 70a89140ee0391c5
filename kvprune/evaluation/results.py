"""Results: a file of JSON lines, a line for every example under every policy, that survives interruptions.

Every line is complete: it names the model, the suite, the example and the policy, so files can be put together,
cut and read by other tools. Whatever was written before an interruption is not done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvprune.errors import EvaluationError

Row = dict[str, Any]
_KEY = ("task", "index", "label")
_NEEDED = {"suite": str, "model": str, "task": str, "index": int, "label": str, "nbytes": int, "dense_nbytes": int}


def read(path: Path) -> list[Row]:
    """The rows of a results file, without a last line that was cut off when its process was stopped.

    Raises EvaluationError, with the line, for a file that cannot be read or is not made of results.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Row], int]:
    """The rows, and the bytes of the file that hold them, without a last line that was cut off."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise EvaluationError(f"cannot read the results {path}: {error}") from error
    rows, good = [], 0
    for number, line in enumerate(lines, 1):
        last = number == len(lines)
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            if last:  # a process was stopped while it wrote
                break
            raise EvaluationError(
                f"line {number} of {path} is not JSON ({error}): remove the line to have its example done again."
            ) from None
        if last and not line.endswith(b"\n"):
            break
        if row is not None:
            rows.append(_checked(row, number, path))
        good += len(line)
    return rows, good


def _checked(row: Any, number: int, path: Path) -> Row:
    wrong = [
        name
        for name, kind in _NEEDED.items()
        if not isinstance(row, dict) or not isinstance(row.get(name), kind) or isinstance(row[name], bool)
    ]
    if wrong:
        raise EvaluationError(
            f"line {number} of {path} is not a result of `kvprune eval`: it lacks {', '.join(wrong)}, or they have "
            "another type."
        )
    return row


class Results:
    """The rows of one evaluation: those of earlier runs, and those that are being added.

    Several processes work on one file: each appends to a part of its own beside it, `FILE.part0` and so on, and the
    first process puts them together at the end. All parts are read at the start, whoever has written them.

    path: the file, or None to keep rows in memory. part: which process this is; None for the only one.
    """

    def __init__(self, path: Path | None, part: int | None = None) -> None:
        self.path = path
        self._mine = path if path is None or part is None else _part(path, part)
        self._rows: dict[tuple[Any, ...], Row] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in [path, *sorted(path.parent.glob(f"{path.name}.part*"))]:
            if file.exists():
                rows, good = _read(file)
                for row in rows:
                    self._rows.setdefault(_key(row), row)
                if file == self._mine:
                    os.truncate(file, good)

    def __len__(self) -> int:
        return len(self._rows)

    def has(self, task: str, index: int, label: str) -> bool:
        return (task, index, label) in self._rows

    def check(self, suite: str, model: str, settings: Row) -> None:
        """Raise EvaluationError if earlier rows were made with other settings, so that they cannot be compared."""
        for row in self._rows.values():
            before = {"suite": row["suite"], "model": row["model"], **row.get("settings", {})}
            now = {"suite": suite, "model": model, **settings}
            if before != now:
                differing = ", ".join(
                    f"{name} {before.get(name)!r} (now {now.get(name)!r})"
                    for name in dict.fromkeys([*before, *now])
                    if before.get(name) != now.get(name)
                )
                raise EvaluationError(
                    f"{self.path} holds results made with {differing}: write to another file with --out, or repeat "
                    "the settings of that run to continue it."
                )

    def add(self, row: Row) -> None:
        """Keep a row and write it at once. A row that is there already is left alone."""
        if _key(row) in self._rows:
            return
        self._rows[_key(row)] = row
        if self._mine is not None:
            with self._mine.open("ab") as file:
                file.write(_line(row))

    def rows(self, labels: Sequence[str] | None = None) -> list[Row]:
        """All rows: examples in the order they were first met, by task and index; labels in the given order."""
        tasks = {task: place for place, task in enumerate(dict.fromkeys(row["task"] for row in self._rows.values()))}
        first = dict.fromkeys([*(labels or ()), *(row["label"] for row in self._rows.values())])
        order = {label: place for place, label in enumerate(first)}
        return sorted(self._rows.values(), key=lambda row: (tasks[row["task"]], row["index"], order[row["label"]]))

    def finish(self, tasks: Iterable[str] = (), labels: Sequence[str] = ()) -> list[Row]:
        """Put the file in order, with the rows of all parts, and remove the parts. Returns its rows."""
        if self.path is None:
            return self.rows(labels)
        parts = sorted(self.path.parent.glob(f"{self.path.name}.part*"))
        for part in parts:
            for row in _read(part)[0]:
                self._rows.setdefault(_key(row), row)
        known = dict.fromkeys([*tasks, *(row["task"] for row in self._rows.values())])
        places = {task: place for place, task in enumerate(known)}
        rows = sorted(self.rows(labels), key=lambda row: (places[row["task"]], row["index"]))
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_bytes(b"".join(map(_line, rows)))
        os.replace(temporary, self.path)
        for part in parts:
            part.unlink()
        return rows


def _part(path: Path, part: int) -> Path:
    return path.with_name(f"{path.name}.part{part}")


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
