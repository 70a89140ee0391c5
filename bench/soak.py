"""A very long generation under each policy that evicts: memory and step times must not grow, and no row may be lost.

    python bench/soak.py --steps 100000 --out bench/results/soak.json

Feeds a short prompt and then token after token to the smallest model that has everything: one layer, grouped heads.
At every step logits must be finite. At some hundred of them the cache must hold the bytes that it held from the start,
and the kept positions must be those of a reference: for StreamingLLM a counter of sinks and recent tokens; for the
others as many as the budget says, all different, with sinks and recent window among them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvprune import Eviction, Policy, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, H2O, KIVI, TOVA, Keyformer, SnapKV, StreamingLLM, ZipCache
from printing.output import Log, save, save_markdown, table

POLICIES: dict[str, Callable[[int], Policy]] = {
    "A2SF": A2SF,
    "H2O": H2O,
    "Keyformer": Keyformer,
    "SnapKV, interval=1": lambda budget: SnapKV(budget, interval=1),
    "TOVA": TOVA,
    "StreamingLLM": StreamingLLM,
    "A2SF, interval=16": lambda budget: A2SF(budget, interval=16),
    "A2SF | ZipCache": lambda budget: A2SF(budget) | ZipCache(),
    "A2SF | KIVI": lambda budget: A2SF(budget) | KIVI(),
}
SAMPLES = 200
# Packed rows that are evicted leave holes, which close up later, and blocks of all sizes: bytes go up and down.
_TOLERANCE = 0.1


@dataclass
class Soak:
    """One policy's run. Times in ms, memory in bytes; a slope is of a straight line through the second half."""

    policy: str
    steps: int
    seconds: float
    first_ms: float
    """Median step of the first tenth."""
    last_ms: float
    """Median step of the last tenth."""
    nbytes: tuple[int, int]
    """Least and most that the cache held at any sample of the second half."""
    nbytes_first_half: tuple[int, int]
    rss_slope: float
    """Growth of resident memory, bytes a step."""
    faults: list[str]
    """What was wrong, if anything was."""

    @property
    def slowdown(self) -> float:
        return self.last_ms / self.first_ms


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def faults_of(pruned: PrunedCache, policy: Eviction, budget: int, tokens: int) -> list[str]:
    """What is wrong with the positions that a cache keeps of so many tokens."""
    interval = policy.interval or 1
    waiting = (tokens - PROMPT) % interval
    sinks, recent = policy.sinks, policy.recent_tokens(budget)
    found = []
    for layer in pruned.pruned_layers:
        for head in pruned.kept_positions(layer)[0].tolist():
            if len(head) != min(tokens, budget + waiting):
                found.append(f"{len(head)} rows after {tokens} tokens")
            if head != sorted(set(head)) or head[0] < 0 or head[-1] != tokens - 1:
                found.append(f"positions that repeat, are none, or end at {head[-1]} after {tokens} tokens")
            kept = set(head)
            if not kept.issuperset(range(sinks)) or not kept.issuperset(range(tokens - recent, tokens)):
                found.append(f"a sink or a recent token is gone after {tokens} tokens")
            if isinstance(policy, StreamingLLM) and head != [*range(sinks), *range(tokens - budget + sinks, tokens)]:
                found.append(f"not the sinks and the newest tokens after {tokens} tokens")
    return found


PROMPT = 300


@torch.no_grad()
def soak(
    name: str, budget: int, steps: int, progress: Callable[[range], Any] = iter, model: LlamaForCausalLM | None = None
) -> Soak:
    """Feed a prompt and so many tokens under a policy."""
    model = model or tiny_model()
    pruned = PrunedCache(model, POLICIES[name](budget))
    evicting = next(part for part in pruned.policy.parts() if isinstance(part, Eviction))
    token = model(random_tokens(PROMPT), **cache_argument(pruned)).logits[:, -1:].argmax(-1)
    times, nbytes, resident_bytes, faults = np.full(steps, np.nan), [], [], []
    every = max(1, steps // SAMPLES)
    begin = time.perf_counter()
    for step in progress(range(steps)):
        before = time.perf_counter()
        logits = model(token, **cache_argument(pruned)).logits
        times[step] = time.perf_counter() - before
        # Greedy decoding soon repeats itself, so every other token is random.
        token = logits[:, -1:].argmax(-1) if step % 2 else random_tokens(1)
        if not logits.isfinite().all():
            faults.append(f"logits that are no numbers at step {step}")
        if step % every == every - 1:
            nbytes.append(pruned.nbytes)
            resident_bytes.append(resident())
            faults += faults_of(pruned, evicting, budget, PROMPT + step + 1)
    seconds, tenth, half = time.perf_counter() - begin, max(1, steps // 10), len(nbytes) // 2
    early, late = nbytes[:half], nbytes[half:]
    if max(late) > max(early) * (1 + _TOLERANCE * bool(pruned.policy.codecs)):
        faults.insert(0, f"the cache grew from {max(early)} to {max(late)} bytes")
    return Soak(
        name,
        steps,
        round(seconds, 1),
        1e3 * statistics.median(times[:tenth]),
        1e3 * statistics.median(times[-tenth:]),
        (min(late), max(late)),
        (min(early), max(early)),
        slope(resident_bytes[half:], every),
        faults[:10],
    )


def random_tokens(count: int) -> Tensor:
    return torch.randint(64, (1, count))


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def slope(samples: list[int], apart: int) -> float:
    """Growth a step of samples that are so many steps apart."""
    if len(samples) < 2:
        return 0.0
    return float(np.polyfit(np.arange(len(samples)) * apart, samples, 1)[0])


def shown(soaks: list[Soak], budget: int) -> Table:
    made = table(
        f"soak, a budget of {budget} tokens",
        "bytes: of the cache, in the second half. ms: median step of the last tenth. last / first: of the first tenth.",
        "policy", "steps", "bytes", "RSS growth, bytes a step", "ms", "last / first", "faults",
    )  # fmt: skip
    for each in soaks:
        least, most = each.nbytes
        held = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        made.add_row(
            each.policy, f"{each.steps:,}", held, f"{round(each.rss_slope, 2) + 0.0:.2f}", f"{each.last_ms:.2f}",
            f"{each.slowdown:.2f}x", str(len(each.faults)),
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="POLICY")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log, soaks = Log(), []
    for name in arguments.policies:
        bar = partial(track, description=name, console=log.console, transient=True)
        soaks.append(soak(name, arguments.budget, arguments.steps, bar))
        for fault in soaks[-1].faults:
            log.note(f"{name}: {fault}")
        rows = [asdict(each) | {"slowdown": each.slowdown} for each in soaks]
        save(arguments.out, budget=arguments.budget, notes=log.notes, rows=rows)
    log.console.print(shown(soaks, arguments.budget))
    save_markdown(arguments.out, [shown(soaks, arguments.budget)], log.notes)
    if log.notes:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
