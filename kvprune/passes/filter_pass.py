"""The pass in which a prompt filter looks at a prompt: the first layers run, and nothing of them is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import cache_argument
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.passes.choosing import Chooser
from kvprune.passes.scratch import ScratchPass
from kvprune.policy.heads import Heads


class _Chosen(Exception):  # noqa: N818 - it ends a forward pass, and is no error
    """Raised by the attention of the layer that chooses, as soon as its queries and keys exist."""


class FilterPass(ScratchPass):
    """A cache to run a prompt through, up to the layer that chooses; what it leaves in `columns` is all that stays."""

    def __init__(self, cache: PrunedCache, policy: Chooser, layer: int, valid: Tensor | None) -> None:
        """layer: that chooses. valid: bool `[B, L]`, False for padding; None if there is none."""
        super().__init__(cache, valid, layers=layer)
        self.columns: list[Tensor] | None = None
        """For each sequence, the columns of the input that were chosen, ascending; None if all are."""
        self._policy, self._layer = policy, layer
        self._capacity: tuple[int, ...] = ()

    def run(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor] | None:
        """Run the decoder's forward, and return `columns`."""
        try:
            with torch.no_grad():
                forward(**arguments, **cache_argument(self))
        except _Chosen:
            return self.columns
        raise self.misused("its forward pass never came to the layer that chooses")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(layer := self.layers[layer_idx], PrunedLayer) and not self._capacity:
            self._weigh_budget(layer, key_states, value_states)
        return states

    def _weigh_budget(self, layer: PrunedLayer, keys: Tensor, values: Tensor) -> None:
        """Now it is known what a token costs: stop here if all of them fit."""
        one = torch.zeros(keys.shape[0], 1, 1, dtype=torch.int32, device=keys.device)
        row = layer.new_table(keys[:, :, :1], values[:, :, :1], one, dense=True)
        tokens = self._tokens(keys)
        held = sum(each.nbytes for each in self._cache.layers if isinstance(each, PrunedLayer))
        processes = layer.planner.heads.present(keys.shape[1]).size
        self._capacity = tuple(
            self._policy.capacity(
                count,
                token_bytes=row.token_bytes * layer.planner.pruned_layers * processes,
                other_bytes=(row.kv_token_bytes * layer.planner.stock_tokens + held) * processes,
                half_bytes=row.kv_token_bytes * 2 // keys.itemsize * layer.planner.pruned_layers * processes,
            )
            or count
            for count in tokens
        )
        if all(count <= most for count, most in zip(tokens, self._capacity, strict=True)):
            raise _Chosen

    def _tokens(self, keys: Tensor) -> tuple[int, ...]:
        return (keys.shape[2],) * keys.shape[0] if self._valid is None else tuple(self._valid.sum(1).tolist())

    def look(self, module: torch.nn.Module, layer: PrunedLayer, query: Tensor, keys: Tensor, values: Tensor,
             scoring: Scoring) -> Tensor:  # fmt: skip
        if layer.index == self._layer:
            self.columns = self._choose(query, keys, layer.planner.heads.present(keys.shape[1]))
            raise _Chosen
        queries, seen, _, scoring = self.over(layer, query, keys, values, scoring)
        output = queries.attend(seen, scoring, backend=layer.backend).output
        return output.transpose(1, 2).contiguous().to(query.device)

    def _choose(self, query: Tensor, keys: Tensor, heads: Heads) -> list[Tensor]:
        every = torch.arange(keys.shape[2], device=keys.device)
        chosen = []
        for row, (count, most) in enumerate(zip(self._tokens(keys), self._capacity, strict=True)):
            own = every if self._valid is None else every[self._valid[row].to(keys.device)]
            if count > most:  # padding is out before neighbours are averaged
                states = keys[row] if count == len(every) else keys[row][:, own]
                own = own[self._policy.choose(query[row, :, own[-1]], states, most, heads)]
            chosen.append(own)
        return chosen
