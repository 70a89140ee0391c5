"""A step that `crop` may still take back: what assisted decoding has drafted."""

from __future__ import annotations

from dataclasses import dataclass

from kvprune.attention.mass import Scoring
from kvprune.attention.queries import Queries


@dataclass
class Undecided:
    """A step whose tokens `crop` may still take back."""

    queries: Queries
    prefill: bool
    scoring: Scoring
