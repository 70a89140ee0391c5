"""`Chooser`: what is asked of whatever chooses tokens of a prompt before the layers run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from kvprune.policy.heads import ALL_HEADS, Heads


class Chooser(ABC):
    """It chooses by the queries and keys of one layer."""

    @abstractmethod
    def filter_layer(self, config: Any, pruned: tuple[int, ...]) -> int:
        """The layer whose queries and keys choose, one of `pruned`; config is that of the text decoder.

        Raises PolicyError for a layer that was asked for and is not pruned.
        """

    @abstractmethod
    def capacity(
        self, tokens: int, *, token_bytes: int | None = None, other_bytes: int = 0, half_bytes: int = 0
    ) -> int | None:
        """How many of a sequence's new tokens to choose; None if it takes bytes to tell and none are given.

        token_bytes: that one token of every sequence costs in the whole cache. other_bytes: that the cache holds, or
        will hold, beside the chosen tokens. half_bytes: of the keys and values of one token at 16 bits a number. Raises
        BudgetError for a budget that cannot hold what is always chosen.
        """

    @abstractmethod
    def choose(self, query: Tensor, keys: Tensor, count: int, heads: Heads = ALL_HEADS) -> Tensor:
        """The `count` tokens of one sequence that the model runs on, LongTensor `[count]`, ascending.

        query: of its newest token, `[Hq, D]`. keys: `[Hkv, n, D]`. Both with rotary positions, count < n.
        heads: whose they are. Every process of a model that is split must choose the same: add up what heads say by
        `heads.sum`.
        """
