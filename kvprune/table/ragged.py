"""`RaggedTable`: the cache of one attention layer whose heads hold different numbers of rows, without padding.

Every sequence and KV head has a `TokenTable` of its own, so whatever a table can do to its rows, this one does head by
head: packing included. As long as nothing is packed, these tables are views of tensors in which the heads lie one
behind another (`Flat`), and what is done at every generated token is done to all heads at once, there.

Policies see it like any table whose slots may be empty: `[B, Hkv, length]` with as many slots as the longest head has
rows, and -1 as the position of those that a shorter one does not have. Those come first, so that the newest rows are
the last slots of every head; of packed rows and those in full precision likewise, each by themselves. What `positions`
and `table[column]` return is a copy, made when it is asked for; what is written to a column comes back into the rows
before the table is changed, and at the end of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from kvprune.state import Saved, State
from kvprune.table.basis import Basis
from kvprune.table.flat import Flat
from kvprune.table.quantize import Codec
from kvprune.table.ragged_contents import RaggedContents
from kvprune.table.rows import EMPTY, picked, true_rows
from kvprune.table.storage import is_of_all_slots
from kvprune.table.token_table import TokenTable


class RaggedTable(RaggedContents):
    """The table of a batch, of which every head has a table of one sequence and head: `heads`, sequence by sequence."""

    def __init__(self, heads: list[TokenTable], kv_heads: int, given: dict[str, tuple[int, ...]]) -> None:
        self.heads = heads
        """Of sequence `b` and KV head `h` the one of number `b * Hkv + h`; not to be changed from outside."""
        self.one_policy = False
        self.dense = False
        self._kernels = heads[0]._kernels
        self._kv_heads = kv_heads
        self._given = given
        self._flat: Flat | None = None
        self._shown: dict[str, Tensor] = {}  # copies of columns that policies have been shown
        self.native: Any = None  # what kernels make of the heads, who see for themselves whether it still holds

    @classmethod
    def of(cls, table: TokenTable, slots: Tensor, room: int) -> RaggedTable:
        """What a table is when just these slots stay, LongTensor `[B, Hkv, rows]`, -1 for none: see `compact`."""
        number = [(row, head) for row in range(table.batch_size) for head in range(table.kv_heads)]
        ragged = cls([_alone(table, row, head) for row, head in number], table.kv_heads, table._given)
        ragged._keep([own[own >= 0] for own in slots.flatten(0, 1)], room)
        return ragged

    # -- what is shown to policies -----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring what was written to columns back into the rows. Views are not valid any more."""
        shown, self._shown = self._shown, {}
        for name, column in shown.items():
            if name == "positions":
                continue
            if self._flat is not None:
                self._flat.collect(name, column.flatten(0, 1), self.kernels)
                continue
            loose = not is_of_all_slots(name)
            for head, whole in zip(self.heads, column.flatten(0, 1), strict=True):
                rows, split = head._storage.rows(name)[0, 0], 0 if loose else head.packed_length
                packed = 0 if loose else self.packed_length
                rows[:split] = whole[packed - split : packed]
                rows[split:] = whole[len(whole) - (len(rows) - split) :]

    def _own_slots(self, slots: Tensor) -> list[Tensor]:
        """Of slots `[B, Hkv, k]`, -1 for none, those that a head has rows for, LongTensors `[k']` in its counting."""
        packed, length = self.packed_length, self.length
        found = []
        for head, own in zip(self.heads, slots.flatten(0, 1), strict=True):
            own = own[own >= 0]
            moved = torch.where(
                own < packed, own - (packed - head.packed_length), own - (length - head.length)
            )  # where nothing is packed, own >= packed
            found.append(moved[torch.where(own < packed, moved >= 0, moved >= head.packed_length)])
        return found

    # -- rows come: these change the table -------------------------------------------------------------------------

    def append(
        self, keys: Tensor, values: Tensor, positions: Tensor | int, *, dense: bool = True, room: int = 1
    ) -> None:
        self.settle()
        added, shape = keys.shape[2], (self.batch_size, self.kv_heads, keys.shape[2])
        if self._flat is not None and self._spare < added:
            self._lay_out([head.length + max(added, room) for head in self.heads])
        if self._flat is None and isinstance(positions, int):
            parts = (each.reshape(-1, 1, 1, *each.shape[2:]) for each in (keys, values))
            for head, key, value in zip(self.heads, *parts, strict=True):
                head.append(key, value, positions, room=room)
            return
        places = torch.as_tensor(positions, dtype=torch.int32, device=keys.device).expand(shape)
        if added == 1 and dense and self._flat is not None:
            self.kernels.append_rows(self._flat.columns, keys, values, places[:, :, 0])
            self._count(1)
            return
        whole = [dense] * shape[0] if dense else (places >= 0).all(dim=2).all(dim=1).tolist()
        for number, head in enumerate(self.heads):
            row, own = number // self.kv_heads, number % self.kv_heads
            part = (slice(row, row + 1), slice(own, own + 1))
            head.append(keys[part], values[part], places[part], dense=whole[row], room=room)
        self._heads_changed()

    def followed_by(self, keys: Tensor, values: Tensor, positions: Tensor, *, dense: bool) -> TokenTable:
        other = self.fork()
        other.append(keys, values, positions, dense=dense)
        return other

    def with_keys(self, keys: Tensor) -> TokenTable:
        other = copy.copy(self)
        own = zip(self.heads, keys.flatten(0, 1), strict=True)
        other.heads = [head.with_keys(whole[len(whole) - head.length :][None, None]) for head, whole in own]
        other._flat, other._shown = None, {}
        return other

    def with_positions(self, positions: Tensor) -> TokenTable:
        other = copy.copy(self)
        own = zip(self.heads, positions.flatten(0, 1), strict=True)
        other.heads = [head.with_positions(whole[len(whole) - head.length :][None, None]) for head, whole in own]
        other._flat, other._shown = None, {}
        return other

    def _count(self, added: int) -> None:
        """Note that every head has so many rows more in its tensors."""
        for head in self.heads:
            head._storage.length += added
            head._most_rows += added

    def _heads_changed(self) -> None:
        """Rows of single heads have come or gone."""
        if self._flat is not None:
            self._flat.lengths.copy_(torch.tensor([head.length for head in self.heads]))

    def _lay_out(self, capacities: list[int], kept: list[Tensor] | None = None) -> None:
        """Put the heads one behind another anew, with room for so many rows each. kept: their slots that stay."""
        sources = [{name: head._storage.rows(name) for name in head._storage.tensors} for head in self.heads]
        self._flat = Flat.of(sources, kept or [None] * len(self.heads), capacities)
        lengths = [head.length for head in self.heads] if kept is None else [len(rows) for rows in kept]
        for head, storage in zip(self.heads, self._flat.storages(lengths), strict=True):
            head._storage, head._most_rows = storage, storage.length

    # -- rows go: these change the table ---------------------------------------------------------------------------

    def compact(self, slots: Tensor, room: int = 0) -> None:
        self.settle()
        self._keep(self._own_slots(slots), room)

    def _keep(self, kept: list[Tensor], room: int) -> None:
        """Keep these slots of the heads, in this order."""
        if any(head.packed for head in self.heads):
            for head, rows in zip(self.heads, kept, strict=True):
                head.compact(rows[None, None], room)
            self._leave_flat()
            return
        for head, rows in zip(self.heads, kept, strict=True):
            head.dense = head.dense or not bool((head.positions[0, 0, rows] < 0).any())
        self._lay_out([len(rows) + room for rows in kept], kept)

    def _leave_flat(self) -> None:
        """Rows of some head are elsewhere now: those of all heads are in storage of their own from here on."""
        if self._flat is None:
            return
        shared = {tensor.untyped_storage().data_ptr() for tensor in self._flat.tensors.values()}
        for head in self.heads:
            if head._storage.tensors["keys"].untyped_storage().data_ptr() in shared:
                head._storage = head._storage.clone()
        self._flat = None

    def drop_empty(self) -> None:
        """Empty slots come behind other rows here, and stay until rows are evicted."""

    def move(self, positions: Tensor) -> None:
        self.settle()
        kept = []
        for number, head in enumerate(self.heads):
            own = head.positions[0, 0]
            moved = positions[number // self.kv_heads][own.clamp(min=0).long()].to(own.dtype)
            own.copy_(moved.masked_fill_(own < 0, EMPTY))
            kept.append((own >= 0).nonzero().squeeze(1))
        if any(len(rows) < head.length for rows, head in zip(kept, self.heads, strict=True)):
            self._keep(kept, self._spare)

    def evict(self, slots: Tensor, *, exact: bool = False) -> None:
        self.settle()
        if exact and slots.shape[2] == 1 and self._flat is not None:
            self.kernels.drop_rows(self._flat.columns, slots, self.length)
            self._count(-1)
            return
        for head, own in zip(self.heads, self._own_slots(slots), strict=True):
            if head.packed:  # an empty slot stays one there, and is no row less
                own = own[head.positions[0, 0, own] >= 0]
            if len(own):
                head.evict(own[None, None])
        self._heads_changed()

    def drop_newest(self, count: int) -> None:
        self.settle()
        for head in self.heads:
            head.drop_newest(count)
        self._heads_changed()

    @contextmanager
    def without_newest(self, count: int) -> Iterator[None]:
        self.settle()
        with ExitStack() as stack:
            for head in self.heads:
                stack.enter_context(head.without_newest(count))
            self._heads_changed()
            yield
            self.settle()
        self._heads_changed()

    # -- rows lose precision: this changes the table ---------------------------------------------------------------

    def quantize(self, parts: Iterable[tuple[Codec, Tensor]], kept: Tensor | None = None) -> None:
        self.settle()
        of_codecs = [(codec, self._own_slots(slots)) for codec, slots in parts]
        stay = None if kept is None else self._own_slots(kept)
        for number, head in enumerate(self.heads):
            own = [(codec, slots[number][None, None]) for codec, slots in of_codecs]
            head.quantize(own, None if stay is None else stay[number][None, None])
        if kept is not None or any(head.packed for head in self.heads):
            for head in self.heads:  # one that has packed nothing now still has its padding
                if not head.dense:
                    head.compact(true_rows(head.positions >= 0))
            self._leave_flat()

    def turn(self, basis: Basis, sequences: Tensor | None = None) -> None:
        for number, head in enumerate(self.heads):
            row, own = divmod(number, self.kv_heads)
            if sequences is None or bool(sequences[row]):
                head.turn(basis.of_head(row, own))

    # -- in which memory it is -------------------------------------------------------------------------------------

    def shrink(self, room: int) -> None:
        self.settle()
        spare = [head.capacity - head.length for head in self.heads]
        if self._flat is not None and max(spare) > room:
            self._lay_out([head.length + min(each, room) for head, each in zip(self.heads, spare, strict=True)])
        elif self._flat is None:
            for head in self.heads:
                head.shrink(room)

    def own(self) -> None:
        """It has storage of its own from the beginning."""

    def leave_inference_mode(self) -> None:
        self.settle()
        if self._flat is not None:
            self._lay_out([head.capacity for head in self.heads])
            for head in self.heads:
                head.basis = head.basis and head.basis.clone()
        else:
            for head in self.heads:
                head.leave_inference_mode()

    # -- the batch changes -----------------------------------------------------------------------------------------

    def select_batch(self, rows: Tensor) -> None:
        self.settle()
        self._given = {scope: picked(given, rows) for scope, given in self._given.items()}
        chosen = [row * self.kv_heads + head for row in rows.tolist() for head in range(self.kv_heads)]
        self._take_over([self.heads[number] for number in chosen])

    def fork(self) -> RaggedTable:
        self.settle()
        other = copy.copy(self)
        other._shown = {}
        other._take_over(self.heads)
        return other

    def _take_over(self, heads: list[TokenTable]) -> None:
        """Go on with copies of these heads, each of which may come several times."""
        if self._flat is None:
            self.heads = [head.fork() for head in heads]
            return
        self.heads = [copy.copy(head) for head in heads]
        for head in self.heads:
            head.packed = []
            head.basis = head.basis and head.basis.clone()
        self._lay_out([head.capacity for head in self.heads])

    # -- saved and restored ----------------------------------------------------------------------------------------

    def state(self) -> State:
        self.settle()
        state = State({"kv_heads": self.kv_heads, "given": dict(self._given)})
        state.add_all("heads", (head.state() for head in self.heads))
        return state

    @classmethod
    def restored(cls, saved: Saved, batch_size: int, read: Callable[[Saved], TokenTable]) -> RaggedTable:
        """The table of a `state`. read: makes a table of one sequence and head. Raises CacheError."""
        kv_heads = saved.count("kv_heads", least=1)
        heads = [read(part) for part in saved.parts("heads", length=batch_size * kv_heads)]
        if len({head.dims for head in heads}) > 1:
            raise saved.refused("has heads of different sizes")
        given = saved.part("given")
        shares = {scope: given.counts(scope, length=batch_size) for scope in given.facts} if given else {}
        table = cls(heads, kv_heads, shares)
        if not any(head.packed for head in heads):
            table._lay_out([head.capacity for head in heads])
        return table


def keep_rows(table: TokenTable, slots: Tensor, room: int, *, apart: bool = False) -> TokenTable:
    """The table with just these slots, LongTensor `[B, Hkv, rows]`, -1 for none: the same one, or one of other heads.

    Where heads of a sequence keep different numbers of rows, it is a `RaggedTable` from then on. Changes the table.
    room: spare slots behind the rows of every head. apart: whether it is that too where sequences differ.
    """
    if not isinstance(table, RaggedTable):
        counts = (slots >= 0).sum(-1)
        if not bool((counts != (counts[:1, :1] if apart else counts[:, :1])).any()):
            table.compact(slots, room)
            return table
        return RaggedTable.of(table, slots, room)
    table.compact(slots, room)
    return table


def pack_rows(
    table: TokenTable, parts: Sequence[tuple[Codec, Tensor]], kept: Tensor | None = None, *, apart: bool
) -> TokenTable:
    """The table with rows packed, see `TokenTable.quantize`: the same one, or one of other heads. Changes the table.

    Where heads of a sequence keep different numbers of rows, it is a `RaggedTable` from then on. apart: whether it is
    that too where heads, or sequences, would take padding for each other. To find that out waits for the device.
    """
    if not isinstance(table, RaggedTable) and _part(table, parts, kept, apart):
        held, packed = table.positions >= 0, table.packed_length
        every = torch.arange(table.length, device=held.device).expand(held.shape)
        table = RaggedTable.of(table, every.masked_fill(~held, EMPTY), 0)
        # Empty slots have gone: packed rows end where the others begin in the longest head, and those at the end.
        ends = _last(held[:, :, :packed], table.packed_length), _last(held[:, :, packed:], table.length)
        moved = torch.cat(ends, dim=2)

        def of_heads(slots: Tensor) -> Tensor:
            return moved.gather(2, slots.clamp(min=0)).masked_fill(slots < 0, EMPTY)

        parts = [(codec, of_heads(slots)) for codec, slots in parts]
        kept = None if kept is None else of_heads(kept)
    table.quantize(parts, kept)
    return table


def _last(held: Tensor, stop: int) -> Tensor:
    """The slots of rows, bool `[B, Hkv, rows]`, where those that are held come last before a slot, in their order."""
    return stop - held.sum(-1, keepdim=True) + held.cumsum(-1) - 1


def _part(table: TokenTable, parts: Sequence[tuple[Codec, Tensor]], kept: Tensor | None, apart: bool) -> bool:
    """Whether heads would take padding for each other: rows of every codec, if they are to be apart, or rows in all."""
    if not apart:
        return kept is not None and bool(((kept >= 0).sum(-1) != (kept >= 0)[:, :1].sum(-1)).any())
    left = table.positions >= 0 if kept is None else table.named(kept)
    counts: dict[Codec, Tensor] = {}
    for codec, slots in parts:
        counts[codec] = counts.get(codec, 0) + (slots >= 0).sum(-1)
        left = left & ~table.named(slots)
    first = 0
    for tier in table.packed:
        counts[tier.codec] = counts.get(tier.codec, 0) + left[:, :, first : first + len(tier)].sum(-1)
        first += len(tier)
    rows = torch.stack([*counts.values(), left[:, :, first:].sum(-1)])  # [codecs + 1, B, Hkv]
    return bool((rows != rows[:, :1, :1]).any())


def _alone(table: TokenTable, row: int, head: int) -> TokenTable:
    """A table of one sequence and head of a table, over the same memory."""
    part = (slice(row, row + 1), slice(head, head + 1))
    alone = copy.copy(table)
    alone._given = {}
    alone._storage = table._storage.sharing()
    tensors = {name: tensor[part] for name, tensor in table._storage.tensors.items()}
    alone._storage.fill(tensors, table.length, table.packed_length)
    alone.packed = [tier.of_head(row, head) for tier in table.packed]
    if table.basis is not None:
        alone.turn(table.basis.of_head(row, head))
    return alone
