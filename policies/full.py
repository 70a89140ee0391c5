"""Full: the dense cache, to compare with."""

from __future__ import annotations

from dataclasses import dataclass

from kvprune.policy.base import Policy


@dataclass(frozen=True)
class Full(Policy):
    """Keeps every token."""
