"""Pictures of what speed.py and memory.py have measured, beside their JSON.

    python bench/plots.py bench/results

speed-TOKENS.png: ratios of prefill and decode to stock, of everyone, at each length. decode.png: a decode step against
the length. memory-TOKENS.png: ratios of peak memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from subjects.contenders import KVPRESS, KVPRUNE, STOCK, TRANSFORMERS

COLORS = {TRANSFORMERS: "#7a7a7a", KVPRUNE: "#1f6fb4", KVPRESS: "#5a9e2f"}
# There is room for some lines only: stock, one of each kind, and the closest methods of other libraries.
LINES = (
    STOCK, "A2SF", "SnapKV", "H2O", "ZipCache", "A2SF | ZipCache", "kvpress SnapKV", "kvpress TOVA interval=1",
    "quanto 4 bit", "HQQ 4 bit",
)  # fmt: skip

Row = dict[str, Any]


def along_lengths(rows: Sequence[Row]) -> list[Row]:
    """The rows that have batch, dtype and budget in common with the first; those without a budget belong there too."""
    first = next(row for row in rows if row["budget"] is not None)
    return [
        row
        for row in rows
        if (row["batch"], row["dtype"]) == (first["batch"], first["dtype"]) and row["budget"] in (None, first["budget"])
    ]


def bars(axes: Axes, rows: Sequence[Row], figure: str, title: str) -> None:
    """Ratios to stock, least first, to both sides of 1 on a logarithmic axis, with their range over the rounds."""
    ordered = sorted(rows, key=lambda row: row[f"{figure}_ratio"], reverse=True)
    ratios = [row[f"{figure}_ratio"] for row in ordered]
    ranges = [row.get(f"{figure}_ratio_range", (ratio, ratio)) for row, ratio in zip(ordered, ratios, strict=True)]
    axes.set_xscale("log")
    axes.barh(
        range(len(ordered)), [ratio - 1 for ratio in ratios], left=1, height=0.7,
        color=[COLORS[row["family"]] for row in ordered],
    )  # fmt: skip
    for place, (ratio, (low, high)) in enumerate(zip(ratios, ranges, strict=True)):
        axes.plot((low, high), (place, place), color="black", linewidth=0.8)
        faster = ratio < 1
        axes.annotate(
            f"{ratio:.2f}", (min(low, 1) if faster else max(high, 1), place), xytext=(-4 if faster else 4, 0),
            textcoords="offset points", va="center", ha="right" if faster else "left", fontsize=8,
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    # Room for the numbers at both ends, and never so little around 1 that noise fills the picture.
    axes.set_xlim(0.75 * min(0.8, *(low for low, _ in ranges)), 1.35 * max(1.25, *(high for _, high in ranges)))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(ordered)), [row["contender"] for row in ordered], fontsize=8)
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def two_panels(rows: Sequence[Row], panels: Sequence[tuple[str, str]], title: str) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(13, 1.4 + 0.24 * len(rows)), layout="constrained")
    for each, (name, heading) in zip(axes, panels, strict=True):
        bars(each, rows, name, heading)
    families = dict.fromkeys(row["family"] for row in rows)
    figure.suptitle(title, fontsize=11)
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=COLORS[family]) for family in families],
        list(families), loc="outside lower center", ncols=len(families), frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def decode_lines(rows: Sequence[Row]) -> Figure:
    """Milliseconds of a decode step against the length of the prompt, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    shades: dict[str, int] = {}
    for name in LINES:
        points = sorted((row["tokens"], row["decode_ms"]) for row in rows if row["contender"] == name)
        if not points:
            continue
        family = next(row["family"] for row in rows if row["contender"] == name)
        shade = shades[family] = shades.get(family, -1) + 1
        axes.plot(
            *zip(*points, strict=True), color="black" if name == STOCK else COLORS[family], label=name,
            linestyle=("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))[shade], marker="osD^v"[shade], markersize=4,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({row["tokens"] for row in rows})
    axes.set_xticks(lengths, [f"{tokens // 1024}k" for tokens in lengths])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("a decode step, ms")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw(folder: Path) -> list[Path]:
    """Draw all results that exist; returns the pictures."""
    made = []

    def save(figure: Figure, name: str) -> None:
        figure.savefig(folder / name, dpi=140)
        plt.close(figure)
        made.append(folder / name)

    for name, panels in (
        ("speed", (("prefill_s", "prefill time"), ("decode_ms", "time of a decode step"))),
        ("memory", (("prefill_peak_bytes", "peak memory, prefill"), ("decode_peak_bytes", "peak memory, decode"))),
    ):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        rows = along_lengths(json.loads(path.read_text())["rows"])
        for tokens in sorted({row["tokens"] for row in rows}):
            here = [row for row in rows if row["tokens"] == tokens]
            budget = next(row["budget"] for row in rows if row["budget"])
            title = (
                f"{tokens:,} tokens, batch {here[0]['batch']}, {here[0]['dtype']}, budget {budget:.0%}: ratios to stock"
            )
            save(two_panels(here, panels, title), f"{name}-{tokens}.png")
        if name == "speed":
            save(decode_lines(rows), "decode.png")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "results")
    for picture in draw(parser.parse_args().folder):
        print(picture)


if __name__ == "__main__":
    main()
