"""SpAtten: what is attended to least is dropped for all layers above. Wang et al., arXiv 2012.09852, HPCA 2021."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights
from kvprune.errors import UnsupportedModelError
from kvprune.passes.cascades import Cascade
from kvprune.passes.schedule import Schedule, checked, share_after
from kvprune.policy.base import Decision, Step
from kvprune.policy.passage import best_heads
from kvprune.policy.settings import check_count
from kvprune.table.rows import true_rows
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class SpAtten(Cascade):
    """Cascade token pruning: by all the attention that a token has been given, in all heads, layers and steps so far.

        s_k += sum over heads h, queries q of A^l[h, q, k], after every layer l that computes;   one s for the model

    After some layers, only the tokens of largest s go on to deeper ones. Those neither compute nor cache the others,
    and drop the rows that they have of them: what has gone comes back in no later step. Every attention row of a prompt
    is weighed.

    Where `heads` says so, heads stop too, in whole KV heads with their query heads, by the size of what they put out:

        e_g += sum over query heads h of g, tokens i, dims d of |O^l[h, i, d]|,   after every layer l

    In the layers above, one that stopped has no rows, is not attended to, and adds zeros to the output. Which go on is
    decided where a sequence begins, by its first tokens, and holds for all of it. Heads are matched from layer to layer
    by their numbers, which mean nothing in a model that was not trained for it, and the model's projections run for all
    of them. Local pruning of values, the rest of the paper, is not here;
    its progressive quantization is what `SpAtten() | KIVI(8, theta=0.05)` adds.
    While the past is recorded (assisted and prompt-lookup decoding) nothing stops.

    Settings:
        schedule: pairs (depth, share): after so much of the layers' number, rounded, such a share of all tokens so far
            goes on. Depths ascend, shares do not. As text: "0.5:0.7/0.9:0.3". The default is what the published code
            does with GPT-2 medium, which prunes no prompt there.
        heads: pairs (depth, share) as of the schedule, of all KV heads, rounded up; none by default. The published code
            has "0.67:0.81/0.92:0.62".
        recent: newest tokens that always go on. The paper has none; without any, its shares lose the end of the text.

    Raises PolicyError for settings without meaning.
    """

    schedule: Schedule | str = ((0.08, 0.9), (0.13, 0.8), (0.21, 0.6), (0.46, 0.3))
    _: KW_ONLY
    heads: Schedule | str = ()
    recent: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("schedule", "heads"):
            object.__setattr__(self, name, checked(getattr(self, name), name=name))
        check_count("recent", self.recent, least=1)

    @property
    def stops_generated(self) -> bool:
        return True

    @property
    def scored(self) -> bool:
        return True

    @property
    def drops_heads(self) -> bool:
        return bool(self.heads)

    @property
    def evicts(self) -> bool:
        return True

    def row_weights(self, step: Step) -> RowWeights | None:
        return None if step.passage is None else RowWeights.uniform(step.queries)

    def heads_onward(self, table: TokenTable, step: Step) -> Tensor | None:
        passage = step.passage
        if passage is None or step.output is None or step.source is None:
            return None
        if step.scoring is not None and step.scoring.sinks is not None:
            raise UnsupportedModelError(
                "every head of this model has an attention sink of its own, and heads that stop would leave theirs "
                "behind: leave out the setting heads."
            )
        output = step.output.unflatten(1, (table.kv_heads, -1))
        if step.source.valid is not None:
            output = output.masked_fill(~step.source.valid[:, None, None, :, None], 0.0)
        accurate = torch.promote_types(output.dtype, torch.float32)
        sizes = torch.linalg.vector_norm(output, ord=1, dim=(2, 3, 4), dtype=accurate).float()
        passage.head_score = sizes if passage.head_score is None else sizes + passage.head_score.to(sizes.device)
        total = table.kv_heads if passage.heads is None else passage.heads.total
        share = share_after(self.heads, step.depth, step.layers)  # type: ignore[arg-type]
        return None if share is None else best_heads(passage.head_score, share, total)

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
