"""`OneHead`: the part of one sequence and KV head in queries, weights and scores.

Over a table whose heads hold different numbers of rows, the queries of each attend to a table of their own, as queries
do to any table: no key is there that is not attended to, and no mask but that of the tokens of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights, Scoring


@dataclass(frozen=True)
class OneHead:
    """sequence: of the batch. heads: the query heads of the KV head."""

    sequence: int
    heads: slice

    @classmethod
    def of(cls, number: int, kv_heads: int, group: int) -> OneHead:
        """number: counting the KV heads of all sequences, sequence by sequence. group: query heads of a KV head."""
        first = number % kv_heads * group
        return cls(number // kv_heads, slice(first, first + group))

    def part(self, states: Tensor) -> Tensor:
        """`[B, Hq, ...] -> [1, G, ...]`."""
        return states[self.sequence : self.sequence + 1, self.heads]

    def sequence_of(self, tensor: Tensor) -> Tensor:
        """`[B or 1, ...] -> [1, ...]`."""
        return tensor if len(tensor) == 1 else tensor[self.sequence : self.sequence + 1]

    def scoring(self, scoring: Scoring) -> Scoring:
        return scoring if scoring.sinks is None else replace(scoring, sinks=scoring.sinks[self.heads])

    def weights(self, weights: RowWeights) -> RowWeights:
        if weights.noise is not None:  # a number of a query head in the layer
            first = weights.noise.first_head + self.heads.start
            weights = replace(weights, noise=replace(weights.noise, first_head=first))
        if weights.rows is None or weights.weights is None or weights.rows.ndim == 1:
            return weights
        return replace(weights, rows=self.sequence_of(weights.rows), weights=self.sequence_of(weights.weights))


def side_by_side(parts: list[Tensor], kv_heads: int) -> Tensor:
    """`[1, G, ...]` of every sequence and KV head as `[B, Hq, ...]`."""
    return torch.cat(parts).unflatten(0, (-1, kv_heads)).flatten(1, 2)
