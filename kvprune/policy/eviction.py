"""`Eviction`: the common part of all policies that rank rows by a score and keep the best within a budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.policy.base import Decision, Step, per_sequence
from kvprune.policy.ranking import Ranking
from kvprune.policy.shares import ALWAYS_KEPT, NEVER_KEPT
from kvprune.table.rows import EMPTY
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Eviction(Ranking):
    """Keeps the sinks, the recent window, and the rows of highest score, within a budget.

    A subclass says where the score comes from: it declares a float32 column "score" and updates it in `observe`, or
    overrides `scores`. Its settings are those of `Ranking`.

    Raises BudgetError for a budget without meaning or smaller than sinks + recent, PolicyError for other settings.
    """

    @property
    def evicts(self) -> bool:
        return True

    @property
    def decides_together(self) -> bool:
        return self.share.scope == "model"

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        if not step.due:
            return None
        if self.heads_compete:
            return self._compete([table], [step])[0] if step.prefill else self._evict_surplus(table, step)
        capacity = self.capacity(step)
        alike = len(set(capacity)) == 1
        excess = table.rows - max(capacity)
        if step.prefill:
            return self._select(table, step, capacity) if excess > 0 or not alike else None
        if not alike and self._most_surplus(table, capacity) > max(excess, 0):
            return self._select(table, step, capacity)  # a sequence is above its own budget, another below its own
        return self._evict(table, step, capacity, excess) if excess > 0 else None

    def _most_surplus(self, table: TokenTable, capacity: tuple[int, ...]) -> int:
        """By how many rows a sequence exceeds its budget."""
        rows = (table.positions >= 0).sum(-1, keepdim=True)
        return int((rows - per_sequence(capacity, rows.device)).max())

    def _select(self, table: TokenTable, step: Step, capacity: tuple[int, ...]) -> Decision:
        """The best rows of all, in the order of their positions."""
        most, device = min(max(capacity), table.length), table.positions.device
        kept = per_sequence(capacity, device)
        retention = self._ranks(table, step, capacity, self._compared(table, step, capacity), kept)
        return _best(table, retention, most, None if isinstance(kept, int) else kept)

    def _evict(
        self, table: TokenTable, step: Step, capacity: tuple[int, ...], excess: int, surplus: int | Tensor | None = None
    ) -> Decision:
        """After a generated token: the `excess` worst rows; a sequence below its own budget gives empty slots, or none.

        surplus: rows above what a head may hold, where the capacity does not say that.
        """
        all_over = isinstance(surplus, int) and surplus == excess  # every head has as many rows too many as any other
        scores = self._compared(table, step, capacity)
        if excess == 1 and (table.dense or all_over) and not self.refines:
            window, stay = self._window(table, step, capacity), self.protected(table)
            worst = table.kernels.worst_rows(scores, table.positions, self.sinks, window, stay)
            return Decision(evict=worst, exact=True)
        if table.dense:
            retention = self._ranks(table, step, capacity, scores, table.length - excess)
            return Decision(evict=retention.topk(excess, dim=-1, largest=False).indices)
        empty = table.positions < 0
        rows = (~empty).sum(-1, keepdim=True)
        if surplus is None:
            surplus = rows - per_sequence(capacity, empty.device)
        surplus = torch.as_tensor(surplus, device=empty.device)
        retention = self._ranks(table, step, capacity, scores, rows - surplus.clamp(min=0))
        worst = retention.masked_fill(empty, ALWAYS_KEPT).topk(excess, dim=-1, largest=False).indices
        vacant = empty.to(torch.int8).topk(excess, dim=-1).indices
        vacant = torch.where(empty.gather(2, vacant), vacant, EMPTY)
        rank = torch.arange(excess, device=empty.device).expand_as(worst)
        return Decision(
            evict=torch.where(rank < surplus, worst, vacant.gather(2, (rank - surplus.clamp(min=0)).clamp(min=0)))
        )

    # -- where heads compete -----------------------------------------------------------------------------------------

    def check(self, step: Step) -> None:
        self.capacity(step)

    def decide_together(self, tables: list[TokenTable], steps: list[Step]) -> list[Decision | None]:
        return self._compete(tables, steps) if self.share.scope == "model" else super().decide_together(tables, steps)

    def _compete(self, tables: list[TokenTable], steps: list[Step]) -> list[Decision | None]:
        """What the heads of these tables keep, who have the budget together."""
        capacities = [self.capacity(step) for step in steps]
        heads = [step.heads for step in steps]
        of_layers = [table.kv_heads * of.size for table, of in zip(tables, heads, strict=True)]
        # Of each sequence: rows that there are, and rows that there may be.
        held = [of.total(table.row_totals()) for table, of in zip(tables, heads, strict=True)]
        here = [sum(of_layer) for of_layer in zip(*held, strict=True)]
        room = [
            sum(tokens * number for tokens, number in zip(each, of_layers, strict=True))
            for each in zip(*capacities, strict=True)
        ]
        spare = tuple(max(0, most - rows) // sum(of_layers) for most, rows in zip(room, here, strict=True))
        if all(rows <= most for most, rows in zip(room, here, strict=True)):
            counts = None
        else:
            asked = zip(tables, steps, capacities, strict=True)
            scores = [self._compared(table, step, capacity) for table, step, capacity in asked]
            counts = self._counts(tables, steps, capacities, scores)
        decisions: list[Decision | None] = []
        for number, (table, step, capacity) in enumerate(zip(tables, steps, capacities, strict=True)):
            rows = table.row_totals() if counts is None else tuple(counts[number].sum(1).tolist())
            table.given = tuple(a + b * table.kv_heads for a, b in zip(rows, spare, strict=True))
            if counts is None or rows == table.row_totals():
                decisions.append(None)
                continue
            own = counts[number].to(scores[number].device)[..., None]
            retention = self._ranks(table, step, capacity, scores[number], own)
            decisions.append(_best(table, retention, int(own.max()), own))
        return decisions

    def _counts(
        self, tables: list[TokenTable], steps: list[Step], capacities: list[tuple[int, ...]], scores: list[Tensor]
    ) -> list[Tensor]:
        """How many rows each head keeps that is here, LongTensors `[B, Hkv]`, one for each layer."""
        ranks, room = [], []
        device = tables[0].positions.device
        for table, step, capacity, of_layer in zip(tables, steps, capacities, scores, strict=True):
            retention = self._retention(table, step, capacity, of_layer)
            candidates = (retention > NEVER_KEPT) & (retention < ALWAYS_KEPT)
            compared = self.share.normalized(of_layer, candidates)
            if compared is not of_layer:
                retention = self._retention(table, step, capacity, compared)
            # Other processes may have other numbers of rows in a head, but none more than tokens and queries.
            width = int(torch.as_tensor(step.tokens).max()) + step.queries
            ranks.append(step.heads.gather(retention, width, NEVER_KEPT).to(device))
            room += [torch.tensor(capacity, device=device)[:, None].expand(-1, ranks[-1].shape[1])]
        most = max(each.shape[2] for each in ranks)
        ranks = [F.pad(each, (0, most - each.shape[2]), value=NEVER_KEPT) for each in ranks]
        counts = self.share.counts(torch.cat(ranks, dim=1), torch.cat(room, dim=1))
        parts = counts.split([each.shape[1] for each in ranks], dim=1)
        return [step.heads.own(part) for step, part in zip(steps, parts, strict=True)]

    def _evict_surplus(self, table: TokenTable, step: Step) -> Decision | None:
        """After generated tokens: as many rows from every head as there are more than the sequence was given."""
        rows, capacity = table.row_totals(), self.capacity(step)
        given = table.given or tuple(tokens * table.kv_heads for tokens in capacity)
        surplus = tuple(max(0, -((most - here) // table.kv_heads)) for most, here in zip(given, rows, strict=True))
        excess = max(surplus)
        if not table.is_ragged:  # every sequence gives up as many slots, rows or empty ones
            beyond = table.length + -max(given) // table.kv_heads
            if beyond > excess and not table.packed:  # slots that are empty everywhere take bytes as well
                empty_everywhere = int((table.positions < 0).sum(-1).min())
                excess = max(excess, min(beyond, empty_everywhere + min(surplus)))
            slots = (table.length - here // table.kv_heads for here in rows)
            excess = min(excess, *(most + empty for most, empty in zip(surplus, slots, strict=True)))
        if not excess:
            return None
        return self._evict(table, step, capacity, excess, per_sequence(surplus, table.positions.device))


def _best(table: TokenTable, retention: Tensor, most: int, counts: int | Tensor | None) -> Decision:
    """Keep the best `most` rows of each head, or `counts` of them, `[B, Hkv or 1, 1]`, in the order of positions."""
    slots = retention.topk(most, dim=-1).indices
    positions = table.positions.gather(2, slots)
    if counts is not None:
        positions = positions.masked_fill(torch.arange(most, device=slots.device) >= counts, EMPTY)
    positions, order = positions.sort(dim=-1)
    return Decision(keep=slots.gather(2, order).masked_fill(positions < 0, EMPTY))
