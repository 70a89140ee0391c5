"""What a prompt filter is, what it chose, and what it left of a step.

A prompt filter shortens a prompt before the layers run: it lets the first layers look at all of it, and the model then
runs on the chosen tokens alone, as if they were the whole prompt. `prompt_filter.py` does that; here is the policy's
side of it, and what the cache remembers. Positions in the table, and every length that transformers asks for, stay
those of the whole prompt; only the position embeddings count the chosen tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.heads import ALL_HEADS, Heads
from kvprune.policy.base import Policy
from kvprune.state import Saved, State


@dataclass(frozen=True)
class PromptFilter(Policy, ABC):
    """Base of the policies that choose tokens of a prompt before the model runs on them."""

    @property
    def filters_prompt(self) -> bool:
        return True

    @property
    def needs_question(self) -> bool:
        return True  # its newest token's query chooses

    @abstractmethod
    def filter_layer(self, config: Any, pruned: tuple[int, ...]) -> int:
        """The layer whose queries and keys choose, one of `pruned`; config is that of the text decoder.

        Raises PolicyError for a layer that was asked for and is not pruned.
        """

    @abstractmethod
    def capacity(self, tokens: int, *, token_bytes: int | None = None, other_bytes: int = 0) -> int | None:
        """How many of a sequence's new tokens to choose; None if it takes bytes to tell and none are given.

        token_bytes: that one token of every sequence costs in the whole cache. other_bytes: that the cache holds, or
        will hold, beside the chosen tokens. Raises BudgetError for a budget that cannot hold what is always chosen.
        """

    @abstractmethod
    def choose(self, query: Tensor, keys: Tensor, count: int, heads: Heads = ALL_HEADS) -> Tensor:
        """The `count` tokens of one sequence that the model runs on, LongTensor `[count]`, ascending.

        query: of its newest token, `[Hq, D]`. keys: `[Hkv, n, D]`. Both with rotary positions, count < n.
        heads: whose they are. Every process of a model that is split must choose the same: add up what heads say by
        `heads.sum`.
        """


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
    """What a filter left of a step: the layers see the chosen tokens, and count all of them."""

    positions: Tensor
    """Of the chosen tokens, LongTensor `[B, k]`, -1 for padding."""
    tokens: tuple[int, ...]
    """Of each sequence, chosen or not."""
    columns: int
    """Of the model's input, padding included, before it was shortened."""
