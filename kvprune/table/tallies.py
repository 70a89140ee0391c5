"""`Tallies`: what a policy remembers of a sequence that belongs to no row, such as the sum of all its queries.

They move with the batch as the table does, and no row that goes takes a part of them along.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvprune.state import Saved, State


class Tallies(dict[str, Tensor]):
    """float32 tensors `[B, ...]` by name, zero when a sequence begins. Update them in place."""

    @classmethod
    def zeros(cls, shapes: Mapping[str, tuple[int, ...]], batch: int, device: torch.device) -> Tallies:
        """shapes: of one sequence."""
        return cls(
            {name: torch.zeros(batch, *shape, dtype=torch.float32, device=device) for name, shape in shapes.items()}
        )

    def scoped(self, scope: str) -> Tallies:
        """Those whose names begin with this prefix, under names without it: what one link of a chain works on."""
        if not scope:
            return self
        return Tallies({name[len(scope) :]: each for name, each in self.items() if name.startswith(scope)})

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.values())

    def select_batch(self, rows: Tensor) -> Tallies:
        """These sequences, in this order. rows: LongTensor `[B']`."""
        return Tallies({name: each.index_select(0, rows.to(each.device)) for name, each in self.items()})

    def clone(self) -> Tallies:
        return Tallies({name: each.clone() for name, each in self.items()})

    def state(self, query_heads: int) -> State:
        """query_heads: of the layer, by which the shapes are known again."""
        return State({"query_heads": query_heads}, dict(self))

    @classmethod
    def restored(cls, saved: Saved, shapes: Mapping[str, tuple[int, ...]], batch: int) -> Tallies:
        """Those of a `state`, which must be of these shapes. Raises CacheError."""
        return cls({name: saved.tensor(name, (batch, *shape), torch.float32) for name, shape in shapes.items()})
