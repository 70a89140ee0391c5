"""What the loops of ragged_query.c take for a table whose heads hold different numbers of rows, some of them packed."""

from __future__ import annotations

import ctypes
import weakref
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.kernels.cpu import rotated
from kvprune.kernels.cpu.arguments import (
    KINDS,
    Tier,
    are_codes,
    are_rows,
    floats,
    needs_gradients,
    sinks_of,
    threads_for,
)
from kvprune.table.basis import Basis, Coordinates
from kvprune.table.hadamard import hadamard
from kvprune.table.packed_rows import PackedRows
from kvprune.table.ragged import RaggedTable
from kvprune.table.rotated_rows import RotatedRows


class Turning(ctypes.Structure):
    """`coordinates` of ragged_query.c."""

    _fields_ = tuple((name, c_void_p) for name in ("matrix", "codes", "span", "mean"))

    @classmethod
    def of(cls, part: Coordinates, fixed: Tensor) -> Turning:
        """fixed: the Hadamard matrix, which stands for one of its own. Nothing of it is a copy."""
        mean = None if part.mean is None else part.mean.data_ptr()
        if part.matrix is None or part.span is None:
            return cls(fixed.data_ptr(), None, None, mean)
        return cls(None, part.matrix.data_ptr(), part.span.data_ptr(), mean)


class Part(ctypes.Structure):
    """`packed_part` of ragged_query.c."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("rows", c_int64), ("bits", c_int64))


class Head(ctypes.Structure):
    """`ragged_head` of ragged_query.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "positions")),
        ("of_keys", Turning),
        ("of_values", Turning),
        *((name, c_int64) for name in ("first", "parts", "packed", "loose")),
    )


# What is added to every component alike: these loops know nothing of it.
_OF_ALL_COMPONENTS = {"key_offset", "value_offset"}


@dataclass
class Plan:
    """Heads and their packed rows as the loops take them, for as long as these are theirs.

    owners: tensors of the table, and bases, whose memory is pointed to; no plan keeps them alive. structures: what is
    pointed to beside that.
    """

    heads: Any
    parts: Any
    kind: int
    owners: list[weakref.ref[Any]]
    structures: list[Any]

    def fits(self, owners: list[Any]) -> bool:
        pairs = zip(self.owners, owners, strict=False)
        return len(owners) == len(self.owners) and all(ref() is each for ref, each in pairs)


def single_query(c: Any, queries: Tensor, table: RaggedTable, scoring: Scoring) -> tuple[Tensor, Tensor] | None:
    """See `AttentionOperations.ragged_single_query`; None where the loops cannot take this."""
    plan = plan_of(c, table) if scoring.softcap is None and c.ragged_query is not None else None
    if plan is None or needs_gradients(queries, *(head.whole("keys") for head in table.heads)):
        return None
    places = _places(plan, table)
    (batch, query_heads, _, dim), value_dim = queries.shape, table.dims[1]
    heads, group, width = len(table.heads), query_heads // table.kv_heads, table.length
    probabilities = floats(batch, table.kv_heads, group, width)
    output = floats(batch, query_heads, 1, value_dim)
    failed = c.ragged_query(
        output, probabilities, queries.float().contiguous(), plan.heads, plan.parts, sinks_of(scoring, batch),
        scoring.scale, plan.kind, heads, group, width, table.packed_length, dim, value_dim,
        threads_for(heads * group * width * (dim + value_dim)),
    )  # fmt: skip
    del places  # until here, the loops read them
    if failed:
        raise MemoryError("there is no memory for attention to packed rows.")
    return output.to(queries.dtype), probabilities


def plan_of(c: Any, table: RaggedTable) -> Plan | None:
    """The plan of a table, which holds it while it is true; None where the loops cannot take its rows."""
    owners: list[Any] = [tier.tensors["key_codes"] for tier in table.packed]
    owners += [head.whole("keys") for head in table.heads]
    owners += [head.basis for head in table.heads if head.basis is not None]
    plan: Plan | None = table.native
    if plan is None or not plan.fits(owners):
        table.native = plan = _made(c, table, list(map(weakref.ref, owners)))
    return plan


def _places(plan: Plan, table: RaggedTable) -> list[Tensor]:
    """Tell a plan what changes from token to token. Returns what it points to, to be kept until the loops are done."""
    places = []
    for head, native in zip(table.heads, plan.heads, strict=True):
        native.loose = head.length - head.packed_length
        native.positions = None
        if not head.dense:
            places.append(head.positions.int().contiguous())
            native.positions = places[-1].data_ptr()
    return places


def _made(c: Any, table: RaggedTable, owners: list[weakref.ref[Any]]) -> Plan | None:
    heads, parts = (Head * len(table.heads))(), (Part * len(table.packed))()
    whole = table.heads[0].whole("keys")
    fixed = [hadamard(dim, whole.device) for dim in table.dims[:2]]
    structures: list[Any] = []
    first = 0
    for number, head in enumerate(table.heads):
        keys, values = head.whole("keys"), head.whole("values")
        basis = head.basis or Basis.fixed(keys.shape[3], values.shape[3])
        if not are_rows(keys, values) or not all(can_take(c, tier) for tier in head.packed):
            return None
        if any(tier.tensors.keys() & _OF_ALL_COMPONENTS for tier in head.packed):
            return None
        if not all(tensor.is_contiguous() for tensor in basis.tensors().values()):
            return None
        turnings = map(Turning.of, (basis.keys, basis.values), fixed)
        heads[number] = Head(
            keys.data_ptr(), values.data_ptr(), None, *turnings, first, len(head.packed), head.packed_length, 0
        )
        for place, tier in enumerate(head.packed, first):
            if isinstance(tier, RotatedRows):
                native: tuple[ctypes.Structure, ...] = tuple(
                    rotated.Rotated.of(tier, kind) for kind in ("key", "value")
                )
            else:
                native = Tier.of_keys(tier), Tier.of_values(tier)
            structures += native
            bits = 0 if isinstance(tier, RotatedRows) else tier.codec.bits
            parts[place] = Part(*map(ctypes.addressof, native), len(tier), bits)
        first += len(head.packed)
    return Plan(heads, parts, KINDS[whole.dtype], owners, structures)


def can_take(c: Any, tier: PackedRows) -> bool:
    """Whether there are loops for the rows of a tier."""
    if isinstance(tier, RotatedRows):
        return rotated.are_there(c) and rotated.can_take(tier)
    return are_codes(tier)
