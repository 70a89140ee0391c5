"""Scores over neighbouring positions: pooled from the rows at hand, wherever these lie in a table."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.attention.mass import row_blocks


def lent(scores: Tensor, positions: Tensor, recent: int | Tensor) -> Tensor:
    """What rows lend to their neighbours: their scores, and -inf for NaN, for empty rows, and from `recent` on.

    scores, positions: `[B, Hkv, rows]`. recent: a position, or LongTensor `[B, 1, 1]`.
    """
    lends = (scores > -math.inf) & (positions < recent) & (positions >= 0)
    return scores.masked_fill(~lends, -math.inf)


def largest_near(scores: Tensor, positions: Tensor, before: int, after: int, recent: int | Tensor) -> Tensor:
    """For every row, the most that it and its neighbours lend, see `lent`, and -inf where it scores -inf or NaN."""
    found = over_neighbours(lent(scores, positions, recent), positions, before, after, lambda near: near.amax(-1))
    return found.masked_fill_(~(scores > -math.inf), -math.inf)


def over_neighbours(
    scores: Tensor,
    positions: Tensor,
    before: int,
    after: int,
    reduce: Callable[[Tensor], Tensor],
    fill: float = -math.inf,
) -> Tensor:
    """For every row, `reduce` of its own score and of those up to `before` positions before it and `after` behind it.

    `reduce` is given `[..., neighbours]`; `fill` stands where there is none. No shape depends on what positions say,
    and the device is not waited for. scores, positions: `[B, Hkv, rows]`; positions differ, but for those of empty
    rows, which are to score `fill`.
    """
    batch, heads, rows = positions.shape
    # As positions differ, no neighbour is more rows away than positions.
    few = min(before, rows - 1), min(after, rows - 1)
    width = sum(few) + 1
    order = positions.argsort(dim=-1)
    places = positions.gather(2, order)
    around = F.pad(places, few).unfold(2, width, 1)
    lent = F.pad(scores.gather(2, order), few, value=fill).unfold(2, width, 1)
    parts = []
    for block in row_blocks(rows, batch * heads * width, scores.device):
        away = around[:, :, block] - places[:, :, block, None]
        near = away.abs() <= before if before == after else (away >= -before) & (away <= after)
        parts.append(reduce(torch.where(near, lent[:, :, block], fill)))
    pooled = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return torch.empty_like(pooled).scatter_(2, order, pooled)
