"""Prefill and decode time of all contenders relative to the stock cache, in the same run.

    python bench/speed.py --out bench/results/speed.json

A Llama of 4 layers, hidden size 256, 8 query and 4 KV heads, random weights. Every round runs every contender once, one
after the other, so that all run under the same load of the machine; what is reported are medians over the rounds of the
ratio to the stock cache (DynamicCache with sdpa) in the same round. kvpress needs an older transformers and runs in a
process of its own, which takes part in every round; "stock beside kvpress" is the stock cache in that process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from rich.table import Table

from measuring.workload import Job
from printing.output import Log, save, save_markdown, table
from subjects.contenders import CONTENDERS, KVPRESS, PEERS_STOCK
from subjects.rounds import TIMES, Cell, Row, Runner, add_arguments, cells_of, interleave, jobs_of, summarise
from subjects.worker import Here, Worker, incomparable


def peers_stand(arguments: argparse.Namespace, here: Runner, peers: Runner, say: Callable[[str], None]) -> Row | None:
    """Versions in the environment of kvpress, if it is asked for and builds the same model; else it is left out."""
    names = [name for name in arguments.contenders if CONTENDERS[name].family == KVPRESS]
    if not names or not arguments.peers.exists():
        return None  # its contenders are skipped one by one, with the reason
    job = Job(PEERS_STOCK, tokens=1)
    theirs = peers.ask("versions", job)
    reason = incomparable(here.ask("versions", job), theirs)
    if reason is None:
        return dict(theirs["versions"])
    say(f"skipped: kvpress: {reason}")
    arguments.contenders = [name for name in arguments.contenders if name not in names]
    return None


def shown(cell: Cell, rows: list[Row]) -> Table:
    made = table(
        f"{cell}: ratios to stock sdpa",
        f"Medians, and ranges, over {rows[0]['rounds']} rounds.",
        "contender", "prefill", "decode", "prefill s", "decode ms", "last/first quarter", "KV bytes",
    )  # fmt: skip
    for row in rows:
        ratios = []
        for time_taken in TIMES:
            low, high = row[f"{time_taken}_ratio_range"]
            ratios.append(f"{row[f'{time_taken}_ratio']:.2f}x ({low:.2f}-{high:.2f})")
        made.add_row(
            row["contender"], *ratios, f"{row['prefill_s']:.3f}", f"{row['decode_ms']:.2f}",
            f"{row['last_to_first_quarter']:.2f}", f"{row['nbytes_ratio']:.3f}",
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, tokens=[4096, 1024, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10, help="most of them for a comparison of many rounds")
    parser.add_argument("--new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.new_tokens = 2, 32
    log = Log()
    here, peers = Here(), Worker(arguments.peers)
    beside = peers_stand(arguments, here, peers, log.note)
    cells = cells_of(arguments)
    rows: list[Row] = []
    tables = []
    for cell in cells:
        log.heading(str(cell))
        measured = interleave(
            jobs_of(cell, cells[0], arguments, log.note),
            lambda job: peers if CONTENDERS[job.contender].family == KVPRESS else here,
            rounds=arguments.rounds, minutes=arguments.minutes, say=log.note,
        )  # fmt: skip
        found = summarise(measured)
        tables.append(shown(cell, found))
        log.console.print(tables[-1])
        rows += found
        # After every comparison: a run of an hour leaves something when it is cut short.
        save(arguments.out, beside_kvpress=beside, notes=log.notes, rows=rows)
        save_markdown(arguments.out, tables, log.notes)
    peers.close()


if __name__ == "__main__":
    main()
