"""Scores laid out by position. Pooled from rows wherever these lie: `kvprune.attention.neighbours`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def max_pool(kernel_size: int) -> Callable[[Tensor], Tensor]:
    """The largest of `kernel_size` neighbours, along the last dimension; there are none beyond its ends."""

    def pool(dense: Tensor) -> Tensor:
        size = reach(kernel_size, dense.shape[-1])
        return F.max_pool1d(dense, size, stride=1, padding=size // 2)

    return pool


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
