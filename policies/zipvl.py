"""ZipVL: as many tokens as hold a share of a layer's attention. He et al., arXiv 2410.08584, 2024."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights
from kvprune.errors import PolicyError
from kvprune.policies.zipcache import ZipCache
from kvprune.policy.base import Decision, Policy, Step
from kvprune.policy.settings import check_count, check_number
from kvprune.policy.shares import NEVER_KEPT
from kvprune.table.quantize import Codec
from kvprune.table.rows import in_order, ranked, top_rows, true_rows
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class ZipVL(Policy):
    """Keeps, in every layer, the fewest tokens that hold a share of its attention; the rest goes, or gets few bits.

        a_k = sum over probes and heads of P[q, k],   p = least number of tokens whose a add up to coverage * total

    The p tokens of best a_k / (probes that could see k) are the ones, the same in all heads of a layer. Probes are
    those of ZipCache. Sinks and recent window are kept beside them, and are not counted: a sink that holds most of the
    attention would leave nothing to choose. So a layer that looks everywhere keeps much, one that looks at little keeps
    little, and there is no budget to be given. Each piece of a prompt is decided when it has been attended to.

    `rest="evict"` is the second version of the paper: generated tokens accumulate. `rest="pack"` is the first: the p
    tokens at `high_bits` and the others at `low_bits`, generated tokens in blocks of `buffer`. Prompts are attended to
    in full, where the paper leaves out what it drops.

    Settings:
        coverage: the share of attention, in [0, 1].
        rest: "evict" or "pack", what becomes of other tokens. sinks: the first tokens, always among the kept.
        recent: the newest tokens, always among the kept.
        high_bits, low_bits, buffer, group_size: of packed tokens, as of `ZipCache`.
        probe_recent, probe_random: shares of the queries that probe. seed: of those drawn.
        group: how the attention of the query heads of a KV head is reduced, "mean" or "max".
    """

    coverage: float = 0.975
    _: KW_ONLY
    rest: str = "evict"
    sinks: int = 4
    recent: int = 32
    high_bits: int = 4
    low_bits: int = 2
    buffer: int = 100
    group_size: int | None = None
    probe_recent: float = 0.05
    probe_random: float = 0.05
    group: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("coverage", self.coverage, low=0, high=1)
        check_count("sinks", self.sinks, least=0)
        check_count("recent", self.recent, least=0)
        if self.rest not in ("evict", "pack"):
            raise PolicyError(f'rest must be "evict" or "pack", not {self.rest!r}.')
        self._probing  # noqa: B018 - raises for settings without meaning

    @cached_property
    def _probing(self) -> ZipCache:
        return ZipCache(
            high_bits=self.high_bits, low_bits=self.low_bits, buffer=self.buffer, group_size=self.group_size,
            probe_recent=self.probe_recent, probe_random=self.probe_random, group=self.group, seed=self.seed,
        )  # fmt: skip

    @property
    def evicts(self) -> bool:
        return self.rest == "evict"

    @property
    def codecs(self) -> tuple[Codec, ...]:
        return () if self.evicts else self._probing.codecs

    def columns(self) -> dict[str, torch.dtype]:
        return self._probing.buffer_columns() if self.evicts else {}

    def buffer_columns(self) -> dict[str, torch.dtype]:
        return {} if self.evicts else self._probing.buffer_columns()

    def row_weights(self, step: Step) -> RowWeights | None:
        return self._probing.row_weights(step) if step.prefill or not self.evicts else None

    def _first(self, table: TokenTable) -> int:
        """The slot from which on rows are decided about."""
        return 0 if self.evicts else table.packed_length

    def observe(self, table: TokenTable, step: Step) -> None:
        if step.weighed is not None:
            first = self._first(table)
            table["saliency"].add_(step.mass[:, :, first:])
            table["probes"].add_(step.witnesses(table.positions[:, :, first:]))

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        first = self._first(table)
        waiting = table.length - first
        if waiting == 0 or not (step.prefill or (not self.evicts and waiting >= self.buffer)):
            return None
        positions = table.positions[:, :, first:]
        salient = self._salient(table, step, positions)
        if self.evicts:
            return Decision(keep=in_order(true_rows(salient), positions))
        parts = zip(self.codecs, (salient, ~salient & (positions >= 0)), strict=False)
        if len(self.codecs) == 1:
            parts = zip(self.codecs, (positions >= 0,), strict=True)
        return Decision(quantize=tuple((codec, in_order(true_rows(part), positions, first)) for codec, part in parts))

    def _salient(self, table: TokenTable, step: Step, positions: Tensor) -> Tensor:
        """Which rows are among the tokens that are kept, bool of the shape of positions."""
        always = (positions >= 0) & ((positions < self.sinks) | (positions >= step.tokens - self.recent))
        others = (positions >= 0) & ~always
        tokens = int(torch.as_tensor(step.tokens).max())
        index = torch.where(positions < 0, tokens, positions).long()

        def by_token(rows: Tensor) -> Tensor:
            dense = torch.zeros(*rows.shape[:2], tokens + 1, device=rows.device, dtype=torch.float64)
            return step.heads.sum(dense.scatter_(2, index, rows.double())[:, :, :tokens].sum(1, keepdim=True))

        saliency = torch.nan_to_num(table["saliency"]).masked_fill(~others, 0.0)
        attention, there = by_token(saliency), by_token(others) > 0
        mean = by_token(saliency / table["probes"].clamp(min=1)).float()
        total = attention.sum(-1, keepdim=True)
        held = attention.sort(dim=-1, descending=True).values.cumsum(-1)
        number = (held < self.coverage * total * (1 - 1e-9)).sum(-1, keepdim=True) + (self.coverage > 0)
        number = there.sum(-1, keepdim=True) if self.coverage == 1 else number
        ranks = ranked(mean, torch.arange(tokens, device=mean.device).expand_as(mean).int())
        number = torch.minimum(number, there.sum(-1, keepdim=True))
        best = top_rows(ranks.masked_fill(~there, NEVER_KEPT), number) & there
        return always | others & best.expand(-1, positions.shape[1], -1).gather(2, positions.long().clamp(min=0))
