"""Keyformer: key tokens by a noisy, tempered attention score. Adnan et al., arXiv 2403.09054, MLSys 2024."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights
from kvprune.attention.noise import Gumbel
from kvprune.errors import PolicyError
from kvprune.policy.base import Step, per_sequence
from kvprune.policy.eviction import Eviction
from kvprune.policy.settings import check_count, check_number
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Keyformer(Eviction):
    """Keeps a recent window and the key tokens, those of highest accumulated Gumbel-softmax score.

        f_k = softmax_k((x + noise) / tau),   noise ~ Gumbel(0, 1) for every logit x,       F <- F + f
        tau = tau_init + (tau_end - tau_init) * min(1, generated / generation_length)

    over every row of the prompt and every generated token. Once tokens are gone, the softmax over the rest inflates
    those that stayed; noise and a temperature that rises while more and more is dropped flatten the score again. The
    output of attention is that of the plain softmax. The token that leaves the window competes with the key tokens.

    The sum is exact over the whole prompt, so prefill reads every attention row once more. Noise is a function of seed,
    layer, query head and the two positions: chunks, padding and batches do not change what is kept.

    Settings (beside those of `Eviction`):
        tau_init, tau_end: temperature at the prompt, and from the generation_length-th generated token on.
        generation_length: tokens expected to be generated.
        noise: multiplies the noise; 0 is none, which with both temperatures 1 is H2O.
        frozen_keys: as in the published code, whose mask is one token too long: a token that leaves the window is
            dropped without competing, so no generated token ever becomes a key token.
    """

    _: KW_ONLY
    sinks: int = 0
    recent: int | float = 0.3
    tau_init: float = 1.0
    tau_end: float = 2.0
    generation_length: int = 128
    noise: float = 1.0
    frozen_keys: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau_init", self.tau_init, low=1e-3, high=1e9)
        check_number("tau_end", self.tau_end, low=1e-3, high=1e9)
        check_number("noise", self.noise, low=0, high=1e6)
        check_count("generation_length", self.generation_length, least=1)
        if not isinstance(self.frozen_keys, bool):
            raise PolicyError(f"frozen_keys must be True or False, not {self.frozen_keys!r}.")

    @property
    def scores_generated(self) -> bool:
        return not self.frozen_keys

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}

    def temperature(self, step: Step) -> float | Tensor:
        """Of the rows of this step: one for a prompt, one each for generated tokens, `[L]`."""
        if step.prefill:
            return float(self.tau_init)
        if step.queries == 1 and isinstance(step.generated, int):
            return float(self._tau(min(step.generated, self.generation_length)))
        ages = torch.arange(step.queries - 1, -1, -1, device=step.query_positions.device)
        return self._tau((step.generated - ages).clamp(0, self.generation_length).double()).float()

    def _tau(self, generated: Any) -> Any:
        return self.tau_init + (self.tau_end - self.tau_init) * (generated / self.generation_length)

    def row_weights(self, step: Step) -> RowWeights:
        first = step.heads.first_query_head
        return RowWeights.uniform(step.queries).noisy(
            Gumbel(self.seed, step.layer, self.temperature(step), float(self.noise), first)
        )

    def observe(self, table: TokenTable, step: Step) -> None:
        table["score"].add_(step.mass)

    def scores(self, table: TokenTable, step: Step) -> Tensor:
        if not self.frozen_keys or step.prefill:
            return table["score"]
        window = tuple(
            tokens - self.recent_tokens(capacity)
            for tokens, capacity in zip(step.prompt_tokens, self.capacity(step), strict=True)
        )
        left_the_window = table.positions >= per_sequence(window, table.positions.device)
        return table["score"].masked_fill(left_the_window, -math.inf)
