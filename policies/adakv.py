"""AdaKV: the heads of a layer compete for its rows. Feng et al., arXiv 2407.11550, NeurIPS 2025."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from kvprune.policies.snapkv import SnapKV
from kvprune.policy.shares import Adaptive, Share

COMPETING = Adaptive(floor=0.2)


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's scores, and a budget that goes to the KV heads of a layer where its best scores are.

        rows of head h = floor * C + (1 - floor) * (how many of the layer's best Hkv * C rows are h's)

    C is the budget without the window, which every head keeps. The total is exact, by largest remainder. Attention mass
    is averaged over the query heads of a KV head before it is pooled, as the authors recommend for grouped queries.

    Settings (beside those of `SnapKV`):
        share: who gets rows; the authors' evaluation of grouped queries gives every head a fifth of the budget.
    """

    _: KW_ONLY
    share: Share = COMPETING
