"""Prefill with GemFilter against the stock cache, in the same run.

    python bench/gemfilter.py --out bench/results/gemfilter.json

A Llama of 32 layers, hidden size 128, 4 query and 2 KV heads, float32, random weights, one thread. Every round prefills
once with each contender, one after the other; what is reported are medians over the rounds of the ratio to the stock
cache in the same round. Peak memory is the growth of a fresh process in one prefill. The filter pass runs 13 of the 32
layers, so 0.41 is the least that the time can be.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from memory import peaks_of, with_ratios

from measuring.workload import Job
from printing.output import Log, save, save_markdown, table
from subjects.contenders import STOCK
from subjects.rounds import Row, interleave, summarise
from subjects.worker import Here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory, which needs Linux")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log, here = Log(), Here()
    jobs = [
        Job(name, arguments.length, budget, new_tokens=1, model="deep")
        for name, budget in ((STOCK, None), ("GemFilter", arguments.budget))
    ]
    measured = interleave(jobs, lambda job: here, rounds=arguments.rounds, minutes=60, say=log.note)
    rows: list[Row] = summarise(measured)
    if not arguments.no_memory:
        peaks = [peaks_of(job, threads=1) for job in jobs]
        rows = with_ratios([row | peak for row, peak in zip(rows, peaks, strict=True)])
    shown = table(
        f"{arguments.length:,} tokens: ratios to stock sdpa", f"Medians over {rows[0]['rounds']} rounds.",
        "contender", "prefill s", "prefill", "KV bytes", "peak memory",
    )  # fmt: skip
    for row in rows:
        shown.add_row(
            row["contender"], f"{row['prefill_s']:.2f}", f"{row['prefill_s_ratio']:.2f}x", f"{row['nbytes_ratio']:.3f}",
            f"{row['prefill_peak_bytes_ratio']:.2f}x" if "prefill_peak_bytes_ratio" in row else "",
        )  # fmt: skip
    log.console.print(shown)
    save(arguments.out, rows=rows)
    save_markdown(arguments.out, [shown])


if __name__ == "__main__":
    main()
