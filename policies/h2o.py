"""H2O: heavy hitters by accumulated attention. Zhang et al., arXiv 2306.14048, NeurIPS 2023."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune.attention.mass import RowWeights
from kvprune.policy.base import Step
from kvprune.policy.eviction import Eviction
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class H2O(Eviction):
    """Keeps the tokens with the most attention so far, summed over every query: F <- F + mass.

    The sum is exact over the whole prompt, so prefill reads every attention row once more.
    """

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}

    def row_weights(self, step: Step) -> RowWeights:
        return RowWeights.uniform(step.queries)

    def observe(self, table: TokenTable, step: Step) -> None:
        table["score"].add_(step.mass)
