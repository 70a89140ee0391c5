"""`Ledger`: what a cache remembers of tokens that its layers do not: see `kvprune.passes.trip`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.cache.columns import Past
from kvprune.state import Saved, State
from kvprune.table.rows import EMPTY


@dataclass(frozen=True)
class Ledger:
    """Scores of all tokens, and what it takes to go on with those that stopped at a layer and may come back.

    score: float32 `[B, N]`, by position; None where the policy holds none. Of tokens that stopped, `m` of a sequence
    at most: positions: LongTensor `[B, m]`, ascending, -1 for none. frontier: LongTensor `[B, m]`, how many layers have
    computed them. states: `[B, m, H]`, what the last of those made of them. arguments: what layers are given for every
    token beside its state, `[B, m, ...]`, by name. stops: every number that may be in `frontier`.
    """

    score: Tensor | None = None
    positions: Tensor | None = None
    frontier: Tensor | None = None
    states: Tensor | None = None
    arguments: dict[str, Tensor] = field(default_factory=dict)
    stops: tuple[int, ...] = ()

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("score", "positions", "frontier", "states"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor

    def tensors(self) -> list[Tensor]:
        return [tensor for _, tensor in self._named()] + list(self.arguments.values())

    def _each(self, function: Any) -> Ledger:
        arguments = {name: function(tensor) for name, tensor in self.arguments.items()}
        return replace(self, arguments=arguments, **{name: function(tensor) for name, tensor in self._named()})

    def clone(self) -> Ledger:
        return self._each(torch.clone)

    def select_batch(self, rows: Tensor) -> Ledger:
        """These sequences, in this order."""
        return self._each(lambda tensor: tensor[rows.to(tensor.device)])

    def crop(self, tokens: tuple[int, ...]) -> Ledger:
        """Only the first so many tokens of each sequence."""
        score, positions = self.score, self.positions
        if score is not None:
            ends = torch.tensor(tokens, device=score.device)[:, None]
            score = score[:, : max(tokens)].clone()
            score.masked_fill_(torch.arange(score.shape[1], device=score.device) >= ends, 0.0)
        if positions is not None:
            ends = torch.tensor(tokens, device=positions.device)[:, None]
            positions = positions.masked_fill(positions >= ends, EMPTY)
        return replace(self, score=score, positions=positions)

    def moved(self, past: Past) -> Ledger:
        """Where a mask hides tokens: those behind them move up."""
        score, positions = self.score, self.positions
        if score is not None:
            new = past.on(score.device).long()
            width = max(score.shape[1], new.shape[1])
            score, new = F.pad(score, (0, width - score.shape[1])), F.pad(new, (0, width - new.shape[1]), value=EMPTY)
            at = torch.where(new < 0, width, new)
            score = score.new_zeros(len(score), width + 1).scatter_(1, at, score)[:, :width].clone()
        if positions is not None:
            new = past.on(positions.device).long().gather(1, positions.clamp(min=0))
            positions = new.masked_fill(positions < 0, EMPTY)
        return replace(self, score=score, positions=positions)

    def scores(self, tokens: int) -> Tensor | None:
        """Of so many tokens, in a tensor of its own; zero for those that are new."""
        return None if self.score is None else F.pad(self.score, (0, tokens - self.score.shape[1])).clone()

    def with_score(self, score: Tensor | None) -> Ledger:
        return replace(self, score=score)

    # -- saved and restored ------------------------------------------------------------------------------------------

    def state(self) -> State:
        tensors = dict(self._named()) | {f"arguments.{name}": tensor for name, tensor in self.arguments.items()}
        return State({"arguments": sorted(self.arguments), "stops": list(self.stops)}, tensors)

    @classmethod
    def restored(cls, saved: Saved, tokens: tuple[int, ...], layers: int) -> Ledger:
        """tokens: of each sequence. Raises CacheError."""
        batch, most = len(tokens), max(tokens)
        score = None
        if saved.has("score"):
            (_, width), _ = _shaped(saved, "score", 2)  # of sequences that are gone, which may have been longer
            score = saved.tensor("score", (batch, width), torch.float32)
        if not saved.has("positions"):
            return cls(score)
        (_, held), _ = _shaped(saved, "positions", 2)
        shape = batch, held
        (*_, width), dtype = saved.numbers("states", ndim=3)
        names = saved.fact("arguments", list)
        if not all(isinstance(name, str) for name in names):
            raise saved.refused(f"has {names!r} as names of arguments")
        arguments = {}
        for name in names:
            found, kind = saved.described(f"arguments.{name}")
            arguments[name] = saved.tensor(f"arguments.{name}", (*shape, *found[2:]), kind)
        return cls(
            score,
            saved.tensor("positions", shape, torch.int64, within=(EMPTY, most - 1)),
            saved.tensor("frontier", shape, torch.int64, within=(0, layers)),
            saved.tensor("states", (*shape, width), dtype),
            arguments,
            saved.counts("stops", layers),
        )


def _shaped(saved: Saved, name: str, ndim: int) -> tuple[tuple[int, ...], torch.dtype]:
    shape, dtype = saved.described(name)
    if len(shape) != ndim:
        raise saved.refused(f"has {name} of shape {list(shape)}")
    return shape, dtype
