"""A cascade that lets any tokens stop, to compare with: `subjects.dropping:Dropping` for `kvprune eval`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune import Step, TokenTable
from kvprune.policies import LazyLLM


@dataclass(frozen=True)
class Dropping(LazyLLM):
    """As many tokens go on as of LazyLLM, chosen by chance: the same ones at every step, but for the newest."""

    def onward(self, table: TokenTable, step: Step) -> Tensor | None:
        share = self.share_after(step.depth, step.layers)
        if share is None or step.passage is None:
            return None
        looked_at = step.passage.by_token(torch.zeros_like(table.positions, dtype=torch.float32), table)
        chance = torch.rand(looked_at.shape[1], generator=torch.Generator().manual_seed(step.layer))
        return step.passage.best(looked_at + chance.to(looked_at.device), share)
