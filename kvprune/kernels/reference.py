"""`Kernels`: the operations that have several implementations, in PyTorch.

Shapes: `B` batch, `Hq` query heads, `Hkv` KV heads, `G = Hq / Hkv`, `L` queries, `S` keys, `D` head dim.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights, Scoring, attention_mass, hidden_keys
from kvprune.attention.noise import Gumbel
from kvprune.attention.softmax import single_query_attention
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec
from kvprune.table.rows import take_rows

if TYPE_CHECKING:
    from kvprune.table.token_table import TokenTable

_ALWAYS_KEPT = torch.iinfo(torch.int64).max


class Columns(tuple[Tensor, ...]):
    """The tensors of a table, `[B, Hkv, slots, ...]` contiguous: keys, values, positions, and others.

    native: what kernels have worked out of them, to be used again: it is true as long as the tensors live, and they are
    held here.
    """

    native: Any = None


class Kernels:
    """PyTorch's, on every device. Other kernels override what they do better, and pass on what they cannot do."""

    name = "torch"

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

    def packed_single_query(self, queries: Tensor, table: TokenTable, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """The same over a table with packed rows; see `packed.single_query`."""
        from kvprune.attention import packed

        return packed.single_query(queries, table, scoring)

    # -- attention mass ----------------------------------------------------------------------------------------------

    def attention_mass(
        self, queries: Tensor, keys: Tensor, row_weights: RowWeights, scoring: Scoring, **settings: Any
    ) -> Tensor:
        """Weighted attention mass of every key, `[B, Hkv, S]` float32; see `mass.attention_mass`."""
        return attention_mass(queries, keys, row_weights, scoring, **settings, kernels=self)

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

    def noisy_weights(
        self,
        logits: Tensor,
        noise: Gumbel,
        scoring: Scoring,
        query_positions: Tensor,
        key_positions: Tensor,
        lse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A noisy, tempered softmax of capped logits `[B, Hkv, G, L, S]` float32, which may be overwritten.

        Returns weights of that shape, 0 where a query does not see a key, and what a row of them is to be divided by,
        `[B, Hkv, G, L]`.

        query_positions: `[B or 1, L]`, -1 for padding. key_positions: `[B or 1, Hkv or 1, S]`, -1 for empty. lse:
        log-sum-exp of the logits, of that shape, if it is known.
        """
        hidden = hidden_keys(query_positions, key_positions)
        logits = noise.perturb(logits, query_positions, key_positions).masked_fill_(hidden, -math.inf)
        # Normalized already; NaN where a row sees nothing.
        return scoring.softmax(logits).nan_to_num_(0.0), logits.new_ones(logits.shape[:4])

    def mass_from_lse(
        self,
        queries: Tensor,
        keys: Tensor,
        weights: Tensor,
        scoring: Scoring,
        places: Tensor,
        lse: Tensor,
        noise: Gumbel | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor | None:
        """Attention mass `[B, Hkv, S]` of the mean over query heads, where rows need not be normalized any more.

        None where that is not faster than `attention_mass` without it, as in PyTorch, which would write every tile of
        logits several times. queries: those weighed, `[B, Hq, R, D]`. weights: `[B, R]`. places: of these queries among
        the keys, LongTensor `[B or 1, R]`, ascending. lse: log-sum-exp of their logits, `[B, Hq, R]`. noise goes by
        query_positions `[B or 1, R]` and key_positions `[B or 1, Hkv or 1, S]`.
        """
        return None

    # -- rows of a table ---------------------------------------------------------------------------------------------

    def worst_rows(self, scores: Tensor, positions: Tensor, sinks: int, recent: int | Tensor) -> Tensor:
        """Slot of the row of least score of every head, LongTensor `[B, Hkv, 1]`; of equal ones the oldest.

        Rows at positions below `sinks` or from `recent` on, an int or LongTensor `[B, 1, 1]`, are not chosen. NaN
        counts as -inf. scores: float32, broadcastable to positions `[B, Hkv, S]` int32, of which none is -1.
        """
        kept = positions >= recent
        if sinks:
            kept |= positions < sinks
        ranks = ranked(scores.expand_as(positions), positions).masked_fill_(kept, _ALWAYS_KEPT)
        return ranks.argmin(dim=-1, keepdim=True)

    def move_rows(self, columns: Columns, slots: Tensor, newest: int) -> None:
        """In every column, the row in slot `newest` takes the place of the one that slots `[B, Hkv, 1]` int64 name."""
        batch, heads, capacity = columns[0].shape[:3]
        first = torch.arange(0, batch * heads * capacity, capacity, device=slots.device)
        target = slots.expand(batch, heads, 1).reshape(-1) + first
        for column in columns:
            rows = column.view(-1, *column.shape[3:])
            moved = column[:, :, newest].flatten(0, 1)
            # Of a single head or slot this is the very memory that is written to, which torch refuses.
            rows.index_copy_(0, target, moved.clone() if 1 in (len(moved), capacity) else moved)

    def append_row(self, columns: Columns, slot: int, keys: Tensor, values: Tensor, positions: int) -> None:
        """Fill a slot of every head: keys `[B, Hkv, 1, D]`, values `[B, Hkv, 1, Dv]`, their position, then zeros."""
        new = slice(slot, slot + 1)
        columns[0][:, :, new] = keys
        columns[1][:, :, new] = values
        columns[2][:, :, new] = positions
        for column in columns[3:]:
            column[:, :, new] = 0

    def encode(self, codec: Codec, keys: Tensor, values: Tensor, slots: Tensor) -> PackedRows:
        """Rows packed by a codec: of keys `[B, Hkv, S, D]` and values `[B, Hkv, S, Dv]` those in the slots.

        slots: LongTensor `[B, Hkv, R]`, in the order of their positions; -1 for rows that are nothing.
        """
        empty, index = slots < 0, slots.clamp(min=0)
        return PackedRows.encode(
            codec, take_rows(keys, index), take_rows(values, index), empty if bool(empty.any()) else None
        )


def ranked(scores: Tensor, positions: Tensor) -> Tensor:
    """An int64 for every row that orders rows by score, ties by recency, exactly.

    The bits of a float32 read as an integer order like the float (negative ones after flipping), so score and position
    pack into one integer. NaN ranks below every number. scores, positions: `[B, Hkv, rows]`, positions int32.
    """
    scores = torch.nan_to_num(scores.float(), nan=-math.inf, posinf=math.inf, neginf=-math.inf).add_(0.0)  # no -0.0
    bits = scores.view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return torch.add(positions, bits.to(torch.int64), alpha=1 << 32)


TORCH = Kernels()
