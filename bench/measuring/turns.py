"""Caches that take turns of a few steps, so that whatever the machine does beside meets all of them alike.

Needs nothing but Python, so it also runs in environments that have no torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Protocol, TypeVar

Name = TypeVar("Name", bound=Hashable)


class Going(Protocol):
    """A cache that has read a prompt and goes on from there."""

    def turn(self, steps: int) -> float:
        """Seconds of a step."""


def seconds_of(step: Callable[[], None], steps: int) -> float:
    """Seconds of a step, the median of so many after the first."""
    taken = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def take_turns(going: Mapping[Name, Going], turns: int, steps: int) -> dict[Name, list[float]]:
    """For each of them seconds of a step, turn by turn."""
    taken: dict[Name, list[float]] = {name: [] for name in going}
    for turn in range(turns + 1):
        for name, generation in going.items():
            seconds = generation.turn(steps)
            if turn:  # in the first one, memory is mapped
                taken[name].append(seconds)
    return taken
