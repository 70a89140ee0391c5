"""Leverage: keys that no others stand for. Of Compactor: Chari and Van Durme, arXiv 2507.08143, 2025."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from kvprune.policy.base import Step
from kvprune.policy.eviction import Eviction
from kvprune.policy.settings import check_number
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Leverage(Eviction):
    """Keeps the tokens whose keys are of most leverage: those that the others could least be combined to.

        F_k = x_k . (X^T X + ridge I)^-1 x_k,   x = keys before positions turn them, less their mean over a head's rows

    The half of Compactor that looks at no attention; the other adds attention that looks both ways within chunks of the
    prompt. Exact: the paper and kvpress' LeverageScorePress project keys at random to 48 dimensions first, kvpress by
    another draw each time, which saves little where a head has 64 or 128. Scores of every head add up to at most D.
    All keys are read at every decision: after every prompt, or piece of one, and every `interval` generated tokens.

    Settings (beside those of `Eviction`):
        ridge: as a share of the mean of the diagonal of X^T X.
    """

    _: KW_ONLY
    interval: int | None = 128
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ridge", self.ridge, low=1e-6, high=1e6)

    @property
    def turns_back(self) -> bool:
        return True

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}

    def observe(self, table: TokenTable, step: Step) -> None:
        if not step.due:
            return
        keys, positions = table.all_keys().float(), table.positions
        # Heads hold different tokens: each is turned back as a sequence of its own.
        alone = keys.flatten(0, 1).unsqueeze(1)
        keys = step.rotary.turn(alone, positions.flatten(0, 1).long(), back=True).view_as(keys)
        held = (positions >= 0)[..., None]
        mean = keys.masked_fill(~held, 0.0).sum(2, keepdim=True) / held.sum(2, keepdim=True).clamp(min=1)
        keys = (keys - mean).masked_fill_(~held, 0.0)
        gram = keys.mT @ keys
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal += diagonal.mean(-1, keepdim=True).clamp(min=1e-12) * self.ridge
        factor, failed = torch.linalg.cholesky_ex(gram)
        scores = (keys * torch.cholesky_solve(keys.mT, factor).mT).sum(-1)
        table["score"] = scores.masked_fill(failed[..., None] != 0, 0.0)
