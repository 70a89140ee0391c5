"""`KeptHeads`: the KV heads whose attention a layer computes, where others have stopped below it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvprune.state import Saved, State
from kvprune.table.rows import EMPTY


@dataclass(frozen=True)
class KeptHeads:
    """Which KV heads are left, each with all of its query heads; a sequence may keep others than its neighbour.

    numbers: LongTensor `[B, r]`, ascending, in the counting of the model. total: KV heads that the model has.
    """

    numbers: Tensor
    total: int

    def __len__(self) -> int:
        return self.numbers.shape[1]

    def of(self, states: Tensor) -> Tensor:
        """Queries, keys or values of these heads alone, `[B, total * G, L, D] -> [B, r * G, L, D]`."""
        return states.unflatten(1, (self.total, -1))[self._at(states)].flatten(1, 2)

    def among_all(self, output: Tensor) -> Tensor:
        """What these heads have put out, with zeros for all others, `[B, r * G, L, Dv] -> [B, total * G, L, Dv]`."""
        own = output.unflatten(1, (len(self), -1))
        every = own.new_zeros(own.shape[0], self.total, *own.shape[2:])
        every[self._at(own)] = own
        return every.flatten(1, 2)

    def positions(self, own: Tensor) -> Tensor:
        """Positions of the rows of all heads, `[B, r, rows] -> [B, total, rows]`: -1 for heads that have none."""
        every = own.new_full((own.shape[0], self.total, own.shape[2]), EMPTY)
        every[self._at(own)] = own
        return every

    def _at(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        numbers = self.numbers.to(tensor.device)
        return torch.arange(len(numbers), device=tensor.device)[:, None], numbers

    def without(self, left: Tensor) -> KeptHeads:
        """Only some of these, LongTensor `[B, r']`, ascending, in the counting of those that are left here."""
        return replace(self, numbers=self.numbers.gather(1, left.to(self.numbers.device)))

    def where(self, sequences: tuple[bool, ...], other: KeptHeads) -> KeptHeads:
        """For these sequences those of another, for all others the own; as many are left of both."""
        chosen = torch.tensor(sequences, device=self.numbers.device)[:, None]
        return replace(self, numbers=torch.where(chosen, other.numbers.to(self.numbers.device), self.numbers))

    def select_batch(self, rows: Tensor) -> KeptHeads:
        """These sequences, in this order."""
        return replace(self, numbers=self.numbers[rows.to(self.numbers.device)])

    def clone(self) -> KeptHeads:
        return replace(self, numbers=self.numbers.clone())

    def state(self) -> State:
        return State({"total": self.total}, {"numbers": self.numbers})

    @classmethod
    def restored(cls, saved: Saved, batch: int, left: int) -> KeptHeads:
        """Of so many sequences, with so many heads left. Raises CacheError."""
        total = saved.count("total", least=left)
        numbers = saved.tensor("numbers", (batch, left), torch.int64, within=(0, total - 1))
        if bool((numbers.diff(dim=1) <= 0).any()):
            raise saved.refused("has heads that do not ascend")
        return cls(numbers, total)
