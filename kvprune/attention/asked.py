"""`Asked`: the queries of a step and what they look at, for policies that go through attention row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from kvprune.attention.mass import Scoring, hidden_keys, row_blocks, row_logits
from kvprune.attention.queries import Queries, Remembered
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Asked:
    """queries: of the step. table: as they see it. earlier: queries of earlier steps, where a policy has a window."""

    queries: Queries
    table: TokenTable
    scoring: Scoring
    earlier: Remembered | None = None

    def rows(self, count: int) -> Iterator[Tensor]:
        """Attention probabilities of the `count` newest queries, some at a time, `[B, Hkv, G, l, S]` float64.

        0 for keys that a query does not see, and all of a row that is padding. So exact because small differences from
        1 count in what is made of them. Packed keys are decoded for it.
        """
        if self.earlier is not None and (count > len(self.queries) or self.queries.valid is not None):
            states, positions = self.earlier.followed_by(self.queries)
            states, positions = states[:, :, -count:], positions[:, -count:]
        else:
            states, positions = self.queries.newest(count)
        keys, places = self.table.all_keys(), self.table.positions
        for block in row_blocks(states.shape[2], 2 * states[:, :, 0, 0].numel() * keys.shape[2], states.device):
            logits = row_logits(states[:, :, block], keys, self.scoring).double()
            logits.masked_fill_(hidden_keys(positions[:, block], places), -math.inf)
            yield self.scoring.softmax(logits).nan_to_num_(0.0)  # NaN where a row sees nothing
