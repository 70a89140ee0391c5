"""Heat maps of needles in a haystack: mean score by depth and length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvprune.errors import EvaluationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4  # panels side by side
_CELLS_WITH_NUMBERS = 120  # in larger panels they would not be readable

Panel = dict[tuple[float, int], list[float]]
"""The scores at every depth and length."""


def plot_depths(rows: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw `depth_maps` into a file, and return its path."""
    path = Path(path)
    try:
        depth_maps(rows).savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise (
            error if isinstance(error, EvaluationError) else EvaluationError(f"cannot draw {path}: {error}")
        ) from error
    return path


def depth_maps(rows: Iterable[Mapping[str, Any]]) -> Figure:
    """The mean score by depth (percent, down) and length (tokens, across), a panel for every task and label.

    rows: results with task, label, length, depth and score, and with model where there are several; those without a
    depth are left out. Raises EvaluationError where no row has a depth, or one that has lacks something else.
    """
    from matplotlib.figure import Figure

    panels = _panels(rows)
    cells = [cell for panel in panels.values() for cell in panel]
    depths, lengths = sorted({depth for depth, _ in cells}), sorted({length for _, length in cells})
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    size = (1.5 + columns * max(2.4, 0.55 * len(lengths)), 0.8 + lines * max(2.2, 0.8 + 0.24 * len(depths)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        image = _draw(axes, panel, depths, lengths)
        axes.set_title(title, fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("depth of the answer")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.supxlabel("tokens of the prompt", fontsize=10)
    figure.colorbar(image, ax=figure.axes, label="mean score")
    return figure


def _panels(rows: Iterable[Mapping[str, Any]]) -> dict[str, Panel]:
    """By title: the label, and in front of it the model and the task where there are several."""
    panels: dict[tuple[Any, str, str], Panel] = {}
    for row in rows:
        if row.get("depth") is None:
            continue
        if missing := [name for name in ("task", "label", "length", "score") if row.get(name) is None]:
            raise EvaluationError(f"a result with a depth has no {' and no '.join(missing)}: {dict(row)}")
        panel = panels.setdefault((row.get("model"), row["task"], row["label"]), {})
        panel.setdefault((row["depth"], row["length"]), []).append(row["score"])
    if not panels:
        raise EvaluationError(
            "no result has a depth, so there is nothing to draw: evaluate needle_single, needle_multikey or qa."
        )
    models, tasks = {model for model, _, _ in panels}, {task for _, task, _ in panels}
    return {
        "\n".join([str(model)] * (len(models) > 1) + [task] * (len(tasks) > 1) + [label]): panel
        for (model, task, label), panel in panels.items()
    }


def _draw(axes: Any, panel: Panel, depths: list[float], lengths: list[int]) -> Any:
    """One heat map; cells without a result stay grey."""
    scores = np.full((len(depths), len(lengths)), np.nan)
    for (depth, length), found in panel.items():
        scores[depths.index(depth), lengths.index(length)] = np.mean(found)
    axes.set_facecolor("lightgrey")
    image = axes.imshow(scores, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    if scores.size <= _CELLS_WITH_NUMBERS:
        for (down, across), score in np.ndenumerate(scores):
            if not np.isnan(score):
                color = "black" if score > 0.6 else "white"
                axes.text(across, down, f"{score:.0%}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axes.set_yticks(range(len(depths)), [f"{depth:g}%" for depth in depths])
    return image
