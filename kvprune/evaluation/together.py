"""Many caches of one model through the same forward passes: a prompt is read once, whoever compresses it.

    together = Together([PrunedCache(model, policy) for policy in policies])
    with together.shown([...]): model(document, cache=together)     # one row, for all of them
    model(tokens, cache=together)                                    # one row for each

While caches are *shown* a pass, the batch is one sequence, which the first cache attends to; the others take the same
queries, keys and values, layer by layer, and do with them what they would have done by themselves, except for computing
an output of attention that is the same for all. Otherwise the batch has a row for every cache, and each attends to its
own; what is left to share is reading the weights, which is most of the time of a decode step. A prompt is replayed once
for all that ask for the same replay.

Everything a cache does between its first layer and its last is there, and replays. What it does around a forward pass
is not, such as a prompt filter: `shareable` says which caches can be here. One that refuses what comes, as for a budget
that does not hold it, is served no more, and says why in `refused`; the others go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvprune.attention.backends import Sdpa
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.cache.registration import PendingKeys
from kvprune.cache.unread import Unread
from kvprune.errors import CacheError, KVPruneError
from kvprune.passes.replay import Once


def shareable(cache: PrunedCache) -> bool:
    """Whether all of a cache's work is in the layers of a forward pass or a replay, and all its layers are pruned."""
    beside = cache.prompt_filter is not None or any(part.stops_tokens for part in cache.policy.parts())
    return not beside and len(cache.pruned_layers) == len(cache.layers)


class _Known(Sdpa):
    """An attention whose output is known: `[1, Hq, L, Dv]`."""

    name = "known"

    def __init__(self, output: Tensor) -> None:
        self._output = output

    def takes(self, queries: Tensor, keys: Tensor, values: Tensor) -> bool:
        return queries.shape[2] == keys.shape[2] == self._output.shape[2]

    def causal(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        return self._output, None


@dataclass
class _Seen:
    """What one layer has been given and returned: queries `[1, Hq, L, D]`, keys, values, output `[1, L, Hq, Dv]`."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor

    def then(self, other: _Seen) -> _Seen:
        return _Seen(
            torch.cat([self.queries, other.queries], 2),
            torch.cat([self.keys, other.keys], 2),
            torch.cat([self.values, other.values], 2),
            torch.cat([self.output, other.output], 1),
        )


class Together(Cache):
    """The cache that a model is given in place of many. `caches` may be reordered and cut between forward passes."""

    def __init__(self, caches: Sequence[PrunedCache]) -> None:
        """Raises CacheError where there is no cache, or one that does something around a forward pass."""
        if not caches or not all(map(shareable, caches)):
            raise CacheError("caches go together where there is one, and where all they do is in their layers.")
        super().__init__(layers=list(caches[0].layers))
        self.caches = list(caches)
        self.pruned_layers = caches[0].pruned_layers
        self.is_hybrid = False
        self.refused: dict[PrunedCache, KVPruneError] = {}
        self._shown: list[PrunedCache] | None = None
        self._late: list[PrunedCache] = []
        self._dtype: torch.dtype | None = None
        self._log: dict[int, _Seen] = {}
        self._unread: Unread | None = None
        self._logging = False
        self._incoming: tuple[int, Tensor, Tensor] | None = None

    @contextmanager
    def shown(
        self,
        others: Sequence[PrunedCache],
        *,
        late: Sequence[PrunedCache] = (),
        remember: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Iterator[None]:
        """One sequence in the batch: the first of `caches` attends, and `others`, which are empty, take it over.

        remember: keep what is seen, for caches that are `late`: shown all that was kept and what comes now, as one
        prompt. dtype: of what those that are shown hold from then on; None for the model's.
        """
        self._shown, self._late, self._logging, self._dtype = list(others), list(late), remember, dtype
        once = Once()
        for cache in (*others, *late):
            if cache.replay is not None:
                cache.replay = once
        try:
            yield
        finally:
            self._shown, self._late, self._logging, self._dtype = None, [], False, None

    @contextmanager
    def serving(self, cache: PrunedCache) -> Iterator[None]:
        """What is done for one cache: if it raises a KVPruneError, that is its last, and is no error of the others."""
        try:
            yield
        except KVPruneError as error:
            self.refused[cache] = error

    def _served(self, caches: Iterable[PrunedCache]) -> Iterator[PrunedCache]:
        return (cache for cache in caches if cache not in self.refused)

    @property
    def _first(self) -> PrunedCache:
        """Of those whose rows are in the batch, or, where it is one sequence, the one that attends."""
        return self.caches[0] if self._shown is not None else next(self._served(self.caches), self.caches[0])

    def forget(self) -> None:
        """Let go of what was kept for late ones."""
        self._log.clear()
        self._unread = None

    # -- what replays ask ------------------------------------------------------------------------------------------

    @property
    def replay(self) -> bool:
        """Whether any of the caches wants to know what comes in, see `passes/replay.py`."""
        return any(cache.replay is not None for cache in (*self.caches, *(self._shown or ()), *self._late))

    def note(self, length: int, unread: Unread) -> None:
        """See `PrunedCache.note`."""
        if self._shown is None:
            for row, cache in enumerate(self.caches):
                if cache.replay is not None and cache not in self.refused:
                    with self.serving(cache):
                        cache.note(length, unread.select_batch(torch.tensor([row])))
            return
        whole = unread
        if self._unread is not None:
            whole = self._unread.followed_by(unread, self.caches[0].model.get_input_embeddings())
        for cache, what in (*((each, unread) for each in self._shown), *((each, whole) for each in self._late)):
            if cache.replay is not None and cache not in self.refused:
                with self.serving(cache):
                    cache.note(len(what), what)
        if self._logging:
            self._unread = whole

    # -- what transformers asks ------------------------------------------------------------------------------------

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._incoming = layer_idx, keys, values
        return PendingKeys(keys, self), values  # type: ignore[return-value]

    def attend(self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **settings: Any) -> Tensor:
        """See `PrunedCache.attend`; there is no padding."""
        layer, keys, values = self._incoming  # type: ignore[misc]
        self._incoming = None
        if self._shown is None:
            output = query.new_zeros(len(query), query.shape[2], query.shape[1], values.shape[3])
            for row, cache in enumerate(self.caches):
                if cache not in self.refused:
                    one = slice(row, row + 1)
                    with self.serving(cache):
                        output[one] = _attended(cache, layer, module, query[one], keys[one], values[one], settings)
            return output
        first = self.caches[0]
        first.update(keys, values, layer)
        output = first.attend(module, query, None, **settings)
        seen = _Seen(query, keys, values, output)
        for cache in self._served(self._shown):
            with self.serving(cache):
                _show(cache, layer, module, seen, settings, self._dtype)
        if self._late:
            whole = self._log[layer].then(seen) if layer in self._log else seen
            for cache in self._served(self._late):
                with self.serving(cache):
                    _show(cache, layer, module, whole, settings, self._dtype)
        if self._logging:
            self._log[layer] = self._log[layer].then(seen) if layer in self._log else seen
        return output

    def bypassed(self) -> KVPruneError:
        """See `PrunedCache.bypassed`."""
        return self._first.bypassed()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._first.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._first.get_mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._first.get_query_offset(layer_idx)

    @property
    def is_compileable(self) -> bool:
        return False


def _attended(
    cache: PrunedCache,
    layer: int,
    module: torch.nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    settings: dict[str, Any],
) -> Tensor:
    """The output of attention of a cache that may hold another type than the model computes in."""
    table = cache.layers[layer].table
    held = keys.dtype if table is None else table.dims[2]
    cache.update(keys.to(held), values.to(held), layer)
    return cache.attend(module, query.to(held), None, **settings).to(query.dtype)


def _show(
    cache: PrunedCache,
    layer: int,
    module: torch.nn.Module,
    seen: _Seen,
    settings: dict[str, Any],
    dtype: torch.dtype | None,
) -> None:
    """Let an empty cache take over what was seen, in tensors of its own."""
    pruned: PrunedLayer = cache.layers[layer]
    own, pruned.backend = pruned.backend, _Known(seen.output.transpose(1, 2))
    held = dtype or seen.keys.dtype
    try:
        cache.update(seen.keys.to(held, copy=True), seen.values.to(held, copy=True), layer)
        cache.attend(module, seen.queries.to(held), None, **settings)
    finally:
        pruned.backend = own
