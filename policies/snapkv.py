"""SnapKV: what the end of the prompt attends to. Li et al., arXiv 2404.14469, NeurIPS 2024."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights
from kvprune.attention.neighbours import lent, over_neighbours
from kvprune.errors import PolicyError
from kvprune.policy.base import Step
from kvprune.policy.eviction import Eviction
from kvprune.policy.settings import check_count
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class SnapKV(Eviction):
    """Keeps what the last `window` queries attend to, pooled over neighbours, and the window itself.

        z_k = sum over the last `window` queries q of P[q, k],   pooled with a kernel of `kernel_size`

    Decides at the end of every prefill step and lets generated tokens accumulate, as in the paper. With `interval` set
    it also evicts while decoding, by what the newest `window` queries attend to.

    Settings (beside those of `Eviction`):
        window: queries to observe. recent: tokens always kept, by default the window.
        pooling: "max" or "avg" (zeros count at the edges, as in the paper's code).
    """

    _: KW_ONLY
    window: int = 32
    kernel_size: int = 7
    pooling: str = "max"
    recent: int | float | None = None  # type: ignore[assignment]
    interval: int | None = None

    def __post_init__(self) -> None:
        check_count("window", self.window, least=1)
        if self.recent is None:
            object.__setattr__(self, "recent", self.window)
        if self.pooling not in ("max", "avg"):
            raise PolicyError(f'pooling must be "max" or "avg", not {self.pooling!r}.')
        super().__post_init__()

    @property
    def query_window(self) -> int:
        return self.window

    @property
    def needs_question(self) -> bool:
        return True

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}

    def row_weights(self, step: Step) -> RowWeights | None:
        return RowWeights.last_window(self.window) if step.due else None

    def observe(self, table: TokenTable, step: Step) -> None:
        if step.due:
            table["score"] = step.mass

    def pool(self, scores: Tensor, table: TokenTable, recent: int | Tensor) -> Tensor:
        if self.pooling == "max":
            return super().pool(scores, table, recent)
        added = lent(scores, table.positions, recent)
        # In float64, where the same rows add up to the same whatever their order: neighbours that share all theirs tie.
        average = over_neighbours(
            added.masked_fill_(added == -math.inf, 0.0),
            table.positions,
            *self.neighbours,
            lambda near: (near.double().sum(-1) / self.kernel_size).float(),
            0.0,
        )
        return average.masked_fill_(~(scores > -math.inf), -math.inf)
