"""Products with rows in the coordinates of a basis: queries and sums are turned here, the loops see only codes."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvprune.kernels.cpu.arguments import LANES, floats, parts_of, threads_for
from kvprune.table.basis import Coordinates
from kvprune.table.rotated_codes import STEPS, Quantizer, scales_of
from kvprune.table.rotated_rows import RotatedRows


class Rotated(ctypes.Structure):
    """`rotated` of rotated_query.c: keys or values."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "scale", "widths", "steps")),
        *((name, c_int64) for name in ("rows", "dim", "row_bytes")),
    )

    @classmethod
    def of(cls, rows: RotatedRows, kind: str) -> Rotated:
        codes, scale, widths = (rows.tensors[f"{kind}_{name}"] for name in ("codes", "scale", "widths"))
        addresses = (tensor.data_ptr() for tensor in (codes, scale, widths, _steps()))
        return cls(*addresses, len(rows), rows.key_dim if kind == "key" else rows.value_dim, codes.shape[3])


@cache
def _steps() -> Tensor:
    return torch.tensor(STEPS, dtype=torch.float32)


def are_there(c: Any) -> bool:
    """Whether the library was compiled with these loops."""
    return c.rotated_encode is not None


def fits(*dims: int) -> bool:
    """Whether components are whole vectors, and no more of them than the loops have room for."""
    return all(dim % LANES == 0 and dim <= 64 * LANES for dim in dims)


def can_take(rows: RotatedRows) -> bool:
    """Whether rows fit, levels are even, and all lies one behind another."""
    even = not rows.codec.is_normal("key")
    return even and fits(rows.key_dim, rows.value_dim) and all(each.is_contiguous() for each in rows.tensors.values())


def quantizer(c: Any) -> Quantizer:
    """`rotated_codes.nearest` as a compiled loop, for components that are whole vectors."""

    def quantized(numbers: Tensor, widths: Tensor, size: int) -> tuple[Tensor, Tensor]:
        batch, heads, rows, dim = numbers.shape
        tried = scales_of(numbers)
        codes = torch.empty(batch, heads, rows, size, dtype=torch.uint8)
        scale = torch.empty(batch, heads, rows, dtype=torch.float16)
        held = Rotated(None, None, widths.data_ptr(), _steps().data_ptr(), rows, dim, size)
        c.rotated_encode(
            ctypes.byref(held), codes, scale, numbers.contiguous(), tried.float(), tried, tried.shape[3],
            batch * heads, threads_for(8 * numbers.numel()),
        )  # fmt: skip
        return codes, scale

    return quantized


@dataclass
class Asked:
    """Queries turned to meet codes, once for all tiers that share a basis.

    turned: `[B, Hkv, G, D]` float32, scaled. means: their products with the mean of keys, `[B, Hkv, G, 1]`, or None.
    """

    turned: Tensor
    means: Tensor | None

    @classmethod
    def of(cls, queries: Tensor, scale: float, keys: Coordinates) -> Asked:
        return cls(*keys.asked(queries * scale))

    def dots(self, c: Any, logits: Tensor, first: int, rows: RotatedRows, threads: int) -> None:
        """Write logits `[B, Hkv, G, S]`, from slot `first` on, of these queries with the rows."""
        batch, heads, group, length = logits.shape
        held = ctypes.byref(Rotated.of(rows, "key"))
        c.rotated_dots(logits, length, first, self.turned, self.means, held, batch * heads, group, threads)
        offset = rows.tensors.get("key_offset")
        if offset is not None:  # of every component alike
            added = self.turned.sum(-1, keepdim=True) * offset.float()[:, :, None]
            logits[..., first : first + len(rows)] += added


class Sums:
    """What weights `[B, Hkv, G, S]` add up of values, in the coordinates of a basis: turned back once, by `output`."""

    def __init__(self, weights: Tensor, values: Coordinates) -> None:
        self.weights, self.values = weights, values
        self._numbers = weights.new_zeros(*weights.shape[:3], values.dim)
        self._total = weights.new_zeros(*weights.shape[:3], 1)

    def add(self, c: Any, first: int, rows: RotatedRows, threads: int) -> None:
        """The rows whose weights begin with slot `first`."""
        batch, heads, group, length = self.weights.shape
        scratch = floats(batch, heads, parts_of(len(rows)), group, rows.value_dim)
        held = ctypes.byref(Rotated.of(rows, "value"))
        c.rotated_sums(scratch, self.weights, length, first, held, batch * heads, group, threads)
        self._numbers += scratch.sum(2)
        own, offset = self.weights[..., first : first + len(rows)], rows.tensors.get("value_offset")
        if offset is not None:
            self._numbers += torch.matmul(own, offset.float()[..., None])
        if self.values.mean is not None:
            self._total += own.sum(-1, keepdim=True)

    def output(self) -> Tensor:
        """`[B, Hkv, G, Dv]` float32."""
        return self.values.added_up(self._numbers, self._total)
