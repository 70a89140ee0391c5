"""A2SF: accumulated attention with a forgetting factor. Jo and Shin, arXiv 2407.20485, 2024."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from kvprune.attention.mass import RowWeights
from kvprune.policy.base import Step
from kvprune.policy.eviction import Eviction
from kvprune.policy.settings import check_number
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class A2SF(Eviction):
    """Keeps the tokens of highest attention, where attention is forgotten with age.

        F_k(t) = sum over queries q <= t of  gamma^(t - q) * P[q, k],      so   F <- gamma^L * F + mass

    with L new queries in a step. The sum over plain attention favours old tokens, which more queries could see; the
    forgetting factor makes tokens of different ages comparable. gamma = 1 is H2O, gamma = 0 the last query alone.

    Settings (beside those of `Eviction`):
        forgetting_factor: gamma, in [0, 1].
        epsilon: prefill reads only the last T rows, where gamma^T / (1 - gamma) <= epsilon. That bounds the error of
            every score: the rows left out weigh less than gamma^T / (1 - gamma) in all, and no probability exceeds 1.
            0 reads all rows. T is 238 for the defaults.
    """

    _: KW_ONLY
    forgetting_factor: float = 0.95
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("forgetting_factor", self.forgetting_factor, low=0, high=1)
        check_number("epsilon", self.epsilon, low=0, high=1)

    @property
    def needs_question(self) -> bool:
        return self.forgetting_factor < 1

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}

    def row_weights(self, step: Step) -> RowWeights:
        return RowWeights.geometric(step.queries, self.forgetting_factor, self.epsilon)

    def observe(self, table: TokenTable, step: Step) -> None:
        table["score"].mul_(self.forgetting_factor**step.new_tokens).add_(step.mass)
