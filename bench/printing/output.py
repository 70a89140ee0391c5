"""The output of every benchmark: a table, and JSON with the command that made it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import kvprune
from kvprune.demo.show import machine


class Log:
    """The terminal, and the notes to keep with the results: who was left out, and why."""

    def __init__(self) -> None:
        self.console = Console(width=None if sys.stdout.isatty() else 130)
        self.notes: list[str] = []
        self._heading = ""

    def heading(self, text: str) -> None:
        """What the notes that follow are about."""
        self._heading = text
        self.console.print(text, style="bold")

    def note(self, text: str) -> None:
        self.notes.append(f"{self._heading}: {text}" if self._heading else text)
        self.console.print(text, highlight=False)


def table(title: str, caption: str, first: str, *figures: str) -> Table:
    """A table with a column of names and columns of figures."""
    made = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    made.add_column(first, overflow="fold")
    for figure in figures:
        made.add_column(figure, justify="right", no_wrap=True)
    return made


def markdown(shown: Table) -> str:
    """A table as GitHub shows it."""
    columns = list(shown.columns)
    rules = ["---:" if column.justify == "right" else "---" for column in columns]
    cells = [
        [str(column.header) for column in columns],
        rules,
        *zip(*(column.cells for column in columns), strict=True),
    ]
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join([f"**{shown.title}**", "", *lines, "", *([str(shown.caption), ""] if shown.caption else [])])


def save_markdown(path: Path | None, tables: Iterable[Table], notes: Iterable[str] = ()) -> None:
    """Write tables and notes beside the JSON at `path`, as Markdown; nothing where no path is given."""
    if path is not None:
        parts = [*map(markdown, tables), "".join(f"- {note}\n" for note in notes)]
        path.with_suffix(".md").write_text("\n".join(part for part in parts if part))


def provenance() -> dict[str, Any]:
    """The command that runs, the machine and the versions."""
    return {
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": {**machine(), "cores": os.cpu_count(), "python": sys.version.split()[0]},
        "kvprune": kvprune.__version__,
    }


def save(path: Path | None, **results: Any) -> None:
    """Write results with the command, the machine and the versions, as JSON; nothing where no path is given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), **results}, indent=1) + "\n")
