"""Bits: one number of bytes, and for every row as many bits as it is worth."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.policies.snapkv import SnapKV
from kvprune.policy.aging import oldest
from kvprune.policy.allotment import EXACT, Rows, allotted, doubted, weights_of
from kvprune.policy.base import Decision, Step
from kvprune.policy.budget import Budget
from kvprune.policy.byte_limits import ByteLimits
from kvprune.policy.heads import ALL_HEADS
from kvprune.policy.ranking import Ranking
from kvprune.policy.registry import parse
from kvprune.policy.scored import Scored
from kvprune.policy.settings import check_count, check_number
from kvprune.policy.shares import Adaptive, Everywhere, Share
from kvprune.table.quantize import BITS, Codec, is_width
from kvprune.table.rotated_rows import RotatedCodec
from kvprune.table.rows import in_order, true_rows
from kvprune.table.token_table import TokenTable

_TOGETHER = 32  # generated tokens that are packed together
_SCORE, _SHARE = SnapKV(), Everywhere()


@dataclass(frozen=True)
class Bits(Scored):
    """Gives every row of a head 0, 2, 3, 4, 8 or 16 bits, so that the expected error is least for a number of bytes.

        error = sum over rows of  s_i 4^-b_i,     bytes = sum over rows of what b_i bits take
        b_i   = max(0, 1/2 log2(s_i / theta)), rounded to what there is,     s_i = score_i^power, doubted as below

    Rows whose error would count much stay exact, those that count less lose bits, and what counts nothing goes: with
    0 and 16 bits alone, it is the eviction policy whose scores it takes, and where all rows stay, mixed precision. The
    rule is that of rate and distortion, as in RDKV (arXiv 2605.08317); `kvprune/policy/allotment.py` says what
    is minimised. theta is common to all who share a budget: heads and layers (`Everywhere`), heads of a layer
    (`Adaptive`), or no others. Codes are of a Hadamard transform, carry their scale, and share nothing with other rows.

    Every prompt is decided when it has ended, from the bytes that all tokens so far may take. What is packed by then
    keeps its bits, has fewer from then on, for which its codes are decoded and encoded anew, or goes: whichever loses
    least. Generated tokens stay exact until 32 are older than the newest `recent`, and then get
    `aged_bits`, if anything is packed: a budget says what is left of prompts. With an `interval`, all rows of a layer
    compete again after so many generated tokens, for the bytes that a prompt has given it: exact rows get bits, packed
    ones lose some, or they go. Beyond its bytes a cache then has no more than what has come since.

    Settings:
        budget: a float in (0, 1] is a share of the bytes that the full cache of the prompt takes at 16 bits a number,
            as "0.05b" is, but never less than sinks and recent tokens take; an int is the bytes of so many tokens at 16
            bits; a string such as "512MiB" is bytes of the whole cache. Queries that the scorer remembers until the
            first token is generated come on top.
        score: whose scores they are, a policy that ranks rows, or its text ("kvzip"). What it says of budget, sinks,
            recent tokens, interval and share means nothing here.
        power: of scores, see above; by default 2, as what attention loses counts by its square, and 1 for scores that
            are squares, as those of DropKV.
        doubt: a share of the rows, those that score least, count nearly alike: what scores do not foresee, such as a
            later question, is among them. At few bytes they go, in their order; where there are bytes, they have bits.
        widths: of codes, out of 2, 3, 4 and 8; none for eviction alone.
        share: who shares a budget, a `Share`; its floor is of bytes: what a head would have by itself, of so much of an
            equal part, it has.
        sinks, recent: the first and the newest tokens, always exact; they are paid first.
        interval: generated tokens from one decision to the next, by scores that go on while tokens are generated, as
            those of A2SF, H2O or SnapKV do; None decides about prompts alone.
        aged_bits: of generated tokens where there is no interval, 2, 3, 4 or 8.
    """

    budget: float | int | str = 0.1
    _: KW_ONLY
    score: Ranking | str = _SCORE
    power: float | None = None
    doubt: float = 0.75
    widths: tuple[int, ...] = BITS
    share: Share = _SHARE
    sinks: int = 1
    recent: int = 4
    interval: int | None = None
    aged_bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.score, str):
            object.__setattr__(self, "score", parse(self.score))
        if not isinstance(self.score, Ranking):
            raise PolicyError(f"score must be a policy that ranks rows, such as SnapKV(), not {self.score!r}.")
        if self.score.renumbers:
            raise PolicyError(
                f"{self.score} shows rows at their places in the cache, and keys that are packed cannot be turned any "
                'more: write positions="original".'
            )
        if isinstance(self.share, str):
            object.__setattr__(self, "share", Share.parse(self.share))
        if not isinstance(self.share, Share):
            raise PolicyError(f"share must be a Share such as Everywhere(), or its text, not {self.share!r}.")
        object.__setattr__(self, "budget", self._budget.plain(self.budget))
        if self.power is not None:
            check_number("power", self.power, low=0, high=2)
        check_number("doubt", self.doubt, low=0, high=1)
        check_count("sinks", self.sinks, least=0)
        check_count("recent", self.recent, least=0)
        if isinstance(self.widths, list):
            object.__setattr__(self, "widths", tuple(self.widths))
        if not isinstance(self.widths, tuple) or not all(map(is_width, self.widths)):
            raise PolicyError(f"widths={self.widths!r} is not supported: give a tuple out of 2, 3, 4 and 8.")
        if self.interval is not None:
            check_count("interval", self.interval, least=1)
            if not self.scorer.scores_generated:
                raise PolicyError(
                    f"{self.scorer} does not score generated tokens, which are to compete every {self.interval}: leave "
                    "interval out, or take scores that go on, such as A2SF(), H2O() or SnapKV()."
                )
        if not is_width(self.aged_bits):
            raise PolicyError(f"aged_bits={self.aged_bits!r} is not supported: choose 2, 3, 4 or 8.")

    @cached_property
    def _budget(self) -> Budget:
        return Budget.parse(self.budget)

    @cached_property
    def _limits(self) -> ByteLimits:
        return ByteLimits(self._budget, self.share, self.codecs, self.sinks + self.recent)

    @cached_property
    def scorer(self) -> Ranking:
        """The policy whose scores they are, with the recent rows of this one, which pooling leaves alone."""
        score: Ranking = self.score  # type: ignore[assignment]
        return replace(score, budget=0.5, sinks=self.sinks, recent=self.recent)

    @property
    def _power(self) -> float:
        if self.power is not None:
            return self.power
        return 1 if self.scorer.scores_squares else 2

    @property
    def evicts(self) -> bool:
        return True

    @property
    def decides_together(self) -> bool:
        return self.share.scope == "model" or self.scorer.decides_together

    @property
    def codecs(self) -> tuple[Codec, ...]:
        aged = {self.aged_bits} if self.interval is None else set()
        return tuple(RotatedCodec(bits) for bits in sorted({*self.widths, *aged}))

    @property
    def buffer(self) -> int:
        return self.recent + self.sinks + (self.interval or _TOGETHER)

    def observe(self, table: TokenTable, step: Step) -> None:
        super().observe(table, step)
        if step.prefill:
            self._limits.check(table, step, self.budget)

    # -- which rows stay, and at how many bits -----------------------------------------------------------------------

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        if step.prefill:
            return self.decide_together([table], [step])[0]
        if not step.due:
            return None
        limits, scope = self._limits.left(table, step), self._limits.scope_of_layer
        of_heads = limits / (1 if scope == "head" else table.kv_heads * step.heads.size)
        return self._decided([table], [step], [limits], [of_heads], scope)[0][0]

    def decide_together(self, tables: list[TokenTable], steps: list[Step]) -> list[Decision | None]:
        limits, of_heads = (
            [self._limits.of(table, step, scope) for table, step in zip(tables, steps, strict=True)]
            for scope in (None, "head")
        )
        decisions, sizes = self._decided(tables, steps, limits, of_heads, self.share.scope)
        if self.interval is not None:
            self._limits.remember(tables, limits, sizes)
        return decisions

    def _decided(
        self, tables: list[TokenTable], steps: list[Step], limits: list[Tensor], of_heads: list[Tensor], scope: str
    ) -> tuple[list[Decision | None], list[Tensor]]:
        """What is decided of these tables, and the bytes that heads have then, of all processes if they compete.

        limits: bytes of those who compete, as scope says. of_heads: of a head on average, of which a floor is a part.
        """
        own = [self._rows(table, step) for table, step in zip(tables, steps, strict=True)]
        heads = [ALL_HEADS if scope == "head" else step.heads for step in steps]
        rows = [
            here.of_every_head(of, int(torch.as_tensor(step.tokens).max()))
            for here, of, step in zip(own, heads, steps, strict=True)
        ]
        rows = doubted(rows, [step.tokens for step in steps], self.doubt, scope)
        floor = self.share.floor if isinstance(self.share, Adaptive) else 0
        floors = [floor * each for each in of_heads] if floor else None
        bits = allotted(rows, limits, self._limits.total(scope), floors)
        sizes = [every.sizes(each) for every, each in zip(rows, bits, strict=True)]
        here = [of_here.of_these(of, each) for of_here, of, each in zip(own, heads, bits, strict=True)]
        return [self._decision(*each) for each in zip(tables, own, here, strict=True)], sizes

    def _rows(self, table: TokenTable, step: Step) -> Rows:
        positions = table.positions
        now = torch.full_like(positions, EXACT, dtype=torch.int64)
        now[:, :, : table.packed_length] = table.code_bits()
        always = (positions < self.sinks) | (positions >= step.tokens - self.recent)
        there, scores = positions >= 0, torch.zeros_like(positions, dtype=torch.float64)
        if scores.shape[2]:  # there are no rows of a prompt that is padding alone
            # In 64 bits, so that no two scores of a head become equal on another scale.
            scores = self.share.normalized(self.compared(table, step).double(), there & ~always)
            least = scores.masked_fill(~(there & ~always & scores.isfinite()), 0.0).amin(-1, keepdim=True)
            scores = scores - least.clamp(max=0)  # cosines, norms and "z" have a sign
        weights, prices = weights_of(scores, positions, self._power), self._limits.prices(table)
        return Rows(weights, always & there, there, now, prices, self.widths)

    def _decision(self, table: TokenTable, rows: Rows, bits: Tensor) -> Decision | None:
        stays, fewer = bits > 0, bits < rows.now
        chosen = [(codec, fewer & (bits == codec.bits)) for codec in self.codecs]
        parts = tuple((codec, in_order(true_rows(own), table.positions)) for codec, own in chosen if own.any())
        all_stay = bool((stays == rows.there).all()) and not table.has_gaps
        if all_stay and not parts:
            return None
        keep = None if all_stay else in_order(true_rows(stays), table.positions)
        return Decision(keep=keep, quantize=parts or None, apart=True)

    # -- generated tokens --------------------------------------------------------------------------------------------

    def pack(self, table: TokenTable, step: Step) -> Decision | None:
        if step.due:
            table.shrink(0)  # no budget has paid for the room that tokens to come take
        if step.prefill or self.interval is not None:
            return None
        if step.generated // _TOGETHER == (step.generated - step.queries) // _TOGETHER:
            return None
        packed = step.heads.sum((table.positions[:, :, : table.packed_length] >= 0).sum((1, 2))).view(-1, 1, 1)
        if not packed.any():
            return None
        given = torch.tensor(step.prompt_tokens, device=packed.device).view(-1, 1, 1) - self.recent
        first = torch.where(packed > 0, given.clamp(min=self.sinks), torch.iinfo(torch.int32).max)
        slots = oldest(table, residual=self.recent, together=_TOGETHER, sinks=first)
        return None if slots is None else Decision(quantize=((RotatedCodec(self.aged_bits), slots),), apart=True)
