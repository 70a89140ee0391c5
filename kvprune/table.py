"""`TokenTable`: the cache of one attention layer.

A row is a cached token of one KV head. Its columns are the key, the value, the logical position, and whatever columns
the policy declared. Every operation here moves all columns alike, so nothing falls out of step with the keys.

Slots `0 .. length - 1` are in use, in no particular order: whatever needs order goes by `positions`. A slot with
position -1 is empty (a sequence with fewer tokens than another of its batch). Slots from `length` to `capacity` are
spare room that the next tokens take.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from kvprune.errors import CacheError

EMPTY = -1


def owned(tensor: Tensor) -> Tensor:
    """The tensor in storage of its own and no larger: a view would keep, say, a fused QKV projection alive."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class TokenTable:
    """Keys `[B, Hkv, capacity, D]`, values `[B, Hkv, capacity, Dv]`, positions `[B, Hkv, capacity]` int32, and columns.

    `table["score"]` is a policy's column, `[B, Hkv, length]`; it may be updated in place. `positions` are counted in
    tokens of the sequence, padding left out.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        columns: Mapping[str, torch.dtype],
        *,
        dense: bool = True,
    ) -> None:
        """Take the rows of the first step as they are; `compact` or `own` gives them storage of their own.

        keys: `[B, Hkv, L, D]`. values: `[B, Hkv, L, Dv]`. positions: `[B, Hkv, L]`, or broadcastable to it.
        dense: that no position is -1.
        """
        self.dense = dense
        """Whether no slot in use is empty."""
        self.one_policy = True
        """Whether a single policy decides which rows stay, so that its own regularities hold."""
        self._borrowed = True
        shape = keys.shape[:3]
        self.length = keys.shape[2]
        self._tensors: dict[str, Tensor] = {
            "keys": keys,
            "values": values,
            "positions": positions.to(torch.int32).expand(shape).contiguous(),
        }
        for name, dtype in columns.items():
            self._tensors[f"column.{name}"] = torch.zeros(shape, dtype=dtype, device=keys.device)
        self._shape_changed()

    def _shape_changed(self) -> None:
        batch, heads, capacity, device = self.batch_size, self.kv_heads, self.capacity, self._tensors["keys"].device
        sequences = torch.arange(batch, device=device)[:, None, None]
        each_head = torch.arange(heads, device=device)[:, None]
        # To index slots with, and where each head's first slot is in the flattened table, [B, Hkv, 1].
        self._index = sequences, each_head, (sequences * heads + each_head) * capacity
        self.token_bytes = sum(tensor.nbytes for tensor in self._tensors.values()) // max(capacity, 1)
        """Bytes of one slot over all sequences and heads, all columns included."""
        self.kv_token_bytes = sum(self._tensors[name].nbytes for name in ("keys", "values")) // max(capacity, 1)
        """The part of `token_bytes` that is keys and values."""

    # -- what is in it ---------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self._tensors["keys"].shape[0]

    @property
    def kv_heads(self) -> int:
        return self._tensors["keys"].shape[1]

    @property
    def capacity(self) -> int:
        return self._tensors["keys"].shape[2]

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, length, D]`."""
        return self._tensors["keys"][:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """`[B, Hkv, length, Dv]`."""
        return self._tensors["values"][:, :, : self.length]

    @property
    def positions(self) -> Tensor:
        """Logical positions, `[B, Hkv, length]` int32; -1 where a slot is empty."""
        return self._tensors["positions"][:, :, : self.length]

    def __getitem__(self, column: str) -> Tensor:
        return self._tensors[f"column.{column}"][:, :, : self.length]

    def __setitem__(self, column: str, content: Tensor) -> None:
        self[column].copy_(content)

    def columns(self) -> Iterator[str]:
        return (name.removeprefix("column.") for name in self._tensors if name.startswith("column."))

    def scoped(self, scope: str) -> TokenTable:
        """The table with its columns under names that lack this prefix: what one link of a chain works on."""
        return cast(TokenTable, TableView(self, scope)) if scope else self

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the table holds, at full capacity."""
        return dict(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the table, spare slots included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())

    @property
    def kv_nbytes(self) -> int:
        """The part of `nbytes` that is keys and values."""
        return sum(self._tensors[name].untyped_storage().nbytes() for name in ("keys", "values"))

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
        new = slice(self.length, self.length + added)
        self._tensors["keys"][:, :, new] = keys
        self._tensors["values"][:, :, new] = values
        self._tensors["positions"][:, :, new] = positions
        for name, tensor in self._tensors.items():
            if name.startswith("column."):
                tensor[:, :, new] = 0
        self.length += added

    def _resize(self, capacity: int) -> None:
        for name, tensor in self._tensors.items():
            grown = tensor.new_empty((*tensor.shape[:2], capacity, *tensor.shape[3:]))
            grown[:, :, : self.length] = tensor[:, :, : self.length]
            self._tensors[name] = grown
        self._borrowed = False
        self._shape_changed()

    # -- rows go ---------------------------------------------------------------------------------------------------

    def compact(self, slots: Tensor) -> None:
        """Keep only these slots, in this order, in storage of exactly their number; everything else is freed.

        slots: LongTensor `[B, Hkv, rows]`; -1 makes an empty row.
        """
        empty = slots < 0
        index = (*self._index[:2], slots.clamp(min=0))
        for name, tensor in self._tensors.items():
            self._tensors[name] = tensor[index]
        self._tensors["positions"].masked_fill_(empty, EMPTY)
        self.dense = not bool((self._tensors["positions"] < 0).any())
        self.length = slots.shape[2]
        self._borrowed = False
        self._shape_changed()

    def drop_empty(self) -> None:
        """Free the slots that are padding in every sequence."""
        if self.dense:
            return
        kept = self.positions >= 0
        rows = int(kept.sum(-1).max())
        if rows < self.length:
            order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :, :rows]
            self.compact(torch.where(kept.gather(2, order), order, EMPTY))

    def evict(self, slots: Tensor) -> None:
        """Drop `k` rows per head in place: the last `k` rows move into their slots. Nothing is allocated or freed.

        slots: LongTensor `[B, Hkv, k]`, different slots within a head.
        """
        self.own()
        count = slots.shape[2]
        rest = self.length - count
        if count == 1:
            target = (slots + self._index[2]).view(-1)
            for tensor in self._tensors.values():
                rows = tensor.view(-1, *tensor.shape[3:])
                newest = tensor[:, :, rest].flatten(0, 1)
                # With a single head this is a slice of the very memory that is written to, which torch refuses.
                rows.index_copy_(0, target, newest.clone() if len(newest) == 1 else newest)
        else:
            slots = slots.sort(dim=-1).values
            # Survivors among the last k rows, first; they go to the victims before them, which are the first ones too.
            tail = torch.arange(rest, self.length, device=slots.device)
            victim = (slots[:, :, :, None] == tail).any(dim=2)
            source = tail[victim.to(torch.int8).argsort(dim=-1, stable=True)]
            for tensor in self._tensors.values():
                tensor[(*self._index[:2], slots)] = tensor[(*self._index[:2], source)]
        self.length = rest

    def drop_newest(self, count: int) -> None:
        """Forget the `count` rows that were appended last; nothing may have been evicted since."""
        self.length -= count

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
        if self.capacity > self.length + room:
            self._resize(self.length + room)

    def own(self) -> None:
        """Give every column storage of its own, so that the activations it came from are freed, and not written to."""
        if not self._borrowed:
            return
        self._borrowed = False
        for name, tensor in self._tensors.items():
            self._tensors[name] = owned(tensor)

    # -- the batch changes -----------------------------------------------------------------------------------------

    def select_batch(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; one may come several times (beams). rows: LongTensor `[B']`."""
        rows = rows.to(self.keys.device)
        self._tensors = {name: tensor.index_select(0, rows) for name, tensor in self._tensors.items()}
        self._shape_changed()

    def fork(self) -> TokenTable:
        """An independent copy."""
        other = copy.copy(self)
        other._tensors = {name: tensor.clone() for name, tensor in self._tensors.items()}
        return other

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
