"""KeyDiff: keys unlike the others. Park et al., arXiv 2504.15364, NeurIPS 2025."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from kvprune.policy.base import Step
from kvprune.policy.eviction import Eviction
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class KeyDiff(Eviction):
    """Keeps the tokens whose keys differ most from the mean key. Looks at no attention, and so at no question.

        F_k = -cos(k, a),   a = the mean of k / ||k||_2 over all tokens of a KV head that are in the cache

    What stands out from the text around it, such as digits in prose, has keys that do. All keys are read at every
    decision: after every prompt, or piece of one, and every `interval` generated tokens. The paper takes blocks of a
    prompt one by one; give the prompt in chunks for that. Of a prompt in one piece, the scores are those of kvpress'
    KeyDiffPress, which has no sinks and no recent window.
    """

    _: KW_ONLY
    interval: int | None = 128

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}

    def observe(self, table: TokenTable, step: Step) -> None:
        if not step.due:
            return
        keys = table.all_keys().float()
        inverse = keys.norm(dim=-1, keepdim=True).clamp(min=1e-12).reciprocal()
        if not table.dense:
            inverse = inverse.masked_fill(table.positions[..., None] < 0, 0.0)
        anchor = (keys.mT @ inverse).mT  # its length does not matter
        anchor = anchor / anchor.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        table["score"] = -((keys @ anchor.mT) * inverse).squeeze(-1)
