"""Knorm: keys of small norm. Devoto et al., arXiv 2406.11430, EMNLP 2024."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune.policy.base import Step
from kvprune.policy.eviction import Eviction
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Knorm(Eviction):
    """Keeps the tokens whose keys have the smallest norm: F_k = -||k||_2. Looks at no attention.

    In many models, keys of small norm are those that get most attention. The score of a token is that of its key alone
    and never changes. The same as kvpress' KnormPress, beside its sinks and recent window, of which that has none.
    """

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}

    def observe(self, table: TokenTable, step: Step) -> None:
        new = slice(-step.queries, None)
        table["score"][:, :, new] = -table.newest_keys(step.queries).float().norm(dim=-1)
