"""StreamingLLM: attention sinks and a sliding window. Xiao et al., arXiv 2309.17453, ICLR 2024."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from kvprune.policy.base import Step
from kvprune.policy.eviction import Eviction
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class StreamingLLM(Eviction):
    """Keeps the first `sinks` tokens and, in the rest of the budget, the newest ones. Looks at no attention.

    `positions="cache"` is the paper's, for generating beyond the model's window: keys and queries have the positions of
    their places in the cache. By default they keep those of the text, as with every other policy.
    """

    _: KW_ONLY
    recent: int | float = 1  # of which there are more: all that the sinks leave

    def scores(self, table: TokenTable, step: Step) -> Tensor:
        return table.positions.float().zero_()  # all equal, and ties go to the more recent token
