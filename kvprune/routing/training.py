"""Gradients through a model whose tokens go past layers: its weights stay as they are, and its gates learn.

    loss = KL(model || routed model), mean over tokens, in nats
         + guide * mean over layers and tokens of the cross entropy with the choice of the static router

A gate opens for as many tokens as it does afterwards, and its gradient is that of a sigmoid in place of the step. The
paper lets every token decide by itself, and holds the share of them by a loss; here the schedule's share is met.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from kvprune.attention.mass import Scoring, row_probabilities
from kvprune.cache.models import cache_argument
from kvprune.cache.registration import PendingKeys
from kvprune.errors import CacheError, KVPruneError
from kvprune.routing.gates import FEATURES, Gate, features


class Routing(Protocol):
    """What is to be known of a policy that routes."""

    @property
    def window(self) -> int | None: ...

    def sparsity(self, layer: int, layers: int) -> float: ...


@dataclass(frozen=True)
class Loss:
    """What gates are trained to make small, of one text."""

    distillation: Tensor
    guide: Tensor


_LEAST = 1e-4  # of a row's attention, of which what is left is made whole


class RoutedPass(DynamicCache):
    """In place of a cache, one forward pass of a text whose tokens go past layers as gates say, with gradients.

    Every layer computes all tokens here; what those that go past it were is put in place of what became of them, and
    nobody attends to them there. The hooks of `between_layers` ask it as they ask a policy, and a pass of one.
    """

    def __init__(self, policy: Routing, gates: dict[int, Gate] | None, layers: int, length: int) -> None:
        """gates: of layers that some tokens go past; without any, the static router chooses."""
        super().__init__()
        self.policy, self.gates, self.layer_count, self.length = policy, gates, layers, length
        self.cascade = _Begins(self)
        self.trip: Any = None
        self.keep = torch.ones(length, dtype=torch.bool)
        self.passing: Tensor | None = None
        self.score = torch.zeros(length)
        self.guides: list[Tensor] = []

    # -- what the hooks ask ------------------------------------------------------------------------------------------

    def expect(self, *_: Any) -> None:
        """Nothing was left out before the first layer."""

    def enter(self, index: int, hidden: Tensor, given: dict[str, Any]) -> None:
        self.came = hidden

    def leave(self, index: int, output: Tensor) -> Tensor:
        if self.passing is not None:
            opened = self.passing.to(output)[None, :, None]
            output = self.came + opened * (output - self.came)
        self._choose(index + 1)
        return output

    def arrive(self, layers: int) -> None:
        """Nothing is held."""

    def _choose(self, index: int) -> None:
        """Which tokens compute a layer."""
        self.passing, self.keep = None, torch.ones_like(self.keep)
        sparsity = self.policy.sparsity(index, self.layer_count) if index < self.layer_count else 0.0
        if not sparsity:
            return
        always = torch.zeros_like(self.keep)
        always[[0, -1]] = True
        count = max(round((1 - sparsity) * self.length), int(always.sum()))
        static = _best(self.score, always, count)
        if self.gates is None:
            self.keep, self.passing = static, static.float()
            return
        none, all_of_them = (torch.tensor([[number]], device=self.score.device) for number in (0, self.length))
        opening = self.gates[index].opening(features(self.score[None], none, all_of_them, sparsity))[0]
        self.keep = _best(opening.detach(), always, count)
        opening = opening - opening.mean()  # tokens compete: what is good for all of them opens no gate
        least = opening.detach().masked_fill(~self.keep | always, torch.inf).min()
        likely = (opening - least).sigmoid() if least < torch.inf else torch.ones_like(opening)
        self.passing = torch.where(always, 1.0, self.keep + likely - likely.detach())
        self.guides.append(F.binary_cross_entropy(likely, static.float()))

    # -- what the attention asks -------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.keys, self.values = key_states, value_states
        return PendingKeys(key_states, self), value_states

    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Any, *, scaling: float | None = None,
        softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        scoring = Scoring(query.shape[3] ** -0.5 if scaling is None else scaling, softcap, s_aux)
        keep = self.keep = self.keep.to(query.device)
        places = torch.arange(self.length, device=query.device)
        later, own = places[None] > places[:, None], places[None] == places[:, None]
        attention = row_probabilities(query, self.keys, scoring, later | (~keep[None] & ~own))
        if self.passing is not None and self.passing.requires_grad:
            # What it would be if tokens that have no row here had one: nothing is added but the gradient.
            every = row_probabilities(query, self.keys, scoring, later) * torch.where(own, 1.0, self.passing)
            every = every / every.sum(-1, keepdim=True).clamp(min=_LEAST)
            attention = attention + (every - every.detach())
        rows = keep.nonzero()[:, 0]
        rows = rows[len(rows) - min(self.policy.window or len(rows), len(rows)) :]
        given = attention.detach()[0, :, :, rows].sum(2).mean((0, 1)) / len(rows)
        self.score = torch.where(keep, given, self.score.to(given.device))
        output = torch.einsum("bhgls,bhsd->blhgd", attention.to(self.values.dtype), self.values)
        return output.flatten(2, 3)

    def bypassed(self, use: str = "") -> KVPruneError:
        return CacheError(f"this model uses keys in a way that gates cannot be trained through ({use}).")

    def misused(self, reason: str, error: type[KVPruneError] = CacheError) -> KVPruneError:
        return error(f"gates cannot be trained here: {reason}.")


def _best(score: Tensor, always: Tensor, count: int) -> Tensor:
    """So many of the tokens, bool `[n]`, those that always go among them; ties go to the more recent one."""
    order = score.masked_fill(always, torch.inf).flip(0).argsort(descending=True, stable=True)
    return torch.zeros_like(always).index_fill_(0, len(score) - 1 - order[:count], True)


class _Begins:
    """What the hooks ask for the pass itself, before its first layer."""

    def __init__(self, routed: RoutedPass) -> None:
        self.routed = routed

    def trip(self, *_: Any) -> RoutedPass:
        return self.routed


def loss_of(model: Any, ids: Tensor, policy: Routing, gates: dict[int, Gate] | None, layers: int) -> Loss:
    """The loss of gates on one text, ids `[1, n]`; without gates, that of the static router, which costs no guide."""
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
    routed = RoutedPass(policy, gates, layers, ids.shape[1])
    found = model(ids, **cache_argument(routed)).logits[0].float().log_softmax(-1)
    distillation = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
    return Loss(distillation, torch.stack(routed.guides).mean() if routed.guides else distillation.new_zeros(()))


def new_gate(units: int, generator: torch.Generator) -> Gate:
    """A gate that has learned nothing yet: it is that of the static router, but for a little noise."""
    inner, outer = (torch.randn(shape, generator=generator) * 0.1 for shape in ((units, FEATURES), (units,)))
    inner[0] = torch.tensor([0.0, 0.0, 4.0, 0.0])
    outer[0] = 1.0
    return Gate(inner, torch.zeros(units), outer)


def train(
    model: Any, ids: Tensor, policy: Routing, layers: int, *, steps: int, length: int, units: int, rate: float,
    guide: float, seed: int,
) -> tuple[dict[int, Gate], list[float]]:  # fmt: skip
    """Gates of the layers that tokens go past, and the loss of every step. The model's weights get no gradients."""
    generator = torch.Generator().manual_seed(seed)
    routed = [layer for layer in range(layers) if policy.sparsity(layer, layers)]
    gates = {layer: new_gate(units, generator) for layer in routed}
    gates = {layer: Gate(*(part.to(model.device).requires_grad_() for part in gate)) for layer, gate in gates.items()}
    numbers = [part for gate in gates.values() for part in gate]
    optimizer = torch.optim.Adam(numbers, lr=rate)
    losses = []
    for _ in range(steps):
        begin = int(torch.randint(ids.shape[1] - length + 1, (1,), generator=generator))
        with torch.enable_grad():
            parts = loss_of(model, ids[:, begin : begin + length], policy, gates, layers)
            loss = parts.distillation + guide * parts.guide
            # Asked for these alone, so that the weights of the model get none.
            gradients = torch.autograd.grad(loss, numbers, allow_unused=True)
        for number, gradient in zip(numbers, gradients, strict=True):
            number.grad = gradient
        optimizer.step()
        losses.append(float(loss.detach()))
    return {layer: Gate(*(part.detach() for part in gate)) for layer, gate in gates.items()}, losses
