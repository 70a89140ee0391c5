"""`Trip`: a forward pass in which tokens stop between layers, and others that stopped in earlier passes go on.

    columns     the model's input, behind the `width` tokens that stopped earlier and may come back
    stream      what the last layer that computed a column made of it, `[B, columns + 1, H]`; there when one is left out
    enter       the layer is given the states, and all that goes with them, of the columns that it is to compute
    leave       its output goes back to where those came from, and the model sees as many columns as it gave
    arrive      what has not come through all layers goes into the cache's ledger, if it may come back

Every layer counts all tokens, whatever it computes, so lengths, masks and positions stay what they are. The ledger is
written when the last layer is through: a pass that fails before leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.cache.columns import Looked, Reading
from kvprune.cache.ledger import Ledger
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.cache.registration import PendingMask
from kvprune.cache.selection import FilteredStep
from kvprune.errors import UnsupportedModelError
from kvprune.policy.passage import Passage
from kvprune.table.kept_heads import KeptHeads
from kvprune.table.rows import EMPTY
from kvprune.table.token_table import TokenTable


class Trip:
    """One forward pass. `Hidden` states are `[B, L, H]`; columns without a token have the position -1."""

    def __init__(
        self, cache: PrunedCache, hidden: Tensor, mask: Any, *, revives: bool, scored: bool, skips: bool = False
    ) -> None:
        """hidden: of the first layer. mask: that it is given. revives: whether tokens that stop may go on later.

        scored: whether a score of every token is held. skips: whether a token that a layer leaves out goes past it, for
        those above to compute; of that nothing is held when the pass is over.

        Raises CacheError for a mask that the cache cannot serve.
        """
        layer = cache.layers[0]
        batch, self.length = hidden.shape[:2]
        self.cache, self.revives, self.skips = cache, revives, skips
        self.looked = cache.look(mask, self.length, hidden.device, batch)
        valid, past = (None, None) if self.looked is None else (self.looked.valid, self.looked.past)
        before = layer.tokens or (0,) * batch
        before = before if past is None else past.left(before)
        positions = torch.arange(self.length, device=hidden.device).expand(batch, -1)
        if valid is not None:
            positions = valid.cumsum(1) - 1
        positions = positions + torch.tensor(before, device=hidden.device)[:, None]
        self.added = (self.length,) * batch if valid is None else tuple(valid.sum(1).tolist())
        self.tokens = tuple(a + b for a, b in zip(before, self.added, strict=True))
        self.prefill = layer.takes_prompt(self.length, None)
        self.begins = layer.table is None
        # Those that sequences began with stay; where some do, and have all, so have those that begin beside them.
        self.chooses_heads = 0 in before and (not any(before) or cache.layers[-1].kept_heads is not None)
        self.heads: KeptHeads | None = None  # that layers compute from here on; None for all
        self.head_score: Tensor | None = None
        ledger: Ledger = layer.ledger or Ledger()
        self.ledger = ledger if past is None else ledger.moved(past)
        self.score = self.ledger.scores(max(self.tokens))
        if scored and self.score is None:
            self.score = torch.zeros(batch, max(self.tokens), dtype=torch.float32, device=hidden.device)

        self.positions = positions if valid is None else positions.masked_fill(~valid, EMPTY)
        self.frontier = torch.zeros_like(self.positions)
        self.width = 0
        if revives and self.ledger.positions is not None and self.ledger.frontier is not None:
            self.width = self.ledger.positions.shape[1]
            self.positions = torch.cat([self.ledger.positions.to(hidden.device), self.positions], dim=1)
            self.frontier = torch.cat([self.ledger.frontier.to(hidden.device), self.frontier], dim=1)
        self.new = self.positions >= 0
        self.new[:, : self.width] = False
        self.go = self.new  # which columns the layer at hand computes
        self.stops = set(self.ledger.stops)  # after how many layers columns may have stopped
        self.active: Tensor | None = None  # tokens that layers look at from here on; None for all
        self.passage = Passage(self.tokens, self.added)
        self.stream: Tensor | None = None
        self.at: Tensor | None = None  # the columns that the layer computes, the last one for none; None for the new
        self._given: dict[str, Any] = {}  # what the first layer was given
        self._out_of_order = self._changed = False
        self._mask: PendingMask | None = None
        self._taken: dict[int, tuple[Any, Any]] = {}

    # -- before a layer ----------------------------------------------------------------------------------------------

    def enter(self, index: int, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any] | None:
        """What a layer is given in place of its arguments, by name; None if it is given what it was.

        hidden: what the model gives to it. given: all its arguments.
        """
        if not index:
            self._given = given
        if self._changed or index in self.stops:
            self._choose(index)
        last = index + 1 == len(self.cache.layers)
        self.passage = Passage(
            self.tokens,
            self.added,
            active=None if self.begins or self.skips else self.active,
            above=None if self.begins or self.revives or self.skips or last else self._above(index),
            out_of_order=self._out_of_order,
            score=self.score,
            begins=self.chooses_heads,
            heads=self.heads,
            head_score=self.head_score,
        )
        placed = None if self.at is None else self._placed()
        self.cache.expect(FilteredStep(placed, self.added, self.length, self.prefill, self.passage), None)
        if self.at is None:
            return None
        stream = self._stream(hidden)
        taken = {name: self._take(name, value) for name, value in given.items()}
        at = self.at.to(stream.device)
        states = stream.gather(1, at[..., None].expand(-1, -1, stream.shape[2]))
        return taken | {"hidden_states": states, "attention_mask": self._mask}

    def _above(self, index: int) -> TokenTable:
        """The table of the next layer, its rows where they will be once that layer knows what the mask hides."""
        table = self.cache.layers[index + 1].table
        past = None if self.looked is None else self.looked.past
        if past is None:
            return table
        held = table.positions
        moved = past.on(held.device)[:, None].expand(-1, table.kv_heads, -1)
        new = moved.gather(2, held.clamp(min=0).long()).to(held.dtype)
        return table.with_positions(new.masked_fill(held < 0, EMPTY))

    def _choose(self, index: int) -> None:
        """Find out which columns the layer computes: the new ones, as one, or those of `at`."""
        self._changed, self._taken = False, {}
        go = self.new if self.skips else (self.positions >= 0) & (self.frontier == index)
        if self.active is not None:
            go = go & self.active.gather(1, self.positions.clamp(min=0))
        if 0 in self.added:  # a sequence to which this step is padding alone asks for nothing
            go = go & (torch.tensor(self.added, device=go.device)[:, None] > 0)
        counts = go.sum(1)
        told = torch.stack([counts.max(), counts.min(), (go != self.new).any(), go[:, : self.width].any()])
        most, least, differs, revived = told.tolist()  # the one time that the device is waited for
        self.go, self._out_of_order = go, bool(revived)
        if not differs:
            self.at = None
            return
        # In the order of positions, so that rows come in it; columns that are none come first, as padding does.
        ranked = self.positions.masked_fill(~go, EMPTY).argsort(dim=1, stable=True)
        self._pick = ranked[:, ranked.shape[1] - most :]
        self._real = None if least == most else go.gather(1, self._pick)
        columns = go.shape[1]
        self.at = self._pick if self._real is None else self._pick.masked_fill(~self._real, columns)
        if self._real is None and self.looked is None:
            self._mask = None
        else:
            known = self.cache.layers[0].columns if self.looked is None else self.looked.columns
            past = None if self.looked is None else self.looked.past
            self._mask = PendingMask(None, self.cache, None, True)
            self._mask.reading = Reading.known(Looked(self._real, past, known))

    def _placed(self) -> Tensor:
        placed = self.positions.gather(1, self._pick)
        return placed if self._real is None else placed.masked_fill(~self._real, EMPTY)

    def _stream(self, hidden: Tensor) -> Tensor:
        if self.stream is None:
            earlier = [] if not self.width or self.ledger.states is None else [self.ledger.states.to(hidden)]
            self.stream = F.pad(torch.cat([*earlier, hidden], dim=1), (0, 0, 0, 1))
        else:  # the model, or a hook of somebody else, may have added to what it was given
            self.stream = self.stream.to(hidden.device)
            self.stream[:, self.width : -1] = hidden
        return self.stream

    def _take(self, name: str, value: Any) -> Any:
        """Of an argument that has something for every token the part of the columns at hand."""
        if id(value) in self._taken and self._taken[id(value)][0] is value:  # as other layers were given it
            return self._taken[id(value)][1]
        result = self._picked(name, value, self._pick)
        self._taken[id(value)] = value, result
        return result

    def _picked(self, name: str, value: Any, pick: Tensor) -> Any:
        return _of_tokens(name, value, len(pick), self.length, lambda path, own: self._with_earlier(path, own, pick))

    def _with_earlier(self, path: str, own: Tensor, pick: Tensor) -> Tensor:
        """Columns of something that is held for every token. own: of the new ones, `[B, L, ...]`."""
        if self.width:
            earlier = self.ledger.arguments.get(path)
            if earlier is None or earlier.shape[2:] != own.shape[2:]:
                raise self.cache.misused(
                    f"its layers are given {path} of another kind than before, and tokens of earlier steps go on that "
                    "have none",
                    UnsupportedModelError,
                )
            own = torch.cat([earlier.to(own), own], dim=1)
        return own.gather(
            1, pick.to(own.device).view(*pick.shape, *(1,) * (own.ndim - 2)).expand(-1, -1, *own.shape[2:])
        )

    # -- after it ----------------------------------------------------------------------------------------------------

    def leave(self, index: int, output: Tensor) -> Tensor:
        """What the model goes on with, for all of its columns. output: of the layer, of those that it computed."""
        self.frontier = torch.where(self.go, index + 1, self.frontier)
        if self.stream is not None:
            self.stream = self.stream.to(output.device)  # where the layer is, on a model spread over several devices
            if self.at is None:
                self.stream[:, self.width : -1] = output
            else:
                at = self.at.to(output.device)[..., None].expand(-1, -1, output.shape[2])
                self.stream.scatter_(1, at, output.to(self.stream.dtype))
                output = self.stream[:, self.width : -1].clone()  # which somebody may hold, as output_hidden_states
        onward = self.passage.onward
        if onward is not None:
            self._go_on(index, onward.to(self.positions.device))
        if self.passage.head_score is not None:
            self._keep_heads(self.passage.head_score, self.passage.heads_onward)
        return output

    def _keep_heads(self, score: Tensor, left: Tensor | None) -> None:
        self.head_score = score
        if left is not None:
            heads = self.heads or KeptHeads(
                torch.arange(score.shape[1], device=score.device).expand_as(score), score.shape[1]
            )
            self.heads, self.head_score = heads.without(left), score.gather(1, left)

    def _go_on(self, index: int, onward: Tensor) -> None:
        ends = torch.tensor(self.tokens, device=onward.device)[:, None]
        onward = onward | (torch.arange(onward.shape[1], device=onward.device) == ends - 1)
        if 0 in self.added:
            onward |= torch.tensor(self.added, device=onward.device)[:, None] == 0
        self.active = onward if self.active is None or self.skips else onward & self.active
        self.stops.add(index + 1)
        self._changed = True

    def arrive(self, layers: int) -> None:
        """The last of so many layers is through: write down what may go on later."""
        first = self.cache.layers[0]
        ledger = Ledger(None if self.skips else self.score)
        if self.stream is None:
            if self.width:  # nothing has happened to them
                ledger = self.ledger.with_score(self.score)
        elif self.revives:
            left = (self.positions >= 0) & (self.frontier < layers)
            most = int(left.sum(1).max())
            if most:
                ledger = self._of(left, most)
        first.ledger = ledger if ledger.tensors() else None

    def _of(self, left: Tensor, most: int) -> Ledger:
        pick = left.to(torch.int8).argsort(dim=1, stable=True)[:, left.shape[1] - most :]
        real = left.gather(1, pick)
        stream: Tensor = self.stream  # type: ignore[assignment]
        arguments: dict[str, Tensor] = {}

        def note(path: str, own: Tensor) -> Tensor:
            arguments[path] = self._with_earlier(path, own, pick).detach()
            return own

        for name, value in self._given.items():
            _of_tokens(name, value, len(left), self.length, note)
        return Ledger(
            self.score,
            self.positions.gather(1, pick).masked_fill(~real, EMPTY),
            self.frontier.gather(1, pick),
            stream.gather(1, pick.to(stream.device)[..., None].expand(-1, -1, stream.shape[2])).detach(),
            arguments,
            tuple(sorted(self.stops)),
        )


def _of_tokens(path: str, value: Any, batch: int, length: int, function: Callable[[str, Tensor], Tensor]) -> Any:
    """An argument of a layer with `function(path, [B, L, ...])` in place of what has something for every token.

    Positions of three dimensions give cosines and sines `[3, B, L, D]`; all others begin with the sequences, or with 1.
    """
    if isinstance(value, tuple | list):
        parts = [_of_tokens(f"{path}.{number}", each, batch, length, function) for number, each in enumerate(value)]
        return type(value)(parts)
    if not isinstance(value, Tensor) or path in ("hidden_states", "attention_mask"):
        return value
    if value.ndim == 4 and value.shape[1] in (1, batch) and value.shape[2] == length:
        own = value.expand(-1, batch, -1, -1).permute(1, 2, 0, 3)
        return function(path, own).permute(2, 0, 1, 3)
    if value.ndim >= 2 and value.shape[0] in (1, batch) and value.shape[1] == length:
        return function(path, value.expand(batch, *value.shape[1:]))
    return value
