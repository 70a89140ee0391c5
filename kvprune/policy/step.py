"""What a layer tells its policy about the forward pass at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvprune.attention.asked import Asked
from kvprune.attention.mass import RowWeights, Scoring, row_blocks
from kvprune.attention.outputs import Outputs
from kvprune.attention.queries import Queries
from kvprune.attention.rotary import NO_ROTARY, Rotary
from kvprune.errors import PolicyError
from kvprune.policy.heads import ALL_HEADS, Heads
from kvprune.policy.passage import Passage
from kvprune.table.rows import EMPTY
from kvprune.table.tallies import Tallies


@dataclass
class Step:
    """What a layer tells its policy about the forward pass at hand. Padding is never counted as a token.

    The counts of tokens are ints where every sequence of the batch has the same, else LongTensors `[B, 1, 1]`, ready to
    be compared with `table.positions`.
    """

    layer: int
    """Index of the layer in the model."""
    prefill: bool
    """Whether this step brought a prompt, or a piece of one; False for tokens that were generated."""
    due: bool
    """Whether it is time to decide: after every prefill step, and every `interval` generated tokens."""
    queries: int
    """Attention rows of this step, padding included: what `RowWeights` are made for."""
    new_tokens: int | Tensor
    """Tokens of this step."""
    tokens: int | Tensor
    """Tokens so far, those of this step included: the newest has position `tokens - 1`."""
    prompt_tokens: tuple[int, ...]
    """For each sequence, its tokens at the end of the last prefill step: what fractions are fractions of."""
    token_bytes: int
    """Bytes that one kept token costs in the whole cache: all pruned layers, sequences and heads, of all processes."""
    other_bytes: int
    """Bytes of the whole cache that are no rows: layers that are not pruned, remembered queries."""
    spare: int
    """Slots that the table may hold beside the kept tokens, as it grows by `interval` of them at a time."""
    generated: int | Tensor = 0
    """Tokens generated since the last prefill step, those of this step included; a scalar where steps are compiled."""
    source: Queries | None = None
    """The queries themselves."""
    weights: RowWeights | None = None
    """The attention rows that the policy asked for."""
    weighed: Tensor | None = None
    """What `mass` returns; None where the policy asked for no rows."""
    half_bytes: int = 0
    """What `token_bytes` would be of keys and values alone, of every token, at 16 bits a number."""
    stock_bytes: int = 0
    """The part of `other_bytes` that is of layers which are not pruned."""
    depth: int = 0
    """Number of the layer among those that share a budget, from 0."""
    layers: int = 1
    """How many layers share a budget."""
    scoring: Scoring | None = None
    """How the model makes probabilities of queries and keys; there when policies observe and decide."""
    tallies: Tallies = field(default_factory=Tallies)
    """What the policy remembers beside rows, see `Policy.tallies`; update them in place."""
    rotary: Rotary = field(default_factory=lambda: NO_ROTARY)  # torch.compile of 2.11 takes no object as a default
    """How the layer turns queries and keys by their positions, for a policy that `turns_back`."""
    asked: Asked | None = None
    """What its queries look at; there when policies observe."""
    outputs: Outputs | None = None
    """What values become in the output of the layer, for a policy that `weighs_outputs`."""
    heads: Heads = field(default_factory=lambda: ALL_HEADS)
    """Whose heads the table and `mass` have; to look across heads, ask for `heads.sum` or `heads.mean`."""
    output: Tensor | None = None
    """What attention made of the queries of this step, `[B, Hq, L, Dv]`; there when policies observe."""
    passage: Passage | None = None
    """There where tokens may stop after this layer, for a policy that `stops_tokens`."""

    @property
    def mass(self) -> Tensor:
        """Attention mass of the rows the policy asked for, `[B, Hkv, rows]` float32, aligned with the table's slots."""
        if self.weighed is None:
            raise PolicyError("this step has no attention mass: return the rows to weigh from row_weights().")
        return self.weighed

    @property
    def query_positions(self) -> Tensor:
        """Position of every attention row of this step in its sequence, `[B or 1, queries]` int64, -1 for padding."""
        if self.source is None:
            raise PolicyError("this step has no queries: a layer makes the steps that have.")
        return self.source.positions

    def without_queries(self) -> Step:
        """The same for a decision that waits, while what the queries were made of is freed."""
        return replace(self, source=None, asked=None, output=None)

    def attention_rows(self, count: int) -> Iterator[Tensor]:
        """Attention probabilities of the `count` newest queries, some at a time, `[B, Hkv, G, l, rows]` float64.

        For scores that are no weighted sum of them, which is `mass`. Those of earlier steps are among them where the
        policy has a `query_window`. 0 for rows that a query does not see.
        """
        if self.asked is None:
            raise PolicyError("this step has no queries: attention is there when a policy observes.")
        return self.asked.rows(count)

    def unturned_queries(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The queries of this step before positions turned them, some at a time, for a policy that `turns_back`.

        Yields them, `[B, Hq, l, D]` float32, and `[B, 1, l, 1]` float32: 1 for those at positions from `first` on, 0
        for others and padding.
        """
        if self.source is None:
            raise PolicyError("this step has no queries: a layer makes the steps that have.")
        states, positions = self.source.states, self.query_positions
        for block in row_blocks(self.queries, states[:, :, 0].numel(), states.device):
            placed = positions[:, block]
            counted = (placed >= max(first, 0)).float()[:, None, :, None].expand(len(states), -1, -1, -1)
            yield self.rotary.turn(states[:, :, block].float(), placed, back=True), counted

    def witnesses(self, positions: Tensor) -> Tensor:
        """How many of the rows weighed into `mass` could see each of these positions, int64 of their shape.

        positions: `[B, Hkv, rows]`. Rows of weight zero and padding count nothing.
        """
        if self.weights is None:
            raise PolicyError("this step weighs no attention rows: return them from row_weights().")
        rows, weights = self.weights.chosen(self.queries, positions.device)
        batch = len(positions)
        asked = self.query_positions.expand(batch, -1).gather(1, rows.expand(batch, -1))
        asked = asked.masked_fill(weights.expand(batch, -1) == 0, EMPTY).sort().values
        earlier = torch.searchsorted(asked, positions.long().flatten(1).contiguous())
        return (asked.shape[1] - earlier).view_as(positions)
