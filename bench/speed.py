"""Time and memory of a pruned cache against the stock one, in the same run.

    python bench/speed.py --out bench/results/speed.json

A Llama of 4 layers, hidden size 256, 8 query and 4 KV heads, float32, random weights. Every round runs every contender
once, one after the other, so that all meet the same state of the machine; what is reported are medians over the rounds
of the ratio to the stock cache in the same round. Peak memory is that of a fresh process for each contender.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from output import save
from rich.console import Console
from rich.table import Table
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from kvprune import PrunedCache
from kvprune.policies import A2SF, H2O, KIVI, TOVA, Full, Keyformer, SnapKV, StreamingLLM, ZipCache
from kvprune.policy import Policy

STOCK = "stock"
CONTENDERS: dict[str, Callable[[float], Policy]] = {
    "Full": lambda budget: Full(),
    "A2SF": A2SF,
    "A2SF interval=16": lambda budget: A2SF(budget, interval=16),
    "SnapKV": SnapKV,
    "H2O": H2O,
    "TOVA": TOVA,
    "StreamingLLM": StreamingLLM,
    "Keyformer": Keyformer,
    "ZipCache": lambda budget: ZipCache(),
    "KIVI": lambda budget: KIVI(),
    "A2SF | ZipCache": lambda budget: A2SF(budget) | ZipCache(),
}


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=1 << 17, dtype="float32",
        )
    ).eval()  # fmt: skip


def new_cache(name: str, model: LlamaForCausalLM, budget: float) -> Cache:
    return DynamicCache(config=model.config) if name == STOCK else PrunedCache(model, CONTENDERS[name](budget))


@torch.inference_mode()
def run(name: str, model: LlamaForCausalLM, prompt: torch.Tensor, budget: float, new_tokens: int) -> dict[str, Any]:
    """Prefill once and decode greedily; seconds, and milliseconds of every decode step."""
    cache = new_cache(name, model, budget)
    began = time.perf_counter()
    token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    prefill = time.perf_counter() - began
    steps = []
    for _ in range(new_tokens):
        before = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        steps.append(1000 * (time.perf_counter() - before))
    held = (
        cache.nbytes if isinstance(cache, PrunedCache) else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    )
    quarter = max(1, new_tokens // 4)
    return {
        "prefill_s": prefill,
        "decode_ms": statistics.median(steps),
        "last_to_first_quarter": statistics.median(steps[-quarter:]) / statistics.median(steps[:quarter]),
        "nbytes": held,
    }


def compare(names: list[str], length: int, budget: float, new_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """All contenders at one prompt length, interleaved."""
    models = {STOCK: build_model(), "": build_model()}
    prompt = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(length))
    for name in [STOCK, *names]:  # warm up
        run(name, models.get(name, models[""]), prompt[:, :256], budget, 4)
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in [STOCK, *names]}
    for _ in range(rounds):
        for name, results in measured.items():
            results.append(run(name, models.get(name, models[""]), prompt, budget, new_tokens))
    rows = []
    for name, results in measured.items():
        row: dict[str, Any] = {"policy": name, "tokens": length, "budget": None if name == STOCK else budget}
        for figure in ("prefill_s", "decode_ms"):
            row[figure] = statistics.median(result[figure] for result in results)
            row[figure + "_ratio"] = statistics.median(
                result[figure] / stock[figure] for result, stock in zip(results, measured[STOCK], strict=True)
            )
        row["last_to_first_quarter"] = statistics.median(result["last_to_first_quarter"] for result in results)
        row["nbytes"] = results[-1]["nbytes"]
        row["nbytes_ratio"] = row["nbytes"] / measured[STOCK][-1]["nbytes"]
        rows.append(row)
    return rows


def peak_memory(name: str, length: int, budget: float) -> int:
    """Bytes by which the peak of a fresh process grows in one prefill of this length."""
    command = [sys.executable, __file__, "--child", name, "--lengths", str(length), "--budget", str(budget)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(name: str, length: int, budget: float) -> None:
    model = build_model()
    run(name, model, torch.zeros(1, 64, dtype=torch.long), budget, 1)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    before = resident("VmHWM")
    run(name, model, torch.randint(0, 512, (1, length)), budget, 1)
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of resident memory, now ("VmRSS") or at its peak ("VmHWM")."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="ratios to the stock cache in the same run", title_justify="left")
    for heading in (
        "tokens",
        "policy",
        "prefill",
        "decode",
        "decode ms",
        "last/first quarter",
        "KV bytes",
        "peak memory",
    ):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for before, row in zip([rows[0], *rows], rows, strict=False):
        if row["tokens"] != before["tokens"]:
            table.add_section()
        peak = row.get("peak_ratio")
        table.add_row(
            f"{row['tokens']:,}", row["policy"], f"{row['prefill_s_ratio']:.2f}x", f"{row['decode_ms_ratio']:.2f}x",
            f"{row['decode_ms']:.2f}", f"{row['last_to_first_quarter']:.2f}", f"{row['nbytes_ratio']:.3f}",
            "" if peak is None else f"{peak:.2f}x",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 16384])
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policies", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument(
        "--no-memory", action="store_true", help="skip the peak memory, which needs Linux and a process each"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.lengths[0], arguments.budget)
        return
    console = Console()
    rows: list[dict[str, Any]] = []
    for length in arguments.lengths:
        console.print(f"{length:,} tokens ...")
        found = compare(arguments.policies, length, arguments.budget, arguments.new_tokens, arguments.rounds)
        if not arguments.no_memory:
            stock_peak = peak_memory(STOCK, length, arguments.budget)
            for row in found:
                row["peak_bytes"] = peak_memory(row["policy"], length, arguments.budget)
                row["peak_ratio"] = row["peak_bytes"] / stock_peak
        rows += found
    show(rows, console)
    save(arguments.out, rows=rows)


if __name__ == "__main__":
    main()
