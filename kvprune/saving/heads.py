"""`HeadScores`: how much each KV head of a model looks back, measured once by a replay, and kept in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from kvprune.cache.models import cache_argument
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.errors import CacheError
from kvprune.policy.base import Policy
from kvprune.saving import measured
from kvprune.saving.fingerprint import differences, fingerprint

_FORMAT, _WHAT = "kvprune.heads", "scores of heads"


@dataclass(frozen=True)
class HeadScores:
    """For every pruned layer and KV head the most that a replay gave to one of its rows, sinks left out.

        heads = HeadScores.measure(model, tokenizer(text, return_tensors="pt").input_ids, KVzip())
        heads.save("heads.json")
        PrunedCache(model, KVzip(0.5, level="head", heads=heads.scores))

    scores: of each layer, in their order, one for each KV head. model: what tells whose they are.
    """

    scores: tuple[tuple[float, ...], ...]
    model: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def measure(cls, model: Any, ids: Tensor, policy: Policy) -> Self:
        """Let a model read a text, ids `[1, n]`, twice. policy: what replays, such as `KVzip()`; nothing is evicted.

        Raises CacheError for a policy that replays nothing, and for a text that is no longer than its sinks.
        """
        replays = [part for part in policy.parts() if part.replay is not None]
        if len(replays) != 1:
            raise CacheError(f"{policy} replays nothing, so heads cannot be measured by it: give KVzip().")
        sinks = replays[0].replay.sinks  # type: ignore[union-attr]
        if ids.ndim != 2 or len(ids) != 1 or ids.shape[1] <= sinks:
            raise CacheError(f"give the ids of one text of more than {sinks} tokens, [1, n], not {list(ids.shape)}.")
        cache = PrunedCache(model, replace(replays[0], budget=1.0))  # type: ignore[call-arg]
        model(ids.to(model.device), **cache_argument(cache))
        found = []
        for index in cache.pruned_layers:
            cache.kept_positions(index)  # the prompt has ended
            table = cache.layers[index].table
            column = table[replays[0].replay.column]  # type: ignore[union-attr]
            best = column.masked_fill(table.positions < sinks, 0.0).amax(-1)[0]
            found.append(tuple(round(score, 6) for score in best.tolist()))
        return cls(tuple(found), fingerprint(model))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a file, JSON. Raises CacheError where it cannot be written."""
        measured.write(path, _WHAT, _FORMAT, {"scores": self.scores, "model": self.model})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any = None, *, trust_model: bool = False) -> Self:
        """Read what `save` wrote. model: that they are for; without one, only their form is looked at.

        Raises CacheError for a file that is none or of another model. trust_model: as of `PrunedCache.load`.
        """
        read = measured.read(path, _WHAT, _FORMAT)
        if not _are_scores(read.get("scores")):
            raise CacheError(f"{path} cannot be loaded: its scores of heads are damaged.")
        if model is not None and (told := differences(read["model"], fingerprint(model), trust_model=trust_model)):
            raise CacheError(f"{path} cannot be loaded: it is of another model, {'; '.join(told)}.")
        return cls(tuple(tuple(float(score) for score in layer) for layer in read["scores"]), read["model"])


def _are_scores(given: Any) -> bool:
    return (
        isinstance(given, list)
        and bool(given)
        and all(isinstance(layer, list) and layer for layer in given)
        and all(type(score) in (int, float) and 0 <= score < float("inf") for layer in given for score in layer)
    )
