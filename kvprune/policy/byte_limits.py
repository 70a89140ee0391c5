"""`ByteLimits`: how many bytes the rows of heads may take of a budget, by who shares it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.errors import BudgetError
from kvprune.policy.allotment import EXACT
from kvprune.policy.budget import Budget
from kvprune.policy.shares import Share
from kvprune.policy.step import Step
from kvprune.table.basis import lanes_of
from kvprune.table.flat import index_bytes
from kvprune.table.quantize import Codec
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class ByteLimits:
    """Of a budget that heads, layers, or all of them share, as share says.

    codecs: of rows in few bits. always: rows of a head that are in full precision whatever it is, and are paid first.
    """

    budget: Budget
    share: Share
    codecs: tuple[Codec, ...]
    always: int

    @property
    def _grows(self) -> bool:
        """Whether a longer prompt has more of it."""
        return self.budget.kind in ("fraction", "share")

    def prices(self, table: TokenTable) -> dict[int, int]:
        """Bytes of a row of a head, by bits; of one in full precision under 16."""
        heads = table.batch_size * table.kv_heads
        packed = {codec.bits: table.packed_row_bytes(codec) // heads for codec in self.codecs}
        return {**packed, EXACT: table.token_bytes // heads}

    def of(self, table: TokenTable, step: Step, scope: str | None = None) -> Tensor:
        """Bytes of rows: of a head, of the heads of a layer, or of all layers, float64 `[B, 1]`.

        scope: "head", "layer" or "model"; None for that of the share.
        """
        heads, exact = table.kv_heads * step.heads.size, self.prices(table)[EXACT]
        full = step.half_bytes / (step.layers * table.batch_size)  # of a token, in all heads of a layer
        widths = sum(dim // lanes_of(dim) for dim in table.dims[:2]) * len(self.codecs) * heads
        overhead = max(widths, index_bytes(1) * heads)  # the latter where nothing is packed, whoever has the heads
        limits = []
        for tokens in step.prompt_tokens:
            size = self.budget.amount * full
            if self.budget.kind == "bytes":
                size = (self.budget.amount - step.stock_bytes) / (step.layers * table.batch_size)
            elif self.budget.kind != "tokens":
                size *= tokens
            if self._grows:  # a greeting is no mistake, nor is the first piece of a longer prompt
                size = max(size, min(self.always, tokens) * exact * heads + overhead)
            size = max(0.0, size - overhead)
            rows = int(size / (exact * heads) + 1e-9)  # of those in full precision
            own = self.share.of_layer(
                rows, depth=step.depth, layers=step.layers, prompt_tokens=tokens, least=self.always
            )
            limits.append(size * own / rows if rows else size)
        of_layer = torch.tensor(limits, dtype=torch.float64, device=table.positions.device)[:, None]
        scope = scope or self.share.scope
        return of_layer * step.layers if scope == "model" else of_layer / (heads if scope == "head" else 1)

    def left(self, table: TokenTable, step: Step) -> Tensor:
        """The same while tokens are generated, when no layer waits for another: of a head, or of the heads of a layer.

        Where layers share the budget, it is what `remember` has written down.
        """
        if self.share.scope == "model" and table.given is not None:
            return torch.tensor(table.given, dtype=torch.float64, device=table.positions.device)[:, None]
        return self.of(table, step, self.scope_of_layer)

    def remember(self, tables: Sequence[TokenTable], limits: list[Tensor], sizes: list[Tensor]) -> None:
        """Write down what layers have got of a prompt's limits, and an equal part each of what is left.

        Where they share a budget; others have what `of` says. sizes: bytes of all heads, `[B, H]` for each layer.
        """
        if self.share.scope != "model":
            return
        for table, limit, used, own in zip(tables, limits, self.total()(sizes), sizes, strict=True):
            spare = (limit - used).clamp(min=0) / len(tables)
            table.given = tuple((own.sum(1, keepdim=True) + spare).long().flatten().tolist())

    @property
    def scope_of_layer(self) -> str:
        """Who competes where a layer decides alone."""
        return "head" if self.share.scope == "head" else "layer"

    def total(self, scope: str | None = None) -> Callable[[list[Tensor]], list[Tensor]]:
        """What bytes of heads, `[B, H]` for each layer, come to together: what `of` limits.

        Of all heads, those of other processes among them, where they compete. scope: as of `of`.
        """
        scope = scope or self.share.scope

        def summed(sizes: list[Tensor]) -> list[Tensor]:
            if scope == "head":
                return sizes
            sums = [each.sum(1, keepdim=True) for each in sizes]
            if scope == "layer":
                return sums
            whole = torch.stack([each.to(sums[0].device) for each in sums]).sum(0)
            return [whole.to(each.device) for each in sums]

        return summed

    def check(self, table: TokenTable, step: Step, written: object) -> None:
        """Raise BudgetError where the bytes do not hold what is always exact. written: the budget, as a person did.

        Those of a prompt that may hold what is exact of it and not of a longer one do not either: more may come.
        """
        if self._grows:
            return
        price, heads = self.prices(table)[EXACT], table.kv_heads * step.heads.size
        need, limit = self.always * price * heads, float(self.of(table, step, "layer").min())
        if need > limit:
            raise BudgetError(
                f"budget={written!r} leaves {max(0, int(limit)):,} bytes for the rows of a layer, and the "
                f"{self.always} exact ones (sinks and recent) of its {heads} heads take {need:,}: give more, or lower "
                "sinks or recent."
            )
