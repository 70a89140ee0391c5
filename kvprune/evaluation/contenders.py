"""Who is evaluated: policies under budgets, and the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Cache, DynamicCache

from kvprune.cache import stock
from kvprune.errors import EvaluationError
from kvprune.policy.base import Policy
from kvprune.policy.registry import parse, takes_budget
from kvprune.saving import PrunedCache

FULL = "full"
"""The name of transformers' own cache, the baseline of every comparison."""


@dataclass(frozen=True)
class Contender:
    """A policy under a budget. `name` and `budget` are what a person wrote; policy is None for the stock cache."""

    name: str
    budget: str | None
    policy: Policy | None

    @property
    def label(self) -> str:
        return self.name if self.budget is None else f"{self.name} @ {self.budget}"

    def cache(self, model: Any) -> Cache:
        """A new cache for one prompt, or one batch."""
        return DynamicCache(config=model.config) if self.policy is None else PrunedCache(model, self.policy)


def contenders(policies: Sequence[str], budgets: Sequence[str]) -> list[Contender]:
    """Every policy under every budget, once where a policy takes none or has its own: "zipcache", "a2sf:budget=0.5".

    Raises KVPruneError for a policy or a budget that cannot be read, and where there is nothing to evaluate.
    """
    found: dict[str, Contender] = {}
    for text in (text.strip() for text in policies):
        if text == FULL:
            found[FULL] = Contender(FULL, None, None)
            continue
        if not budgets:
            raise EvaluationError(f"there is no budget for {text!r}: write one, such as 0.25.")
        for budget in (budget.strip() for budget in budgets):
            contender = Contender(text, budget if takes_budget(text) else None, parse(text, budget=budget))
            found.setdefault(contender.label, contender)
    if not found:
        raise EvaluationError('there is no policy to evaluate: name one, such as "a2sf", or "full" for the full cache.')
    return list(found.values())


@dataclass(frozen=True)
class Held:
    """Measured bytes of a cache, and of a dense one for the same tokens: in the cache's type, and at 16 bits."""

    nbytes: int
    dense_nbytes: int
    half_nbytes: int

    @classmethod
    def by(cls, cache: Cache, model: Any) -> Held:
        size = model.dtype.itemsize
        if isinstance(cache, PrunedCache):
            nbytes, dense = cache.nbytes, cache.dense_nbytes
            tables = (cache.layers[index].table for index in cache.pruned_layers)
            size = next((table.dims[2].itemsize for table in tables if table is not None), size)
        else:
            nbytes = dense = sum(map(stock.dense_nbytes, cache.layers))
        return cls(nbytes, dense, dense * 2 // size)
