"""`ReplayedEviction`: base of the policies that rank rows by what a replay of the prompt gives to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from kvprune.passes import replay
from kvprune.policy.eviction import Eviction
from kvprune.policy.replaying import Replay


@dataclass(frozen=True)
class ReplayedEviction(Eviction, ABC):
    """Its prompts are replayed when they have ended, and then it decides, for all layers."""

    @property
    @abstractmethod
    def replay(self) -> Replay | None:
        """What is to be run again, and what of it to write down; None where that is known beforehand."""

    @property
    def decides_together(self) -> bool:
        return True

    def columns(self) -> dict[str, torch.dtype]:
        return {} if self.replay is None else {self.replay.column: torch.float32}

    def attach(self, cache: Any, model: Any) -> None:
        if self.replay is not None:
            replay.attach(cache, model)
