"""`ScratchPass`: a cache to run tokens through a model over another cache, which is only read.

Queries see the rows of that cache and the keys of the pass, which are forgotten: whatever happens in between, the cache
is as it was.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvprune.attention.mass import Scoring
from kvprune.attention.queries import Queries
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.modes import cast, no_autocast
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.cache.registration import PendingKeys
from kvprune.errors import CacheError, KVPruneError
from kvprune.policy.base import per_sequence
from kvprune.table.rows import owned
from kvprune.table.token_table import TokenTable


class ScratchPass(Cache):
    """Base of passes; `look` is what they do at every pruned layer."""

    def __init__(self, cache: PrunedCache, valid: Tensor | None, layers: int | None = None) -> None:
        """valid: bool `[B, L]`, False for padding; None if there is none. layers: how many are run; None for all."""
        read = cache.layers if layers is None else cache.layers[:layers]
        super().__init__(layers=[*map(_scratch, read), *cache.layers[len(read) :]])
        self._cache, self._valid = cache, valid
        self._incoming: tuple[PrunedLayer, Tensor, Tensor] | None = None

    def look(self, module: torch.nn.Module, layer: PrunedLayer, query: Tensor, keys: Tensor, values: Tensor,
             scoring: Scoring) -> Tensor:  # fmt: skip
        """The output of attention, `[B, L, Hq, Dv]`. query: `[B, Hq, L, D]`. keys, values: of this pass alone."""
        raise NotImplementedError  # by each kind of pass

    def over(
        self, layer: PrunedLayer, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring
    ) -> tuple[Queries, TokenTable, Tensor, Scoring]:
        """The queries of a step, the rows they see, the new keys, and the scoring: all where the cache lives."""
        home = query.device if layer.home is None else layer.home
        states, keys, values, scoring = query.to(home), keys.to(home), values.to(home), scoring.to(home)
        valid, table = None if self._valid is None else self._valid.to(home), layer.table
        first = per_sequence(layer.tokens or (0,) * keys.shape[0], home)
        queries = Queries.of_step(states, first, valid, begins=table is None)
        rows, dense = (keys, values, queries.positions[:, None]), valid is None
        seen = TokenTable(*rows, {}, dense=dense) if table is None else table.followed_by(*rows, dense=dense)
        return queries, seen, keys, scoring

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        if not isinstance(layer, PrunedLayer):
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            if isinstance(layer, DynamicLayer):
                layer.keys, layer.values = owned(layer.keys), owned(layer.values)  # else views of the whole prompt
            return keys, values
        keys, values = cast(key_states), cast(value_states)
        if layer.table is not None:
            held = layer.table.dims[2]  # a cache that was filled for its model may be in another type
            keys, values = keys.to(held), values.to(held)
            layer.table.check_step(keys, values)
        self._incoming = layer, keys, values
        return PendingKeys(key_states, self), value_states  # type: ignore[return-value]

    def attend(self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **settings: Any) -> Tensor:
        """As `PrunedCache.attend`, but the new keys are forgotten."""
        query = cast(query)
        with no_autocast(query.device):
            layer, keys, values = self._incoming  # type: ignore[misc]
            self._incoming = None
            scoring = self._cache.scoring_of(module, query, layer, **settings)
            return self.look(module, layer, query.to(keys.dtype), keys, values, scoring).to(query.dtype)

    # -- what the attention asks for where something is wrong --------------------------------------------------------

    def bypassed(self, use: str = "") -> KVPruneError:
        return self._cache.bypassed(use)

    def misused(self, reason: str, error: type[KVPruneError] = CacheError) -> KVPruneError:
        return self._cache.misused(reason, error)


def _scratch(layer: Any) -> Any:
    """A layer that may be written to in place of this one; a pruned layer is only read."""
    if isinstance(layer, PrunedLayer):
        return layer
    # Layers of keys and values replace their tensors (transformers 5.23); those with a state write into it.
    return copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)
