"""Tables of an evaluation, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvprune.evaluation.summary import Comparison, Metric, Summary

_MOST_COLUMNS = 7


def tables(comparison: Comparison) -> Iterator[Table]:
    """One line a policy; then, for several tasks and few policies, one line a task."""
    yield overview(comparison)
    if len(comparison.tasks) > 1 and len(comparison.summaries) <= _MOST_COLUMNS:
        yield by_task(comparison)


def overview(comparison: Comparison) -> Table:
    table = _table(comparison.title, _caption(comparison))
    table.add_column("policy", overflow="fold", min_width=12)
    for heading in ("budget", *(metric.title for metric in comparison.metrics), "ratio", "16 bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("n", justify="right")
    for summary in comparison.summaries:
        cells = [
            summary.policy, summary.budget or "", *(figure(summary, metric) for metric in comparison.metrics),
            f"{summary.ratio:.1%}", f"{summary.half_ratio:.1%}", str(summary.examples),
        ]  # fmt: skip
        table.add_row(*cells)
    return table


def by_task(comparison: Comparison) -> Table:
    metric = comparison.metrics[0]
    table = _table(f"{metric.title} by task", None)
    table.add_column("task", no_wrap=True)
    for summary in comparison.summaries:
        table.add_column(summary.label, justify="right")
    for task in comparison.tasks:
        values = (summary.tasks.get(task) for summary in comparison.summaries)
        table.add_row(task, *("" if value is None else metric.show(value) for value in values))
    return table


def by_length(means: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Table:
    """LongBench-E's means by length, of 100: by label, task and bin."""
    table = _table("score by length", None)
    bins = next(iter(next(iter(means.values())).values()))
    for heading in ("task", "policy", *bins):
        table.add_column(heading, justify="right" if heading in bins else "left")
    for task in next(iter(means.values())):
        for label, tasks in means.items():
            values = tasks.get(task, {}).values()
            table.add_row(task, label, *("" if value is None else f"{value:.2f}" for value in values))
    return table


def figure(summary: Summary, metric: Metric) -> str:
    """A figure with its standard error, where there is one."""
    value, error = summary.figures[metric.name], summary.errors[metric.name]
    shown = metric.show(value)
    if math.isnan(error) or metric.name in ("nll", "kl", "agreement"):
        return shown
    return f"{shown} ± {metric.unit * error:.{metric.digits}f}"


def _caption(comparison: Comparison) -> str:
    what = (
        "NLL, KL: nats per token; KL and top-1, the share of tokens with the same first choice, are to the full cache."
        if len(comparison.metrics) > 1
        else "score: mean over tasks, of 100."
    )
    uneven = " The policies were not given the same examples." if comparison.is_uneven else ""
    return (
        f"{what} ±: standard error; n: examples. ratio: KV bytes of an example at its end, measured, all included, "
        f"to those of a dense cache of the model's type; 16 bits: to a dense one in 16 bits.{uneven}"
    )


def _table(title: str, caption: str | None) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
