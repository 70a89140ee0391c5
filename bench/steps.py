"""Decode steps of caches that take turns, a few steps each, relative to another one: differences of a few percent.

    python bench/steps.py --contenders SnapKV "SnapKV adaptive" --beside SnapKV
    python bench/steps.py --length 16384 --contenders A2SF "A2SF | KVCrush" --beside A2SF

The model of `speed.py`. All caches are filled first; then each generates a few tokens, one cache after the other, again
and again. The first step of a turn is not counted. A ratio is that of two turns that follow each other as closely as
they can; medians over the turns, and the middle half of them.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from measuring.turns import take_turns
from measuring.workload import Generation, Job, build_model, held_bytes, prompt_of
from printing.output import Log, save, save_markdown, table
from subjects.contenders import CONTENDERS, KVPRESS, STOCK

STEPS = 6  # of a turn


def opened(contender: str, job: Job) -> Generation:
    who = CONTENDERS[contender]
    model = build_model(job.model, job.dtype, who.attention, job.device)
    cache = who.open(model, job if who.has_budget else replace(job, budget=None)).cache
    return Generation(model, cache, prompt_of(job, model))


@torch.inference_mode()
def measured(contenders: list[str], job: Job, turns: int) -> dict[str, dict[str, Any]]:
    """For each contender seconds of a step, turn by turn, and the bytes that it holds at the end."""
    going = {name: opened(name, job) for name in contenders}
    taken = take_turns(going, turns, STEPS)
    return {name: {"seconds": taken[name], "nbytes": held_bytes(going[name].cache)} for name in contenders}


def shown(found: dict[str, dict[str, Any]], beside: list[str], title: str) -> Table:
    turns = len(found[STOCK]["seconds"])
    made = table(
        title, f"Medians over {turns} turns of {STEPS} steps, and their quartiles.",
        "contender", "ms", *(f"of {name}" for name in beside), "KV bytes",
    )  # fmt: skip
    for name, row in found.items():
        ratios = []
        for other in beside:
            each = [a / b for a, b in zip(row["seconds"], found[other]["seconds"], strict=True)]
            low, middle, high = statistics.quantiles(each, n=4)
            ratios.append(f"{middle:.2f}x ({low:.2f}-{high:.2f})")
        held = row["nbytes"] / found[STOCK]["nbytes"]
        made.add_row(name, f"{1000 * statistics.median(row['seconds']):.2f}", *ratios, f"{held:.3f}")
    return made


def main() -> None:
    here = [name for name, contender in CONTENDERS.items() if contender.family != KVPRESS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--contenders", nargs="+", choices=here, metavar="NAME", default=["A2SF", "SnapKV"])
    parser.add_argument("--beside", nargs="+", choices=here, metavar="NAME", default=[], help="compared with these too")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--out", type=Path, help="JSON; the table in Markdown goes beside it")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    names = list(dict.fromkeys([STOCK, *arguments.beside, *arguments.contenders]))
    job = Job(STOCK, arguments.length, arguments.budget)
    log = Log()
    found = measured(names, job, arguments.turns)
    title = f"{arguments.length:,} tokens, budget {arguments.budget:.0%}: a decode step"
    made = shown(found, list(dict.fromkeys([STOCK, *arguments.beside])), title)
    log.console.print(made)
    save(arguments.out, rows=[{"contender": name, **row} for name, row in found.items()])
    save_markdown(arguments.out, [made])


if __name__ == "__main__":
    main()
