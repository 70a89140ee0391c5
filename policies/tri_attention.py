"""TriAttention: keys that a typical query finds from many distances. Mao et al., arXiv 2604.04921, 2026."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from kvprune.policy.base import Step
from kvprune.policy.eviction import Eviction
from kvprune.policy.settings import check_count
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class TriAttention(Eviction):
    """Keeps keys that a typical query would attend to from distances of 1, 2, 4, ... tokens, and those of large pairs.

        s_k = (mean over d of R(t + d) mu) . k  +  sum over frequencies f of (E|q_f| - |mu_f|) |k_f|

    with mu = E q before positions turn it, q_f and k_f the pairs of channels that turn together, R the rotation, t the
    newest position and d = 1, 2, 4, ..., 2^(distances - 1). z-normalised over the rows of a query head; the largest of
    a group counts. Where queries agree, their mean tells, elsewhere the size of keys does. The mean over distances is
    over R alone: one vector for every head, and one product for every key.

    Query statistics are those of all queries of the prompt beside the sinks', so there is no file to calibrate, and the
    prompt is evicted too: the published code keeps the first tokens of a prompt that exceeds the budget and drops all
    that is generated. All keys are read at every decision: after every prompt, and every `interval` generated tokens.

    Settings (beside those of `Eviction`):
        distances: how many powers of two, from 1 on; 17 reach to 65,536 tokens.
    """

    _: KW_ONLY
    interval: int | None = 128
    group: str = "max"
    distances: int = 17

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("distances", self.distances, least=1, most=24)

    @property
    def turns_back(self) -> bool:
        return True

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}

    def tallies(self, query_heads: int, kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        return {"count": (1, 1, 1), "sum": (query_heads, 1, head_dim), "sizes": (query_heads, 1, head_dim)}

    def observe(self, table: TokenTable, step: Step) -> None:
        if step.prefill:
            for queries, weights in step.unturned_queries(first=self.sinks):
                step.tallies["count"].add_(weights.sum(2, keepdim=True))
                step.tallies["sum"].add_((queries * weights).sum(2, keepdim=True))
                step.tallies["sizes"].add_((step.rotary.pair_norms(queries) * weights).sum(2, keepdim=True))
        if step.due:
            table["score"] = self._score(table, step)

    def _score(self, table: TokenTable, step: Step) -> Tensor:
        keys, count = table.all_keys().float(), step.tallies["count"].clamp(min=1)
        mean, rotary = step.tallies["sum"] / count, step.rotary
        newest = torch.as_tensor(step.tokens).view(-1, 1).to(keys.device) - 1
        direction = rotary.mean_turn(mean, newest + 2 ** torch.arange(self.distances, device=keys.device))
        spread = (step.tallies["sizes"] / count - rotary.pair_norms(mean)) / 2  # both channels of a pair say its norm
        direction, spread = (part.squeeze(2).unflatten(1, (table.kv_heads, -1)) for part in (direction, spread))
        scores = keys @ direction.mT + rotary.pair_norms(keys) @ spread.mT
        held = (table.positions >= 0)[..., None]
        rows = held.sum(2, keepdim=True).clamp(min=1)
        scores = scores.masked_fill(~held, 0.0)
        scores = (scores - scores.sum(2, keepdim=True) / rows).masked_fill(~held, 0.0)
        scores = scores / (scores.square().sum(2, keepdim=True) / rows).sqrt().clamp(min=1e-12)
        return scores.amax(-1) if self.group == "max" else scores.mean(-1)
