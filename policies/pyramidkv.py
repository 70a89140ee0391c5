"""PyramidKV: the first layers keep more than the last ones. Cai et al., arXiv 2406.02069, 2024."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from kvprune.policies.snapkv import SnapKV
from kvprune.policy.shares import Pyramid, Share

FALLING = Pyramid(beta=20)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's scores, and budgets that fall linearly with depth, as `Pyramid` says.

    The window and the kernel are those of the authors' LongBench runs. Their code rounds the step between two layers
    down and spends up to some per cent more than its budget; here the layers keep it exactly, on average.

    Settings (beside those of `SnapKV`):
        share: how budgets fall.
    """

    _: KW_ONLY
    window: int = 8
    share: Share = FALLING
