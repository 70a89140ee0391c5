"""`Allotment`: how many bits every row gets of a number of bytes, so that the expected error is least.

A row whose error weighs s costs s D(b) with b bits, D(b) = 4^-b: each bit more takes three quarters of an error, and
no bits at all are the whole of it. Of all choices that take no more bytes, the one that makes

    sum of  s D(b)  +  theta * bytes(b)        over all rows

least has the least error of all that take as many bytes, for any theta. Row by row that is a matter of s / theta:
b = 1/2 log2(s / theta) but for constants, rounded to what there is: precision k comes in place of k - 1 from

    s / theta  =  (bytes_k - bytes_(k-1)) / (D_(k-1) - D_k)

on, precisions that no s asks for left out. theta is what makes the bytes fit, found by bisection. A row that has lost
bits chooses among no more than it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.policy.heads import Heads
from kvprune.table.rows import true_rows

EXACT = 16
"""Bits of a row in full precision, whatever the model computes in."""

_HALVINGS = 70  # of a range of logarithms: until floats of 64 bits tell no more apart
_LEAST = 1e-60  # what weighs nothing comes after all that weighs something, and before rows that are not there


def error(bits: int) -> float:
    """D: of a row with so many bits, relative to a row that is not there."""
    return 4.0**-bits


def steps(prices: Mapping[int, int]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The precisions worth having, in bits and from 0 on, and the s / theta from which each but the first is taken.

    prices: bytes of a row, by bits. That is the lower convex hull of error over bytes.
    """
    hull: list[tuple[int, int, float]] = [(0, 0, 1.0)]
    begins: list[float] = []
    for bits, price in sorted(prices.items(), key=lambda each: (each[1], -each[0])):
        if error(bits) >= hull[-1][2]:
            continue
        while True:
            slope = (price - hull[-1][1]) / (hull[-1][2] - error(bits))
            if not begins or slope > begins[-1]:
                break
            hull.pop()
            begins.pop()
        hull.append((bits, price, error(bits)))
        begins.append(slope)
    return tuple(bits for bits, _, _ in hull), tuple(begins)


@dataclass(frozen=True)
class Rows:
    """The rows of a table, who compete for bytes.

    weights: s, float64 `[B, Hkv, rows]`. always: bool, rows that keep what they have. there: bool, False for slots that
    are empty. now: int64, bits of the rows now, 16 for those in full precision: none gets more. prices: bytes of a row,
    by bits, those in full precision under 16. offered: bits that rows may get, beside 0 and those they have.
    """

    weights: Tensor
    always: Tensor
    there: Tensor
    now: Tensor
    prices: Mapping[int, int]
    offered: tuple[int, ...]

    def bits(self, theta: Tensor) -> Tensor:
        """Of every row, int64 `[B, Hkv, rows]`. theta: float64, broadcastable."""
        bits = self.now * self.always
        for own, (widths, begins) in self._steps.items():
            number = torch.zeros_like(self.now)
            for begin in begins:
                number += self.weights >= begin * theta
            chosen = torch.tensor(widths, device=self.weights.device)[number]
            bits = torch.where((self.now == own) & ~self.always, chosen, bits)
        return bits * self.there

    def bytes_at(self, theta: Tensor) -> Tensor:
        """`sizes` of the `bits` of a theta, which are not made: what is counted are rows that take a step."""
        total = self._always_bytes.clone()
        for weights, begins, more in self._asked:
            least = (begins * theta).expand(*weights.shape[:2], -1).contiguous()
            taken = weights.shape[2] - torch.searchsorted(weights, least)  # [B, Hkv, steps]
            total += (taken * more).sum(-1)
        return total

    @cached_property
    def _steps(self) -> dict[int, tuple[tuple[int, ...], tuple[float, ...]]]:
        """`steps` of the rows that have so many bits now: to fewer of those on offer, or to none."""
        return {
            own: steps({bits: self.prices[bits] for bits in (*self.offered, own) if bits <= own})
            for own in self.now[self.there & ~self.always].unique().tolist()
        }

    @cached_property
    def _asked(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of rows that have as many bits: weights of those that are asked what they are worth, ascending, -1 for none.

        And of each step where it begins, and how many bytes it takes more, float64 `[steps]`.
        """
        found = []
        for own, (widths, begins) in self._steps.items():
            rows = true_rows((self.now == own) & self.there & ~self.always)
            weights = self.weights.gather(2, rows.clamp(min=0)).masked_fill(rows < 0, -1.0)
            more = self._price_of_bits[list(widths)].diff()
            found.append((weights.sort(-1).values, weights.new_tensor(begins), more))
        return found

    @cached_property
    def _always_bytes(self) -> Tensor:
        """Bytes of every head that no theta takes, float64 `[B, Hkv]`."""
        return self.sizes(self.now * (self.always & self.there))

    @cached_property
    def _price_of_bits(self) -> Tensor:
        """By bits, float64 `[17]`; 0 of a row that is not there."""
        prices = torch.zeros(EXACT + 1, dtype=torch.float64, device=self.weights.device)
        for width, price in self.prices.items():
            prices[width] = price
        return prices

    def sizes(self, bits: Tensor) -> Tensor:
        """Bytes of every head, float64 `[B, Hkv]`."""
        return self._price_of_bits[bits].sum(-1)

    # -- where processes share the heads -----------------------------------------------------------------------------

    def of_every_head(self, heads: Heads, most: int) -> Rows:
        """The rows of all heads, `[B, H, most]`, which processes tell each other in one message; `most` of a head."""
        if heads.size == 1:
            return self
        slots = true_rows(self.there)
        told = torch.stack([self.weights.contiguous().view(torch.int64), 2 * self.now + self.always])
        told = told.gather(3, slots.clamp(min=0).expand(2, *slots.shape)).masked_fill(slots < 0, 0)
        told = F.pad(told, (0, most - slots.shape[2]))
        weights, state = heads.gather(torch.cat([*told], dim=2), 2 * most, 0).split(most, dim=2)
        weights = weights.contiguous().view(torch.float64)
        return replace(self, weights=weights, always=state % 2 > 0, there=state > 0, now=state // 2)

    def of_these(self, heads: Heads, bits: Tensor) -> Tensor:
        """Of bits that the rows of all heads have got, those of the rows here, int64 `[B, Hkv, rows]`."""
        if heads.size == 1:
            return bits
        slots, rows = true_rows(self.there), self.there.shape[2]
        own, found = heads.own(bits)[:, :, : slots.shape[2]], bits.new_zeros(*slots.shape[:2], rows + 1)
        return found.scatter_(2, torch.where(slots < 0, rows, slots), own)[:, :, :rows]


def weights_of(scores: Tensor, positions: Tensor, power: float) -> Tensor:
    """s of rows, float64, of scores of at least 0: their power; of equal ones the more recent weighs more.

    NaN, and what is below nothing, count as nothing.
    """
    known = torch.nan_to_num(scores.double(), nan=0.0, posinf=torch.finfo(torch.float32).max, neginf=0.0).clamp(min=0)
    return (known**power).clamp(min=_LEAST) * (1 + positions.clamp(min=0).double() * 2.0**-44)


def doubted(tables: Sequence[Rows], tokens: Sequence[int | Tensor], share: float, scope: str) -> list[Rows]:
    """The same rows, of which a share, those that weigh least, weigh nearly alike: scores are not trusted to know them.

        s'_i = s_m 2^(r_i - 1)     with s_m the least weight of the others, and r_i the share of these that weigh less

    So none of them differs by a bit from another, and the order of all stays. The share is one of all rows there have
    been: those that have gone are part of it.

    tokens: that each table has seen, int or `[B, 1, 1]`. scope: among whom a share is counted, rows of a "head", a
    "layer" or the "model".
    """
    weights = [rows.weights.masked_fill(rows.always | ~rows.there, torch.inf) for rows in tables]
    gone = [
        (torch.as_tensor(count).to(rows.there.device) - rows.there.sum(-1, keepdim=True)).clamp(min=0)
        for rows, count in zip(tables, tokens, strict=True)
    ]
    pools, lost = weights, gone
    if scope != "head":
        pools, lost = [each.flatten(1) for each in weights], [each.sum(1) for each in gone]
    sizes = [pool.shape[-1] for pool in pools]
    if scope == "model":
        device = weights[0].device
        pools = [torch.cat([each.to(device) for each in pools], dim=1)]
        lost = [torch.stack([each.to(device) for each in lost]).sum(0)]
    found = [_alike(pool, own, share) for pool, own in zip(pools, lost, strict=True)]
    if scope == "model":
        found = [*found[0].split(sizes, dim=1)]
    found = [part.to(each.device).view(each.shape) for part, each in zip(found, weights, strict=True)]
    return [
        replace(rows, weights=torch.where(each.isfinite(), each, rows.weights))
        for rows, each in zip(tables, found, strict=True)
    ]


def _alike(weights: Tensor, gone: Tensor, share: float) -> Tensor:
    """`doubted` over the last dimension; those that do not compete are infinite. gone: rows, `[..., 1]`."""
    ordered, index = weights.sort(dim=-1, stable=True)
    there = ordered.isfinite().sum(-1, keepdim=True)
    count = (((there + gone) * share).long() - gone).clamp(min=0)
    rank = torch.arange(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    least = ordered.gather(-1, torch.minimum(count, there - 1).clamp(min=0)) if weights.shape[-1] else ordered
    nearly = least * torch.exp2(rank / count.clamp(min=1) - 1)
    return torch.empty_like(weights).scatter_(-1, index, torch.where(rank < count, nearly, ordered))


Total = Callable[[list[Tensor]], list[Tensor]]
"""Of bytes by heads, `[B, Hkv]` for each table, what is compared with a limit, which broadcasts to that."""


def allotted(
    tables: Sequence[Rows], limits: Sequence[Tensor], total: Total, floors: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Bits of the rows of these tables, int64 `[B, Hkv, rows]` each, that the limits have bytes for.

    limits: bytes there are, one tensor a table; alike where a budget is shared, as a common theta is found for it.
    floors: bytes that every head may take by itself, whatever the others ask for, likewise; within the limits.
    """
    most = [torch.full_like(limit, torch.inf) for limit in limits]
    if floors is not None:
        most = _thetas(tables, floors, lambda sizes: sizes, most)
    thetas = _thetas(tables, limits, total, most)
    return [rows.bits(theta[..., None]) for rows, theta in zip(tables, thetas, strict=True)]


def _thetas(tables: Sequence[Rows], limits: Sequence[Tensor], total: Total, most: Sequence[Tensor]) -> list[Tensor]:
    """The least theta that there are bytes for, but none above `most`; all float64, `[B, Hkv]` or `[B, 1]`."""

    def bounded(thetas: list[Tensor]) -> list[Tensor]:
        return [torch.minimum(theta, each) for theta, each in zip(thetas, most, strict=True)]

    def used(thetas: list[Tensor]) -> list[Tensor]:
        pairs = zip(tables, bounded(thetas), strict=True)
        return total([rows.bytes_at(theta[..., None]) for rows, theta in pairs])

    nobody = [torch.full_like(limit, 1e-250) for limit in limits]  # goes
    fits = [size <= limit for size, limit in zip(used(nobody), limits, strict=True)]
    low = [torch.full_like(limit, -260.0) for limit in limits]  # theta = 2^-260: nobody goes
    high = [torch.full_like(limit, 300.0) for limit in limits]  # everybody goes
    for _ in range(_HALVINGS):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        sizes = used([torch.exp2(each) for each in middle])
        for number, (size, limit, each) in enumerate(zip(sizes, limits, middle, strict=True)):
            high[number] = torch.where(size <= limit, each, high[number])
            low[number] = torch.where(size <= limit, low[number], each)
    found = zip(fits, nobody, high, strict=True)
    return bounded([torch.where(fit, none, torch.exp2(theta)) for fit, none, theta in found])
