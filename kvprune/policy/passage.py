"""What a policy that stops tokens between layers is told at a layer, and what it says: see `kvprune.passes.cascades`.

Tokens are named by their positions here, `N` of them in the longest sequence: rows of a table may be in any order, and
those of one head may not be those of another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.table.kept_heads import KeptHeads
from kvprune.table.rows import EMPTY, ranked, top_rows
from kvprune.table.token_table import TokenTable


@dataclass
class Passage:
    """A layer's part in a forward pass whose tokens may stop.

    tokens: of each sequence, those of this step included. added: those of this step. active: which tokens the layer
    looks at, bool `[B, N]`; None if all that have a row. above: the table of the next layer, where earlier tokens that
    have no row in it cannot go on; None where all can. out_of_order: whether rows come that are older than others in
    the table. score: what is held of every token over all layers and steps, float32 `[B, N]`, to be updated in place;
    None where the policy wants none. begins: whether this is where the heads of a sequence are chosen, for good. heads:
    that the layer computes; None for all of the model's. head_score: float32 `[B, r]`, what the policy holds of those
    heads in this pass; it puts there what it has.
    """

    tokens: tuple[int, ...]
    added: tuple[int, ...]
    active: Tensor | None = None
    above: TokenTable | None = None
    out_of_order: bool = False
    score: Tensor | None = None
    begins: bool = False
    heads: KeptHeads | None = None
    head_score: Tensor | None = None
    onward: Tensor | None = None
    """What the policy has said: which tokens the next layers look at, bool `[B, N]`; None if as many as this one."""

    heads_onward: Tensor | None = None
    """Which of its heads the next layers compute, LongTensor `[B, r']`, ascending, in its counting; None for all."""

    def seen(self, table: TokenTable) -> TokenTable:
        """The table as the queries of this layer see it: without the rows of tokens that have stopped before it."""
        if self.active is None and not self.out_of_order:
            return table
        return table.with_positions(table.positions.masked_fill(~self.looked_at(table), EMPTY))

    def looked_at(self, table: TokenTable) -> Tensor:
        """Which rows of a table the layer looks at, bool `[B, Hkv, rows]`."""
        positions = table.positions
        if self.active is None:
            return positions >= 0
        at = positions.clamp(min=0).long()
        active = self.active.to(at.device)[:, None].expand(-1, at.shape[1], -1)
        return active.gather(2, at).logical_and_(positions >= 0)

    def by_token(self, rows: Tensor, table: TokenTable) -> Tensor:
        """Numbers of the rows of a table, added up over KV heads, `[B, Hkv, rows] -> [B, N]` float32.

        -inf for tokens that the layer does not look at.
        """
        width = max(self.tokens)
        looked_at = self.looked_at(table)
        at = torch.where(looked_at, table.positions.long(), width).flatten(1)
        total = torch.zeros(len(at), width + 1, dtype=torch.float32, device=rows.device)
        total.scatter_add_(1, at, rows.float().flatten(1))
        known = torch.zeros(len(at), width + 1, dtype=torch.bool, device=rows.device).scatter_(1, at, True)
        return total.masked_fill_(~known, -math.inf)[:, :width]

    def _reachable(self, above: TokenTable) -> Tensor:
        width, device = max(self.tokens), above.positions.device
        at = above.positions.masked_fill(above.positions < 0, width).long().flatten(1)
        held = torch.zeros(len(at), width + 1, dtype=torch.bool, device=device).scatter_(1, at, True)[:, :width]
        first = torch.tensor([a - b for a, b in zip(self.tokens, self.added, strict=True)], device=device)[:, None]
        return held | (torch.arange(width, device=device) >= first)

    def best(self, importance: Tensor, share: float, recent: int = 1) -> Tensor:
        """The most important tokens, bool `[B, N]`: a share of all tokens, rounded up, the newest `recent` among them.

        importance: as for `top`.
        """
        return self.top(importance, [share_of(tokens, share) for tokens in self.tokens], recent=recent)

    def top(self, importance: Tensor, counts: list[int], *, first: int = 0, recent: int = 1) -> Tensor:
        """So many tokens of each sequence, the most important ones, bool `[B, N]`.

        The first and the newest so many are always among them. importance: float32 `[B, N]`; -inf for tokens out of the
        question, as those are that cannot go on. Ties go to the more recent token.
        """
        device = importance.device
        places = torch.arange(importance.shape[1], device=device, dtype=torch.int32).expand_as(importance)
        ends = torch.tensor(self.tokens, device=device)[:, None]
        known = (importance > -math.inf) & (places < ends)
        if self.above is not None:
            known &= self._reachable(self.above).to(device)
        kept = known & ((places >= ends - recent) | (places < first))
        ranks = ranked(importance.masked_fill(kept, math.inf).masked_fill(~known, -math.inf), places)
        chosen = top_rows(ranks[:, None], torch.tensor(counts, device=device)[:, None, None])[:, 0]
        return known & (chosen | kept)


def share_of(tokens: int, share: float) -> int:
    """So many of so many tokens, rounded up, at least one."""
    return max(1, math.ceil(tokens * share - 1e-9))  # 0.7 * 10 is 7.000000000000001


def best_heads(importance: Tensor, share: float, total: int) -> Tensor | None:
    """The most important of some heads: a share of all `total` heads, rounded up, LongTensor `[B, r']`, ascending.

    importance: `[B, r]`; ties go to the first. None where all of them stay.
    """
    count = share_of(total, share)
    if count >= importance.shape[1]:
        return None
    order = importance.nan_to_num(nan=-math.inf).argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values
