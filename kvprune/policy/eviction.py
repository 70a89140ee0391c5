"""`Eviction`: the common part of all policies that rank rows by a score and keep the best within a budget."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.attention.mass import GROUPS, row_blocks
from kvprune.errors import BudgetError, PolicyError
from kvprune.policy.base import Decision, Policy, Step, per_sequence
from kvprune.policy.budget import Budget
from kvprune.policy.budget import share as part_of
from kvprune.policy.settings import check_count, check_kernel, check_seed
from kvprune.policy.shares import ALWAYS_KEPT, NEVER_KEPT, UNIFORM, Share
from kvprune.table.rows import EMPTY, ranked
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Eviction(Policy):
    """Keeps the sinks, the recent window, and the rows of highest score, within a budget.

    A subclass says where the score comes from: it declares a float32 column "score" and updates it in `observe`, or
    overrides `scores`.

    Settings:
        budget: a float in (0, 1] is a fraction of the prompt tokens, rounded up and never below sinks + recent; an int
            is tokens per KV head; a string such as "512MiB" is bytes of the whole cache, that is, of all processes
            together where tensor parallelism splits the heads.
        sinks: the first tokens of a sequence, always kept, part of the budget.
        recent: the newest tokens, always kept, part of the budget; a float is a share of the budget, rounded up.
        interval: generated tokens between two evictions. 1 evicts at every step and the cache never exceeds the budget
            by more than the token being generated; None never evicts generated tokens.
        group: how scores of the query heads of a KV head are reduced, "mean" or "max".
        kernel_size: odd; wherever rows are compared, while tokens are generated too, a row counts as much as the best
            of that many positions around it: an answer of n tokens beside what is attended to takes 2 n + 1. 1 is none.
        positions: "original", where queries see rows where they were in the text, or "cache", where they see them side
            by side, no further away than there are rows, so that a rotary model may generate beyond its window.
        seed: of policies that draw random numbers.
        share: who gets how many rows of the budget, a `Share` or its text ("adaptive"). But for `Uniform`, heads or
            layers keep different numbers of rows, as many on average as the budget says.

    Raises BudgetError for a budget without meaning or smaller than sinks + recent, PolicyError for other settings.
    """

    budget: float | int | str = 0.25
    _: KW_ONLY
    sinks: int = 4
    recent: int | float = 32
    interval: int | None = 1
    group: str = "mean"
    kernel_size: int = 1
    seed: int = 0
    positions: str = "original"
    share: Share = UNIFORM

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.share, str):
            object.__setattr__(self, "share", Share.parse(self.share))
        if not isinstance(self.share, Share):
            raise PolicyError(f"share must be a Share such as Adaptive(floor=0.2), or its text, not {self.share!r}.")
        budget = self._budget  # parses, and raises for nonsense
        object.__setattr__(self, "budget", budget.plain(self.budget))
        check_count("sinks", self.sinks, least=0)
        check_kernel(self.kernel_size)
        check_seed(self.seed)
        if self.positions not in ("original", "cache"):
            raise PolicyError(f'positions must be "original" or "cache", not {self.positions!r}.')
        if self.renumbers and self.turns_back:
            raise PolicyError(
                f"{type(self).__name__} turns queries and keys back from where they were in the text, and "
                'positions="cache" shows them elsewhere: write positions="original".'
            )
        if self.interval is not None:
            check_count("interval", self.interval, least=1)
        if self.group not in GROUPS:
            raise PolicyError(f'group must be "mean" or "max", not {self.group!r}.')
        if not isinstance(self.recent, numbers.Integral):
            if not isinstance(self.recent, numbers.Real) or not 0 <= self.recent <= 1 - (self.sinks > 0) * 1e-6:
                raise PolicyError(
                    f"recent={self.recent!r} is no share of the budget that leaves room for {self.sinks} sinks: "
                    "write a float from 0 to 1, or an int for a number of tokens."
                )
        else:
            check_count("recent", self.recent, least=0)
        if budget.kind == "tokens" and budget.amount < self._least:
            raise BudgetError(
                f"a budget of {int(budget.amount)} tokens cannot hold {self.sinks} sinks and "
                f"{self.recent_tokens(int(budget.amount))} recent tokens: give a budget of at least {self._least}, "
                "or lower sinks or recent."
            )

    @property
    def evicts(self) -> bool:
        return True

    @property
    def renumbers(self) -> bool:
        return self.positions == "cache"

    @property
    def static_decode(self) -> bool:
        return self.interval == 1 and not self.turns_back

    @cached_property
    def _budget(self) -> Budget:
        return Budget.parse(self.budget)

    @cached_property
    def _least(self) -> int:
        """The smallest budget, in tokens, that holds sinks and recent window."""
        if isinstance(self.recent, numbers.Integral):
            return max(self.sinks + int(self.recent), 1)
        start = int(self.sinks / (1 - self.recent)) if self.sinks else 1
        return next(n for n in count(max(start, 1)) if self.sinks + self.recent_tokens(n) <= n)

    def note(self, prompt_tokens: tuple[int, ...]) -> str | None:
        return self._budget.raised(prompt_tokens, self._least, "sinks and recent")

    def recent_tokens(self, capacity: int) -> int:
        """Size of the recent window, in tokens, under a budget of `capacity` tokens."""
        if isinstance(self.recent, numbers.Integral):
            return int(self.recent)
        tokens: int = part_of(self.recent, capacity)
        return tokens

    def capacity(self, step: Step) -> tuple[int, ...]:
        """Tokens kept per KV head of this layer, on average over its heads, for each sequence of the batch."""
        return tuple(
            self.share.of_layer(
                self._budget.tokens(
                    tokens,
                    floor=self._least,
                    token_bytes=step.token_bytes,
                    other_bytes=step.other_bytes,
                    spare=step.spare,
                ),
                depth=step.depth,
                layers=step.layers,
                prompt_tokens=tokens,
                least=self._least,
            )
            for tokens in step.prompt_tokens
        )

    def scores(self, table: TokenTable, step: Step) -> Tensor:
        """The score by which rows are kept, float32, `[B, Hkv, rows]` or broadcastable to it."""
        return table["score"]

    @property
    def decides_together(self) -> bool:
        return self.share.scope == "model"

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        if not step.due:
            return None
        if self.share.scope != "head":
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
        retention = self._retention(table, step, capacity, self._compared(table, step, capacity))
        return _best(table, retention, most, None if len(set(capacity)) == 1 else per_sequence(capacity, device))

    def _evict(
        self, table: TokenTable, step: Step, capacity: tuple[int, ...], excess: int, surplus: int | Tensor | None = None
    ) -> Decision:
        """After a generated token: the `excess` worst rows; a sequence below its own budget gives empty slots.

        surplus: rows above what a head may hold, where the capacity does not say that.
        """
        all_over = isinstance(surplus, int)  # then every head has as many rows too many as any other
        if excess == 1 and (table.dense or all_over):
            scores, window = self._compared(table, step, capacity), self._window(table, step, capacity)
            return Decision(evict=table.kernels.worst_rows(scores, table.positions, self.sinks, window), exact=True)
        retention = self._retention(table, step, capacity, self._compared(table, step, capacity))
        if table.dense:
            return Decision(evict=retention.topk(excess, dim=-1, largest=False).indices)
        empty = table.positions < 0
        if surplus is None:
            surplus = (~empty).sum(-1, keepdim=True) - per_sequence(capacity, empty.device)
        surplus = torch.as_tensor(surplus, device=empty.device)
        worst = retention.masked_fill(empty, ALWAYS_KEPT).topk(excess, dim=-1, largest=False).indices
        vacant = empty.to(torch.int8).topk(excess, dim=-1).indices
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
            retention = self._retention(table, step, capacity, scores[number])
            own = counts[number].to(retention.device)
            decisions.append(_best(table, retention, int(own.max()), own[..., None]))
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
        if not any(surplus):
            return None
        return self._evict(table, step, capacity, max(surplus), per_sequence(surplus, table.positions.device))

    # -- what rows are kept by ---------------------------------------------------------------------------------------

    def _compared(self, table: TokenTable, step: Step, capacity: tuple[int, ...]) -> Tensor:
        """The scores by which rows are compared, `[B, Hkv, rows]`: pooled, if the policy pools.

        Pooled anew from the rows at hand, not once for all: a neighbour stays as long as what it stands beside, and
        what a generated token stands beside counts as well. Rows of the recent window, kept anyway, lend nothing; a row
        that scores -inf or NaN is out of the question, and is lent nothing.
        """
        scores = self.scores(table, step)
        try:
            scores = scores.expand_as(table.positions)
        except (AttributeError, RuntimeError):
            given = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PolicyError(
                f"scores() of {type(self).__name__} must be a float32 tensor [batch, kv_heads, rows], here "
                f"{list(table.positions.shape)}, or broadcast to it, and is {given}."
            ) from None
        if self.kernel_size == 1:
            return scores
        out = ~(scores > -math.inf)
        idle = out | self._is_recent(table, step, capacity)
        if not table.dense:
            idle |= table.positions < 0
        return self.pool(scores.masked_fill(idle, -math.inf), table.positions).masked_fill_(out, -math.inf)

    def pool(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Scores pooled over neighbouring positions, both `[B, Hkv, rows]`; -inf lends nothing."""
        return over_neighbours(scores, positions, self.kernel_size, lambda lent: lent.amax(-1))

    def _window(self, table: TokenTable, step: Step, capacity: tuple[int, ...]) -> int | Tensor:
        """The position where the recent window begins: an int, or LongTensor `[B, 1, 1]`."""
        recent = tuple(self.recent_tokens(tokens) for tokens in capacity)
        return step.tokens - per_sequence(recent, table.positions.device)

    def _is_recent(self, table: TokenTable, step: Step, capacity: tuple[int, ...]) -> Tensor:
        return table.positions >= self._window(table, step, capacity)

    def _retention(self, table: TokenTable, step: Step, capacity: tuple[int, ...], scores: Tensor) -> Tensor:
        """What rows are kept by, int64 `[B, Hkv, rows]`."""
        positions = table.positions
        retention = ranked(scores, positions)
        kept = self._is_recent(table, step, capacity)
        if self.sinks:
            kept |= positions < self.sinks
        retention = retention.masked_fill_(kept, ALWAYS_KEPT)
        return retention if table.dense else retention.masked_fill_(positions < 0, NEVER_KEPT)


def _best(table: TokenTable, retention: Tensor, most: int, counts: int | Tensor | None) -> Decision:
    """Keep the best `most` rows of each head, or `counts` of them, `[B, Hkv or 1, 1]`, in the order of positions."""
    slots = retention.topk(most, dim=-1).indices
    positions = table.positions.gather(2, slots)
    if counts is not None:
        positions = positions.masked_fill(torch.arange(most, device=slots.device) >= counts, EMPTY)
    positions, order = positions.sort(dim=-1)
    return Decision(keep=slots.gather(2, order).masked_fill(positions < 0, EMPTY))


def max_pool(kernel_size: int) -> Callable[[Tensor], Tensor]:
    """The largest of `kernel_size` neighbours, along the last dimension; there are none beyond its ends."""

    def pool(dense: Tensor) -> Tensor:
        size = reach(kernel_size, dense.shape[-1])
        return F.max_pool1d(dense, size, stride=1, padding=size // 2)

    return pool


def over_neighbours(
    scores: Tensor, positions: Tensor, kernel_size: int, reduce: Callable[[Tensor], Tensor], fill: float = -math.inf
) -> Tensor:
    """For every row, `reduce` of the scores of its neighbours, those less than half a kernel away, `[..., neighbours]`.

    `fill` stands where there is no neighbour. No shape depends on what positions say, and the device is not waited for.
    scores, positions: `[B, Hkv, rows]`; positions differ, but for those of empty rows, which are to score `fill`.
    """
    batch, heads, rows = positions.shape
    half = kernel_size // 2
    few = min(half, rows - 1)  # as positions differ, no neighbour is more rows away
    order = positions.argsort(dim=-1)
    places = positions.gather(2, order)
    around = F.pad(places, (few, few)).unfold(2, 2 * few + 1, 1)
    lent = F.pad(scores.gather(2, order), (few, few), value=fill).unfold(2, 2 * few + 1, 1)
    parts = []
    for block in row_blocks(rows, batch * heads * (2 * few + 1), scores.device):
        near = (around[:, :, block] - places[:, :, block, None]).abs_() <= half
        parts.append(reduce(torch.where(near, lent[:, :, block], fill)))
    pooled = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return torch.empty_like(pooled).scatter_(2, order, pooled)


def reach(kernel_size: int, length: int) -> int:
    """A kernel no wider than it takes to reach all of a length from everywhere: more would only cost memory."""
    return min(kernel_size, 2 * length - 1)


def along_positions(scores: Tensor, positions: Tensor, function: Callable[[Tensor], Tensor], fill: float) -> Tensor:
    """Apply a function to scores laid out by position, `[B, Hkv, positions]`, with `fill` where no row is.

    scores, positions: `[B, Hkv, rows]`.
    """
    positions = positions.long()
    axis = max(1, int(positions.max()) + 1)  # of nothing but padding, too
    index = torch.where(positions < 0, axis, positions)
    dense = scores.new_full((*scores.shape[:2], axis + 1), fill).scatter_(2, index, scores)[:, :, :axis]
    result = function(dense)
    return result.gather(2, positions.clamp(min=0))
