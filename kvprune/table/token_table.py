"""`TokenTable`: the cache of one attention layer.

A row is a cached token of one KV head. Its columns are the key, the value, the logical position, and whatever columns
the policy declared. Every operation here moves all columns alike, so nothing falls out of step with the keys.

Slots `0 .. length - 1` are in use, in no particular order: whatever needs order goes by `positions`. A slot with
position -1 is empty (a sequence with fewer tokens than another of its batch). Slots from `length` to `capacity` are
spare room that the next tokens take.

The first `packed_length` slots may be packed: their keys and values are codes (see `quantize.py`), kept together by
codec. The others are in full precision, and it is there that new rows come in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.errors import CacheError, PolicyError
from kvprune.kernels import TORCH, Columns, Kernels
from kvprune.state import Saved, State
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec
from kvprune.table.rows import take_rows, true_rows

EMPTY = -1
# Rows that are evicted from a packed table leave holes; so many of them, and the rows close up.
MOST_HOLES = 32
# Spare slots that a saved table may have beyond the number of its rows.
MOST_SPARE = 32


def owned(tensor: Tensor) -> Tensor:
    """The tensor in storage of its own and no larger: a view would keep, say, a fused QKV projection alive."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class TokenTable:
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
        kernels: Kernels = TORCH,
    ) -> None:
        """Take the rows of the first step as they are; `compact` or `own` gives them storage of their own.

        keys: `[B, Hkv, L, D]`. values: `[B, Hkv, L, Dv]`. positions: `[B, Hkv, L]`, or broadcastable to it.
        buffer_columns: those that rows lose when they are packed. dense: that no position is -1. kernels: what moves
        rows, and attends to them.
        """
        self._kernels = kernels
        self.dense = dense
        """Whether no slot in use is empty."""
        self.one_policy = True
        """Whether a single policy decides which rows stay, so that its own regularities hold."""
        self.packed: list[PackedRows] = []
        self.packed_length = 0
        """Slots whose keys and values are codes: the first ones."""
        self._borrowed = True
        self._made_columns: Columns | None = None
        shape = keys.shape[:3]
        self.length = keys.shape[2]
        self._most_rows = self.length
        self._closed_length = 0  # of a packed table, when its rows last closed up
        # Of all slots: positions and column.*; of slots in full precision: keys, values and buffer.*
        self._tensors: dict[str, Tensor] = {
            "keys": keys,
            "values": values,
            "positions": positions.to(torch.int32).expand(shape).contiguous(),
        }
        for prefix, named in (("column", columns), ("buffer", buffer_columns or {})):
            for name, dtype in named.items():
                self._tensors[f"{prefix}.{name}"] = torch.zeros(shape, dtype=dtype, device=keys.device)
        self._shape_changed()

    @property
    def _columns(self) -> Columns:
        """All tensors, while each has storage of its own: made anew whenever one of them is."""
        if torch.compiler.is_compiling():  # which must not find a table that has changed since it was traced
            return Columns(self._tensors.values())
        if self._made_columns is None:
            self._made_columns = Columns(self._tensors.values())
        return self._made_columns

    def _shape_changed(self) -> None:
        self._made_columns = None
        row_bytes = {
            name: tensor.itemsize * math.prod(tensor.shape[3:]) * self.batch_size * self.kv_heads
            for name, tensor in self._tensors.items()
        }
        self.token_bytes = sum(row_bytes.values())
        """Bytes of one slot in full precision over all sequences and heads, all columns included."""
        self.kv_token_bytes = row_bytes["keys"] + row_bytes["values"]
        """The part of `token_bytes` that is keys and values."""

    def _first_slot(self, name: str) -> int:
        """The slot that comes first in this tensor."""
        return 0 if name == "positions" or name.startswith("column.") else self.packed_length

    @property
    def kernels(self) -> Kernels:
        """What moves rows, and attends to them: PyTorch's where torch.compile makes kernels of its own of them."""
        return TORCH if torch.compiler.is_compiling() else self._kernels

    # -- what is in it ---------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self._tensors["keys"].shape[0]

    @property
    def kv_heads(self) -> int:
        return self._tensors["keys"].shape[1]

    @property
    def capacity(self) -> int:
        return self.packed_length + self._tensors["keys"].shape[2]

    @property
    def rows(self) -> int:
        """Most rows that a KV head may hold: slots in use, without the holes that evicted rows left."""
        return self._most_rows if self.packed else self.length

    @property
    def keys(self) -> Tensor:
        """Of the rows in full precision, `[B, Hkv, length - packed_length, D]`."""
        return self._tensors["keys"][:, :, : self.length - self.packed_length]

    @property
    def values(self) -> Tensor:
        """Of the rows in full precision, `[B, Hkv, length - packed_length, Dv]`."""
        return self._tensors["values"][:, :, : self.length - self.packed_length]

    @property
    def positions(self) -> Tensor:
        """Logical positions, `[B, Hkv, length]` int32; -1 where a slot is empty."""
        return self._tensors["positions"][:, :, : self.length]

    def all_keys(self) -> Tensor:
        """Of every row, `[B, Hkv, length, D]`: packed ones are decoded, which takes as much memory for as long."""
        if not self.packed:
            return self.keys
        decoded = [tier.decoded()[0].to(self._tensors["keys"].dtype) for tier in self.packed]
        return torch.cat([*decoded, self.keys], dim=2)

    def __getitem__(self, column: str) -> Tensor:
        name = f"column.{column}"
        if name in self._tensors:
            return self._tensors[name][:, :, : self.length]
        name = f"buffer.{column}"
        if name not in self._tensors:
            known = [each.partition(".")[2] for each in self._tensors if "." in each]
            raise PolicyError(
                f"the table has no column {column!r}: declare it in columns(). It has: {', '.join(known) or 'none'}."
            )
        return self._tensors[name][:, :, : self.length - self.packed_length]

    def __setitem__(self, column: str, content: Tensor) -> None:
        self[column].copy_(content)

    def scoped(self, scope: str) -> TokenTable:
        """The table with its columns under names that lack this prefix: what one link of a chain works on."""
        return cast(TokenTable, TableView(self, scope)) if scope else self

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the table holds, at full capacity."""
        held = dict(self._tensors)
        for number, tier in enumerate(self.packed):
            held.update({f"packed.{number}.{name}": tensor for name, tensor in tier.tensors.items()})
        return held

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the table, spare slots included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors().values())

    @property
    def kv_nbytes(self) -> int:
        """The part of `nbytes` that is keys and values, or stands for them: codes and their parameters."""
        own = sum(self._tensors[name].untyped_storage().nbytes() for name in ("keys", "values"))
        return own + sum(tensor.untyped_storage().nbytes() for tier in self.packed for tensor in tier.tensors.values())

    @property
    def code_nbytes(self) -> int:
        """The part of `kv_nbytes` that is no parameter: codes, and what is in full precision."""
        own = sum(self._tensors[name].untyped_storage().nbytes() for name in ("keys", "values"))
        return own + sum(tier.code_nbytes for tier in self.packed)

    def packed_row_bytes(self, codec: Codec) -> int:
        """What `token_bytes` is for a row that this codec has packed."""
        key_dim, value_dim = self._tensors["keys"].shape[3], self._tensors["values"].shape[3]
        of_blocks = -(-codec.block_bytes(key_dim, value_dim) // codec.tokens) if codec.tokens else 0
        columns = sum(
            tensor.itemsize
            for name, tensor in self._tensors.items()
            if name == "positions" or name.startswith("column.")
        )
        return self.batch_size * self.kv_heads * (codec.row_bytes(key_dim, value_dim) + of_blocks + columns)

    def block_bytes(self, codec: Codec) -> int:
        """Parameters that blocks of this codec's rows share, of one block more and of those there are.

        Where rows pay for the blocks they fill, this is for those that evicted rows have left thinly filled.
        """
        tiers = [tier for tier in self.packed if tier.codec == codec]
        paid = sum(len(tier) // codec.tokens for tier in tiers) if codec.tokens else 0
        blocks = 1 + max(0, sum(tier.blocks for tier in tiers) - paid)
        key_dim, value_dim = self._tensors["keys"].shape[3], self._tensors["values"].shape[3]
        return self.batch_size * self.kv_heads * blocks * codec.block_bytes(key_dim, value_dim)

    # -- rows come -------------------------------------------------------------------------------------------------

    def append(
        self, keys: Tensor, values: Tensor, positions: Tensor | int, *, dense: bool = True, room: int = 1
    ) -> None:
        """Add `L` rows behind the others; policy columns start at zero.

        Where they do not fit, the table grows by L slots, or by `room` if that is more. dense: that no position is -1.
        """
        added = keys.shape[2]
        self.dense &= dense
        if self.length + added > self.capacity:
            self._resize(self.length + max(added, room))
        else:
            self.own()
        new = slice(self.length, self.length + added)
        unpacked = slice(new.start - self.packed_length, new.stop - self.packed_length)
        if added == 1 and not self.packed and not isinstance(positions, Tensor):
            self.kernels.append_row(self._columns, self.length, keys, values, positions)
        else:
            self._tensors["keys"][:, :, unpacked] = keys
            self._tensors["values"][:, :, unpacked] = values
            self._tensors["positions"][:, :, new] = positions
            for name, tensor in self._tensors.items():
                if name.startswith("column."):
                    tensor[:, :, new] = 0
                elif name.startswith("buffer."):
                    tensor[:, :, unpacked] = 0
        self.length += added
        self._most_rows += added

    def followed_by(self, keys: Tensor, values: Tensor, positions: Tensor, *, dense: bool) -> TokenTable:
        """A table to attend to, with these rows behind the others; this one stays as it is."""
        other = copy.copy(self)
        other._tensors = dict(self._tensors)
        other._resize(self.length + keys.shape[2])
        other.append(keys, values, positions, dense=dense)
        return other

    def _resize(self, capacity: int) -> None:
        for name, tensor in self._tensors.items():
            first = self._first_slot(name)
            grown = tensor.new_empty((*tensor.shape[:2], capacity - first, *tensor.shape[3:]))
            grown[:, :, : self.length - first] = tensor[:, :, : self.length - first]
            self._tensors[name] = grown
        self._borrowed = False
        self._shape_changed()

    # -- rows go ---------------------------------------------------------------------------------------------------

    def compact(self, slots: Tensor, room: int = 0) -> None:
        """Keep only these slots, in this order; everything else is freed.

        slots: LongTensor `[B, Hkv, rows]`; -1 makes an empty row. Packed rows keep the order they have.
        room: spare slots behind them, where nothing is packed.
        """
        if self.packed:
            kept = torch.zeros(*slots.shape[:2], self.length + 1, dtype=torch.bool, device=slots.device)
            self._close_up(kept.scatter_(2, torch.where(slots < 0, self.length, slots), True)[:, :, : self.length])
            return
        empty = slots < 0
        index = F.pad(slots.clamp(min=0), (0, room))  # what is in spare slots means nothing
        for name, tensor in self._tensors.items():
            self._tensors[name] = take_rows(tensor, index)
        self.length = self._most_rows = slots.shape[2]
        self.positions.masked_fill_(empty, EMPTY)
        self.dense = not bool((self.positions < 0).any())
        self._borrowed = False
        self._shape_changed()

    def drop_empty(self) -> None:
        """Free the first slots, as far as they are padding in every sequence.

        Those behind a token stay, until rows are evicted: `drop_newest` goes by slots.
        """
        if self.dense or self.packed:
            return
        taken = (self.positions >= 0).any(dim=1).any(dim=0)
        first = int((taken.cumsum(0) == 0).sum())
        if first:
            self.compact(self._slots(first, self.length))

    def evict(self, slots: Tensor) -> None:
        """Drop `k` rows per head in place: the last `k` rows move into their slots. Nothing is allocated or freed.

        In a packed table, whose rows cannot take each other's places, they leave holes, which close up later.
        slots: LongTensor `[B, Hkv, k]`, different slots within a head.
        """
        count = slots.shape[2]
        if self.packed:
            self._tensors["positions"].scatter_(2, slots, EMPTY)
            self.dense = False
            self._most_rows -= count
            if self.length - self._closed_length >= MOST_HOLES and self.length - self._most_rows >= MOST_HOLES:
                self._close_up(self.positions >= 0)
            return
        self.own()
        rest = self.length - count
        if count == 1:
            self.kernels.move_rows(self._columns, slots, rest)
        else:
            slots = slots.sort(dim=-1).values
            # Survivors among the last k rows, first; they go to the victims before them, which are the first ones too.
            tail = torch.arange(rest, self.length, device=slots.device)
            victim = (slots[:, :, :, None] == tail).any(dim=2)
            source = tail[victim.to(torch.int8).argsort(dim=-1, stable=True)]
            sequences = torch.arange(self.batch_size, device=slots.device)[:, None, None]
            heads = torch.arange(self.kv_heads, device=slots.device)[:, None]
            for tensor in self._tensors.values():
                tensor[sequences, heads, slots] = tensor[sequences, heads, source]
        self.length = self._most_rows = rest

    def drop_newest(self, count: int) -> None:
        """Forget the `count` rows that were appended last; nothing may have been evicted since.

        All rows, if there are not so many: the first ones were padding, and have been freed.
        """
        count = min(count, self.length)
        self.length -= count
        self._most_rows -= count

    @contextmanager
    def without_newest(self, count: int) -> Iterator[None]:
        """The table as it was before the `count` rows that were appended last."""
        self.length -= count
        try:
            yield
        finally:
            self.length += count

    def shrink(self, room: int) -> None:
        """Free spare slots beyond `room`."""
        if not self.packed and self.capacity > self.length + room:
            self._resize(self.length + room)

    def own(self) -> None:
        """Give every column storage of its own, so that the activations it came from are freed, and not written to."""
        if not self._borrowed:
            return
        self._borrowed = False
        for name, tensor in self._tensors.items():
            self._tensors[name] = owned(tensor).detach()  # the first keys have a history where gradients are enabled
        self._made_columns = None

    def leave_inference_mode(self) -> None:
        """Copy what was made in inference mode, outside of which it cannot be written to."""
        for held in (self._tensors, *(tier.tensors for tier in self.packed)):
            held |= {name: tensor.clone() for name, tensor in held.items() if tensor.is_inference()}
        self._made_columns = None

    # -- rows lose precision ---------------------------------------------------------------------------------------

    def quantize(self, parts: Iterable[tuple[Codec, Tensor]]) -> None:
        """Pack rows that are in full precision; what full precision they took is freed. Other rows stay as they are.

        parts: codecs, each with the slots to pack, LongTensor `[B, Hkv, R]`, in the order of their positions; -1 for
        none, where a head has fewer than another.
        """
        left = torch.ones(*self.positions.shape[:2], self.length + 1, dtype=torch.bool, device=self.positions.device)
        moved: dict[int, list[Tensor]] = {}  # for each of self.packed, slots of its new rows
        held = len(self.packed)
        for codec, slots in parts:
            if slots.shape[2] == 0:
                continue
            left.scatter_(2, torch.where(slots < 0, self.length, slots), False)
            new = self.kernels.encode(codec, self.keys, self.values, (slots - self.packed_length).clamp(min=EMPTY))
            tier = next((number for number, other in enumerate(self.packed) if other.codec == codec), None)
            if tier is None:
                tier = len(self.packed)
                self.packed.append(new)
            else:
                self.packed[tier].append(new)
            moved.setdefault(tier, []).append(slots)
        if not moved:
            return

        # In which order the slots of today come now, tier by tier; -1 for rows that are nothing.
        order, first = [], 0
        for number, tier_rows in enumerate(self.packed):
            old = len(tier_rows) - sum(slots.shape[2] for slots in moved.get(number, ())) if number < held else 0
            order += [self._slots(first, first + old), *moved.get(number, ())]
            first += old
        order.append(true_rows(left[:, :, self.packed_length : self.length], self.packed_length))
        self._reorder(torch.cat(order, dim=2), sum(map(len, self.packed)))
        if not self.dense:
            self._close_up(self.positions >= 0)
        self._closed_length = self.length

    def _slots(self, start: int, stop: int) -> Tensor:
        """`[B, Hkv, stop - start]`: these slots of every head."""
        slots = torch.arange(start, stop, device=self._tensors["positions"].device)
        return slots.expand(self.batch_size, self.kv_heads, -1)

    def _close_up(self, kept: Tensor) -> None:
        """Keep these slots, bool `[B, Hkv, length]`: packed rows move as they are, and memory is freed."""
        kept = kept & (self.positions >= 0)
        order, first = [], 0
        for tier in self.packed:
            size = len(tier)
            slots = true_rows(kept[:, :, first : first + size], first)
            empty = slots < 0
            order.append(slots)
            # A row that is nothing may as well stay where it is: then, often, none has to move.
            tier.keep(torch.where(empty, self._slots(0, slots.shape[2]), slots - first), empty)
            first += size
        order.append(true_rows(kept[:, :, first:], first))
        self.packed = [tier for tier in self.packed if len(tier)]
        self._reorder(torch.cat(order, dim=2), sum(map(len, self.packed)))
        self._closed_length = self.length

    def _reorder(self, slots: Tensor, packed_length: int) -> None:
        """Rearrange all columns: slot by slot, the slot it was in, or -1. Packed rows are where they belong."""
        empty = slots < 0
        for name, tensor in self._tensors.items():
            first = self._first_slot(name)
            index = slots if name == "positions" or name.startswith("column.") else slots[:, :, packed_length:]
            self._tensors[name] = take_rows(tensor, (index - first).clamp(min=0))
        self._tensors["positions"].masked_fill_(empty, EMPTY)
        held = self._tensors["positions"] >= 0
        self.dense = bool(held.all())
        self._most_rows = int(held.sum(-1).max())
        self.length, self.packed_length = slots.shape[2], packed_length
        self._borrowed = False
        self._shape_changed()

    # -- the batch changes -----------------------------------------------------------------------------------------

    def select_batch(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; one may come several times (beams). rows: LongTensor `[B']`."""
        rows = rows.to(self.keys.device)
        self._tensors = {name: tensor.index_select(0, rows) for name, tensor in self._tensors.items()}
        self.packed = [tier.select_batch(rows) for tier in self.packed]
        self._shape_changed()

    def fork(self) -> TokenTable:
        """An independent copy."""
        other = copy.copy(self)
        other._tensors = {name: tensor.clone() for name, tensor in self._tensors.items()}
        other.packed = [tier.clone() for tier in self.packed]
        other._shape_changed()
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
            },
            {name: tensor[:, :, : self.length - self._first_slot(name)] for name, tensor in self._tensors.items()},
        )
        state.add_all("packed", (tier.state() for tier in self.packed))
        return state

    def restore(self, saved: Saved, codecs: Iterable[Codec], tokens: int) -> None:
        """Take the rows of a `state`, into a table that has none; its own columns are those that must be there.

        codecs: that its policies pack rows with. tokens: more than any position. Raises CacheError.
        """
        self.length = saved.count("rows")
        spare = saved.count("spare", self.length + MOST_SPARE)
        heads, (key_dim, value_dim) = self.positions.shape[:2], (self.keys.shape[3], self.values.shape[3])
        known = list(codecs)
        self.packed = [PackedRows.restored(tier, known, heads, key_dim, value_dim) for tier in saved.parts("packed")]
        self.packed_length = sum(map(len, self.packed))
        if self.packed_length > self.length:
            raise saved.refused(f"has {self.packed_length} packed rows of {self.length}")
        for name, empty in self._tensors.items():
            shape = (*heads, self.length - self._first_slot(name), *empty.shape[3:])
            within = (EMPTY, tokens - 1) if name == "positions" else None
            self._tensors[name] = saved.tensor(name, shape, empty.dtype, spare=spare, within=within)
        self.dense = saved.flag("dense")
        if self.dense and bool((self.positions < 0).any()):
            raise saved.refused("has empty rows, and says that it has none")
        self._most_rows = saved.count("most_rows", self.length)
        self._closed_length = saved.count("closed_rows")
        self._borrowed = False
        self._shape_changed()

    def check_step(self, keys: Tensor, values: Tensor) -> None:
        """Raise CacheError where new keys and values do not fit this table."""
        for name, new in (("keys", keys), ("values", values)):
            held = self._tensors[name]
            if new.shape[0] != held.shape[0]:
                raise CacheError(
                    f"this cache holds a batch of {held.shape[0]}, and the model was called with a batch of "
                    f"{new.shape[0]}. Make a new PrunedCache, or call reset() to start over."
                )
            if new.shape[1] != held.shape[1] or new.shape[3] != held.shape[3] or new.dtype != held.dtype:
                raise CacheError(
                    f"this cache holds {name} of {held.shape[1]} heads of {held.shape[3]} in {held.dtype}, and was "
                    f"given {new.shape[1]} heads of {new.shape[3]} in {new.dtype}: it belongs to another model. "
                    "Make a PrunedCache for each model."
                )


class TableView:
    """A table as one link of a chain sees it: its own columns under their plain names, the rest as it is."""

    def __init__(self, table: TokenTable, scope: str) -> None:
        self._table, self._scope = table, scope
        self.one_policy = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def __getitem__(self, column: str) -> Tensor:
        return self._table[self._scope + column]

    def __setitem__(self, column: str, content: Tensor) -> None:
        self._table[self._scope + column] = content
