"""DropKV: what the output would lose. Zhang et al., openreview MqfNzH3TVH, 2026."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from kvprune.policies.snapkv import SnapKV
from kvprune.policy.base import Step
from kvprune.policy.settings import check_number
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class DropKV(SnapKV):
    """Keeps the tokens without which the output of attention would change most, for the last `window` queries.

        o_i^(-j) - o_i = r_ij (o_i - v_j),   r = p / (1 - p)
        s_j = sum over the last `window` queries i of  r_ij^2 |v_j - o_i|^2
            = |v_j|^2 sum r^2  -  2 v_j . sum r^2 o_i  +  sum r^2 |o_i|^2

    Exact for each token that goes alone. The unit is the same in every head, so heads may compete:
    `DropKV(0.25, share=Adaptive())`. Scores of the query heads of a KV head are averaged, then pooled. The same as
    kvpress' DropKVPress, but that the window lends nothing to its neighbours.

    Settings (beside those of `SnapKV`):
        epsilon: the least that 1 - p may be.
    """

    _: KW_ONLY
    pooling: str = "avg"
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("epsilon", self.epsilon, low=1e-12, high=1)

    @property
    def scores_attention(self) -> bool:
        return False  # but what values make of it

    @property
    def scores_squares(self) -> bool:
        return True

    def row_weights(self, step: Step) -> None:
        return None

    def observe(self, table: TokenTable, step: Step) -> None:
        if not step.due:
            return
        values = table.all_values().double()
        sizes = values.square().sum(-1, keepdim=True)
        each = torch.cat([values, torch.ones_like(sizes), sizes], dim=-1)
        score = torch.zeros((), dtype=torch.float64, device=values.device)
        for rows in step.attention_rows(self.window):
            group = rows.shape[2:4]
            outputs = rows.flatten(2, 3) @ values
            sizes = outputs.square().sum(-1, keepdim=True)
            asked = torch.cat([-2 * outputs, sizes, torch.ones_like(sizes)], dim=-1)
            alone = rows == 1  # whoever sees but one key has no other output
            squares = rows.div_((1 - rows).clamp_(min=self.epsilon)).masked_fill_(alone, 0.0).square_()
            apart = (asked @ each.mT).unflatten(2, group)  # |v_j - o_i|^2
            score = score + squares.mul_(apart).sum(-2)
        score = score.clamp(min=0)
        table["score"] = score.mean(2) if self.group == "mean" else score.amax(2)
