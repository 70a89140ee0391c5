"""Quality against measured bytes, one curve a policy."""

from __future__ import annotations

import io
from itertools import cycle
from typing import TYPE_CHECKING

from kvprune.evaluation.contenders import FULL
from kvprune.evaluation.summary import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = [f"C{number}" for number in range(10)] + ["navy", "crimson", "olive", "black"]


def curves(comparison: Comparison) -> Figure:
    """The first metric of scores, the change of NLL of likelihoods, over KV bytes."""
    from matplotlib.figure import Figure

    metric = comparison.metrics[min(1, len(comparison.metrics) - 1)]
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    policies = dict.fromkeys(summary.policy for summary in comparison.summaries if summary.label != FULL)
    for marker, color, policy in zip(cycle("osD^vP*Xhd<>"), cycle(_COLORS), policies, strict=False):
        points = sorted(
            (100 * summary.half_ratio, metric.unit * summary.figures[metric.name])
            for summary in comparison.summaries
            if summary.policy == policy
        )
        axes.plot(*zip(*points, strict=True), marker=marker, color=color, label=policy)
    if comparison.full is not None:
        level = metric.unit * comparison.full.figures[metric.name]
        label = f"full cache ({metric.show(comparison.full.figures[metric.name])})"
        axes.axhline(level, color="black", linestyle="--", linewidth=1, label=label)
    title = "change of NLL, nats a token" if metric.name == "nll_change" else metric.title
    better = "more is better" if metric.rises else "less is better"
    axes.set(
        xlabel="KV bytes, % of a dense cache in 16 bits (measured, everything included)",
        ylabel=f"{title} ({better})",
        title=comparison.title,
        xlim=(0, None),
    )
    if metric.unit == 100:
        axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return figure


def svg(figure: Figure) -> str:
    """A figure as text that stands in a page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "kvprune", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
