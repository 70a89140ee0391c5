"""Where the time of a decode step goes: the parts of one layer's step, and steps over caches of different lengths.

    OMP_NUM_THREADS=1 python bench/decode_parts.py

The model of `speed.py`, one thread. The table is the one that A2SF leaves of 4,096 tokens at 25 %: 1,024 rows of 4 KV
heads and a slot for the token that comes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from kvprune import PrunedCache, Scoring
from kvprune.attention.queries import Queries
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, SnapKV
from measuring.workload import build_model

ROWS, HEADS, QUERY_HEADS, HEAD_DIM = 1024, 4, 8, 32


def parts(repeats: int = 300) -> dict[str, float]:
    """Median microseconds of each part of a layer's decode step under A2SF."""
    policy = A2SF(ROWS)
    layer = PrunedLayer(policy, 0)
    scoring = Scoring(HEAD_DIM**-0.5)
    layer.update(*(torch.randn(1, HEADS, ROWS + 1, HEAD_DIM) for _ in range(2)))
    layer.attend(torch.randn(1, QUERY_HEADS, ROWS + 1, HEAD_DIM), None, scoring)
    taken: dict[str, list[float]] = {}

    def timed(name: str, part: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = part()
        taken.setdefault(name, []).append(1e6 * (time.perf_counter() - began))
        return result

    table = layer.table
    if table is None:
        raise RuntimeError("the prompt has left no table")
    for _ in range(repeats):
        keys, values = (torch.randn(1, HEADS, 1, HEAD_DIM) for _ in range(2))
        queries = Queries.of_step(torch.randn(1, QUERY_HEADS, 1, HEAD_DIM), layer.seen, None, begins=False)
        timed("append the new row", partial(table.append, keys, values, layer.seen))
        layer.seen, layer.generated = layer.seen + 1, layer.generated + 1
        layer.tokens = (layer.seen,)
        attended = timed("attention", partial(queries.attend, table, scoring, with_probabilities=True))
        (plan,) = timed("what the policy is told", partial(layer.plans, table, queries, False))
        timed("update the score", partial(layer.observe, table, [plan], queries, scoring, attended))
        decision = timed("rank the rows, choose the worst", partial(policy.decide, table, plan.step))
        timed("move the newest row over the worst", partial(table.evict, decision.evict))
    return {name: statistics.median(times) for name, times in taken.items()}


@torch.inference_mode()
def step_ms(cache: Any, tokens: int, repeats: int = 60) -> float:
    """Median milliseconds of a decode step after a prompt of so many tokens."""
    model = build_model()
    model(torch.randint(0, 512, (1, tokens)), **cache_argument(cache(model)), logits_to_keep=1)  # warm up
    held = cache(model)
    token = model(torch.randint(0, 512, (1, tokens)), **cache_argument(held), logits_to_keep=1).logits.argmax(-1)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        token = model(token, **cache_argument(held)).logits.argmax(-1)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    table = Table("part of a layer's step", "microseconds", title="A2SF at 1,024 rows", title_justify="left")
    for name, microseconds in parts().items():
        table.add_row(name, f"{microseconds:.0f}")
    steps = Table("cache", "prompt", "milliseconds", title="a decode step of 4 layers", title_justify="left")
    for name, cache, tokens in (
        ("stock", lambda model: DynamicCache(config=model.config), 16),
        ("stock", lambda model: DynamicCache(config=model.config), 1024),
        ("stock", lambda model: DynamicCache(config=model.config), 4096),
        ("A2SF(0.25)", lambda model: PrunedCache(model, A2SF(0.25)), 4096),
        ("SnapKV(0.25)", lambda model: PrunedCache(model, SnapKV(0.25)), 4096),
    ):
        steps.add_row(name, f"{tokens:,}", f"{step_ms(cache, tokens):.2f}")
    console = Console()
    console.print(table)
    console.print(steps)


if __name__ == "__main__":
    main()
