"""Bits: one number of bytes, and for every row as many bits as it is worth."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvprune.errors import BudgetError, PolicyError
from kvprune.policies.snapkv import SnapKV
from kvprune.policy.aging import oldest
from kvprune.policy.allotment import EXACT, Rows, allotted, weights_of
from kvprune.policy.base import Decision, Step
from kvprune.policy.budget import Budget
from kvprune.policy.ranking import Ranking
from kvprune.policy.registry import parse
from kvprune.policy.scored import Scored
from kvprune.policy.settings import check_count, check_number
from kvprune.policy.shares import Adaptive, Everywhere, Share
from kvprune.table.basis import lanes_of
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
        b_i   = max(0, 1/2 log2(s_i / theta)), rounded to what there is,     s_i = score_i^power

    Rows whose error would count much stay exact, those that count less lose bits, and what counts nothing goes: with
    0 and 16 bits alone, it is the eviction policy whose scores it takes, and where all rows stay, mixed precision. The
    rule is that of rate and distortion, as in RDKV (arXiv 2605.08317); `kvprune/policy/allotment.py` says what
    is minimised. theta is common to all who share a budget: heads and layers (`Everywhere`), heads of a layer
    (`Adaptive`), or no others. Codes are of a Hadamard transform, carry their
    scale, and share nothing with other rows.

    Every prompt is decided when it has ended, from the bytes that all tokens so far may take. What is packed by then
    keeps its bits or goes. Generated tokens stay exact until 32 are older than the newest `recent`, and then get
    `aged_bits`, if anything is packed: a budget says what is left of prompts.

    Settings:
        budget: a float in (0, 1] is a share of the bytes that the full cache of the prompt takes at 16 bits a number,
            as "0.05b" is, but never less than sinks and recent tokens take; an int is the bytes of so many tokens at 16
            bits; a string such as "512MiB" is bytes of the whole cache. Queries that the scorer remembers until the
            first token is generated come on top.
        score: whose scores they are, a policy that ranks rows, or its text ("kvzip"). What it says of budget, sinks,
            recent tokens, interval and share means nothing here.
        power: of scores, see above; what attention loses counts by its square. widths: of codes, out of 2, 3, 4 and 8;
            none for eviction alone.
        share: who shares a budget, a `Share`; its floor is of bytes.
        sinks, recent: the first and the newest tokens, always exact; they are paid first.
        aged_bits: of generated tokens, 2, 3, 4 or 8.
    """

    budget: float | int | str = 0.1
    _: KW_ONLY
    score: Ranking | str = _SCORE
    power: float = 2
    widths: tuple[int, ...] = BITS
    share: Share = _SHARE
    sinks: int = 4
    recent: int = 16
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
        check_number("power", self.power, low=0, high=2)
        check_count("sinks", self.sinks, least=0)
        check_count("recent", self.recent, least=0)
        if isinstance(self.widths, list):
            object.__setattr__(self, "widths", tuple(self.widths))
        if not isinstance(self.widths, tuple) or not all(map(is_width, self.widths)):
            raise PolicyError(f"widths={self.widths!r} is not supported: give a tuple out of 2, 3, 4 and 8.")
        if not is_width(self.aged_bits):
            raise PolicyError(f"aged_bits={self.aged_bits!r} is not supported: choose 2, 3, 4 or 8.")

    @cached_property
    def _budget(self) -> Budget:
        return Budget.parse(self.budget)

    @property
    def scorer(self) -> Ranking:
        return self.score  # type: ignore[return-value]

    @property
    def evicts(self) -> bool:
        return True

    @property
    def decides_together(self) -> bool:
        return self.share.scope == "model" or self.scorer.decides_together

    @property
    def codecs(self) -> tuple[Codec, ...]:
        return tuple(RotatedCodec(bits) for bits in sorted({*self.widths, self.aged_bits}))

    @property
    def buffer(self) -> int:
        return self.recent + self.sinks + _TOGETHER

    def buffer_columns(self) -> dict[str, torch.dtype]:
        return {"bits": torch.int32}

    def observe(self, table: TokenTable, step: Step) -> None:
        super().observe(table, step)
        if step.prefill:
            self._check(table, step)

    # -- which rows stay ---------------------------------------------------------------------------------------------

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        return self.decide_together([table], [step])[0] if step.prefill else None

    def decide_together(self, tables: list[TokenTable], steps: list[Step]) -> list[Decision | None]:
        rows = [self._rows(table, step) for table, step in zip(tables, steps, strict=True)]
        limits = [self._limit(table, step) for table, step in zip(tables, steps, strict=True)]
        floor = self.share.floor if isinstance(self.share, Adaptive) else 0
        if floor:
            of_heads = [floor * self._limit(table, step, "head") for table, step in zip(tables, steps, strict=True)]
            least = allotted(rows, of_heads, lambda sizes: sizes)
            rows = [replace(own, least=bits) for own, bits in zip(rows, least, strict=True)]

        def total(sizes: list[Tensor]) -> list[Tensor]:
            if self.share.scope == "head":
                return sizes
            sums = [each.sum(1, keepdim=True) for each in sizes]
            if self.share.scope == "layer":
                return [step.heads.sum(each) for step, each in zip(steps, sums, strict=True)]
            whole = steps[0].heads.sum(torch.stack([each.to(sums[0].device) for each in sums]).sum(0))
            return [whole.to(each.device) for each in sums]

        bits = allotted(rows, limits, total)
        return [self._decision(*each) for each in zip(tables, bits, strict=True)]

    def _rows(self, table: TokenTable, step: Step) -> Rows:
        positions, packed = table.positions, table.code_bits()
        always = (positions < self.sinks) | (positions >= step.tokens - self.recent)
        loose = packed.new_zeros(*packed.shape[:2], positions.shape[2] - packed.shape[2])
        there = positions >= 0
        scores = self.share.normalized(self.compared(table, step), there & ~always)
        least = scores.masked_fill(~(there & ~always & scores.isfinite()), 0.0).amin(-1, keepdim=True)
        scores = scores - least.clamp(max=0)  # cosines, norms and "z" have a sign
        return Rows(
            weights_of(scores, positions, self.power),
            always & there,
            there,
            torch.cat([packed, loose], dim=2),
            self._prices(table),
            self.widths,
        )

    def _prices(self, table: TokenTable) -> dict[int, int]:
        """Bytes of a row of a head, by bits."""
        heads = table.batch_size * table.kv_heads
        packed = {codec.bits: table.packed_row_bytes(codec) // heads for codec in self.codecs}
        return {**packed, EXACT: table.token_bytes // heads}

    def _limit(self, table: TokenTable, step: Step, scope: str | None = None) -> Tensor:
        """Bytes of rows: of a head, of the heads of a layer, or of all layers, float64 `[B, 1]`."""
        heads = table.kv_heads * step.heads.size
        full = step.half_bytes / (step.layers * table.batch_size)  # of a token, in all heads of a layer
        limits = []
        for tokens in step.prompt_tokens:
            size = self._budget.amount * full
            if self._budget.kind == "bytes":
                size = (self._budget.amount - step.stock_bytes) / (step.layers * table.batch_size)
            elif self._budget.kind != "tokens":
                size *= tokens
            if self._budget.kind == "fraction":  # a greeting is no mistake
                exact = min(self.sinks + self.recent, tokens) * self._prices(table)[EXACT]
                size = max(size, (exact + self._overhead(table)) * heads)
            size = max(0.0, size - self._overhead(table) * heads)
            rows = int(size / (self._prices(table)[EXACT] * heads) + 1e-9)  # of those in full precision
            own = self.share.of_layer(
                rows, depth=step.depth, layers=step.layers, prompt_tokens=tokens, least=self.sinks + self.recent
            )
            limits.append(size * own / rows if rows else size)
        of_layer = torch.tensor(limits, dtype=torch.float64, device=table.positions.device)[:, None]
        scope = scope or self.share.scope
        return of_layer * step.layers if scope == "model" else of_layer / (heads if scope == "head" else 1)

    def _overhead(self, table: TokenTable) -> int:
        """Bytes that a head holds beside its rows: the widths of its components."""
        return sum(dim // lanes_of(dim) for dim in table.dims[:2]) * len(self.codecs)

    def _check(self, table: TokenTable, step: Step) -> None:
        """Raise BudgetError where the bytes do not hold what is always exact."""
        price, heads = self._prices(table)[EXACT], table.kv_heads * step.heads.size
        limits = self._limit(table, step, "layer")[:, 0].tolist()
        for limit, tokens in zip(limits, step.prompt_tokens, strict=True):
            rows = min(self.sinks + self.recent, tokens)
            need = rows * price * heads
            if need > limit:
                raise BudgetError(
                    f"budget={self.budget!r} leaves {max(0, int(limit)):,} bytes for the rows of a layer, and the "
                    f"{rows} exact ones (sinks and recent) of its {heads} heads take {need:,}: give more, or lower "
                    "sinks or recent."
                )

    def _decision(self, table: TokenTable, bits: Tensor) -> Decision | None:
        table["bits"] = bits[:, :, table.packed_length :]
        stays = bits > 0
        if bool((stays == (table.positions >= 0)).all()):
            return None
        return Decision(keep=in_order(true_rows(stays), table.positions))

    # -- and at how many bits ----------------------------------------------------------------------------------------

    def pack(self, table: TokenTable, step: Step) -> Decision | None:
        if step.prefill:
            positions, bits = table.positions[:, :, table.packed_length :], table["bits"]
            chosen = [(codec, (bits == codec.bits) & (positions >= 0)) for codec in self.codecs]
            parts = [
                (codec, in_order(true_rows(own), positions, table.packed_length)) for codec, own in chosen if own.any()
            ]
            return Decision(quantize=tuple(parts), apart=True) if parts else None
        if not table.packed or step.generated < _TOGETHER:
            return None
        given = torch.as_tensor(step.tokens - step.generated - self.recent, device=table.positions.device)
        slots = oldest(table, residual=self.recent, together=_TOGETHER, sinks=given.clamp(min=self.sinks))
        return None if slots is None else Decision(quantize=((RotatedCodec(self.aged_bits), slots),), apart=True)
