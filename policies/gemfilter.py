"""GemFilter: the model reads what an early layer picks. Shi et al., arXiv 2409.17422, Findings of ACL 2026."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.errors import BudgetError, PolicyError
from kvprune.passes.filters import PromptFilter
from kvprune.policy.budget import Budget
from kvprune.policy.heads import ALL_HEADS, Heads
from kvprune.policy.pooling import reach
from kvprune.policy.settings import check_count, check_kernel

# Zero-based, as in the paper: of Llama-3.1-8B, Mistral-Nemo-12B and Phi-3.5-mini, by (type, layers, hidden size).
_PAPER_LAYERS = {("llama", 32, 4096): 13, ("mistral", 40, 5120): 19, ("phi3", 32, 3072): 19}
_DEPTH = 0.42  # of other models: where 13 of 32 and 19 of 40 lie, more or less


@dataclass(frozen=True)
class GemFilter(PromptFilter):
    """Runs the layers up to r on the whole prompt, keeps the tokens that the last query likes best, and starts over.

        z_i = sum over all query heads of q_n . k_i  in layer r,   averaged over `kernel_size` neighbours

    The dot products are raw: no scale, softmax or cap. The model then runs on the chosen tokens as if they were the
    whole prompt, at positions 0 .. budget - 1, so all layers hold the same tokens, and layers above r never see the
    others. A prompt within the budget is left alone. Ties go to the more recent token.

    The last token decides, so give the prompt in one piece: each chunk of a `prefill_chunk_size` is filtered by its own
    last token. A second turn filters only what is new, by its own last token and within the same budget; what the cache
    holds stays, and its rows do not compete. Generated tokens are never dropped: `GemFilter(1024) | A2SF(256)` does
    that. While the past is recorded (assisted and prompt-lookup decoding) nothing is filtered, because the model has to
    answer for every token.

    Settings:
        budget: an int is tokens; a float in (0, 1] is a fraction of the tokens to choose from, rounded up and never
            below keep_first + keep_last; a string such as "512MiB" is bytes of the whole cache when the prompt ends,
            rows of earlier turns included; "0.05b" is a share of the bytes that the tokens to choose from would take at
            16 bits a number, and earlier turns have theirs.
        layer: r, from 0; None for 13 of Llama-3.1-8B, 19 of Mistral-Nemo and of Phi-3.5-mini, and the layer with full
            attention nearest to 0.42 of the depth of others.
        kernel_size: odd; how many neighbours to average. Zeros count at the edges, as in the paper's code.
        keep_first, keep_last: tokens at the ends of the prompt that are always chosen, part of the budget. The paper
            forces none; chat templates may want them.

    Raises BudgetError for a budget without meaning or smaller than keep_first + keep_last, PolicyError for other
    settings.
    """

    budget: float | int | str = 1024
    _: KW_ONLY
    layer: int | None = None
    kernel_size: int = 5
    keep_first: int = 0
    keep_last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        budget = self._budget  # parses, and raises for nonsense
        object.__setattr__(self, "budget", budget.plain(self.budget))
        for name in ("keep_first", "keep_last"):
            check_count(name, getattr(self, name), least=0)
        check_kernel(self.kernel_size)
        if self.layer is not None:
            check_count("layer", self.layer, least=0)
        if budget.kind == "tokens" and budget.amount < self._least:
            raise BudgetError(
                f"a budget of {int(budget.amount)} tokens cannot hold the first {self.keep_first} and the last "
                f"{self.keep_last}: give a budget of at least {self._least}, or lower keep_first or keep_last."
            )

    @cached_property
    def _budget(self) -> Budget:
        return Budget.parse(self.budget)

    @property
    def _least(self) -> int:
        return max(1, self.keep_first + self.keep_last)

    def note(self, prompt_tokens: tuple[int, ...], **costs: int) -> str | None:
        return self._budget.raised(prompt_tokens, self._least, "keep_first and keep_last", **costs)

    def filter_layer(self, config: Any, pruned: tuple[int, ...]) -> int:
        if self.layer is not None:
            if self.layer not in pruned:
                raise PolicyError(
                    f"GemFilter cannot choose by layer {self.layer}: its attention is not full, or there is no such "
                    f"layer. Write one of {list(pruned)}, or leave layer out."
                )
            return self.layer
        depth = config.num_hidden_layers
        wanted = _PAPER_LAYERS.get((config.model_type, depth, config.hidden_size), round(_DEPTH * depth))
        return min(pruned, key=lambda index: (abs(index - wanted), index))

    def capacity(
        self, tokens: int, *, token_bytes: int | None = None, other_bytes: int = 0, half_bytes: int = 0
    ) -> int | None:
        if self._budget.in_bytes and token_bytes is None:
            return None
        other_bytes = 0 if self._budget.kind == "share" else other_bytes  # what came earlier has a share of its own
        return self._budget.tokens(
            tokens, floor=self._least, token_bytes=token_bytes or 1, other_bytes=other_bytes, half_bytes=half_bytes
        )

    def choose(self, query: Tensor, keys: Tensor, count: int, heads: Heads = ALL_HEADS) -> Tensor:
        z = self._smooth(heads.sum(_dots(query, keys)))
        z[: self.keep_first] = math.inf
        z[len(z) - self.keep_last :] = math.inf
        # Ascending and stable: of two equals the more recent one comes later, so it is chosen first.
        return z.sort(stable=True).indices[-count:].sort().values

    def _smooth(self, z: Tensor) -> Tensor:
        size = reach(self.kernel_size, len(z))
        pooled = F.avg_pool1d(z[None, None], size, stride=1, padding=size // 2)[0, 0]
        return torch.nan_to_num(pooled, nan=-math.inf, posinf=torch.finfo(z.dtype).max, neginf=-math.inf)


def _dots(query: Tensor, keys: Tensor) -> Tensor:
    """Sum of the raw dot products of these heads, `[n]`, at least float32. query: `[Hq, D]`. keys: `[Hkv, n, D]`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Heads that share keys add up before the product.
    grouped = query.to(dtype).unflatten(0, (keys.shape[0], -1)).sum(1)
    z = torch.zeros(keys.shape[1], dtype=dtype, device=keys.device)
    for head, shared in zip(grouped, keys, strict=True):  # one by one: float32 keys of all heads would be the peak
        z += shared.to(dtype) @ head
    return z
