"""`Scored`: base of policies that do something else than to evict by the scores of a policy that ranks rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights
from kvprune.policy.base import Policy
from kvprune.policy.ranking import Ranking
from kvprune.policy.replaying import Replay
from kvprune.policy.step import Step
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Scored(Policy, ABC):
    """Its columns, the attention that it asks for, and its replays are those of a policy that ranks rows."""

    @property
    @abstractmethod
    def scorer(self) -> Ranking:
        """Whose scores they are; of its settings, those say nothing that are about which rows stay."""

    def compared(self, table: TokenTable, step: Step) -> Tensor:
        """The scores by which rows are compared, `[B, Hkv, rows]` float32: pooled, if the scorer pools."""
        return self.scorer.compared(table, step)

    # -- what the scorer is asked, and says ------------------------------------------------------------------------

    @property
    def group(self) -> str:
        return self.scorer.group

    @property
    def query_window(self) -> int:
        return self.scorer.query_window

    @property
    def needs_question(self) -> bool:
        return self.scorer.needs_question

    @property
    def turns_back(self) -> bool:
        return self.scorer.turns_back

    @property
    def weighs_outputs(self) -> bool:
        return self.scorer.weighs_outputs

    @property
    def replay(self) -> Replay | None:
        return self.scorer.replay

    def attach(self, cache: Any, model: Any) -> None:
        self.scorer.attach(cache, model)

    def columns(self) -> dict[str, torch.dtype]:
        return self.scorer.all_columns()

    def tallies(self, query_heads: int, kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        return self.scorer.tallies(query_heads, kv_heads, head_dim)

    def row_weights(self, step: Step) -> RowWeights | None:
        return self.scorer.row_weights(step)

    def prepare(self, table: TokenTable, step: Step) -> None:
        self.scorer.prepare(table, step)

    def observe(self, table: TokenTable, step: Step) -> None:
        self.scorer.observe(table, step)
