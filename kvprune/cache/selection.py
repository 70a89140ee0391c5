"""What a prompt filter chose so far, and what it left of a step: what the cache remembers of it.

Positions in the table, and every length that transformers asks for, stay those of the whole prompt; only the position
embeddings count the chosen tokens. See `kvprune.passes`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvprune.policy.passage import Passage
from kvprune.state import Saved, State


@dataclass(frozen=True)
class Selection:
    """What a prompt filter chose so far. Sequences are those of the batch; their tokens are counted without padding."""

    layer: int
    """The layer that chose."""
    positions: tuple[tuple[int, ...], ...]
    """For each sequence, the positions chosen from every prompt that was filtered, ascending."""
    dropped: tuple[int, ...]
    """For each sequence, its tokens that were not chosen: position embeddings lag behind positions by so many."""
    skipped: int = 0
    """Columns of the model's input, padding included, that no layer has seen."""
    columns: Tensor | None = None
    """Which of the columns that the layers have seen are no padding, bool `[B, C]`; None if all are, or no one asks."""

    def extended(self, length: int, valid: Tensor | None, new: int, batch: int) -> Selection:
        """After a step of `new` columns behind `length` others. valid: bool `[B, new]`, None if none is padding."""
        if self.columns is None and valid is None:
            return self
        device = (self.columns if valid is None else valid).device  # type: ignore[union-attr]
        before = torch.ones(batch, length, dtype=torch.bool, device=device) if self.columns is None else self.columns
        after = torch.ones(batch, new, dtype=torch.bool, device=device) if valid is None else valid
        return replace(self, columns=torch.cat([before, after], dim=1))

    def crop(self, count: int) -> Selection:
        """Without the newest `count` columns, none of which came from a filtered prompt."""
        return self if self.columns is None else replace(self, columns=self.columns[:, :-count].clone())

    def clone(self) -> Selection:
        return replace(self, columns=None if self.columns is None else self.columns.clone())

    def state(self) -> State:
        facts = {name: getattr(self, name) for name in ("layer", "positions", "dropped", "skipped")}
        return State(facts, {} if self.columns is None else {"columns": self.columns})

    @classmethod
    def restored(cls, saved: Saved, seen: int, tokens: tuple[int, ...]) -> Selection:
        """seen: columns of the input so far. tokens: of each sequence. Raises CacheError."""
        batch, most = len(tokens), max(tokens, default=0)
        skipped = saved.count("skipped", seen)
        columns = saved.tensor("columns", (batch, seen - skipped), torch.bool) if saved.has("columns") else None
        positions = saved.many_counts("positions", most - 1, length=batch)
        return cls(saved.count("layer"), positions, saved.counts("dropped", most, length=batch), skipped, columns)

    def select_batch(self, rows: Tensor) -> Selection:
        """These sequences, in this order."""
        columns = None if self.columns is None else self.columns[rows.to(self.columns.device)]
        if len({*zip(self.positions, self.dropped, strict=True)}) == 1:  # no need to wait for the device
            positions, dropped = self.positions[:1] * len(rows), self.dropped[:1] * len(rows)
        else:
            listed = rows.tolist()
            positions = tuple(self.positions[row] for row in listed)
            dropped = tuple(self.dropped[row] for row in listed)
        return replace(self, positions=positions, dropped=dropped, columns=columns)


@dataclass(frozen=True)
class FilteredStep:
    """What is left of a step for a layer: it sees the chosen tokens, and counts all of them."""

    positions: Tensor | None
    """Of the chosen tokens, LongTensor `[B, k]`, -1 for padding; None if nothing was left out."""
    tokens: tuple[int, ...]
    """Of each sequence, chosen or not."""
    columns: int
    """Of the model's input, padding included, before it was shortened."""
    prefill: bool = True
    """Whether the step brings a prompt, or a piece of one."""
    passage: Passage | None = None
    """Of a step in which tokens may stop at any layer."""
