"""`Storage`: where the rows of a table lie in memory.

Here every KV head has as many slots as any other, side by side in one tensor a column. Whatever depends on that is in
this file, and `TokenTable` says what rows mean, whatever they lie in: a storage whose heads hold different numbers of
rows has the methods of this one.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.table.operations import Columns, RowOperations
from kvprune.table.rows import EMPTY, owned, take_rows


class Storage:
    """Tensors by name, `[B, Hkv, slots, ...]`: `keys`, `values`, `positions`, `column.<name>`, `buffer.<name>`.

    Slots `0 .. length - 1` are in use, those up to `capacity` are spare. `keys`, `values` and `buffer.<name>` begin
    with slot `packed_length`: in front of it, keys and values are codes, which are held elsewhere.

    What `rows` returns is a view: it is valid until a method that says it changes the rows is called.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors as they are; whatever changes them, or `own`, gives them storage of their own."""
        self.tensors = tensors
        self.length = tensors["keys"].shape[2]
        self.packed_length = 0
        self._borrowed = True
        self._columns: Columns | None = None
        self._shape_changed()

    def _shape_changed(self) -> None:
        self._columns = None
        row_bytes = {
            name: tensor.itemsize * math.prod(tensor.shape[3:]) * self.batch_size * self.kv_heads
            for name, tensor in self.tensors.items()
        }
        self.token_bytes = sum(row_bytes.values())
        """Bytes of one slot of all tensors, over all sequences and heads."""
        self.kv_token_bytes = row_bytes["keys"] + row_bytes["values"]
        """The part of `token_bytes` that is keys and values."""
        self.lasting_bytes = sum(size for name, size in row_bytes.items() if is_of_all_slots(name))
        """The part of `token_bytes` that a row has packed or not."""

    # -- what is in it: nothing changes ----------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self.tensors["keys"].shape[0]

    @property
    def kv_heads(self) -> int:
        return self.tensors["keys"].shape[1]

    @property
    def device(self) -> torch.device:
        return self.tensors["positions"].device

    @property
    def capacity(self) -> int:
        return self.packed_length + self.tensors["keys"].shape[2]

    def first_slot(self, name: str) -> int:
        """The slot that comes first in this tensor."""
        return 0 if is_of_all_slots(name) else self.packed_length

    def rows(self, name: str) -> Tensor:
        """The slots in use of a tensor, `[B, Hkv, length - first_slot, ...]`: a view."""
        tensor = self.tensors[name]
        return (
            tensor[:, :, : self.length] if is_of_all_slots(name) else tensor[:, :, : self.length - self.packed_length]
        )

    def slots(self, start: int, stop: int) -> Tensor:
        """These slots of every head, `[B, Hkv, stop - start]`."""
        return torch.arange(start, stop, device=self.device).expand(self.batch_size, self.kv_heads, -1)

    @property
    def columns(self) -> Columns:
        """All tensors, while each has storage of its own: made anew whenever one of them is."""
        if torch.compiler.is_compiling():  # which must not find a table that has changed since it was traced
            return Columns(self.tensors.values())
        if self._columns is None:
            self._columns = Columns(self.tensors.values())
            if self.packed_length:
                self._columns.before = tuple(map(self.first_slot, self.tensors))
        return self._columns

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind all tensors, spare slots included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    @property
    def kv_nbytes(self) -> int:
        """The part of `nbytes` that is keys and values in full precision."""
        return sum(self.tensors[name].untyped_storage().nbytes() for name in ("keys", "values"))

    # -- rows come: these change the rows --------------------------------------------------------------------------

    def append(
        self, keys: Tensor, values: Tensor, positions: Tensor | int, room: int, operations: RowOperations
    ) -> None:
        """Add `L` rows behind the others, zero in their columns; it grows by L slots, or by `room` if that is more."""
        added = keys.shape[2]
        if self.length + added > self.capacity:
            self.resize(self.length + max(added, room))
        else:
            self.own()
        if added == 1 and not isinstance(positions, Tensor):
            operations.append_row(self.columns, self.length, keys, values, positions)
        else:
            self._write(keys, values, positions)
        self.length += added

    def _write(self, keys: Tensor, values: Tensor, positions: Tensor | int) -> None:
        new = slice(self.length, self.length + keys.shape[2])
        unpacked = slice(new.start - self.packed_length, new.stop - self.packed_length)
        self.tensors["keys"][:, :, unpacked] = keys
        self.tensors["values"][:, :, unpacked] = values
        self.tensors["positions"][:, :, new] = positions
        for name, tensor in self.tensors.items():
            if "." in name:
                tensor[:, :, new if is_of_all_slots(name) else unpacked] = 0

    def resize(self, capacity: int) -> None:
        for name, tensor in self.tensors.items():
            first = self.first_slot(name)
            grown = tensor.new_empty((*tensor.shape[:2], capacity - first, *tensor.shape[3:]))
            grown[:, :, : self.length - first] = tensor[:, :, : self.length - first]
            self.tensors[name] = grown
        self._borrowed = False
        self._shape_changed()

    # -- rows go, or move: these change the rows -------------------------------------------------------------------

    def take(self, slots: Tensor, room: int = 0) -> None:
        """Keep only these slots, LongTensor `[B, Hkv, rows]`, in this order, and `room` spare ones behind them.

        -1 makes an empty row. Nothing may be packed.
        """
        index = F.pad(slots.clamp(min=0), (0, room))  # what is in spare slots means nothing
        for name, tensor in self.tensors.items():
            self.tensors[name] = take_rows(tensor, index)
        self.length = slots.shape[2]
        self.rows("positions").masked_fill_(slots < 0, EMPTY)
        self._borrowed = False
        self._shape_changed()

    def rearrange(self, slots: Tensor, packed_length: int) -> None:
        """Bring the rows into an order, LongTensor `[B, Hkv, rows]`: slot by slot, the slot it was in; -1 for none.

        packed_length: of the first ones, keys and values are held elsewhere from now on.
        """
        for name, tensor in self.tensors.items():
            index = slots if is_of_all_slots(name) else slots[:, :, packed_length:]
            self.tensors[name] = take_rows(tensor, (index - self.first_slot(name)).clamp(min=0))
        self.tensors["positions"].masked_fill_(slots < 0, EMPTY)
        self.length, self.packed_length = slots.shape[2], packed_length
        self._borrowed = False
        self._shape_changed()

    def overwrite(self, slots: Tensor, operations: RowOperations) -> None:
        """Drop the rows in slots `[B, Hkv, k]`, different ones within a head: the last `k` rows move there.

        In place: nothing is allocated or freed. Nothing may be packed.
        """
        count = slots.shape[2]
        self.own()
        rest = self.length - count
        if count == 1:
            operations.move_rows(self.columns, slots, rest)
        else:
            slots = slots.sort(dim=-1).values
            # Survivors among the last k rows, first; they go to the victims before them, which are the first ones too.
            tail = torch.arange(rest, self.length, device=slots.device)
            victim = (slots[:, :, :, None] == tail).any(dim=2)
            source = tail[victim.to(torch.int8).argsort(dim=-1, stable=True)]
            sequences = torch.arange(self.batch_size, device=slots.device)[:, None, None]
            heads = torch.arange(self.kv_heads, device=slots.device)[:, None]
            for tensor in self.tensors.values():
                tensor[sequences, heads, slots] = tensor[sequences, heads, source]
        self.length = rest

    def select_batch(self, rows: Tensor) -> None:
        """Keep these sequences, LongTensor `[B']`, in this order."""
        self.tensors = {name: tensor.index_select(0, rows) for name, tensor in self.tensors.items()}
        self._shape_changed()

    # -- in which memory the rows are: they stay as they are -------------------------------------------------------

    def own(self) -> None:
        """Give every column storage of its own, so that the activations it came from are freed, and not written to."""
        if not self._borrowed:
            return
        self._borrowed = False
        for name, tensor in self.tensors.items():
            self.tensors[name] = owned(tensor).detach()  # the first keys have a history where gradients are enabled
        self._columns = None

    def leave_inference_mode(self) -> None:
        """Copy what was made in inference mode, outside of which it cannot be written to."""
        self.tensors |= {name: tensor.clone() for name, tensor in self.tensors.items() if tensor.is_inference()}
        self._columns = None

    def sharing(self) -> Storage:
        """The same tensors, of which this one and the other may each be resized."""
        other = copy.copy(self)
        other.tensors = dict(self.tensors)
        return other

    def clone(self) -> Storage:
        """An independent copy."""
        other = copy.copy(self)
        other.tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        other._shape_changed()
        return other

    def fill(self, tensors: dict[str, Tensor], length: int, packed_length: int) -> None:
        """Take these tensors, in storage of their own, in place of those it has."""
        self.tensors, self.length, self.packed_length = tensors, length, packed_length
        self._borrowed = False
        self._shape_changed()


def is_of_all_slots(name: str) -> bool:
    """Whether a tensor has the slots of packed rows too."""
    return name == "positions" or name.startswith("column.")
