"""Prefill with GemFilter against the stock cache, in the same run.

    python bench/gemfilter.py --out bench/results/gemfilter.json

A Llama of 32 layers, hidden size 128, 4 query and 2 KV heads, float32, random weights, one thread. Every round prefills
once with each contender, one after the other; what is reported are medians over the rounds of the ratio to the stock
cache in the same round. Peak memory is the growth of a fresh process in one prefill. The filter pass runs 13 of the 32
layers, so 0.41 is the least that the time can be.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from output import save
from rich.console import Console
from rich.table import Table
from speed import STOCK, resident
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from kvprune import PrunedCache
from kvprune.policies import GemFilter

CONTENDERS = (STOCK, "GemFilter")


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=32, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1 << 17, dtype="float32",
        )
    ).eval()  # fmt: skip


@torch.inference_mode()
def prefill(name: str, model: LlamaForCausalLM, length: int, budget: int) -> tuple[float, Cache]:
    """Seconds of one prefill, and the cache it leaves."""
    prompt = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(length))
    cache = DynamicCache(config=model.config) if name == STOCK else PrunedCache(model, GemFilter(budget))
    began = time.perf_counter()
    model(prompt, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - began, cache


def held(cache: Cache) -> int:
    return (
        cache.nbytes if isinstance(cache, PrunedCache) else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    )


def compare(length: int, budget: int, rounds: int) -> list[dict[str, Any]]:
    models = {name: build_model() for name in CONTENDERS}
    for name, model in models.items():  # warm up
        prefill(name, model, 256, 64)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    nbytes = {}
    for _ in range(rounds):
        for name, model in models.items():
            taken, cache = prefill(name, model, length, budget)
            seconds[name].append(taken)
            nbytes[name] = held(cache)
    return [
        {
            "policy": name,
            "tokens": length,
            "budget": None if name == STOCK else budget,
            "prefill_s": statistics.median(seconds[name]),
            "prefill_s_ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds[STOCK], strict=True)),
            "nbytes": nbytes[name],
            "nbytes_ratio": nbytes[name] / nbytes[STOCK],
        }
        for name in CONTENDERS
    ]


def peak_memory(name: str, length: int, budget: int) -> int:
    """Bytes by which the peak of a fresh process grows in one prefill."""
    command = [sys.executable, __file__, "--child", name, "--length", str(length), "--budget", str(budget)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(name: str, length: int, budget: int) -> None:
    model = build_model()
    prefill(name, model, 64, 32)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    before = resident("VmHWM")
    prefill(name, model, length, budget)
    print(resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory, which needs Linux")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        child(arguments.child, arguments.length, arguments.budget)
        return
    rows = compare(arguments.length, arguments.budget, arguments.rounds)
    if not arguments.no_memory:
        for row in rows:
            row["peak_bytes"] = peak_memory(row["policy"], arguments.length, arguments.budget)
            row["peak_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    table = Table(title="ratios to the stock cache in the same run", title_justify="left")
    for heading in ("tokens", "policy", "prefill s", "prefill", "KV bytes", "peak memory"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for row in rows:
        table.add_row(
            f"{row['tokens']:,}", row["policy"], f"{row['prefill_s']:.2f}", f"{row['prefill_s_ratio']:.2f}x",
            f"{row['nbytes_ratio']:.3f}", f"{row['peak_ratio']:.2f}x" if "peak_ratio" in row else "",
        )  # fmt: skip
    Console().print(table)
    save(arguments.out, rows=rows)


if __name__ == "__main__":
    main()
