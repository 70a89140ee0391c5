"""Budgets: how much of the cache a policy may keep, as a fraction, a number of tokens, or bytes."""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass
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
    'per KV head (1024), or a string with a unit for the bytes of the whole cache ("512MiB")'
)


@dataclass(frozen=True)
class Budget:
    """A parsed budget. `amount` is a fraction, tokens per KV head, or bytes of the whole cache, as `kind` says."""

    kind: Literal["fraction", "tokens", "bytes"]
    amount: float

    @classmethod
    def parse(cls, value: float | int | str) -> Budget:
        """Read what a person wrote: `0.25`, `1024`, `"512MiB"`; strings `"0.25"`, `"25%"` and `"1024"` work too.

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
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z%]*)\s*", text.lower())
        if match is None:
            raise BudgetError(f"a budget cannot be {text!r}: {_HELP}.")
        number, unit = match.groups()
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

    def plain(self, written: float | int | str) -> float | int | str:
        """What a person wrote, as a number where it is one: `"25%"` -> 0.25, `"1024"` -> 1024, `"1GiB"` as it is."""
        if self.kind == "bytes":
            return written
        return self.amount if self.kind == "fraction" else int(self.amount)

    def raised(self, prompt_tokens: tuple[int, ...], floor: int, always: str) -> str | None:
        """Says that a fraction of the shortest prompt is fewer than the `floor` tokens that are `always` kept."""
        if self.kind != "fraction" or not prompt_tokens:
            return None
        shortest = min(prompt_tokens)
        tokens = share(self.amount, shortest)
        if tokens >= floor:
            return None
        return f"{self.amount:g} of {shortest:,} prompt tokens is {tokens:,}: raised to {floor:,} ({always})"

    def tokens(
        self, prompt_tokens: int, *, floor: int = 1, token_bytes: int = 1, other_bytes: int = 0, spare: int = 0
    ) -> int:
        """Tokens per KV head that this budget allows.

        Args:
            prompt_tokens: tokens of the prompt, padding not counted; fractions are of these, rounded up.
            floor: tokens the policy always keeps (sinks + recent). A fraction is never taken below it.
            token_bytes: bytes that one kept token costs in the whole cache (all layers, heads and sequences).
            other_bytes: bytes of the cache that no policy rules (layers with a sliding window).
            spare: slots the table holds beside the kept tokens; they are paid from a budget in bytes too.

        Raises BudgetError where the bytes do not suffice for `floor` tokens.
        """
        if self.kind == "fraction":
            return max(floor, share(self.amount, prompt_tokens))
        if self.kind == "tokens":
            return int(self.amount)
        tokens = (int(self.amount) - other_bytes) // token_bytes - spare
        if tokens < floor:
            need = (floor + spare) * token_bytes + other_bytes
            raise BudgetError(
                f"{int(self.amount):,} bytes hold {max(tokens, 0)} tokens of this model and batch, fewer than the "
                f"{floor} (sinks and recent) that are always kept: give at least {need:,} bytes."
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
