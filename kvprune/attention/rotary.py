"""Rotary positions, as far as scores ask for them: turned forward, turned back, and averaged over positions to come.

A rotation turns pairs of channels, by an angle that grows with the position. Which channels are a pair, how many are
turned, and how fast, differs from model to model: the model's own rotary embedding and the function that applies it say
so, and no layout is known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """The rotation of one layer's queries and keys.

    angles: cosines and sines of positions, LongTensor `[B, N]`, each `[B, N, A]`, as the model gives them, on any
        device; None where the layer turns nothing (learned positions, layers without any).
    apply: the model's own function of states `[B, H, N, D]`, cosines and sines; it may turn the first channels alone.
    """

    angles: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    apply: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def turn(self, states: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """States as they are at these positions; or, turned back from them, as they were before. Keeps every norm.

        states: `[B, H, N, D]`. positions: `[B or 1, N]`, below 0 for padding, of which any turn will do.
        """
        if self.angles is None:
            return states
        cosines, sines = self._unit(positions)
        return self._applied(states, cosines, -sines if back else sines)

    def mean_turn(self, states: Tensor, positions: Tensor) -> Tensor:
        """The mean over positions `[B or 1, N]` of what states `[B, H, M, D]` are at them, `[B, H, M, D]`."""
        if self.angles is None:
            return states
        cosines, sines = (part.mean(1, keepdim=True) for part in self._unit(positions))  # rotation is linear in both
        return self._applied(states, cosines, sines)

    def pair_norms(self, states: Tensor) -> Tensor:
        """Norms of the pairs of channels that are turned together, at both of them; 0 where nothing is turned.

        states: `[B, H, N, D]`; so is the result. No rotation changes it.
        """
        if self.angles is None:
            return torch.zeros_like(states)
        cosines, sines = self._unit(torch.zeros(1, 1, dtype=torch.int64, device=states.device))
        none, quarter = torch.zeros_like(cosines), torch.ones_like(sines)
        partners = self._applied(states, none, quarter)  # of a quarter turn, what is left in place is not turned at all
        turned = self._applied(states, none, none) == 0
        return torch.where(turned, (states.square() + partners.square()).sqrt(), 0.0)

    def _unit(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Without the factor that some models (YaRN, LongRoPE) multiply both by: queries and keys have it already."""
        cosines, sines = (part.to(positions.device) for part in self.angles(positions.clamp(min=0)))  # type: ignore[misc]
        size = (cosines.square() + sines.square()).sqrt()
        return cosines / size, sines / size

    def _applied(self, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        turned: Tensor = self.apply(states, cosines.to(states.dtype), sines.to(states.dtype))  # type: ignore[misc]
        return turned


NO_ROTARY = Rotary()
