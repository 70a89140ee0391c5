"""`Ranking`: what rows are kept by: a score, in the order of which they stay, and what stays whatever it scores."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from kvprune.attention import operations
from kvprune.attention.mass import GROUPS
from kvprune.errors import BudgetError, PolicyError
from kvprune.policy.base import Policy, Step, per_sequence
from kvprune.policy.budget import Budget
from kvprune.policy.budget import share as part_of
from kvprune.policy.representatives import Representatives
from kvprune.policy.settings import check_count, check_reach, check_seed
from kvprune.policy.shares import ALWAYS_KEPT, NEVER_KEPT, UNIFORM, Share
from kvprune.table.rows import ranked
from kvprune.table.token_table import TokenTable

REPRESENTATIVE = "representative"
"""The column, `[B, Hkv, rows]` int32, of rows that are kept as `Representatives`."""
VALUE_SIZE = "value_size"
"""The column, `[B, Hkv, rows]` float32, of what values add to the output, where a policy is `value_aware`."""


@dataclass(frozen=True)
class Ranking(Policy):
    """Orders the rows of a head by score; sinks and the recent window come before all of them.

    Settings:
        budget: a float in (0, 1] is a fraction of the prompt tokens, rounded up and never below sinks + recent; an int
            is tokens per KV head; a string such as "512MiB" is bytes of the whole cache, that is, of all processes
            together where tensor parallelism splits the heads; "0.05b" is a share of the bytes that the full cache of
            the prompt takes at 16 bits a number, in layers that are pruned.
        sinks: the first tokens of a sequence, always kept, part of the budget.
        recent: the newest tokens, always kept, part of the budget; a float is a share of the budget, rounded up.
        interval: generated tokens between two evictions. 1 evicts at every step and the cache never exceeds the budget
            by more than the token being generated; None never evicts generated tokens.
        group: how scores of the query heads of a KV head are reduced, "mean" or "max".
        kernel_size: wherever rows are compared, while tokens are generated too, a row counts as much as the best of
            that many positions around it. 1 is none.
        ahead: how far what is attended to lends its score to what follows; the rest of the kernel comes before. An
            answer follows what a question points at: one of n tokens takes `kernel_size=n + 4, ahead=n`. None is half
            of the kernel, which is then odd.
        positions: "original", where queries see rows where they were in the text, or "cache", where they see them side
            by side, no further away than there are rows, so that a rotary model may generate beyond its window.
        seed: of policies that draw random numbers.
        value_aware: of scores made of attention, whether a row counts as much as attention finds in it: scores, pooled
            if the policy pools, are multiplied by the L1 norm of what the row's value adds to the output of the layer
            through the output projection, averaged over the query heads of a KV head.
        share: who gets how many rows of the budget, a `Share` or its text ("adaptive"). But for `Uniform`, heads or
            layers keep different numbers of rows, as many on average as the budget says.
    """

    budget: float | int | str = 0.25
    _: KW_ONLY
    sinks: int = 4
    recent: int | float = 32
    interval: int | None = 1
    group: str = "mean"
    kernel_size: int = 1
    ahead: int | None = None
    seed: int = 0
    positions: str = "original"
    value_aware: bool = False
    share: Share = UNIFORM
    representatives: ClassVar[Representatives | None] = None
    """Of a chain, what follows it and chooses a part of what it keeps: no setting, see `with_representatives`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.share, str):
            object.__setattr__(self, "share", Share.parse(self.share))
        if not isinstance(self.share, Share):
            raise PolicyError(f"share must be a Share such as Adaptive(floor=0.2), or its text, not {self.share!r}.")
        budget = self._budget  # parses, and raises for nonsense
        object.__setattr__(self, "budget", budget.plain(self.budget))
        check_count("sinks", self.sinks, least=0)
        check_reach(self.kernel_size, self.ahead)
        check_seed(self.seed)
        if self.positions not in ("original", "cache"):
            raise PolicyError(f'positions must be "original" or "cache", not {self.positions!r}.')
        if self.renumbers and self.turns_back:
            raise PolicyError(
                f"{type(self).__name__} turns queries and keys back from where they were in the text, and "
                'positions="cache" shows them elsewhere: write positions="original".'
            )
        if not isinstance(self.value_aware, bool):
            raise PolicyError(f"value_aware must be True or False, not {self.value_aware!r}.")
        if self.value_aware and not self.scores_attention:
            raise PolicyError(
                f"the scores of {type(self).__name__} are no attention, which values could be weighed by: leave "
                "value_aware out, or take a policy such as SnapKV."
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
    def renumbers(self) -> bool:
        return self.positions == "cache"

    @property
    def weighs_outputs(self) -> bool:
        return self.value_aware

    @property
    def scores_attention(self) -> bool:
        """Whether its scores are made of attention: 0 for a row that nobody attends to, and larger for others."""
        return type(self).row_weights is not Policy.row_weights or self.replay is not None

    @property
    def scores_squares(self) -> bool:
        """Whether its scores are squared errors, as what is lost counts, and not sizes, which count by their square."""
        return False

    @property
    def scores_generated(self) -> bool:
        """Whether generated tokens get scores, by which they may compete with those of a prompt before the next."""
        return self.replay is None

    @property
    def heads_compete(self) -> bool:
        return self.share.scope != "head"

    @property
    def static_decode(self) -> bool:
        return self.interval == 1 and not (self.turns_back or self.value_aware or self.refines)

    def all_columns(self) -> dict[str, torch.dtype]:
        sizes = {VALUE_SIZE: torch.float32} if self.value_aware else {}
        chosen = {REPRESENTATIVE: torch.int32} if self.representatives is not None else {}
        return {**self.columns(), **sizes, **chosen}

    def with_representatives(self, chooser: Policy) -> Policy:
        if self.representatives is not None or not isinstance(chooser, Representatives):
            return super().with_representatives(chooser)
        other = copy.copy(self)
        object.__setattr__(other, "representatives", chooser)
        return other

    def prepare(self, table: TokenTable, step: Step) -> None:
        if self.value_aware and step.outputs is not None and step.source is not None:
            sizes = step.outputs.sizes(table.newest_values(step.queries), step.source.states.shape[1])
            table[VALUE_SIZE][:, :, -step.queries :] = sizes

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

    def note(self, prompt_tokens: tuple[int, ...], **costs: int) -> str | None:
        return self._budget.raised(prompt_tokens, self._least, "sinks and recent", **costs)

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
                    half_bytes=step.half_bytes,
                    stock_bytes=step.stock_bytes,
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

    # -- what rows are kept by ---------------------------------------------------------------------------------------

    def compared(self, table: TokenTable, step: Step) -> Tensor:
        """The scores by which rows are compared, `[B, Hkv, rows]`, for policies that do so themselves."""
        return self._compared(table, step, step.prompt_tokens)

    def _compared(self, table: TokenTable, step: Step, capacity: tuple[int, ...]) -> Tensor:
        """The scores by which rows are compared, `[B, Hkv, rows]`: pooled, if the policy pools.

        Pooled anew from the rows at hand, not once for all: a neighbour stays as long as what it stands beside, and
        what a generated token stands beside counts as well. Rows of the recent window, kept anyway, lend nothing; a row
        that scores -inf or NaN is out of the question, and is lent nothing.
        """
        given = scores = self.scores(table, step)
        try:
            scores = scores.expand_as(table.positions)
            if scores.device != table.positions.device or scores.is_complex():
                raise RuntimeError
        except (AttributeError, RuntimeError):
            said = type(given).__name__
            if isinstance(given, Tensor):
                said = f"{list(given.shape)} of {given.dtype} on {given.device}"
            raise PolicyError(
                f"scores() of {type(self).__name__} must be a float32 tensor [batch, kv_heads, rows] on "
                f"{table.positions.device}, here {list(table.positions.shape)}, or broadcast to it, and is {said}."
            ) from None
        if self.kernel_size > 1:
            scores = self.pool(scores, table, self._window(table, step, capacity))
        return self.weighed(scores, table)

    def weighed(self, scores: Tensor, table: TokenTable) -> Tensor:
        """What rows and heads are compared by, of pooled scores `[B, Hkv, rows]`."""
        return scores * table[VALUE_SIZE] if self.value_aware else scores

    def pool(self, scores: Tensor, table: TokenTable, recent: int | Tensor) -> Tensor:
        """Scores `[B, Hkv, rows]` pooled over neighbouring positions; rows from position `recent` on lend nothing."""
        return operations.of(table).largest_near(scores, table.positions, *self.neighbours, recent)

    @property
    def neighbours(self) -> tuple[int, int]:
        """How many positions before a row, and after it, lend it their scores."""
        ahead = self.kernel_size // 2 if self.ahead is None else self.ahead
        return ahead, self.kernel_size - 1 - ahead

    def _window(self, table: TokenTable, step: Step, capacity: tuple[int, ...]) -> int | Tensor:
        """The position where the recent window begins: an int, or LongTensor `[B, 1, 1]`."""
        recent = tuple(self.recent_tokens(tokens) for tokens in capacity)
        return step.tokens - per_sequence(recent, table.positions.device)

    def _is_recent(self, table: TokenTable, step: Step, capacity: tuple[int, ...]) -> Tensor:
        return table.positions >= self._window(table, step, capacity)

    def _ranks(
        self, table: TokenTable, step: Step, capacity: tuple[int, ...], scores: Tensor, kept: int | Tensor
    ) -> Tensor:
        """What rows are kept by, int64 `[B, Hkv, rows]`, where heads have been given as many as they keep."""
        retention = self._retention(table, step, capacity, scores)
        if not self.refines and self.representatives is None:
            return retention
        rows = (retention > NEVER_KEPT).sum(-1, keepdim=True)
        kept = torch.minimum(torch.as_tensor(kept, device=retention.device), rows)

        def ranked_by(other: Tensor) -> Tensor:
            return self._retention(table, step, capacity, other)

        if self.refines:
            retention = self.refined(retention, scores, table, kept, ranked_by)
        if self.representatives is None:
            return retention
        anew = rows - kept > (0 if step.prefill else 1)
        now, before = self.representatives.chosen(retention, table, step, kept), table[REPRESENTATIVE] > 0
        now = torch.where(anew, now, before)
        table[REPRESENTATIVE] = now
        return retention.masked_fill(now & (retention > NEVER_KEPT), ALWAYS_KEPT)

    def protected(self, table: TokenTable) -> Tensor | None:
        """Where one row goes, the column of rows that stay, `[B, Hkv, rows]` int32: those above 0; None for none."""
        return None if self.representatives is None else table[REPRESENTATIVE]

    @property
    def refines(self) -> bool:
        """Whether `refined` changes anything."""
        return False

    def refined(
        self,
        retention: Tensor,
        scores: Tensor,
        table: TokenTable,
        kept: Tensor,
        ranked_by: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """What rows of a head are kept by, once it is known how many: of the result, the `kept` largest stay.

        retention: int64 `[B, Hkv, rows]`, `ALWAYS_KEPT` for sinks and recent window, `NEVER_KEPT` for empty slots, else
        in the order of `scores`. kept: LongTensor that broadcasts to `[B, Hkv, 1]`. ranked_by: makes such a retention
        of other scores.
        """
        return retention

    def _retention(self, table: TokenTable, step: Step, capacity: tuple[int, ...], scores: Tensor) -> Tensor:
        """What rows are compared by, int64 `[B, Hkv, rows]`."""
        positions = table.positions
        retention = ranked(scores, positions)
        kept = self._is_recent(table, step, capacity)
        if self.sinks:
            kept |= positions < self.sinks
        retention = retention.masked_fill_(kept, ALWAYS_KEPT)
        return retention if table.dense else retention.masked_fill_(positions < 0, NEVER_KEPT)
