"""Prefill and decode time of everyone beside the stock cache, in the same run.

    python bench/speed.py --out bench/results/speed.json

A Llama of 4 layers, hidden size 256, 8 query and 4 KV heads, random weights. Every round runs every contender once, one
after the other, so that all meet the same state of the machine; what is reported are medians over the rounds of the
ratio to the stock cache (DynamicCache with sdpa) in the same round. kvpress needs an older transformers and runs in a
process of its own, which takes its turns like everyone; "stock beside kvpress" is the stock cache in that process.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from contenders import CONTENDERS, KVPRESS
from output import save, save_markdown, table
from rich.console import Console
from rich.table import Table
from rounds import Cell, Row, Runner, add_arguments, cells_of, interleave, jobs_of, summarise
from worker import Here, Worker
from workload import Job, build_model

__all__ = ["build_model"]  # of decode_parts.py


def same_weights(here: Runner, there: Runner, job: Job) -> bool:
    """Whether two environments measure the same model."""
    answers = [runner.ask("versions", job) for runner in (here, there)]
    return "error" not in answers[1] and answers[0]["weights"] == answers[1]["weights"]


def shown(cell: Cell, rows: list[Row]) -> Table:
    made = table(
        f"{cell}, ratios to stock sdpa",
        f"Medians over {rows[0]['rounds']} rounds.",
        "contender", "prefill", "range", "decode", "range", "prefill s", "decode ms", "last/first quarter", "KV bytes",
    )  # fmt: skip
    for row in rows:
        cells = [row["contender"]]
        for time_taken in ("prefill_s", "decode_ms"):
            low, high = row[f"{time_taken}_ratio_range"]
            cells += [f"{row[f'{time_taken}_ratio']:.2f}x", f"{low:.2f}-{high:.2f}"]
        made.add_row(
            *cells, f"{row['prefill_s']:.3f}", f"{row['decode_ms']:.2f}", f"{row['last_to_first_quarter']:.2f}",
            f"{row['nbytes_ratio']:.3f}",
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, tokens=[4096, 1024, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10, help="most of them for one comparison, after a first round")
    parser.add_argument("--new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.new_tokens = 2, 32
    console = Console()
    here, peers = Here(), Worker(arguments.peers)
    runners: dict[str, Any] = {KVPRESS: peers}
    cells = cells_of(arguments)
    rows: list[Row] = []
    tables = []
    for cell in cells:
        console.print(f"[bold]{cell}[/]")
        measured = interleave(
            jobs_of(cell, cells[0], arguments, console.print),
            lambda job: runners.get(CONTENDERS[job.contender].family, here),
            rounds=arguments.rounds, minutes=arguments.minutes, say=console.print,
        )  # fmt: skip
        found = summarise(measured)
        tables.append(shown(cell, found))
        console.print(tables[-1])
        rows += found
        save(arguments.out, rows=rows)  # a run of an hour leaves something when it is cut short
        save_markdown(arguments.out, tables)
    peers.close()


if __name__ == "__main__":
    main()
