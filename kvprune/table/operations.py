"""`RowOperations`: what is done to the rows of a table and has several implementations, here in PyTorch.

`kvprune.kernels` has others, which override what they do faster. Shapes: see `kvprune.table`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.table.basis import Basis
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec
from kvprune.table.rotated_codes import Quantizer
from kvprune.table.rotated_rows import RotatedCodec, RotatedRows
from kvprune.table.rows import ranked, take_rows
from kvprune.table.split_rows import SplitCodec, SplitRows, whole

_ALWAYS_KEPT = torch.iinfo(torch.int64).max
_RECENT = _ALWAYS_KEPT - (1 << 32)  # and a position: above all that is ranked by a score


class Columns(tuple[Tensor, ...]):
    """The tensors of a table, `[B, Hkv, slots, ...]` contiguous: keys, values, positions, and others.

    before: slots that come before the first one of each tensor, where rows are packed; nothing where none are.
    native: what kernels have worked out of them, to be used again: it is true as long as the tensors live, and they are
    held here.
    """

    before: tuple[int, ...] = ()
    native: Any = None


class FlatColumns(Columns):
    """The tensors of heads one behind another, `[slots, ...]`; see `Flat`.

    starts: LongTensor `[heads + 1]`. lengths: LongTensor `[heads]`, which those who add or drop rows keep right.
    """

    starts: Tensor
    lengths: Tensor

    def __new__(cls, tensors: Iterable[Tensor], starts: Tensor, lengths: Tensor) -> FlatColumns:
        columns = super().__new__(cls, tensors)
        columns.starts, columns.lengths = starts, lengths
        return columns


class RowOperations:
    """PyTorch's, on every device. Others override what they do better, and pass on what they cannot do."""

    name = "torch"

    def worst_rows(
        self, scores: Tensor, positions: Tensor, sinks: int, recent: int | Tensor, stay: Tensor | None = None
    ) -> Tensor:
        """Slot of the row of least score of every head, LongTensor `[B, Hkv, 1]`; of equal ones the oldest.

        Rows at positions below `sinks` or from `recent` on, an int or LongTensor `[B, 1, 1]`, are not chosen, but for
        the oldest of the recent ones in a head that has no others. NaN counts as -inf.

        scores: float32, broadcastable to positions `[B, Hkv, S]` int32, -1 where there is no row. stay: a column of the
        same table, `[B, Hkv, S]` int32: rows where it is above 0 count as inf, whatever they score.
        """
        if stay is not None:
            scores = scores.masked_fill(stay > 0, math.inf)
        ranks = ranked(scores.expand_as(positions), positions)
        ranks = torch.where(positions >= recent, _RECENT + positions.long(), ranks)
        return ranks.masked_fill_(positions < sinks, _ALWAYS_KEPT).argmin(dim=-1, keepdim=True)

    def move_rows(self, columns: Columns, slots: Tensor, newest: int) -> None:
        """In every column, the row in slot `newest` takes the place of the one that slots `[B, Hkv, 1]` int64 name.

        Writes to the columns in place.
        """
        batch, heads, capacity = columns[0].shape[:3]
        first = torch.arange(0, batch * heads * capacity, capacity, device=slots.device)
        target = slots.expand(batch, heads, 1).reshape(-1) + first
        for column in columns:
            rows = column.view(-1, *column.shape[3:])
            moved = column[:, :, newest].flatten(0, 1)
            # Of a single head or slot this is the very memory that is written to, which torch refuses.
            rows.index_copy_(0, target, moved.clone() if 1 in (len(moved), capacity) else moved)

    def append_row(self, columns: Columns, slot: int, keys: Tensor, values: Tensor, positions: int) -> None:
        """Fill a slot of every head: keys `[B, Hkv, 1, D]`, values `[B, Hkv, 1, Dv]`, their position, then zeros.

        Writes to the columns in place.
        """
        rows: tuple[Tensor | int, ...] = (keys, values, positions, *(0,) * (len(columns) - 3))
        for column, before, row in zip(columns, columns.before or (0,) * len(columns), rows, strict=True):
            column[:, :, slot - before : slot - before + 1] = row

    # -- of heads one behind another -------------------------------------------------------------------------------

    def append_rows(self, columns: FlatColumns, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """A row more for every head: keys `[B, Hkv, 1, D]`, values `[B, Hkv, 1, Dv]`, int32 positions, then zeros.

        Writes to the columns, and to their lengths, in place. positions: `[B, Hkv]`. There must be room.
        """
        slots = columns.starts[:-1] + columns.lengths
        columns[0].index_copy_(0, slots, keys.flatten(0, 2))
        columns[1].index_copy_(0, slots, values.flatten(0, 2))
        columns[2].index_copy_(0, slots, positions.flatten())
        for column in columns[3:]:
            column.index_fill_(0, slots, 0)
        columns.lengths += 1

    def drop_rows(self, columns: FlatColumns, slots: Tensor, width: int) -> None:
        """One row less for every head: the last takes the place of the one that slots `[B, Hkv, 1]` int64 name.

        Writes to the columns, and to their lengths, in place. Slots are counted as `spread` lays them out.
        """
        first, lengths = columns.starts[:-1], columns.lengths
        target = first + lengths - width + slots.flatten()
        last = first + lengths - 1
        for column in columns:
            column.index_copy_(0, target, column.index_select(0, last))
        lengths -= 1

    def spread(self, column: Tensor, starts: Tensor, lengths: Tensor, width: int, filling: float) -> Tensor:
        """Rows of heads as `[heads, width, ...]`, those of each head at its end, with the filling before them."""
        slots = _slots(starts, lengths, width)
        found = column.index_select(0, slots.clamp(min=0).flatten()).unflatten(0, slots.shape)
        before = (slots < starts[:-1, None]).view(*slots.shape, *(1,) * (column.ndim - 1))
        return found.masked_fill_(before, filling)

    def collect(self, column: Tensor, padded: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Write back `[heads, width]` that `spread` gave, in place."""
        width = padded.shape[1]
        every = torch.arange(len(column), device=column.device)
        head = torch.searchsorted(starts, every, right=True) - 1
        place = every - starts[head] + width - lengths[head]
        column.copy_(padded.reshape(-1).index_select(0, head * width + place.clamp(max=width - 1)))

    def encode(
        self, codec: Codec, keys: Tensor, values: Tensor, slots: Tensor, basis: Basis | None = None
    ) -> PackedRows:
        """Rows packed by a codec: of keys `[B, Hkv, S, D]` and values `[B, Hkv, S, Dv]` those in the slots.

        basis: for a codec that rotates; None for a fixed one. slots: LongTensor `[B, Hkv, R]`, in the order of their
            positions; -1 for rows that are nothing.
        """
        empty, index = slots < 0, slots.clamp(min=0)
        if isinstance(codec, RotatedCodec):
            basis = basis or Basis.fixed(keys.shape[3], values.shape[3])
            return RotatedRows.encode_in(codec, basis, take_rows(keys, index), take_rows(values, index))
        if isinstance(codec, SplitCodec):
            return SplitRows.of(codec, self.encode(whole(codec), keys, values, slots, basis))
        return PackedRows.encode(
            codec, take_rows(keys, index), take_rows(values, index), empty if bool(empty.any()) else None
        )

    def encode_anew(self, codec: Codec, tier: PackedRows, rows: Tensor) -> PackedRows:
        """Packed rows by a codec of fewer bits: of a tier those of an index, LongTensor `[B, Hkv, R]`.

        Raises PolicyError where rows share parameters with others, by either codec.
        """
        if not isinstance(tier, RotatedRows) or not isinstance(codec, RotatedCodec):
            raise PolicyError(
                f"rows packed by {tier.codec} cannot be packed anew by {codec}: both must be RotatedCodec."
            )
        return tier.encoded_anew(codec, rows, self.quantizer(tier.key_dim, tier.value_dim))

    def quantizer(self, *dims: int) -> Quantizer | None:
        """What is faster than `rotated_codes.nearest` for rows of so many numbers; None for nothing."""
        return None


def _slots(starts: Tensor, lengths: Tensor, width: int) -> Tensor:
    """`[heads, width]`: slots of all heads as `spread` lays them out; before the first of a head, others."""
    return (starts[:-1] + lengths - width)[:, None] + torch.arange(width, device=starts.device)


TORCH_ROWS = RowOperations()
