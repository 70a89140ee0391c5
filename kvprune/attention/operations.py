"""`AttentionOperations`: what attention and its mass have several implementations of, here in PyTorch.

`kvprune.kernels` has others, which override what they do faster. Shapes: see `kvprune.table`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvprune.attention import neighbours, packed
from kvprune.attention.mass import MassOperations, RowWeights, Scoring, attention_mass
from kvprune.attention.noise import Gumbel
from kvprune.attention.ragged import OneHead, side_by_side
from kvprune.attention.softmax import single_query_attention
from kvprune.table.ragged import RaggedTable
from kvprune.table.token_table import TokenTable


class AttentionOperations(MassOperations):
    """PyTorch's, on every device. Others override what they do better, and pass on what they cannot do."""

    # -- attention of one query per sequence -------------------------------------------------------------------------

    def single_query(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scoring: Scoring,
        empty: Tensor | None,
        with_probabilities: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Output `[B, Hq, 1, Dv]`, and probabilities `[B, Hkv, G, S]` float32 if wanted.

        queries: `[B, Hq, 1, D]`. keys: `[B, Hkv, S, D]`. values: `[B, Hkv, S, Dv]`. empty: bool `[B, Hkv, S]`, slots
        that hold nothing; None if there are none.
        """
        return single_query_attention(queries, keys, values, scoring, empty, with_probabilities)

    def packed_single_query(
        self, queries: Tensor, table: TokenTable, scoring: Scoring, with_probabilities: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The same over a table with packed rows; see `packed.single_query`. Who has probabilities may return them."""
        return packed.single_query(queries, table, scoring)

    def flat_single_query(
        self, queries: Tensor, table: RaggedTable, scoring: Scoring, with_probabilities: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The same over heads of different lengths, no row of which is packed or empty."""
        return self.ragged_single_query(queries, table, scoring, with_probabilities)

    def ragged_single_query(
        self, queries: Tensor, table: RaggedTable, scoring: Scoring, with_probabilities: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The same over any table of heads of different lengths; probabilities are 0 where a head has no row."""
        group = queries.shape[1] // table.kv_heads
        outputs: list[Tensor] = []
        probabilities: list[Tensor] = []
        for number, head in enumerate(table.heads):
            one = OneHead.of(number, table.kv_heads, group)
            own, scored = one.part(queries), one.scoring(scoring)
            if head.packed:
                output, found = self.packed_single_query(own, head, scored, with_probabilities)
            else:
                empty = None if head.dense else head.positions < 0
                output, found = self.single_query(own, head.keys, head.values, scored, empty, with_probabilities)
            outputs.append(output)
            if with_probabilities and found is not None:
                probabilities.append(found)
        output = side_by_side(outputs, table.kv_heads)
        return output, table.padded(probabilities) if with_probabilities else None

    # -- attention mass ----------------------------------------------------------------------------------------------

    def attention_mass(
        self, queries: Tensor, keys: Tensor, row_weights: RowWeights, scoring: Scoring, **settings: Any
    ) -> Tensor:
        """Weighted attention mass of every key, `[B, Hkv, S]` float32; see `mass.attention_mass`."""
        return attention_mass(queries, keys, row_weights, scoring, **settings, kernels=self)

    def attention_maxima(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor | None,
        weights: Tensor,
        scoring: Scoring,
        query_positions: Tensor,
        key_positions: Tensor,
        *,
        lse: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor] | None:
        """Attention, and the most that any query of each head gives to a key, in one pass over their products.

        Returns the output `[B, Hq, L, Dv]`, zero where a query sees nothing, and the largest of `w[q] * P[b, g, q, k]`,
        `[B, Hkv, G, S]` float32. None where that is not faster than one after the other (`queries.attend`,
        `maxima.attention_maxima`), as in PyTorch, which would write all probabilities.

        queries: `[B, Hq, L, D]`. keys: `[B, Hkv, S, D]`. values: `[B, Hkv, S, Dv]`; None where no output is wanted.
        weights: w, `[B or 1, L]`, at least 0. query_positions: `[B or 1, L]`, -1 for padding. key_positions:
        `[B or 1, Hkv or 1, S]`, -1 for empty. lse: log-sum-exp of every query over all keys, sinks included,
        `[B, Hq, L]`, if it is known.
        """
        return None

    def query_mass(
        self,
        probabilities: Tensor,
        group: str,
        noise: Gumbel | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor:
        """Mass `[B, Hkv, S]` that a single query gives to keys by its probabilities `[B, Hkv, G, S]` float32.

        group: "mean" or "max" over query heads. With noise, it is the mass of the noisy softmax, at query_positions
        `[B or 1, 1]` and key_positions `[B, Hkv, S]`: the logarithms of probabilities are logits like any other.
        """
        if noise is not None and query_positions is not None and key_positions is not None:
            logits = probabilities.log().unsqueeze(3)
            weights, totals = self.noisy_weights(logits, noise, Scoring(1.0), query_positions, key_positions)
            probabilities = weights.div_(totals[..., None]).squeeze(3)
        return probabilities.mean(2) if group == "mean" else probabilities.amax(2)

    # -- scores ------------------------------------------------------------------------------------------------------

    def largest_near(self, scores: Tensor, positions: Tensor, before: int, after: int, recent: int | Tensor) -> Tensor:
        """For every row, the largest score of rows from `before` positions before it to `after` behind it.

        Rows at positions from `recent` on, an int or LongTensor `[B, 1, 1]`, and empty ones count for nothing; one that
        scores -inf or NaN neither counts nor gets anything but -inf. scores: float32 `[B, Hkv, S]`; positions: the
        same, int32, -1 where there is no row.
        """
        return neighbours.largest_near(scores, positions, before, after, recent)


TORCH_ATTENTION = AttentionOperations()


def of(table: TokenTable) -> AttentionOperations:
    """What attends to a table: the kernels that move its rows, if they can attend, and else PyTorch."""
    kernels = table.kernels
    return kernels if isinstance(kernels, AttentionOperations) else TORCH_ATTENTION
