"""Budgets: how much of the cache a policy may keep, as a fraction, a number of tokens, or bytes."""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from kvprune.errors import BudgetError

_UNITS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_MOST_DIGITS = 100  # of a number of tokens: int() refuses thousands, and floats above 1 are refused here
_HELP = (
    "write a float in (0, 1] for a fraction of the prompt tokens (0.25), an int of at least 1 for a number of tokens "
    'per KV head (1024), or a string with a unit for the bytes of the whole cache ("512MiB", or "0.05b" for a share of '
    "those that every token would take at 16 bits a number)"
)


@dataclass(frozen=True)
class Budget:
    """A parsed budget.

    amount: as kind says, a fraction of the tokens, tokens per KV head, bytes of the whole cache, or a share of those
    that the full cache of the prompt takes at 16 bits a number.
    """

    kind: Literal["fraction", "tokens", "bytes", "share"]
    amount: float

    @classmethod
    def parse(cls, value: float | int | str) -> Budget:
        """Read what a person wrote: `0.25`, `1024`, `"512MiB"`, `"0.05b"`; `"0.25"`, `"25%"` and `"1024"` work too.

        Raises BudgetError for anything that is not a positive, finite amount.
        """
        if isinstance(value, str):
            return cls._parse_text(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise BudgetError(f"a budget cannot be {value!r}: {_HELP}.")
        if isinstance(value, numbers.Integral):
            if value < 1:
                raise BudgetError(f"a budget of {value} tokens keeps nothing: {_HELP}.")
            return cls("tokens", int(value))
        if not 0 < value <= 1:  # NaN fails both comparisons
            hint = f"; for {math.ceil(value)} tokens write the int {math.ceil(value)}" if 1 < value < math.inf else ""
            raise BudgetError(f"a fraction must lie in (0, 1], and {value!r} does not: {_HELP}{hint}.")
        return cls("fraction", float(value))

    @classmethod
    def _parse_text(cls, text: str) -> Budget:
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z%]*)\s*", text)
        if match is None:
            raise BudgetError(f"a budget cannot be {text!r}: {_HELP}.")
        number, unit = match.groups()
        if unit == "b" and 0 < float(number) <= 1:  # of bytes it would be one or none, and those are written "B"
            return cls("share", float(number))
        unit = unit.lower()
        if unit == "":
            return cls.parse(float(number) if len(number) > _MOST_DIGITS or not number.isdigit() else int(number))
        if unit == "%":
            return cls.parse(float(number) / 100)
        if unit not in _UNITS:
            raise BudgetError(f"unknown unit {unit!r} in the budget {text!r}: {_HELP}.")
        amount = float(number) * _UNITS[unit]
        if not 1 <= amount < math.inf:
            raise BudgetError(f"a budget of {text!r} keeps nothing: {_HELP}.")
        return cls("bytes", int(amount))

    @property
    def in_bytes(self) -> bool:
        """Whether it depends on what a token costs, which policies learn at the first step."""
        return self.kind in ("bytes", "share")

    @property
    def of_whole_batch(self) -> bool:
        """Whether the sequences of a batch divide it among them; each has its own of any other."""
        return self.kind == "bytes"

    def plain(self, written: float | int | str) -> float | int | str:
        """What a person wrote, as a number where it is one: `"25%"` -> 0.25, `"1024"` -> 1024, `"1GiB"` as it is."""
        if self.in_bytes:
            return written
        return self.amount if self.kind == "fraction" else int(self.amount)

    def raised(
        self, prompt_tokens: tuple[int, ...], floor: int, always: str, *, token_bytes: int, half_bytes: int
    ) -> str | None:
        """Says that the budget of the shortest prompt is fewer than the `floor` tokens that are `always` kept.

        token_bytes, half_bytes: as of `tokens`.
        """
        if self.kind not in ("fraction", "share") or not prompt_tokens:
            return None
        shortest = min(prompt_tokens)
        told = f"{self.amount:g} of {shortest:,} prompt tokens"
        tokens = share(self.amount, shortest)
        if self.kind == "share":
            size = self._bytes_of(shortest, half_bytes)
            told, tokens = f"{self.amount:g}b of {shortest:,} prompt tokens, {size:,} bytes,", size // token_bytes
        return None if tokens >= floor else f"{told} is {tokens:,}: raised to {floor:,} ({always})"

    def _bytes_of(self, prompt_tokens: int, half_bytes: int) -> int:
        """What a share of the bytes is of a prompt."""
        return int(Fraction(str(self.amount)) * half_bytes * prompt_tokens)  # of a batch as of each, to the byte

    def tokens(
        self,
        prompt_tokens: int,
        *,
        floor: int = 1,
        token_bytes: int = 1,
        other_bytes: int = 0,
        spare: int = 0,
        half_bytes: int = 0,
        stock_bytes: int = 0,
    ) -> int:
        """Tokens per KV head that this budget allows.

        Args:
            prompt_tokens: tokens of the prompt, padding not counted; fractions are of these, rounded up.
            floor: tokens the policy always keeps (sinks + recent). A fraction, of tokens or bytes, is never taken below
                it: what comes may be the first piece of a longer prompt.
            token_bytes: bytes that one kept token costs in the whole cache (all layers, heads and sequences).
            other_bytes: bytes of the cache that no policy rules (layers with a sliding window).
            spare: slots the table holds beside the kept tokens; they are paid from a budget in bytes too.
            half_bytes: what keys and values of one token take in the full cache at 16 bits a number, as token_bytes in
                all layers that policies rule, heads and sequences. Shares are of this times the tokens of the prompt.
            stock_bytes: the part of other_bytes that is of other layers: no share counts those, nor pays for them.

        Raises BudgetError where the bytes do not suffice for `floor` tokens.
        """
        if self.kind == "fraction":
            return max(floor, share(self.amount, prompt_tokens))
        if self.kind == "tokens":
            return int(self.amount)
        if self.kind == "share":
            size = self._bytes_of(prompt_tokens, half_bytes)
            return max(floor, (size - (other_bytes - stock_bytes)) // token_bytes - spare)
        tokens = (int(self.amount) - other_bytes) // token_bytes - spare
        if tokens < floor:
            raise BudgetError(
                f"{int(self.amount):,} bytes hold {max(tokens, 0)} tokens of this model and batch, fewer than the "
                f"{floor} (sinks and recent) that are always kept: give at least "
                f"{(floor + spare) * token_bytes + other_bytes:,} bytes."
            )
        return tokens


def share(fraction: float, count: Any, least: int = 0) -> Any:
    """A fraction of a count, rounded up, at least `least` but never more than the count; ints or LongTensors.

    0.1 * 30 is 3.0000000000000004 in binary: the dust is shaved off before rounding up.
    """
    if isinstance(count, Tensor):
        part = torch.ceil(count.double() * fraction - 1e-9).long().clamp(min=least)
        return torch.minimum(part, count)
    return min(count, max(least, math.ceil(count * fraction - 1e-9)))
