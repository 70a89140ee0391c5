"""Scores over neighbouring positions: pooled from the rows at hand, wherever these lie in a table."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.attention.mass import row_blocks


def max_pool(kernel_size: int) -> Callable[[Tensor], Tensor]:
    """The largest of `kernel_size` neighbours, along the last dimension; there are none beyond its ends."""

    def pool(dense: Tensor) -> Tensor:
        size = reach(kernel_size, dense.shape[-1])
        return F.max_pool1d(dense, size, stride=1, padding=size // 2)

    return pool


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


def reach(kernel_size: int, length: int) -> int:
    """A kernel no wider than it takes to reach all of a length from everywhere: more would only cost memory."""
    return min(kernel_size, 2 * length - 1)


def along_positions(scores: Tensor, positions: Tensor, function: Callable[[Tensor], Tensor], fill: float) -> Tensor:
    """Apply a function to scores laid out by position, `[B, Hkv, positions]`, with `fill` where no row is.

    scores, positions: `[B, Hkv, rows]`.
    """
    positions = positions.long()
    axis = max(1, int(positions.max()) + 1)  # of nothing but padding, too
    index = torch.where(positions < 0, axis, positions)
    dense = scores.new_full((*scores.shape[:2], axis + 1), fill).scatter_(2, index, scores)[:, :, :axis]
    result = function(dense)
    return result.gather(2, positions.clamp(min=0))
