"""What a gate is told of a token, and what it makes of it. `B` sequences, `N` tokens by position, `h` hidden units."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvprune.table.rows import ranked

FEATURES = 4


def features(score: Tensor, first: Tensor, tokens: Tensor, sparsity: float) -> Tensor:
    """Four numbers of every token of a step, `[B, N, 4]` float32: where it is, its attention, its rank, the sparsity.

        (i + 1) / N,   log(1 + n s_i),   how many of the step's n tokens have at most its s, of n,   sparsity

    score: s, float32 `[B, N]`, attention that tokens were given, a mean over heads and queries; ties rank by position.
    first, tokens: LongTensors `[B, 1]`, the step has the tokens `first .. tokens - 1` of a sequence; what others get
    means nothing.
    """
    places = torch.arange(score.shape[1], device=score.device, dtype=torch.int32).expand_as(score)
    own = (places >= first) & (places < tokens)
    ranks = ranked(score, places).masked_fill(~own, torch.iinfo(torch.int64).min)
    order = ranks.argsort(dim=1).argsort(dim=1) - (~own).sum(1, keepdim=True)
    added = (tokens - first).clamp(min=1)
    where, rank = (places + 1) / tokens.clamp(min=1), (order + 1) / added
    return torch.stack([where, (added * score).log1p(), rank, torch.full_like(score, sparsity)], dim=-1)


class Gate(NamedTuple):
    """A small network of one layer, float32: `relu(f inner^T + bias) outer`; tokens of which it is largest compute it.

    inner: `[h, 4]`. bias, outer: `[h]`.
    """

    inner: Tensor
    bias: Tensor
    outer: Tensor

    def opening(self, told: Tensor) -> Tensor:
        """Of `features`, `[B, N, 4] -> [B, N]`."""
        return torch.relu(told @ self.inner.T + self.bias) @ self.outer

    def numbers(self) -> tuple[float, ...]:
        """All of its numbers, in a row."""
        return tuple(torch.cat([part.detach().float().cpu().flatten() for part in self]).tolist())

    @classmethod
    def of(cls, numbers: tuple[float, ...], device: torch.device | None = None) -> Gate:
        """The gate of such `numbers`."""
        units = len(numbers) // (FEATURES + 2)
        whole = torch.tensor(numbers, dtype=torch.float32, device=device)
        inner, bias, outer = whole.split([FEATURES * units, units, units])
        return cls(inner.view(units, FEATURES), bias, outer)
