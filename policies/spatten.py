"""SpAtten: what is attended to least is dropped for all layers above. Wang et al., arXiv 2012.09852, HPCA 2021."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights
from kvprune.passes.cascades import Cascade
from kvprune.passes.schedule import Schedule, checked, share_after
from kvprune.policy.base import Decision, Step
from kvprune.policy.settings import check_count
from kvprune.table.rows import true_rows
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class SpAtten(Cascade):
    """Cascade token pruning: by all the attention that a token has been given, in all heads, layers and steps so far.

        s_k += sum over heads h, queries q of A^l[h, q, k], after every layer l that computes;   one s for the model

    After some layers, only the tokens of largest s go on to deeper ones. Those neither compute nor cache the others,
    and drop the rows that they have of them: what has gone comes back in no later step. Every attention row of a prompt
    is weighed. Pruning of heads, local pruning of values and progressive quantization, the rest of the paper, are not
    here.
    While the past is recorded (assisted and prompt-lookup decoding) nothing stops.

    Settings:
        schedule: pairs (depth, share): after so much of the layers' number, rounded, such a share of all tokens so far
            goes on. Depths ascend, shares do not. As text: "0.5:0.7/0.9:0.3". The default is what the published code
            does with GPT-2 medium, which prunes no prompt there.
        recent: newest tokens that always go on. The paper has none; without any, its shares lose the end of the text.

    Raises PolicyError for settings without meaning.
    """

    schedule: Schedule | str = ((0.08, 0.9), (0.13, 0.8), (0.21, 0.6), (0.46, 0.3))
    _: KW_ONLY
    recent: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "schedule", checked(self.schedule))
        check_count("recent", self.recent, least=1)

    @property
    def stops_generated(self) -> bool:
        return True

    @property
    def scored(self) -> bool:
        return True

    @property
    def evicts(self) -> bool:
        return True

    def row_weights(self, step: Step) -> RowWeights | None:
        return None if step.passage is None else RowWeights.uniform(step.queries)

    def onward(self, table: TokenTable, step: Step) -> Tensor | None:
        passage = step.passage
        if passage is None or passage.score is None or step.source is None:
            return None
        group = step.source.states.shape[1] // table.kv_heads
        given = step.heads.sum(passage.by_token(step.mass * group, table))
        passage.score += given.clamp(min=0).to(passage.score.device)
        share = share_after(self.schedule, step.depth, step.layers)  # type: ignore[arg-type]
        if share is None:
            return None
        looked_at = given > -math.inf
        return passage.best(passage.score.to(given.device).masked_fill(~looked_at, -math.inf), share, self.recent)

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        if step.passage is None or step.passage.active is None:
            return None
        gone = (table.positions >= 0) & ~step.passage.looked_at(table)
        least, most = (int(count) for count in torch.stack([*gone.sum(-1).aminmax()]).tolist())
        if not most:
            return None
        if least < most or step.prefill:
            return Decision(keep=true_rows((table.positions >= 0) & ~gone))
        return Decision(evict=gone.to(torch.int8).topk(most, dim=-1).indices, exact=True)
