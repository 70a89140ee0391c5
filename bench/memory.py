"""Peak memory of all contenders relative to the stock cache, while a prompt is read and while tokens are generated.

    python bench/memory.py --out bench/results/memory.json

The model of `speed.py`. Every figure is of a fresh process that has warmed up on a short prompt: the growth of its
resident peak over what it held then (Linux), with glibc told to give back what is free at once, so that figures repeat
within a few percent.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from rich.table import Table

from measuring.workload import Job
from printing.output import Log, save, save_markdown, table
from subjects.contenders import CONTENDERS, KVPRESS, STOCK
from subjects.rounds import Cell, Row, add_arguments, cells_of, described, jobs_of
from subjects.worker import STEADY_HEAP, Worker

PEAKS = ("prefill_peak_bytes", "decode_peak_bytes")


def peaks_of(job: Job, repeats: int = 1, python: Path | str = sys.executable, threads: int | None = None) -> Row:
    """Medians over fresh processes, or `{"error": why not}`. threads: None for torch's choice."""
    environment = STEADY_HEAP | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    results = []
    for _ in range(repeats):
        with Worker(python, environment) as worker:
            for measure in ("warm_up", "peak"):
                result = worker.ask(measure, job)
                if "error" in result:
                    return result
        results.append(result)
    return {figure: statistics.median(result[figure] for result in results) for figure in (*PEAKS, "nbytes")}


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows of one comparison, each with its ratios to stock."""
    stock = next((row for row in rows if row["contender"] == STOCK), None)
    if stock is None:
        return rows
    return [row | {f"{figure}_ratio": row[figure] / stock[figure] for figure in (*PEAKS, "nbytes")} for row in rows]


def shown(cell: Cell, rows: list[Row]) -> Table:
    made = table(
        f"peak memory, {cell}", "Growth of the resident peak, in MiB and as a ratio to stock sdpa.",
        "contender", "prefill", "MiB", "decode", "MiB", "KV bytes",
    )  # fmt: skip
    for row in rows:
        cells = [row["contender"]]
        for figure in PEAKS:
            ratio = row.get(f"{figure}_ratio")
            cells += ["" if ratio is None else f"{ratio:.2f}x", f"{row[figure] / 2**20:.0f}"]
        made.add_row(*cells, f"{row['nbytes_ratio']:.3f}" if "nbytes_ratio" in row else "")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, tokens=[4096, 16384])
    parser.add_argument("--repeats", type=int, default=1, help="processes for each figure")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.set_defaults(batches=[1], dtypes=["float32"], budgets=[0.25])
    arguments = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        parser.error("peaks of resident memory need Linux")
    if arguments.quick:
        arguments.repeats = 1
    log = Log()
    cells = cells_of(arguments)
    rows: list[Row] = []
    tables = []
    for cell in cells:
        log.heading(str(cell))
        found = []
        for job in jobs_of(cell, cells[0], arguments, log.note):
            python = arguments.peers if CONTENDERS[job.contender].family == KVPRESS else sys.executable
            peaks = peaks_of(job, arguments.repeats, python)
            if "error" in peaks:
                log.note(f"dropped: {job.contender}: {peaks['error']}")
            else:
                found.append(described(job) | peaks)
                figures = ", ".join(f"{peaks[figure] / 2**20:.0f}" for figure in PEAKS)
                log.console.print(f"{job.contender}: {figures} MiB", style="dim", highlight=False)
        found = with_ratios(found)
        tables.append(shown(cell, found))
        log.console.print(tables[-1])
        rows += found
        save(arguments.out, notes=log.notes, rows=rows)
        save_markdown(arguments.out, tables, log.notes)


if __name__ == "__main__":
    main()
