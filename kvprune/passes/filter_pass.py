"""The pass in which a prompt filter looks at a prompt: the first layers run, and nothing of them is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvprune.attention.mass import Scoring
from kvprune.attention.queries import Queries
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import cache_argument
from kvprune.cache.modes import cast, no_autocast
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.cache.registration import PendingKeys
from kvprune.errors import CacheError, KVPruneError
from kvprune.passes.choosing import Chooser
from kvprune.policy.base import per_sequence
from kvprune.policy.heads import Heads
from kvprune.table.rows import owned
from kvprune.table.token_table import TokenTable


class _Chosen(Exception):  # noqa: N818 - it ends a forward pass, and is no error
    """Raised by the attention of the layer that chooses, as soon as its queries and keys exist."""


class FilterPass(Cache):
    """A cache to run a prompt through, up to the layer that chooses; what it leaves in `columns` is all that stays.

    Queries see the rows of the cache it stands for and the keys of this pass. That cache is not written to, so whatever
    happens in between leaves it as it was.
    """

    def __init__(self, cache: PrunedCache, policy: Chooser, layer: int, valid: Tensor | None) -> None:
        """layer: that chooses. valid: bool `[B, L]`, False for padding; None if there is none."""
        super().__init__(layers=[_scratch(each) if index < layer else each for index, each in enumerate(cache.layers)])
        self.columns: list[Tensor] | None = None
        """For each sequence, the columns of the input that were chosen, ascending; None if all are."""
        self._cache, self._policy, self._layer, self._valid = cache, policy, layer, valid
        self._incoming: tuple[PrunedLayer, Tensor, Tensor] | None = None
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
        layer = self.layers[layer_idx]
        if not isinstance(layer, PrunedLayer):
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            if isinstance(layer, DynamicLayer):
                layer.keys, layer.values = owned(layer.keys), owned(layer.values)  # else views of the whole prompt
            return keys, values
        if layer.table is not None:
            layer.table.check_step(key_states, value_states)
        if not self._capacity:
            self._weigh_budget(layer, key_states, value_states)
        self._incoming = layer, cast(key_states), cast(value_states)
        return PendingKeys(key_states, self), value_states  # type: ignore[return-value]

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
            )
            or count
            for count in tokens
        )
        if all(count <= most for count, most in zip(tokens, self._capacity, strict=True)):
            raise _Chosen

    def _tokens(self, keys: Tensor) -> tuple[int, ...]:
        return (keys.shape[2],) * keys.shape[0] if self._valid is None else tuple(self._valid.sum(1).tolist())

    def attend(self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **settings: Any) -> Tensor:
        """As `PrunedCache.attend`, but the new keys are forgotten."""
        query = cast(query)
        with no_autocast(query.device):
            return self._attend_or_choose(module, query, settings)

    def _attend_or_choose(self, module: torch.nn.Module, query: Tensor, settings: dict[str, Any]) -> Tensor:
        layer, keys, values = self._incoming  # type: ignore[misc]
        self._incoming = None
        scoring = self._cache.scoring_of(module, query, layer, **settings)
        if layer.index == self._layer:
            self.columns = self._choose(query, keys, layer.planner.heads.present(keys.shape[1]))
            raise _Chosen
        return self._attend(layer, query, keys, values, scoring)

    def _attend(self, layer: PrunedLayer, states: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
        device, table = states.device, layer.table
        home = device if layer.home is None else layer.home
        states, keys, values, scoring = states.to(home), keys.to(home), values.to(home), scoring.to(home)
        valid = None if self._valid is None else self._valid.to(home)
        first = per_sequence(layer.tokens or (0,) * keys.shape[0], states.device)
        queries = Queries.of_step(states, first, valid, begins=table is None)
        rows = keys, values, queries.positions[:, None]
        dense = valid is None
        seen = TokenTable(*rows, {}, dense=dense) if table is None else table.followed_by(*rows, dense=dense)
        output = queries.attend(seen, scoring, backend=layer.backend).output
        return output.transpose(1, 2).contiguous().to(device)

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
