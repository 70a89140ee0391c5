"""Random: any tokens, to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune.attention.noise import consecutive, hashed, uniform
from kvprune.policy.base import Step
from kvprune.policy.eviction import Eviction
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Random(Eviction):
    """Keeps tokens drawn at random: F_k = u(seed, layer, KV head, position), uniform in (0, 1). Looks at no attention.

    What a score has to beat. The number of a token depends on nothing else, so chunks, padding and batches do not
    change what is kept; kvpress' RandomPress draws one after the other, and again for every prompt.
    """

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}

    def observe(self, table: TokenTable, step: Step) -> None:
        new = slice(-step.queries, None)
        positions = table.positions[:, :, new]
        heads = consecutive(step.heads.first_kv_head, table.kv_heads, positions.device).view(-1, 1)
        table["score"][:, :, new] = uniform(hashed(self.seed, step.layer, heads, positions))
