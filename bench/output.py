"""What every benchmark prints and leaves behind: a table, and JSON with the command that made it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import kvprune
from kvprune.demo.show import machine


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


def save(path: Path | None, **results: Any) -> None:
    """Write results with the command, the machine and the versions, as JSON; nothing where no path is given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    summary = {
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": {**machine(), "cores": os.cpu_count(), "python": sys.version.split()[0]},
        "kvprune": kvprune.__version__,
        **results,
    }
    path.write_text(json.dumps(summary, indent=1) + "\n")
