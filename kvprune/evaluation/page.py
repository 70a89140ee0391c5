"""A page with the pictures and tables of an evaluation, in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kvprune.cache.report import human_bytes
from kvprune.evaluation.pictures import curves, svg
from kvprune.evaluation.summary import Comparison
from kvprune.evaluation.synthetic import depth_maps
from kvprune.evaluation.tables import figure

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kvprune: quality against KV bytes</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.5rem; }}
.picture svg {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
p {{ color: #555; }}
</style>
</head>
<body>
<h1>Quality against KV bytes</h1>
{sections}
</body>
</html>
"""
_SECTION = """<h2>{title}</h2>
<p>{settings}</p>
<div class="picture">{picture}</div>
{depths}
<div class="wide">{overview}</div>
{tasks}"""


def page(comparisons: Sequence[Comparison]) -> str:
    """HTML with a section for every comparison."""
    return _PAGE.format(sections="\n".join(map(_section, comparisons)))


def _section(comparison: Comparison) -> str:
    shown = (f"{name}: {value}" for name, value in comparison.settings.items() if value is not None)
    overview = [
        [
            summary.label, *(figure(summary, metric) for metric in comparison.metrics),
            human_bytes(round(summary.nbytes)), f"{summary.ratio:.1%}", f"{summary.half_ratio:.1%}",
            str(summary.examples),
        ]
        for summary in comparison.summaries
    ]  # fmt: skip
    metric = comparison.metrics[0]
    by_task = [
        [
            summary.label,
            *(metric.show(summary.tasks[task]) if task in summary.tasks else "" for task in comparison.tasks),
        ]
        for summary in comparison.summaries
    ]
    headings = ["policy", *(metric.title for metric in comparison.metrics), "KV bytes", "ratio", "16 bits", "examples"]
    tasks = f'<h3>By task</h3>\n<div class="wide">{_table(["policy", *comparison.tasks], by_task)}</div>'
    return _SECTION.format(
        title=escape(comparison.title),
        settings=escape(", ".join(shown)),
        picture=svg(curves(comparison)),
        depths=_depths(comparison),
        overview=_table(headings, overview),
        tasks=tasks if len(comparison.tasks) > 1 else "",
    )


def _depths(comparison: Comparison) -> str:
    """Heat maps of depth and length, where rows have both."""
    if not any(row.get("depth") is not None for row in comparison.rows):
        return ""
    return f'<h3>By depth and length</h3>\n<div class="picture">{svg(depth_maps(comparison.rows))}</div>'


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
