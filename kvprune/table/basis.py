"""`Basis`: the coordinates in which keys and values of a head are quantized, where a codec rotates them.

Of a head's keys, with mean m and C = E[q q^T] over its queries, the error of a logit is q.(k - k^), and its square on
average (k - k^)^T C (k - k^). So C^(1/2) (k - m) is decorrelated: with U, lambda its eigenvectors and eigenvalues,

    z = g^(-1/2) H^T U^T C^(1/2) (k - m),     k = m + M z,     M = C^(-1/2) U H g^(1/2),     E[z_i^2] = 1

where g is lambda and H = 1; or, mixed, g is the mean of lambda over the components that share a width, and H, Hadamard
matrices, mixes just these: what is extraordinary in one is spread over all. An error of z_i costs g times its square.
Measured, that takes a third of the divergence at 3 bits and a half at 4, and adds to it at 2. Of values, likewise with
C = 1. Codes are of z. What a query meets is M^T q, and what weights add up is turned once, by M: no key and no value is
ever turned back. The mean of keys is one number for each query; that of values is added once.

M is held in 8 bits a number, with a scale for each column: what is quantized are coordinates in this M, whatever it is.

The formula is that of transform coding; OSCAR (arXiv 2605.17757) weighs by queries, KVTC (arXiv 2511.01815) and SVDq
(arXiv 2502.15304) take principal components, all three from files. Here, a prompt's own queries, keys and values tell,
or a text that was read before (`Basis.shared`). Where a prompt has too few, they tell the mean alone, and M is the
normalised Hadamard matrix, in blocks where D is no power of 2; where nobody asks, there is no mean either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import log2

import torch
from torch import Tensor

from kvprune.state import Saved, State
from kvprune.table.hadamard import hadamard, hadamard_inverse

Rotate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Orthogonal M `[D, D]` and `[Dv, Dv]` from keys `[n, D]`, values `[n, Dv]` and queries `[m, D]` of a head, float32."""

_Part = tuple[Tensor, Tensor, Tensor]
# Statistics of more rows than these are no better.
_MOST_ROWS = 2048
# From so many bits on, components that share a width are mixed.
MIXED_FROM = 3
# What codes of 0 to 8 bits leave of the variance of a component, at the even steps of rotated_codes.py: of a logistic
# distribution, whose kurtosis of 4.2 is about that of keys and values (3.2 to 4.5, SmolLM2). At 2.5 bits the model
# diverges by a half of what it does where every bit is taken to leave a quarter, as bits do where there are many.
LEFT = (1.0, 0.41911, 0.15211, 0.05542, 0.01994, 0.00699, 0.00238, 0.00079, 0.00025)
# Of mixed components the latter: of 4,096 tokens, 0.017 and 0.0029 at 3 and 4 bits, where LEFT gives 0.031 and 0.0052.
LEFT_OF_MIXED = tuple(4.0**-bits for bits in range(9))
# Eigenvalues are not taken to be smaller, relative to the largest. Of queries, because those to come look where a
# prompt's have not, and what they look for then must not be without a bit: at 2 bits SmolLM2 found none of 9 numbers in
# 1,000 tokens that a later question asked for with 1e-3, and 8 with 1e-2, at no more divergence. Where components are
# mixed, all of them have bits.
_LEAST_QUERY, _LEAST_QUERY_OF_MIXED, _LEAST_KEY, _LEAST = 1e-2, 1e-3, 1e-4, 1e-12
_LARGEST = 65504.0  # of float16
_MOST_CODE = 127.0
# Rows that tell a mean: it is off by a quarter of what they vary by, or less.
_LEAST_ROWS = 16


def lanes_of(dim: int) -> int:
    """How many components share a width: 16, or 8, or all where neither divides the dim."""
    return 16 if dim % 16 == 0 else 8 if dim % 8 == 0 else dim


def bits_in_all(dim: int, bits: float) -> int:
    """Bits of one component of every group together, where each has `bits` on average: whole ones, rounded down."""
    return int(bits * (dim // lanes_of(dim)) + 1e-9)


@dataclass(frozen=True)
class Coordinates:
    """Of keys, or of values. dim: D.

    matrix: M, `[B, Hkv, D, D]` int8, of which each column counts `[B, Hkv, D]` float32 times, span. mean: `[B, Hkv, D]`
    float16. spectrum: log2 of g, its mean over a group, `[B, Hkv, groups]` float32. All but the mean are None for a
    Hadamard matrix, which is the same everywhere; the mean is None where there is none.
    """

    dim: int
    matrix: Tensor | None = None
    span: Tensor | None = None
    mean: Tensor | None = None
    spectrum: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        named = {"matrix": self.matrix, "span": self.span, "mean": self.mean, "spectrum": self.spectrum}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def of_tensors(self, tensors: dict[str, Tensor]) -> Coordinates:
        """The same of these tensors."""
        return Coordinates(self.dim, *(tensors.get(name) for name in ("matrix", "span", "mean", "spectrum")))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Coordinates:
        """The same of its tensors, changed."""
        return self.of_tensors({name: change(each) for name, each in self.tensors().items()})

    def where(self, sequences: Tensor, other: Coordinates) -> Coordinates:
        """Of these sequences, bool `[B]`, what others have, and of all others the same as here."""
        told = next((each for each in (self, other) if each.mean is not None), None)
        if told is None or told.mean is None:
            return self
        heads, matrices = told.mean.shape[:2], self.matrix is not None or other.matrix is not None
        pairs = zip(*(each._written_out(heads, matrices, sequences.device) for each in (self, other)), strict=True)
        chosen = [torch.where(sequences.view(-1, *(1,) * (mine.ndim - 1)), its, mine) for mine, its in pairs]
        return Coordinates(self.dim, *chosen) if matrices else Coordinates(self.dim, mean=chosen[0])

    def _written_out(self, heads: tuple[int, ...], matrices: bool, device: torch.device) -> tuple[Tensor, ...]:
        """Its tensors in their order, with what is so where there are none: a Hadamard matrix, no mean; or the mean."""
        mean = torch.zeros(*heads, self.dim, dtype=torch.float16, device=device) if self.mean is None else self.mean
        if not matrices:
            return (mean,)
        if self.matrix is None or self.span is None or self.spectrum is None:
            matrix, span = in_8_bits(hadamard(self.dim, device).expand(*heads, -1, -1))
            return matrix, span, mean, span.new_zeros(*heads, self.dim // lanes_of(self.dim))
        return self.matrix, self.span, mean, self.spectrum

    def turning(self, device: torch.device) -> Tensor:
        """M, float32, `[B, Hkv, D, D]` or `[D, D]`."""
        if self.matrix is None or self.span is None:
            return hadamard(self.dim, device)
        return self.matrix * self.span[:, :, None]

    def of(self, rows: Tensor) -> Tensor:
        """z of rows `[B, Hkv, R, D]` float32."""
        if self.mean is not None:
            rows = rows - self.mean.float()[:, :, None]
        if self.matrix is None:
            inverse = hadamard_inverse(self.dim, rows.device)
        else:
            inverse = torch.linalg.inv(self.turning(rows.device))
        return torch.matmul(rows, inverse.transpose(-1, -2))

    def back(self, numbers: Tensor) -> Tensor:
        """The rows that z `[B, Hkv, R, D]` stand for."""
        rows = torch.matmul(numbers, self.turning(numbers.device).transpose(-1, -2))
        return rows if self.mean is None else rows.add_(self.mean.float()[:, :, None])

    def asked(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """M^T q and q.m, or None, of queries `[B, Hkv, G, D]` float32: q.(m + M z) = q.m + (M^T q).z"""
        means = None if self.mean is None else torch.matmul(queries, self.mean.float()[..., None])
        return torch.matmul(queries, self.turning(queries.device)), means

    def added_up(self, numbers: Tensor, weights: Tensor) -> Tensor:
        """M sum_i w_i z_i + m sum_i w_i = sum_i w_i (m + M z_i), of sums `[B, Hkv, G, D]` and `[B, Hkv, G, 1]`."""
        found = torch.matmul(numbers, self.turning(numbers.device).transpose(-1, -2))
        return found if self.mean is None else found.add_(weights * self.mean.float()[:, :, None])

    def sizes(self, rows: Tensor) -> Tensor:
        """|z|^2 / D of rows `[B, Hkv, R, D]`, float32 `[B, Hkv, R]`; some at a time, as z is of float32."""
        parts = (self.of(part.float()).square().mean(-1) for part in rows.split(_MOST_ROWS, dim=2))
        return torch.cat(list(parts), dim=2)

    def widths(self, bits: float, heads: tuple[int, ...], device: torch.device) -> Tensor:
        """Bits of the components of every group, `[B, Hkv, groups]` uint8, `bits` on average or a little less.

        The next bit goes where it takes most, g (LEFT[width] - LEFT[width + 1]).
        """
        groups, in_all = self.dim // lanes_of(self.dim), bits_in_all(self.dim, bits)
        if self.spectrum is None:
            alike, more = divmod(in_all, groups)
            widths = (torch.arange(groups, device=device) < more).to(torch.uint8) + alike
            return widths.expand(*heads, -1).contiguous()
        left = LEFT if bits < MIXED_FROM else LEFT_OF_MIXED
        taken = torch.tensor([log2(before - after) for before, after in pairwise(left)], device=device)
        gains = (self.spectrum[..., None] + taken).flatten(-2)
        chosen = gains.topk(in_all, dim=-1).indices // len(taken)
        counts = torch.zeros_like(self.spectrum).scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=torch.float32))
        return counts.to(torch.uint8)


@dataclass(frozen=True)
class Basis:
    """Of the keys and values of a layer. own: which sequences have matrices of numbers that a model has made, bool
    `[B]`; None for none."""

    keys: Coordinates
    values: Coordinates
    own: Tensor | None = None

    @property
    def estimated(self) -> bool:
        """Whether there are matrices, of any sequence."""
        return self.keys.matrix is not None

    @classmethod
    def fixed(cls, key_dim: int, value_dim: int) -> Basis:
        """Hadamard matrices, for which nothing has to be held."""
        return cls(Coordinates(key_dim), Coordinates(value_dim))

    @classmethod
    def shared(cls, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], heads: tuple[int, ...]) -> Basis:
        """One rotation of keys and one of values, without a mean, components alike; every head holds its own copy.

        keys, values: as of `in_8_bits`, `[D, D]` int8 and `[D]` float32. heads: `(B, Hkv)`.
        """

        def copies(matrix: Tensor, span: Tensor) -> Coordinates:
            dim = len(span)
            mean = torch.zeros(*heads, dim, dtype=torch.float16, device=span.device)
            spectrum = torch.zeros(*heads, dim // lanes_of(dim), dtype=torch.float32, device=span.device)
            return Coordinates(dim, matrix.repeat(*heads, 1, 1), span.repeat(*heads, 1), mean, spectrum)

        return cls(copies(*keys), copies(*values), torch.ones(heads[:1], dtype=torch.bool, device=keys[1].device))

    @classmethod
    def estimate(
        cls,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        asked: Tensor,
        held: Tensor,
        mixed: bool = False,
        rotate: Rotate | None = None,
    ) -> Basis:
        """From the queries of a step and the rows that are there, sequence by sequence and head by head.

        queries: `[B, Hq, L, D]`. keys: `[B, Hkv, S, D]`. values: `[B, Hkv, S, Dv]`. asked: bool `[B, L]`, False for
        padding. held: bool `[B, Hkv, S]`, False for empty rows. A sequence of fewer than 2 D rows gets a Hadamard
        matrix and its mean, and no mean of fewer than 16 rows. mixed: whether components that share a width are.
        rotate: makes M of keys and of values otherwise, without a mean, components alike.
        """
        batch, heads = keys.shape[:2]
        grouped = queries.unflatten(1, (heads, -1))
        of_keys: list[_Part] = []
        of_values: list[_Part] = []
        told, most = [False] * batch, 0
        for row in range(batch):
            own = _finite(grouped[row].index_select(2, _some(asked[row])).float().flatten(1, 2))
            for some, there in _alike_heads(held[row]):
                places = _some(there)
                sampled = [_finite(each[row, some].index_select(1, places).float()) for each in (keys, values)]
                enough = len(places) >= 2 * max(keys.shape[3], values.shape[3]) and own.shape[1] > 0
                told[row] |= enough
                most = max(most, len(places))
                if enough and rotate is not None:
                    turnings = zip(*map(rotate, *sampled, own[some]), strict=True)
                    for parts, each in zip((of_keys, of_values), turnings, strict=True):
                        parts.append(_equal(torch.stack(each)))
                    continue
                asking = own[some].mT @ own[some] / max(own.shape[1], 1)
                of_keys.append(_principal(sampled[0], asking, enough, mixed))
                of_values.append(_principal(sampled[1], None, enough, mixed))
        if not any(told) and most < _LEAST_ROWS:
            return cls.fixed(keys.shape[3], values.shape[3])
        whose = torch.tensor(told, device=keys.device) if any(told) else None
        return cls(_stacked(of_keys, heads, any(told)), _stacked(of_values, heads, any(told)), whose)

    def leverage(self, keys: Tensor, values: Tensor) -> Tensor:
        """How far rows are from the mean of their head, in these coordinates: float32 `[B, Hkv, R]`.

        |z|^2 / D of a key and that of its value: 2 on average over the rows that told the basis, and the more of an
        outlier a row is among these, the more. keys: `[B, Hkv, R, D]`. values: `[B, Hkv, R, Dv]`.
        """
        return self.keys.sizes(keys) + self.values.sizes(values)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of it, by name."""
        parts = {f"{name}_{kind}": tensor for kind, part in self._parts() for name, tensor in part.tensors().items()}
        return parts if self.own is None else parts | {"own": self.own}

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors().values())

    def _parts(self) -> Iterator[tuple[str, Coordinates]]:
        yield from (("keys", self.keys), ("values", self.values))

    # -- it goes where its table goes --------------------------------------------------------------------------------

    def select_batch(self, rows: Tensor) -> Basis:
        """These sequences, in this order."""
        return self._changed(lambda tensor: tensor.index_select(0, rows))

    def of_head(self, sequence: int, head: int) -> Basis:
        """Of one sequence and head, in storage of its own."""
        alone = self._changed(lambda tensor: tensor[sequence : sequence + 1])
        keys, values = (part.changed(lambda tensor: tensor[:, head : head + 1]) for _, part in alone._parts())
        return Basis(keys, values, alone.own).clone()

    def clone(self) -> Basis:
        return self._changed(torch.clone)

    def where(self, sequences: Tensor, other: Basis) -> Basis:
        """Of these sequences, bool `[B]`, what another basis has, and of all others the same as here."""
        keys, values = self.keys.where(sequences, other.keys), self.values.where(sequences, other.values)
        if self.own is None and other.own is None:
            return Basis(keys, values)
        mine, its = (torch.zeros_like(sequences) if each.own is None else each.own for each in (self, other))
        return Basis(keys, values, torch.where(sequences, its, mine))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Basis:
        keys, values = (part.changed(change) for _, part in self._parts())
        return Basis(keys, values, None if self.own is None else change(self.own))

    def state(self) -> State:
        return State({"estimated": self.estimated}, self.tensors())

    @classmethod
    def restored(cls, saved: Saved, heads: tuple[int, ...], key_dim: int, value_dim: int) -> Basis:
        """The basis of a `state`. heads: `(B, Hkv)`. Raises CacheError."""
        fixed, made, estimated = cls.fixed(key_dim, value_dim), dict[str, Coordinates](), saved.flag("estimated")
        if not estimated and not saved.has("mean_keys"):
            return fixed
        for kind, part in fixed._parts():
            dim, groups = part.dim, part.dim // lanes_of(part.dim)
            expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"mean": ((dim,), torch.float16)}
            if estimated:
                expected |= {
                    "matrix": ((dim, dim), torch.int8),
                    "span": ((dim,), torch.float32),
                    "spectrum": ((groups,), torch.float32),
                }
            tensors = {
                name: saved.tensor(f"{name}_{kind}", (*heads, *shape), dtype)
                for name, (shape, dtype) in expected.items()
            }
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise saved.refused(f"has numbers of its {kind} that are not finite")
            made[kind] = part.of_tensors(tensors)
        if not estimated:
            return cls(made["keys"], made["values"])
        every = torch.ones(heads[:1], dtype=torch.bool, device=saved.device)  # as older files have it
        own = saved.tensor("own", heads[:1], torch.bool) if saved.has("own") else every
        return cls(made["keys"], made["values"], own)


def _alike_heads(held: Tensor) -> list[tuple[slice, Tensor]]:
    """Heads that hold rows in the same places, and the places, bool `[S]`, of held `[H, S]`: all heads, or each alone.

    A prompt has all of them alike, and a GPU takes one head's eigenvectors no sooner than those of all.
    """
    if bool((held == held[:1]).all()):
        return [(slice(None), held[0])]
    return [(slice(head, head + 1), each) for head, each in enumerate(held)]


def _some(there: Tensor) -> Tensor:
    """Where rows are, of bool `[S]`: at most as many as statistics need, evenly spaced."""
    places = there.nonzero()[:, 0]
    if len(places) > _MOST_ROWS:
        places = places[torch.linspace(0, len(places) - 1, _MOST_ROWS, device=places.device).round().long()]
    return places


def _finite(rows: Tensor) -> Tensor:
    return torch.nan_to_num(rows, nan=0.0).clamp_(-_LARGEST, _LARGEST)


def _principal(rows: Tensor, of_queries: Tensor | None, enough: bool, mixed: bool) -> _Part:
    """M `[H, D, D]`, mean `[H, D]` and spectrum `[H, groups]` of the rows `[H, n, D]`; see the head of this file."""
    dim, lanes = rows.shape[2], lanes_of(rows.shape[2])
    mean = rows.mean(1).half().float() if rows.shape[1] >= _LEAST_ROWS else rows.new_zeros(len(rows), dim)
    plain = hadamard(dim, rows.device).expand(len(rows), -1, -1), rows.new_zeros(len(rows), dim // lanes)
    if not enough:
        return plain[0], mean, plain[1]
    weighted, back = rows - mean[:, None], None
    if of_queries is not None:
        sizes, vectors = torch.linalg.eigh(of_queries)
        least = sizes[:, -1:] * (_LEAST_QUERY_OF_MIXED if mixed else _LEAST_QUERY)
        sizes = torch.maximum(sizes, least.clamp(min=_LEAST))[:, None]
        back = vectors * sizes.rsqrt() @ vectors.mT
        weighted = weighted @ (vectors * sizes.sqrt() @ vectors.mT)
    sizes, vectors = torch.linalg.eigh(weighted.mT @ weighted / rows.shape[1])
    sizes, vectors = sizes.flip(1), vectors.flip(2)
    sizes = torch.maximum(sizes, (sizes[:, :1] * _LEAST_KEY).clamp(min=_LEAST)).unflatten(1, (-1, lanes))
    vectors = vectors.unflatten(2, (-1, lanes))
    if mixed:
        sizes, vectors = sizes.mean(2, keepdim=True), vectors @ hadamard(lanes, rows.device)
    turning = (vectors * sizes.sqrt()[:, None]).flatten(2)
    turning = turning if back is None else back @ turning
    lost = ~turning.isfinite().all(-1).all(-1) | (turning.norm(dim=1).amin(-1) == 0)
    spectrum = torch.where(lost[:, None], plain[1], sizes.log2().mean(2))
    return torch.where(lost[:, None, None], plain[0], turning), mean, spectrum


def _equal(turning: Tensor) -> _Part:
    """The same as `_principal`, of rotations `[H, D, D]` whose components all count as much."""
    dim = turning.shape[2]
    return turning, turning.new_zeros(len(turning), dim), turning.new_zeros(len(turning), dim // lanes_of(dim))


def _stacked(parts: list[_Part], heads: int, told: bool) -> Coordinates:
    """told: whether any matrix is not that of Hadamard."""
    matrix, mean, spectrum = (torch.cat(each).unflatten(0, (-1, heads)) for each in zip(*parts, strict=True))
    if not told:
        return Coordinates(matrix.shape[3], mean=mean.half())
    return Coordinates(matrix.shape[3], *in_8_bits(matrix), mean.half(), spectrum)


def in_8_bits(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices `[..., D, D]` float32 as int8, and the span `[..., D]` float32 that each column counts times."""
    span = matrix.abs().amax(-2) / _MOST_CODE
    return (matrix / span[..., None, :]).round().to(torch.int8), span
