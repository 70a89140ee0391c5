"""`TokenTable`: the cache of one attention layer.

A row is a cached token of one KV head. Its columns are the key, the value, the logical position, and whatever columns
the policy declared. Every operation here moves all columns alike, so nothing falls out of step with the keys.

Slots `0 .. length - 1` are in use, in no particular order: whatever needs order goes by `positions`. A slot with
position -1 is empty (a sequence with fewer tokens than another of its batch). Slots from `length` to `capacity` are
spare room that the next tokens take.

The first `packed_length` slots may be packed: their keys and values are codes (see `quantize.py`), kept together by
codec. The others are in full precision, and it is there that new rows come in.

In which memory the rows lie is up to `Storage`. The tensors that `keys`, `values`, `positions` and `table[column]`
return are views: they are valid until a method is called that says it changes the table, and then they may show
anything.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.state import Saved, State
from kvprune.table import packing
from kvprune.table.basis import Basis
from kvprune.table.contents import Contents
from kvprune.table.operations import TORCH_ROWS, RowOperations
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec
from kvprune.table.rows import EMPTY, picked, true_rows, write
from kvprune.table.storage import Storage, is_of_all_slots
from kvprune.table.view import TableView

# Rows that are evicted from a packed table leave holes; so many of them, and the rows close up.
MOST_HOLES = 8
# Spare slots that a saved table may have beyond the number of its rows.
MOST_SPARE = 32


class TokenTable(Contents):
    """Keys `[B, Hkv, rows, D]`, values `[B, Hkv, rows, Dv]`, positions `[B, Hkv, length]` int32, and columns.

    `table["score"]` is a policy's column, `[B, Hkv, length]`; it may be updated in place. Columns of the rows in full
    precision alone are `[B, Hkv, length - packed_length]`, as are `keys` and `values`. `positions` are counted in
    tokens of the sequence, padding left out.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        columns: Mapping[str, torch.dtype],
        buffer_columns: Mapping[str, torch.dtype] | None = None,
        *,
        dense: bool = True,
        kernels: RowOperations = TORCH_ROWS,
    ) -> None:
        """Take the rows of the first step as they are; `compact` or `own` gives them storage of their own.

        keys: `[B, Hkv, L, D]`. values: `[B, Hkv, L, Dv]`. positions: `[B, Hkv, L]`, or broadcastable to it.
        buffer_columns: those that rows lose when they are packed. dense: that no position is -1. kernels: what moves
        rows; attention to the table uses them as well, if they can attend.
        """
        self._kernels = kernels
        self.dense = dense
        """Whether no slot in use is empty."""
        self.one_policy = True
        """Whether a single policy decides which rows stay, so that its own regularities hold."""
        self.packed: list[PackedRows] = []
        """The rows in the first slots, whose keys and values are codes, in the order of their slots."""
        shape = keys.shape[:3]
        tensors = {"keys": keys, "values": values, "positions": positions.to(torch.int32).expand(shape).contiguous()}
        for prefix, named in (("column", columns), ("buffer", buffer_columns or {})):
            for name, dtype in named.items():
                tensors[f"{prefix}.{name}"] = torch.zeros(shape, dtype=dtype, device=keys.device)
        self._storage = Storage(tensors)
        self.basis: Basis | None = None
        """In which coordinates keys and values are packed, where a codec rotates them; see `turn`."""
        self._most_rows = self.length
        self._closed_length = 0  # of a packed table, when its rows last closed up
        self._given: dict[str, tuple[int, ...]] = {}  # by the prefix of a link of a chain

    # -- columns ---------------------------------------------------------------------------------------------------

    def __getitem__(self, column: str) -> Tensor:
        """A policy's column, `[B, Hkv, length]`, or `[B, Hkv, length - packed_length]`: a view, to be written to."""
        return self._storage.rows(self.column_name(column))

    def column_name(self, column: str) -> str:
        """The name of the tensor that holds a column. Raises PolicyError for one that is not there."""
        tensors = self._storage.tensors
        for name in (f"column.{column}", f"buffer.{column}"):
            if name in tensors:
                return name
        known = [each.partition(".")[2] for each in tensors if "." in each]
        raise PolicyError(
            f"the table has no column {column!r}: declare it in columns(). It has: {', '.join(known) or 'none'}."
        )

    def __setitem__(self, column: str, content: Tensor) -> None:
        """Write a column, in place. Raises PolicyError for what is not one number a row."""
        write(column, self[column], content)

    def scoped(self, scope: str) -> TokenTable:
        """The table with its columns under names that lack this prefix: what one link of a chain works on."""
        return cast(TokenTable, TableView(self, scope)) if scope else self

    @property
    def given(self) -> tuple[int, ...] | None:
        """Rows, or bytes, that each sequence may hold in all heads, as a share of a budget gave them; None for none."""
        return self.given_to("")

    @given.setter
    def given(self, rows: tuple[int, ...]) -> None:
        self.give("", rows)

    def given_to(self, scope: str) -> tuple[int, ...] | None:
        """The same of one link of a chain, whose columns have names with this prefix."""
        return self._given.get(scope)

    def give(self, scope: str, rows: tuple[int, ...]) -> None:
        """Remember it for that link."""
        self._given = {**self._given, scope: rows}

    # -- rows come: these change the table -------------------------------------------------------------------------

    def append(
        self, keys: Tensor, values: Tensor, positions: Tensor | int, *, dense: bool = True, room: int = 1
    ) -> None:
        """Add `L` rows behind the others; policy columns start at zero. Changes the table.

        Where they do not fit, the table grows by L slots, or by `room` if that is more. dense: that no position is -1.
        """
        self.dense &= dense
        self._storage.append(keys, values, positions, room, self.kernels)
        self._most_rows += keys.shape[2]

    def followed_by(self, keys: Tensor, values: Tensor, positions: Tensor, *, dense: bool) -> TokenTable:
        """A table to attend to, with these rows behind the others; this one stays as it is."""
        other = copy.copy(self)
        other._storage = self._storage.sharing()
        other._storage.resize(self.length + keys.shape[2])
        other.append(keys, values, positions, dense=dense)
        return other

    def with_keys(self, keys: Tensor) -> TokenTable:
        """The same rows under other keys `[B, Hkv, length, D]`, to attend to and no more; nothing may be packed."""
        other = copy.copy(self)
        other._storage = self._storage.sharing()
        other._storage.tensors["keys"] = keys
        return other

    def with_positions(self, positions: Tensor) -> TokenTable:
        """The same rows at other positions `[B, Hkv, length]`, -1 for those nobody sees, to attend to and no more."""
        other = copy.copy(self)
        other._storage = self._storage.sharing()
        other._storage.tensors["positions"] = positions
        other.dense = False
        return other

    # -- rows go: these change the table ---------------------------------------------------------------------------

    def compact(self, slots: Tensor, room: int = 0) -> None:
        """Keep only these slots, in this order; everything else is freed. Changes the table.

        slots: LongTensor `[B, Hkv, rows]`; -1 makes an empty row. Packed rows keep the order they have.
        room: spare slots behind them, where nothing is packed.
        """
        if self.packed:
            self._close_up(self.named(slots))
            return
        self._storage.take(slots, room)
        self._most_rows = self.length
        self.dense = not bool((self.positions < 0).any())

    def drop_empty(self) -> None:
        """Free the first slots, as far as they are padding in every sequence. Changes the table.

        Those behind a token stay, until rows are evicted: `drop_newest` goes by slots.
        """
        if self.dense or self.packed:
            return
        taken = (self.positions >= 0).any(dim=1).any(dim=0)
        first = int((taken.cumsum(0) == 0).sum())
        if first:
            self.compact(self._storage.slots(first, self.length))

    def close_up(self, room: int, most: int) -> bool:
        """Free empty slots, and leave `room` spare ones, once every head has many, or there are more than `most` slots.

        Changes the table. True if it has: rows are then in other slots than those they came into.
        """
        held = self.positions >= 0
        if self.dense or not (self.length > most or self.length - int(held.sum(-1).max()) >= MOST_HOLES):
            return False
        self.compact(true_rows(held), room)
        return True

    def move(self, positions: Tensor) -> None:
        """Give rows other positions; those that get -1 are dropped. Changes the table.

        positions: LongTensor or int32 `[B, tokens]`, by the position that a row has; none overtakes another.
        """
        held = self.positions
        tokens = positions[:, None].expand(-1, self.kv_heads, -1)
        new = tokens.gather(2, held.clamp(min=0).long()).to(held.dtype).masked_fill(held < 0, EMPTY)
        held.copy_(new)
        kept = new >= 0
        self.dense = bool(kept.all())
        if self.packed:
            self._close_up(kept)
        elif int(kept.sum(-1).max()) < self.length:
            self.compact(true_rows(kept))

    def evict(self, slots: Tensor, *, exact: bool = False) -> None:
        """Drop `k` rows per head in place: the last `k` rows move into their slots. Nothing is allocated or freed.

        In a packed table, whose rows cannot take each other's places, they leave holes, which close up later. Changes
        the table. slots: LongTensor `[B, Hkv, k]`, different slots within a head. exact: that each of them holds a row.
        """
        if not self.packed:
            self._storage.overwrite(slots, self.kernels)
            self._most_rows = self.length
            return
        self.positions.scatter_(2, slots, EMPTY)
        self.dense = False
        self._most_rows -= slots.shape[2]
        if self.length - self._closed_length >= MOST_HOLES and self.length - self._most_rows >= MOST_HOLES:
            self._close_up(self.positions >= 0)

    def drop_newest(self, count: int) -> None:
        """Forget the `count` rows that were appended last; nothing may have been evicted since. Changes the table.

        All rows, if there are not so many: the first ones were padding, and have been freed.
        """
        count = min(count, self.length)
        self._storage.length -= count
        self._most_rows -= count

    @contextmanager
    def without_newest(self, count: int) -> Iterator[None]:
        """The table as it was before the `count` rows that were appended last, which come back afterwards."""
        self._storage.length -= count
        try:
            yield
        finally:
            self._storage.length += count

    # -- rows lose precision: this changes the table ---------------------------------------------------------------

    def quantize(self, parts: Iterable[tuple[Codec, Tensor]], kept: Tensor | None = None) -> None:
        """Pack rows, or pack them anew with fewer bits; what they took more is freed. Other rows stay as they are.

        Changes the table. parts: codecs, each with the slots to pack, LongTensor `[B, Hkv, R]`, in the order of their
        positions; -1 for none, where a head has fewer than another. kept: slots of all rows that stay, where some go.
        """
        left = torch.ones_like(self.positions, dtype=torch.bool) if kept is None else self.named(kept)
        new: list[tuple[Tensor, PackedRows]] = []
        for codec, slots in parts:
            if slots.shape[2]:
                left &= ~self.named(slots)
                new += self.encoded(codec, slots)
        if not new and kept is None:
            return
        packed = self.packed_length
        order = packing.keep(self.packed, left[:, :, :packed] & (self.positions[:, :, :packed] >= 0))
        packing.add_to(self.packed, order, new)
        order.append(true_rows(left[:, :, packed:], packed))
        self._rearrange(order)
        if not self.dense:
            self._close_up(self.positions >= 0)
        self._closed_length = self.length

    def turn(self, basis: Basis, sequences: Tensor | None = None) -> None:
        """Pack rows in a basis from now on: what is packed is in it, or these sequences' are not. Changes the table."""
        self.basis = basis if sequences is None else (self.basis or Basis.fixed(*self._dims())).where(sequences, basis)
        packing.turn(self.packed, self.basis, widen=sequences is not None)

    def _close_up(self, kept: Tensor) -> None:
        """Keep these slots, bool `[B, Hkv, length]`: packed rows move as they are, and memory is freed."""
        kept = kept & (self.positions >= 0)
        packed = self.packed_length
        order = packing.keep(self.packed, kept[:, :, :packed])
        order.append(true_rows(kept[:, :, packed:], packed))
        self._rearrange(order)
        self._closed_length = self.length

    def _rearrange(self, order: list[Tensor]) -> None:
        """Bring the columns into an order: slot by slot, the slot it was in, or -1. `packed` has its order already."""
        self._storage.rearrange(torch.cat(order, dim=2), sum(map(len, self.packed)))
        held = self.positions >= 0
        self.dense = bool(held.all())
        self._most_rows = int(held.sum(-1).max())

    def settle(self) -> None:
        """Bring what was written to columns back into the rows. Here, columns are the rows."""

    # -- in which memory it is -------------------------------------------------------------------------------------

    def shrink(self, room: int) -> None:
        """Free spare slots beyond `room`. Views are not valid any more."""
        if self.capacity > self.length + room:
            self._storage.resize(self.length + room)

    def own(self) -> None:
        """Give every column storage of its own, so that the activations it came from are freed, and not written to."""
        self._storage.own()

    def leave_inference_mode(self) -> None:
        """Copy what was made in inference mode, outside of which it cannot be written to."""
        self._storage.leave_inference_mode()
        for tier in self.packed:
            tier.tensors |= {name: tensor.clone() for name, tensor in tier.tensors.items() if tensor.is_inference()}
        if self.basis is not None:
            self.turn(self.basis.clone())

    # -- the batch changes -----------------------------------------------------------------------------------------

    def select_batch(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; one may come several times (beams). Changes the table.

        rows: LongTensor `[B']`.
        """
        self._given = {scope: picked(given, rows) for scope, given in self._given.items()}
        rows = rows.to(self._storage.device)
        self._storage.select_batch(rows)
        self.packed = [tier.select_batch(rows) for tier in self.packed]
        if self.basis is not None:
            self.turn(self.basis.select_batch(rows))

    def fork(self) -> TokenTable:
        """An independent copy."""
        other = copy.copy(self)
        other._storage = self._storage.clone()
        other.packed = [tier.clone() for tier in self.packed]
        if self.basis is not None:
            other.turn(self.basis.clone())
        return other

    # -- saved and restored ----------------------------------------------------------------------------------------

    def state(self) -> State:
        """All rows, in the order of their slots. Of spare slots, whose contents mean nothing, only how many there are.

        A table may have far more of those than rows after a crop; no more come back than rows, and a few.
        """
        state = State(
            {
                "rows": self.length,
                "spare": min(self.capacity - self.length, self.length + MOST_SPARE),
                "dense": self.dense,
                "most_rows": self._most_rows,
                "closed_rows": self._closed_length,
                "given": dict(self._given),
            },
            {name: self._storage.rows(name) for name in self._storage.tensors},
        )
        state.add_all("packed", (tier.state() for tier in self.packed))
        if self.basis is not None:
            state.add("basis", self.basis.state())
        return state

    def restore(self, saved: Saved, codecs: Iterable[Codec], tokens: int) -> None:
        """Take the rows of a `state`, into a table that has none; its own columns are those that must be there.

        Changes the table. codecs: that its policies pack rows with. tokens: more than any position. Raises CacheError.
        """
        length = saved.count("rows")
        spare = saved.count("spare", length + MOST_SPARE)
        heads, known = (self.batch_size, self.kv_heads), list(codecs)
        basis = saved.part("basis") if "basis" in saved.facts else None
        self.basis = None if basis is None else Basis.restored(basis, heads, *self._dims())
        known_basis = self.basis or Basis.fixed(*self._dims())
        self.packed = [
            packing.restored(tier, known, heads, *self._dims(), known_basis) for tier in saved.parts("packed")
        ]
        packed_length = sum(map(len, self.packed))
        if packed_length > length:
            raise saved.refused(f"has {packed_length} packed rows of {length}")
        tensors = {}
        for name, empty in self._storage.tensors.items():
            shape = (*heads, length - (0 if is_of_all_slots(name) else packed_length), *empty.shape[3:])
            within = (EMPTY, tokens - 1) if name == "positions" else None
            tensors[name] = saved.tensor(name, shape, empty.dtype, spare=spare, within=within)
        self._storage.fill(tensors, length, packed_length)
        self.dense = saved.flag("dense")
        if self.dense and bool((self.positions < 0).any()):
            raise saved.refused("has empty rows, and says that it has none")
        self._most_rows = saved.count("most_rows", self.length)
        self._closed_length = saved.count("closed_rows")
        given = saved.part("given")
        self._given = {scope: given.counts(scope, length=heads[0]) for scope in given.facts} if given else {}
