"""`Representatives`: links of a chain that choose a part of what the link before them keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvprune.policy.base import Policy, Step
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Representatives(Policy, ABC):
    """Base of policies that stand behind one that ranks rows, and say which of the rows it would drop stay after all.

    Both decide as one, and what they keep together is the budget of the first. Where rows go one by one there is
    nothing to choose among: representatives stay, and the worst of the other rows goes.
    """

    @abstractmethod
    def chosen(self, retention: Tensor, table: TokenTable, step: Step, kept: Tensor) -> Tensor:
        """Which rows are representatives, bool `[B, Hkv, rows]`: none that is kept anyway, and none more than `kept`.

        retention, kept: as of `Ranking.refined`. The best of the other rows take the rest of what is kept.
        """

    def behind(self, before: Policy | None) -> tuple[Policy, ...]:
        return ((before or Policy()).with_representatives(self),)

    def attach(self, cache: Any, model: Any) -> None:
        self.behind(None)  # raises: it is alone
