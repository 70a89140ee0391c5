"""FTP: tokens of little attention skip layers, and come back. Li et al., arXiv 2412.11494, 2024: its static router."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights
from kvprune.passes.cascades import Cascade, newest_rows
from kvprune.passes.schedule import Schedule, checked, share_at
from kvprune.policy.base import Step
from kvprune.policy.settings import check_count
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class FTP(Cascade):
    """Before every layer, the tokens of a prompt that the layers before attended to least skip it.

        s_i = mean over heads h, queries q of A^l[h, q, i],  l the last layer that computed i
        layer l + 1 computes the round((1 - sparsity) * n) of n tokens with the largest s; x_i stays for the others

    A token that skips a layer has no row there, and takes part again where its score is among the best. The first
    and the last layer compute all tokens; the first and the newest token of a sequence skip none. The tokens of a
    chunk or a second turn compete among themselves; generated tokens go through all layers, over the rows that these
    hold. This is the paper's static router; the one that is trained, and the search for a schedule, are not here.
    While the past is recorded (assisted and prompt-lookup decoding) nothing is skipped.

    Settings:
        schedule: pairs (depth, sparsity): from so much of the layers' number on, rounded, such a share of a prompt's
            tokens skips each layer, until the next pair. Depths ascend. As text: "0.3:0.3/0.8:0.5".
        window: so many of the newest queries say who is attended to; None for all of a prompt.

    Raises PolicyError for settings without meaning.
    """

    schedule: Schedule | str = ((0.3, 0.3),)
    _: KW_ONLY
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "schedule", checked(self.schedule, falls=False))
        if self.window is not None:
            check_count("window", self.window, least=1)

    @property
    def skips(self) -> bool:
        return True

    @property
    def scored(self) -> bool:
        return True

    def sparsity(self, layer: int, layers: int) -> float:
        """The share of a prompt's tokens that skips a layer, of so many."""
        return share_at(self.schedule, layer, layers) if 0 < layer < layers - 1 else 0.0  # type: ignore[arg-type]

    def row_weights(self, step: Step) -> RowWeights | None:
        if step.passage is None or not self.sparsity(step.depth + 1, step.layers):
            return None
        return newest_rows(step, min(self.window or step.queries, step.queries))

    def onward(self, table: TokenTable, step: Step) -> Tensor | None:
        passage = step.passage
        if passage is None or passage.score is None:
            return None
        score, sparsity = passage.score, self.sparsity(step.depth + 1, step.layers)
        if not sparsity:
            return torch.ones_like(score, dtype=torch.bool) if self.sparsity(step.depth, step.layers) else None
        rows = torch.as_tensor(step.new_tokens, device=step.mass.device).clamp(min=1, max=self.window).view(-1, 1)
        given = (step.heads.sum(passage.by_token(step.mass, table)) / rows).to(score.device)
        score.copy_(torch.where(given > -math.inf, given, score))
        tokens, added = (
            torch.tensor(counts, device=score.device)[:, None] for counts in (passage.tokens, passage.added)
        )
        earlier = torch.arange(score.shape[1], device=score.device) < tokens - added
        counts = [round((1 - sparsity) * count) for count in passage.added]
        return passage.top(score.masked_fill(earlier, -math.inf), counts, first=1)
