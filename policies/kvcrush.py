"""KVCrush: representatives of what is dropped. Jha et al., arXiv 2503.00022, 2025."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.attention.noise import consecutive, hashed, uniform
from kvprune.errors import PolicyError
from kvprune.policy.base import Step
from kvprune.policy.representatives import Representatives
from kvprune.policy.settings import check_number, check_seed
from kvprune.policy.shares import ALWAYS_KEPT, NEVER_KEPT
from kvprune.table.rows import top_rows
from kvprune.table.token_table import TokenTable

ANCHORS = ("mean", "alternate", "random")


@dataclass(frozen=True)
class KVCrush(Representatives):
    """Behind a policy that ranks rows: gives a share of its budget to tokens that stand for those it drops.

        b_h = whether a token is in the better half of the rows that compete in KV head h; 0 where it is not there
        D   = how many b_h differ from an anchor's

    What a head would drop is ordered by D (ties: the older first) and cut into as many equal groups as there are to be
    representatives; of each, the row of best rank stays. `A2SF(0.25) | KVCrush(share=0.25)` keeps as many rows as
    `A2SF(0.25)`: three quarters of them by score, sinks and recent window among these, and a quarter so. They are
    chosen whenever several rows go at once: at a prompt, and after the `interval` of the policy before, if not 1.

    Settings:
        share: of the budget of every head, rounded down; no more than what sinks and recent window leave.
        anchor: "mean" has for every head the bit of most tokens that some head drops; "alternate" has 0, 1, 0, 1, ...;
            "random" draws. seed: of that.
    """

    share: float = 0.25
    anchor: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("share", self.share, low=0, high=1)
        check_seed(self.seed)
        if self.anchor not in ANCHORS:
            raise PolicyError(f"anchor must be one of {', '.join(map(repr, ANCHORS))}, not {self.anchor!r}.")

    def chosen(self, retention: Tensor, table: TokenTable, step: Step, kept: Tensor) -> Tensor:
        there, always = retention > NEVER_KEPT, retention == ALWAYS_KEPT
        count = torch.minimum((kept * self.share + 1e-9).long(), kept - always.sum(-1, keepdim=True)).clamp(min=0)
        candidates = there & ~top_rows(retention, kept - count)
        distances = self._distances(retention, there & ~always, candidates, table.positions, step)
        # In the order of distance and position; what is no candidate comes last.
        order = distances.long() << 32 | table.positions.long().clamp(min=0)
        order = order.masked_fill(~candidates, ALWAYS_KEPT).argsort(dim=-1)
        rank = torch.empty_like(order).scatter_(
            2, order, torch.arange(order.shape[2], device=order.device).expand_as(order)
        )
        number = candidates.sum(-1, keepdim=True).clamp(min=1)
        group = torch.where(candidates, rank * count.clamp(max=number) // number, order.shape[2])
        best = torch.full_like(order, NEVER_KEPT, dtype=torch.int64)
        best = torch.cat([best, best[..., :1]], dim=2).scatter_reduce_(2, group, retention, "amax")
        return candidates & (count > 0) & (best.gather(2, group) == retention)

    def _distances(
        self, retention: Tensor, competing: Tensor, candidates: Tensor, positions: Tensor, step: Step
    ) -> Tensor:
        """D of the token of every row, `[B, Hkv, rows]`: of a token the same in all heads of the layer."""
        half = (competing.sum(-1, keepdim=True) + 1) // 2
        better = top_rows(retention.masked_fill(~competing, NEVER_KEPT), half) & competing
        tokens = int(torch.as_tensor(step.tokens).max())
        index = torch.where(positions < 0, tokens, positions).long()

        def by_token(rows: Tensor) -> Tensor:
            dense = torch.zeros(*rows.shape[:2], tokens + 1, dtype=torch.bool, device=rows.device)
            return dense.scatter_(2, index, rows)[:, :, :tokens]

        bits = by_token(better)
        if self.anchor == "mean":
            dropped = step.heads.sum(by_token(candidates).sum(1, keepdim=True)) > 0
            anchor = 2 * (bits & dropped).sum(-1, keepdim=True) >= dropped.sum(-1, keepdim=True)
        else:
            heads = consecutive(step.heads.first_kv_head, positions.shape[1], positions.device).view(-1, 1)
            drawn = uniform(hashed(self.seed, step.layer, heads)) < 0.5
            anchor = (heads % 2 == 1) if self.anchor == "alternate" else drawn
        distances = step.heads.sum((bits != anchor).sum(1, keepdim=True)).expand(-1, positions.shape[1], -1)
        return distances.gather(2, positions.long().clamp(min=0))
