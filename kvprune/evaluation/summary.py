"""From rows to figures: how good each policy was, and what it held, over the examples of one comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvprune.errors import EvaluationError
from kvprune.evaluation.contenders import FULL
from kvprune.evaluation.results import Row


@dataclass(frozen=True)
class Metric:
    """A figure of a row. unit: factor to show it by; digits: after the point; rises: more is better."""

    name: str
    title: str
    unit: float = 1.0
    digits: int = 1
    rises: bool = True

    def show(self, value: float) -> str:
        sign = "+" if self.name == "nll_change" else ""
        return f"{self.unit * value:{sign}.{self.digits}f}"


SCORE = Metric("score", "score", unit=100)
LIKELIHOOD = (
    Metric("nll", "NLL", digits=3, rises=False),
    Metric("nll_change", "change", digits=3, rises=False),
    Metric("kl", "KL", digits=4, rises=False),
    Metric("agreement", "top-1, %", unit=100),
)


@dataclass(frozen=True)
class Summary:
    """One policy under one budget.

    figures: by metric, the mean over tasks of each task's mean, as LongBench averages. errors: the standard error of
    each over examples, NaN for one example. tasks: the first metric task by task. Bytes are means over examples, at the
    end of each; ratio is of their sums, against a dense cache of the model's type, half_ratio against 16 bits.
    """

    label: str
    policy: str
    budget: str | None
    examples: int
    figures: dict[str, float]
    errors: dict[str, float]
    tasks: dict[str, float]
    nbytes: float
    ratio: float
    half_ratio: float

    def to_dict(self) -> dict[str, Any]:
        figures = {name: None if math.isnan(value) else value for name, value in self.errors.items()}
        return {**asdict(self), "errors": figures}


@dataclass(frozen=True)
class Comparison:
    """Summaries that can be compared: of one model, one suite and the same settings."""

    model: str
    suite: str
    settings: Row
    metrics: tuple[Metric, ...]
    summaries: tuple[Summary, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        question = ", the question comes after compression" if self.settings.get("question") == "unknown" else ""
        return f"{self.suite}, {self.model}{question}"

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row["task"] for row in self.rows))

    @property
    def full(self) -> Summary | None:
        return next((summary for summary in self.summaries if summary.label == FULL), None)

    @property
    def is_uneven(self) -> bool:
        """Whether the policies were not all given the same examples."""
        return len({summary.examples for summary in self.summaries}) > 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "suite": self.suite,
            "settings": self.settings,
            "results": [summary.to_dict() for summary in self.summaries],
        }


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Sort rows into comparisons, in the order in which they come. Raises EvaluationError for rows without a figure."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        settings = repr(sorted(row.get("settings", {}).items()))
        groups.setdefault((row["model"], row["suite"], settings), []).append(row)
    return [_comparison(list(group)) for group in groups.values()]


def _comparison(rows: Sequence[Row]) -> Comparison:
    metrics = LIKELIHOOD if "nll" in rows[0] else (SCORE,)
    for row in rows:
        bad = [metric.name for metric in metrics if not isinstance(row.get(metric.name), int | float)]
        if bad:
            raise EvaluationError(
                f"a result of {row['task']}, row {row['index']}, under {row['label']} has no {', '.join(bad)}."
            )
    labels = dict.fromkeys(row["label"] for row in rows)
    by_label = ([row for row in rows if row["label"] == label] for label in labels)
    return Comparison(
        rows[0]["model"], rows[0]["suite"], rows[0].get("settings", {}), metrics,
        tuple(_summary(some, metrics) for some in by_label), tuple(rows),
    )  # fmt: skip


def _summary(rows: Sequence[Row], metrics: tuple[Metric, ...]) -> Summary:
    nbytes, dense, half = (sum(row[name] for row in rows) for name in ("nbytes", "dense_nbytes", "half_nbytes"))
    by_metric = {metric.name: _by_task(rows, metric.name) for metric in metrics}
    return Summary(
        label=rows[0]["label"],
        policy=rows[0]["policy"],
        budget=rows[0]["budget"],
        examples=len(rows),
        figures={name: statistics.fmean(map(statistics.fmean, tasks.values())) for name, tasks in by_metric.items()},
        errors={name: _standard_error(tasks) for name, tasks in by_metric.items()},
        tasks={task: statistics.fmean(values) for task, values in by_metric[metrics[0].name].items()},
        nbytes=nbytes / len(rows),
        ratio=nbytes / dense if dense else 1.0,
        half_ratio=nbytes / half if half else 1.0,
    )


def _by_task(rows: Sequence[Row], name: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["task"], []).append(row[name])
    return values


def _standard_error(tasks: dict[str, list[float]]) -> float:
    """Of a mean over tasks, each the mean of independent values; NaN where a task has one value alone."""
    if any(len(values) < 2 for values in tasks.values()):
        return math.nan
    return math.sqrt(sum(statistics.variance(values) / len(values) for values in tasks.values())) / len(tasks)
