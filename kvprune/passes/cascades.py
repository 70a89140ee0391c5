"""`Cascade`: the policies that let tokens stop between layers, so that later layers neither compute nor cache them.

`trip.py` does that, through the hooks of `between_layers.py`; here is the policy's side of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights
from kvprune.errors import UnsupportedModelError
from kvprune.passes.between_layers import install
from kvprune.passes.trip import Trip
from kvprune.policy.base import Policy, Step
from kvprune.table.token_table import TokenTable


def newest_rows(step: Step, count: int = 1) -> RowWeights:
    """The attention of the newest tokens of every sequence, of at most so many columns of this step."""
    if step.source is not None and step.source.valid is None and 0 not in step.source.tokens:
        return RowWeights.last_window(count)
    rows = step.query_positions.topk(count, dim=1).indices.sort(dim=1).values  # padding may stand behind them
    return RowWeights.explicit(rows, torch.ones_like(rows))


@dataclass(frozen=True)
class Cascade(Policy, ABC):
    """Base of the policies that say after every layer who goes on. The newest token of a sequence always does.

    While the past is recorded (assisted and prompt-lookup decoding) nothing stops, because nothing that has stopped
    can be taken back.
    """

    @property
    def stops_tokens(self) -> bool:
        return True

    @property
    def revives(self) -> bool:
        """Whether tokens that stopped may go on in a later pass: what it takes for that is held."""
        return False

    @property
    def stops_generated(self) -> bool:
        """Whether layers are also asked in passes that bring a generated token; in others all rows are looked at."""
        return self.revives

    @property
    def skips(self) -> bool:
        """Whether tokens that a layer leaves out go past it, and may be computed by those above."""
        return False

    @property
    def scored(self) -> bool:
        """Whether `step.passage.score` holds a number of every token over all layers and steps."""
        return False

    @property
    def drops_heads(self) -> bool:
        """Whether KV heads stop too, each with its query heads: they put out zeros in the layers above."""
        return False

    def heads_onward(self, table: TokenTable, step: Step) -> Tensor | None:
        """Which of its heads the layers above compute, as `Passage.heads_onward`; asked while a sequence begins.

        `step.passage` is there; its `head_score` is to be set.
        """
        return None

    @abstractmethod
    def onward(self, table: TokenTable, step: Step) -> Tensor | None:
        """Which tokens the next layers look at, bool `[B, N]` by position; None for all that this one looked at.

        Of a policy that `skips`, which tokens of this step the next layer computes. `step.passage` has all that is
        known of tokens, and is there when this is asked.
        """

    def observe(self, table: TokenTable, step: Step) -> None:
        if step.passage is not None:
            step.passage.onward = self.onward(table, step)
            if self.drops_heads and step.passage.begins:
                step.passage.heads_onward = self.heads_onward(table, step)

    def trip(self, cache: Any, hidden: Tensor, mask: Any) -> Trip | None:
        """What a forward pass on such a cache becomes, before its first layer; None if nothing is to stop in it."""
        cache.begins_pass()  # refuses one that was interrupted, before its counts are taken for a fault of the mask
        layer = cache.layers[0]
        if layer.record_past or (layer.table is not None and layer.table.batch_size != len(hidden)):
            return None  # the cache has an error for another batch
        if not (self.stops_generated or layer.takes_prompt(hidden.shape[1], None)):
            return None
        trip = Trip(cache, hidden, mask, revives=self.revives, scored=self.scored, skips=self.skips)
        return trip if any(trip.added) else None  # in a step that is padding alone

    def attach(self, cache: Any, model: Any) -> None:
        """Let tokens stop between the layers of this model, for this cache."""
        if not cache.pruned_layers:
            return
        if cache.is_hybrid:
            raise UnsupportedModelError(
                f"{type(model).__name__} has layers that are not pruned (sliding windows, or states), which count on "
                f"every token: {type(self).__name__} could stop none before them. Use a policy that evicts after the "
                "prompt, such as SnapKV."
            )
        if self.drops_heads and cache.layers[0].planner.heads.size > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} is split over several processes (tp_plan), each with some of the heads, and "
                f"{self} lets heads stop, which might be all of one process. Leave out its setting heads, or load the "
                "model without tp_plan."
            )
        install(model, len(cache.layers))
        cache.cascade = self


@dataclass(frozen=True)
class Staged(Cascade):
    """Base of those that cut after some of the layers, by the attention of the newest token there."""

    @property
    def needs_question(self) -> bool:
        return True

    @abstractmethod
    def share_after(self, layer: int, layers: int) -> float | None:
        """The share of tokens that goes on after a layer, of so many; None if all that it looks at do."""

    def row_weights(self, step: Step) -> RowWeights | None:
        if step.passage is None or self.share_after(step.depth, step.layers) is None:
            return None
        return newest_rows(step)
