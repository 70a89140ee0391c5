"""TOVA: token omission via attention. Oren et al., arXiv 2401.06104, 2024."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from kvprune.attention.mass import RowWeights
from kvprune.policy.base import Step
from kvprune.policy.eviction import Eviction
from kvprune.policy.pooling import along_positions
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class TOVA(Eviction):
    """Keeps the tokens that the newest query attends to most, averaged over all heads: one set for the whole layer."""

    _: KW_ONLY
    sinks: int = 0
    recent: int | float = 1

    @property
    def needs_question(self) -> bool:
        return True

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}

    def row_weights(self, step: Step) -> RowWeights:
        return RowWeights.last_window(1)

    def observe(self, table: TokenTable, step: Step) -> None:
        if table.one_policy and not self.value_aware:  # then all heads hold the same tokens in the same slots
            score = step.heads.mean(step.mass)
        else:  # in every process the last position is that of this step's newest row, so all of them add up as many
            score = along_positions(step.mass, table.positions, lambda mass: step.heads.mean(mass).expand_as(mass), 0)
        if not isinstance(step.new_tokens, int):  # a sequence to which this step was padding alone has no newer query
            score = torch.where(step.new_tokens > 0, score, table["score"])
        table["score"] = score
