"""ExpectedAttention: what queries to come will attend to. Devoto et al., arXiv 2510.00636, 2025."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.policy.base import Step
from kvprune.policy.eviction import Eviction
from kvprune.policy.settings import check_count, check_number
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class ExpectedAttention(Eviction):
    """Keeps what queries of the next positions will attend to, if they are like those of the prompt.

        q ~ N(mu, C) before positions turn it,   R = mean rotation over the next `future` positions,   s = scale
        E exp(s q.k) = exp(z_k),   z_k = s (R mu).k + s^2/2 k.(R C R^T) k
        F_k = (mean over the query heads of a group of softmax_k(z) + epsilon) * ||v_k||_2

    The softmax is over the rows beside the sinks. mu and C are those of all queries of the prompt beside the sinks',
    turned back: sums of them are kept beside the table, D x D of every query head, so pieces of a prompt are as good as
    the whole. All keys are read at every decision: after every prompt, and every `interval` generated tokens.

    A prompt in one piece is scored as by kvpress' ExpectedAttentionPress, but that its scale is always 1/sqrt(D).

    Settings (beside those of `Eviction`):
        future: positions over which to average. covariance: False leaves C out, and its memory.
        value_norm: False leaves out ||v||. epsilon: the larger, the more the norm of values counts alone.
    """

    _: KW_ONLY
    interval: int | None = 128
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("future", self.future, least=1, most=1 << 20)
        check_number("epsilon", self.epsilon, low=0, high=1e9)
        for name in ("covariance", "value_norm"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name} must be True or False, not {getattr(self, name)!r}.")

    @property
    def turns_back(self) -> bool:
        return True

    @property
    def scores_attention(self) -> bool:
        return True

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}

    def tallies(self, query_heads: int, kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        squares = {"squares": (query_heads, head_dim, head_dim)} if self.covariance else {}
        return {"count": (1, 1, 1), "sum": (query_heads, 1, head_dim), **squares}

    def observe(self, table: TokenTable, step: Step) -> None:
        if step.prefill:
            self._count_queries(step)
        if step.due:
            table["score"] = self._expected(table, step)

    def _count_queries(self, step: Step) -> None:
        for queries, weights in step.unturned_queries(first=self.sinks):
            weighed = queries * weights
            step.tallies["count"].add_(weights.sum(2, keepdim=True))
            step.tallies["sum"].add_(weighed.sum(2, keepdim=True))
            if self.covariance:
                step.tallies["squares"].add_(weighed.mT @ queries)

    def _expected(self, table: TokenTable, step: Step) -> Tensor:
        scale, keys, positions = step.scoring.scale, table.all_keys().float(), table.positions  # type: ignore[union-attr]
        count = step.tallies["count"].clamp(min=1)
        mean = step.tallies["sum"] / count
        coming = torch.arange(self.future, device=keys.device) + torch.as_tensor(step.tokens).view(-1, 1).to(
            keys.device
        )
        turned = step.rotary.mean_turn(mean, coming).unflatten(1, (table.kv_heads, -1))
        hidden = (positions < self.sinks) if self.sinks else positions < 0
        score = torch.zeros_like(keys[..., 0])
        if self.covariance:
            covariance = step.tallies["squares"] / count - mean.mT @ mean
            covariance = step.rotary.mean_turn(step.rotary.mean_turn(covariance, coming).mT, coming)
            spread = covariance.unflatten(1, (table.kv_heads, -1))
        for member in range(turned.shape[2]):  # one by one: keys of all query heads would be the peak
            logits = (keys @ turned[:, :, member].mT).squeeze(-1) * scale
            if self.covariance:
                logits += (keys @ spread[:, :, member] * keys).sum(-1) * (scale**2 / 2)
            expected = torch.softmax(logits.masked_fill(hidden, -math.inf), dim=-1).nan_to_num(0.0)
            score = torch.maximum(score, expected) if self.group == "max" else score.add_(expected / turned.shape[2])
        return (score + self.epsilon) * table.all_values().float().norm(dim=-1) if self.value_norm else score
