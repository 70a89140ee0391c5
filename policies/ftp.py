"""FTP: tokens of little attention skip layers, and come back. Li et al., arXiv 2412.11494, 2024."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights
from kvprune.errors import PolicyError
from kvprune.passes.cascades import Cascade, newest_rows
from kvprune.passes.schedule import Schedule, checked, share_at
from kvprune.policy.base import Step
from kvprune.policy.settings import check_count
from kvprune.routing.gates import features
from kvprune.routing.router import Router
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class FTP(Cascade):
    """Before every layer, the tokens of a prompt that the layers before attended to least skip it.

        s_i = mean over heads h, queries q of A^l[h, q, i],  l the last layer that computed i
        layer l + 1 computes the round((1 - sparsity) * n) of n tokens with the largest s; x_i stays for the others

    A token that skips a layer has no row there, and takes part again where its score is among the best. The first
    and the last layer compute all tokens; the first and the newest token of a sequence skip none. The tokens of a
    chunk or a second turn compete among themselves; generated tokens go through all layers, over the rows that these
    hold. This is the paper's static router; its search for a schedule is not here.

    With a `router`, a small network of every layer says instead which tokens compute it: as many, those of largest

        relu(f W^T + b) u,   f: where the token is, its s, the rank of that, the sparsity; see `routing.gates`

    `Router.fit` trains it for one model and one schedule on a text, while the model stays as it is. The paper lets each
    token decide by itself, and holds the share by a loss; here the share is met exactly.
    While the past is recorded (assisted and prompt-lookup decoding) nothing is skipped.

    Settings:
        schedule: pairs (depth, sparsity): from so much of the layers' number on, rounded, such a share of a prompt's
            tokens skips each layer, until the next pair. Depths ascend. As text: "0.3:0.3/0.8:0.5".
        window: so many of the newest queries say who is attended to; None for all of a prompt.
        router: what `Router.fit` or `Router.load` returned, or the path of its file; None for the static one.

    Raises PolicyError for settings without meaning.
    """

    files = frozenset({"router"})
    schedule: Schedule | str = ((0.3, 0.3),)
    _: KW_ONLY
    window: int | None = None
    router: Router | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "schedule", checked(self.schedule, falls=False))
        if self.window is not None:
            check_count("window", self.window, least=1)
        if self.router is not None and not isinstance(self.router, Router):
            router = Router.load(self.router) if isinstance(self.router, str) else Router(self.router)
            object.__setattr__(self, "router", router)

    def attach(self, cache: Any, model: Any) -> None:
        if isinstance(self.router, Router):
            layers, gates = len(cache.layers), len(self.router)
            asked = [layer for layer in range(layers) if self.sparsity(layer, layers)]
            if layers != gates or not all(self.router[layer] for layer in asked):
                raise PolicyError(
                    f"this router has gates for {sum(map(bool, self.router))} of {gates} layers, and "
                    f"{type(model).__name__} has {layers}, of which this schedule lets tokens skip {len(asked)}: fit "
                    "one to both."
                )
            self.router.check(model, trust_model=self.router.trusted)
        super().attach(cache, model)

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
        importance = score
        if isinstance(self.router, Router):
            told = features(score / (table.kv_heads * step.heads.size), tokens - added, tokens, sparsity)
            importance = self.router.gate(step.depth + 1, score.device).opening(told)
        earlier = torch.arange(score.shape[1], device=score.device) < tokens - added
        counts = [round((1 - sparsity) * count) for count in passage.added]
        return passage.top(importance.masked_fill(earlier, -math.inf), counts, first=1)
