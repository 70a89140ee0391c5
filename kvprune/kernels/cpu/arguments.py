"""What the compiled loops take for tensors, and which tensors they can take."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_int64, c_void_p
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.errors import PolicyError
from kvprune.table.operations import Columns, FlatColumns
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec

# As in the files in C: lanes of a vector, rows that a thread takes at a time, keys of a tile, stretches of queries.
LANES, PART, TILE, STRETCHES = 16, 256, 64, 16
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Multiplications that one thread does sooner than several wake up for.
_ALONE = 1 << 17


class StridedRows(ctypes.Structure):
    """`strided_rows` of loops.h."""

    _fields_ = (
        ("first", c_void_p),
        *((name, c_int64) for name in ("of_sequence", "of_head", "of_row", "kind", "heads", "count")),
    )

    @classmethod
    def of(cls, rows: Tensor) -> StridedRows:
        return cls(rows.data_ptr(), *rows.stride()[:3], KINDS[rows.dtype], *rows.shape[1:3])


class Selection(ctypes.Structure):
    """`selection` of packing.c: rows to pack."""

    _fields_ = (
        ("rows", ctypes.POINTER(StridedRows)),
        ("slots", c_void_p),
        *((name, c_int64) for name in ("count", "tokens")),
    )

    @classmethod
    def of(cls, rows: Tensor, slots: Tensor, tokens: int) -> Selection:
        return cls(ctypes.pointer(StridedRows.of(rows)), slots.data_ptr(), slots.shape[2], tokens)


class Tier(ctypes.Structure):
    """`tier` of loops.h: the keys or the values of packed rows."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "scale", "zero_point", "channel_scale", "blocks")),
        *((name, c_int64) for name in ("block_bytes", "rows", "count", "dim", "row_bytes", "groups", "channels")),
    )

    @classmethod
    def of_keys(cls, rows: PackedRows) -> Tier:
        codes, scale, zero_point = (rows.tensors[f"key_{name}"] for name in ("codes", "scale", "zero_point"))
        return cls._of(rows, codes, scale, zero_point, rows.key_dim)

    @classmethod
    def of_values(cls, rows: PackedRows) -> Tier:
        codes, scale, zero_point = (rows.tensors[f"value_{name}"] for name in ("codes", "scale", "zero_point"))
        channel_scale = rows.tensors.get("channel_scale")
        return cls._of(rows, codes, scale, zero_point, rows.value_dim, channel_scale, scale.shape[3])

    @classmethod
    def _of(
        cls,
        rows: PackedRows,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        dim: int,
        channel_scale: Tensor | None = None,
        groups: int = 1,
    ) -> Tier:
        blocks = rows.tensors.get("block")
        addresses = (
            None if each is None else each.data_ptr() for each in (codes, scale, zero_point, channel_scale, blocks)
        )
        block_bytes = 0 if blocks is None else blocks.itemsize
        channels = rows.codec.channels or dim
        return cls(*addresses, block_bytes, len(rows), rows.blocks, dim, codes.shape[3], groups, channels)


def native(columns: Columns) -> Any:
    """`column`s of rows.c: for each tensor, where it begins, and bytes of its rows."""
    if columns.native is None:
        # Not by stride(2), which means nothing where there is a single slot.
        first = 1 if isinstance(columns, FlatColumns) else 3  # dimension of a row
        sizes = [each.itemsize * math.prod(each.shape[first:]) for each in columns]
        before = columns.before or (0,) * len(columns)
        begins = [each.data_ptr() - size * gone for each, size, gone in zip(columns, sizes, before, strict=True)]
        columns.native = (c_int64 * (2 * len(columns)))(*chain.from_iterable(zip(begins, sizes, strict=True)))
    return columns.native


def floats(*shape: int) -> Tensor:
    """Memory for what the loops write as float32, whatever a user has made torch's default."""
    return torch.empty(*shape, dtype=torch.float32)


def threads_for(multiplications: int) -> int:
    return 1 if multiplications < _ALONE else torch.get_num_threads()


def parts_of(rows: int) -> int:
    return -(-rows // PART)


def sinks_of(scoring: Scoring, batch: int) -> Tensor | None:
    """Attention sinks of every sequence and head, float32."""
    return None if scoring.sinks is None else scoring.sinks.float().expand(batch, -1).contiguous()


def are_rows(*tensors: Tensor) -> bool:
    """Whether rows `[B, Hkv, S, D]` are of one known kind, evenly spaced, and whole vectors long."""
    return all(
        rows.dtype == tensors[0].dtype and _evenly_spaced(rows.dtype, rows.shape, rows.stride()) for rows in tensors
    )


@lru_cache(64)
def _evenly_spaced(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    one_after_the_other = strides[2:] == (shape[3], 1) and (shape[0] == 1 or strides[0] == shape[1] * strides[1])
    return dtype in KINDS and shape[3] % LANES == 0 and one_after_the_other


def are_codes(rows: PackedRows) -> bool:
    """Whether rows of codes are whole vectors long, and so are groups of channels."""
    plain = type(rows) is PackedRows  # others hold codes in another way
    return (
        plain
        and _whole_vectors(rows.codec, rows.key_dim, rows.value_dim)
        and all(tensor.is_contiguous() for tensor in rows.tensors.values())
    )


def can_encode(codec: Codec, keys: Tensor, values: Tensor) -> bool:
    """Whether rows are of known kinds, and become codes that are whole vectors long."""
    return (
        _whole_vectors(codec, keys.shape[3], values.shape[3])
        and all(rows.dtype in KINDS and rows.stride(3) == 1 for rows in (keys, values))
        and not needs_gradients(keys, values)
    )


def _whole_vectors(codec: Codec, key_dim: int, value_dim: int) -> bool:
    return key_dim % LANES == 0 and value_dim % LANES == 0 and (codec.channels or LANES) % LANES == 0


def check_slots(failed: int) -> None:
    if failed:
        raise PolicyError("the policy packs a slot that is not in use.")


def needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
