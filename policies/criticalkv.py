"""CriticalKV: what is attended to, then what that adds to the output. Feng et al., arXiv 2502.03805, 2025."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.policies.adakv import COMPETING
from kvprune.policies.snapkv import SnapKV
from kvprune.policy.ranking import VALUE_SIZE
from kvprune.policy.settings import check_number
from kvprune.policy.shares import ALWAYS_KEPT, NEVER_KEPT, Share
from kvprune.table.rows import top_rows
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class CriticalKV(SnapKV):
    """SnapKV in two stages: half of the rows go by attention, the others by what they add to the output.

        first     the best rows by A_k = pooled attention of the window, as in SnapKV
        then      the best of the others by  (A_k + epsilon) * |W_o v_k|_1

    |W_o v| is averaged over the query heads of a KV head. Sinks and window are kept before either stage. Where heads
    compete (`CriticalAdaKV`), attention alone says how many rows each gets. The same as kvpress' CriticalKVPress over
    SnapKVPress, whose scores are means over 32 queries, and which counts the window in the first half.

    Any policy that scores by attention takes the second stage alone: `A2SF(0.25, value_aware=True)`.

    Settings (beside those of `SnapKV`):
        first_stage: the share of the rows, beside sinks and window, that goes by attention; rounded down.
        value_epsilon: added to scores in the second stage: the larger, the more values count alone.
    """

    _: KW_ONLY
    value_aware: bool = True
    first_stage: float = 0.5
    value_epsilon: float = 32e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_aware is not True:
            raise PolicyError(f"value_aware={self.value_aware!r} makes SnapKV of {type(self).__name__}: write that.")
        check_number("first_stage", self.first_stage, low=0, high=1)
        check_number("value_epsilon", self.value_epsilon, low=0, high=1e9)

    def weighed(self, scores: Tensor, table: TokenTable) -> Tensor:
        return scores

    @property
    def refines(self) -> bool:
        return True

    def refined(
        self, retention: Tensor, scores: Tensor, table: TokenTable, kept: Tensor, ranked_by: Callable[[Tensor], Tensor]
    ) -> Tensor:
        always = (retention == ALWAYS_KEPT).sum(-1, keepdim=True)
        first = ((kept - always).clamp(min=0) * self.first_stage + 1e-9).long() + always
        by_output = ranked_by((scores + self.value_epsilon) * table[VALUE_SIZE])
        chosen = top_rows(retention, first) & (by_output > NEVER_KEPT)
        return super().refined(by_output.masked_fill(chosen, ALWAYS_KEPT), scores, table, kept, ranked_by)


@dataclass(frozen=True)
class CriticalAdaKV(CriticalKV):
    """CriticalKV over AdaKV: the heads of a layer compete for its rows by attention, and choose theirs in two stages.

    Settings (beside those of `CriticalKV`):
        share: who gets rows; every head gets a fifth of the budget.
    """

    _: KW_ONLY
    share: Share = COMPETING
