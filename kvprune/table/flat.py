"""`Flat`: the rows of heads that hold different numbers of them, one head behind another in one tensor a column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvprune.table.operations import FlatColumns, RowOperations
from kvprune.table.storage import Storage


def index_bytes(heads: int) -> int:
    """What `starts` and `lengths` of so many heads take, in bytes."""
    return 8 * (2 * heads + 1)


class Flat:
    """Tensors by name, `[slots of all heads, ...]`: those of `Storage`, without dimensions for sequences and heads.

    Head `i` has the slots `starts[i] .. starts[i + 1] - 1`, the first `lengths[i]` of which are in use.
    """

    def __init__(self, tensors: dict[str, Tensor], starts: list[int], lengths: list[int]) -> None:
        self.tensors = tensors
        self._first = starts
        device = tensors["keys"].device
        self.starts = torch.tensor(starts, device=device)
        self.lengths = torch.tensor(lengths, device=device)
        self.columns = FlatColumns(tensors.values(), self.starts, self.lengths)

    @classmethod
    def of(cls, heads: Sequence[dict[str, Tensor]], kept: Sequence[Tensor | None], capacities: list[int]) -> Flat:
        """The rows of heads laid out anew: of each the tensors `[1, 1, rows, ...]`, of which rows `kept` stay.

        kept: LongTensors `[rows]`, in this order; None for all. capacities: slots of each head.
        """
        starts = [0]
        for capacity in capacities:
            starts.append(starts[-1] + capacity)
        lengths = [
            tensors["keys"].shape[2] if rows is None else len(rows) for tensors, rows in zip(heads, kept, strict=True)
        ]
        flat = {}
        for name, model in heads[0].items():
            flat[name] = model.new_empty(starts[-1], *model.shape[3:])
            for tensors, rows, start, length in zip(heads, kept, starts, lengths, strict=False):
                own = tensors[name][0, 0]
                target = flat[name][start : start + length]
                if rows is None:
                    target.copy_(own)
                else:
                    target.copy_(own.index_select(0, rows))
        return cls(flat, starts, lengths)

    def of_head(self, number: int) -> dict[str, Tensor]:
        """Its tensors, `[1, 1, capacity, ...]`: views."""
        slots = slice(self._first[number], self._first[number + 1])
        return {name: tensor[slots][None, None] for name, tensor in self.tensors.items()}

    def storages(self, lengths: list[int]) -> list[Storage]:
        """A storage for each head, over the same memory."""
        found = []
        for number, length in enumerate(lengths):
            storage = Storage(self.of_head(number))
            storage.fill(storage.tensors, length, 0)
            found.append(storage)
        return found

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.held().values())

    def held(self) -> dict[str, Tensor]:
        """Every tensor of it."""
        return {**self.tensors, "starts": self.starts, "lengths": self.lengths}

    # -- one column as policies see it -----------------------------------------------------------------------------

    def spread(self, name: str, width: int, filling: float, operations: RowOperations) -> Tensor:
        """A copy `[heads, width]` of a column, the rows of each head at its end, the filling before them."""
        return operations.spread(self.tensors[name], self.starts, self.lengths, width, filling)

    def collect(self, name: str, padded: Tensor, operations: RowOperations) -> None:
        """Write back what `spread` gave."""
        operations.collect(self.tensors[name], padded, self.starts, self.lengths)
