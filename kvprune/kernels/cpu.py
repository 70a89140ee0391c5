"""`CPUKernels`: the loops of cpu.c, which are compiled when kvprune is installed.

They run on PyTorch's own threads: both are built on OpenMP, and the library that PyTorch has loaded serves both.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from ctypes import c_float, c_int, c_int32, c_int64, c_long, c_uint32, c_void_p
from functools import cache, lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.attention.noise import Gumbel
from kvprune.errors import PolicyError
from kvprune.kernels.reference import Kernels
from kvprune.table.operations import Columns
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec, channel_scales, packed_bytes
from kvprune.table.token_table import TokenTable

# As in cpu.c: lanes of a vector, rows that a thread takes at a time, keys of a tile, stretches of queries, kinds.
_LANES, _PART, _TILE, _STRETCHES = 16, 256, 64, 16
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INTERFACE = 1
# Multiplications that one thread does sooner than several wake up for.
_ALONE = 1 << 17


class _Pointer:
    """An argument that is a tensor, for the address of its first number, or None."""

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> c_void_p | None:
        return None if tensor is None else c_void_p(tensor.data_ptr())


_SIGNATURES: dict[str, list[Any]] = {
    "noisy_weights": [_Pointer] * 9 + [c_float] + [c_long] * 4 + [c_int],
    "mass_from_lse": [_Pointer, c_void_p] + [_Pointer] * 4 + [c_long] * 5 + [c_int],
    "noisy_mass_from_lse": [_Pointer] * 3 + [c_void_p] + [_Pointer] * 6 + [c_long] * 5 + [c_int],
    "dots": [_Pointer, c_long, c_long, _Pointer, _Pointer, c_long, c_float, c_long, c_int] + [c_long] * 3 + [c_int],
    "softmax": [_Pointer, _Pointer, c_long, _Pointer] + [c_long] * 3 + [c_int],
    "sums": [_Pointer] + [c_long] * 2 + [_Pointer] + [c_long] * 2 + [_Pointer] + [c_long] * 2 + [c_int]
    + [c_long] * 3 + [c_int],
    "add_parts": [_Pointer, _Pointer] + [c_long] * 3,
    "single_query": [_Pointer] * 4 + [c_long, _Pointer, c_long, _Pointer, c_long, _Pointer, _Pointer, c_float, c_int]
    + [c_long] * 5 + [c_int],
    "mean": [_Pointer, _Pointer] + [c_long] * 3 + [c_int],
    "noisy_query": [_Pointer] * 4 + [c_long, c_uint32, c_long, c_float, c_float] + [c_long] * 4 + [c_int],
    "packed_dots": [_Pointer, c_long, c_long, _Pointer, c_void_p, c_float, c_int, c_long, c_long, c_int],
    "packed_sums": [_Pointer] + [c_long] * 2 + [_Pointer] + [c_long] * 2 + [c_void_p, c_int, c_long, c_long, c_int],
    "worst_rows": [_Pointer, _Pointer] + [c_long] * 3 + [_Pointer] + [c_long] * 6,
    "move_rows": [c_void_p, c_long, c_long, _Pointer, c_long, c_long],
    "channel_sizes": [_Pointer, c_void_p] + [c_long] * 2 + [c_int],
    "encode_keys": [c_void_p] * 2 + [c_int, c_long, c_int],
    "encode_values": [c_void_p] * 2 + [c_int, c_long, c_int],
    "append_row": [c_void_p] + [c_long] * 3 + [_Pointer, c_long, c_long] * 2 + [c_int32, c_long, c_long],
}  # fmt: skip


@cache
def library() -> Any:
    """The compiled loops by name; None where kvprune was installed without a compiler."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu{suffix}")
        if path.exists():
            loaded = ctypes.CDLL(str(path))
            if getattr(loaded, "kvprune_interface", int)() == _INTERFACE:
                return _Library(loaded)
            warnings.warn(
                f"{path.name} was compiled of another cpu.c, and is not used: install kvprune again.", stacklevel=2
            )
    return None


class _Library:
    def __init__(self, loaded: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(loaded, f"kvprune_{name}")
            function.argtypes = arguments
            setattr(self, name, function)


class CPUKernels(Kernels):
    """Compiled loops for a CPU; what they do not cover is left to PyTorch."""

    name = "cpu"

    @property
    def _c(self) -> Any:
        return library()

    # -- attention of one query per sequence -------------------------------------------------------------------------

    def single_query(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scoring: Scoring,
        empty: Tensor | None,
        with_probabilities: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if scoring.softcap is not None or not _are_rows(keys, values) or _needs_gradients(queries, keys):
            return super().single_query(queries, keys, values, scoring, empty, with_probabilities)
        (batch, kv_heads, rows, dim), value_dim = keys.shape, values.shape[3]
        heads, group = batch * kv_heads, queries.shape[1] // kv_heads
        positions = None if empty is None else empty.int().neg_().contiguous()  # -1 where empty
        probabilities = torch.empty(batch, kv_heads, group, rows)
        output = torch.empty(batch, heads // batch * group, 1, value_dim)
        self._c.single_query(
            output, probabilities, queries.float().contiguous(), keys, keys.stride(1), values, values.stride(1),
            positions, rows, _sinks(scoring, batch), torch.empty(heads * _parts(rows) * group * value_dim),
            scoring.scale, _KINDS[keys.dtype], heads, group, rows, dim, value_dim,
            _threads(heads * group * rows * (dim + value_dim)),
        )  # fmt: skip
        return output.to(queries.dtype), probabilities

    def packed_single_query(self, queries: Tensor, table: TokenTable, scoring: Scoring) -> tuple[Tensor, Tensor]:
        keys, values = table.keys, table.values
        if (
            scoring.softcap is not None
            or not _are_rows(keys, values)
            or not all(_are_codes(tier) for tier in table.packed)
            or _needs_gradients(queries, keys)
        ):
            return super().packed_single_query(queries, table, scoring)
        (batch, kv_heads, loose, dim), value_dim = keys.shape, values.shape[3]
        heads, group = batch * kv_heads, queries.shape[1] // kv_heads
        length, kind = table.length, _KINDS[keys.dtype]
        threads = _threads(heads * group * length * (dim + value_dim))
        wide, scale = queries.float().contiguous(), scoring.scale
        weights = torch.empty(batch, kv_heads, group, length)

        first = 0
        for tier in table.packed:
            codes = ctypes.byref(_Tier.of_keys(tier))
            self._c.packed_dots(weights, length, first, wide, codes, scale, tier.codec.bits, heads, group, threads)
            first += len(tier)
        self._c.dots(weights, length, first, wide, keys, keys.stride(1), scale, loose, kind, heads, group, dim, threads)
        positions = None if table.dense else table.positions
        stride = 0 if positions is None else positions.stride(1)
        self._c.softmax(weights, positions, stride, _sinks(scoring, batch), heads, group, length, threads)

        parts = _parts(loose) + sum(_parts(len(tier)) for tier in table.packed)
        sums = torch.empty(heads * parts * group * value_dim)
        first, part = 0, 0
        for tier in table.packed:
            codes = ctypes.byref(_Tier.of_values(tier))
            self._c.packed_sums(
                sums, parts, part, weights, length, first, codes, tier.codec.bits, heads, group, threads
            )
            first, part = first + len(tier), part + _parts(len(tier))
        self._c.sums(
            sums, parts, part, weights, length, first, values, values.stride(1), loose, kind, heads, group, value_dim,
            threads,
        )  # fmt: skip
        output = torch.empty(batch, queries.shape[1], 1, value_dim)
        self._c.add_parts(output, sums, heads, parts, group * value_dim)
        return output.to(queries.dtype), weights

    # -- attention mass ----------------------------------------------------------------------------------------------

    def query_mass(
        self,
        probabilities: Tensor,
        group: str,
        noise: Gumbel | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor:
        batch, kv_heads, heads, keys = probabilities.shape
        one_position = query_positions is not None and query_positions.shape[0] == 1
        if (
            group != "mean"
            or not probabilities.is_contiguous()
            or _needs_gradients(probabilities)
            or (noise is not None and not (one_position and noise.scale and isinstance(noise.temperature, float)))
        ):
            return super().query_mass(probabilities, group, noise, query_positions, key_positions)
        mass = torch.empty(batch, kv_heads, keys)
        if noise is None or query_positions is None or key_positions is None:
            self._c.mean(mass, probabilities, batch * kv_heads, heads, keys, _threads(probabilities.numel()))
            return mass
        self._c.noisy_query(
            mass, torch.empty_like(mass), probabilities, key_positions, key_positions.stride(1), noise.word,
            int(query_positions), noise.scale, noise.temperature, batch, kv_heads, heads, keys,
            _threads(32 * probabilities.numel()),
        )  # fmt: skip
        return mass

    def noisy_weights(
        self,
        logits: Tensor,
        noise: Gumbel,
        scoring: Scoring,
        query_positions: Tensor,
        key_positions: Tensor,
        lse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not noise.scale or not logits.is_contiguous() or _needs_gradients(logits):
            return super().noisy_weights(logits, noise, scoring, query_positions, key_positions)
        batch, kv_heads, group, rows, keys = logits.shape
        positions = key_positions.int().expand(batch, kv_heads, keys).contiguous()
        totals = torch.empty(batch, kv_heads, group, rows)
        sinks = _sinks(scoring, batch)
        self._c.noisy_weights(
            logits, totals, positions,
            query_positions.int().expand(batch, rows)[:, None].expand(-1, kv_heads, -1).contiguous(),
            noise.column_words(positions),
            noise.row_words(query_positions, kv_heads, group).expand(batch, -1, -1, -1).contiguous(),
            sinks, None if lse is None or sinks is not None else lse.float().contiguous(),
            torch.as_tensor(noise.temperature, dtype=torch.float32).expand(rows).contiguous(),
            noise.scale, batch * kv_heads, group, rows, keys, _threads(32 * logits.numel()),
        )  # fmt: skip
        return logits, totals

    def mass_from_lse(
        self,
        queries: Tensor,
        keys: Tensor,
        weights: Tensor,
        scoring: Scoring,
        places: Tensor,
        lse: Tensor,
        noise: Gumbel | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor | None:
        if keys.dtype not in _KINDS or keys.stride(3) != 1 or _needs_gradients(queries, keys):
            return None
        if noise is not None and (noise.scale, noise.temperature) != (1.0, 1.0):
            return None
        (batch, kv_heads, length, dim), (query_heads, rows) = keys.shape, queries.shape[1:3]
        heads, group = batch * kv_heads, query_heads // kv_heads
        scaled = (queries.float() * scoring.scale).contiguous()
        lse = lse.float().contiguous()
        weights = (weights / group)[:, None].expand(-1, kv_heads, -1).contiguous()
        limits = (places + 1)[:, None].expand(batch, kv_heads, -1).contiguous()
        mass = torch.empty(batch, kv_heads, length)
        rows_of_keys, threads = ctypes.byref(_StridedRows.of(keys)), torch.get_num_threads()
        if noise is None or query_positions is None or key_positions is None:
            self._c.mass_from_lse(
                mass, rows_of_keys, scaled, lse, weights, limits, heads, group, rows, length, dim, threads
            )
            return mass
        padded = -(-length // _TILE) * _TILE
        column_words = noise.column_words(key_positions).expand(batch, kv_heads, length)
        failed = self._c.noisy_mass_from_lse(
            mass, torch.empty(heads * padded * dim), torch.empty(heads * padded * _STRETCHES), rows_of_keys,
            scaled, F.pad(column_words, (0, padded - length)).contiguous(),
            noise.row_words(query_positions, kv_heads, group).expand(batch, -1, -1, -1).contiguous(),
            lse, weights, limits, heads, group, rows, length, dim, threads,
        )  # fmt: skip
        return None if failed else mass

    # -- rows of a table ---------------------------------------------------------------------------------------------

    def worst_rows(self, scores: Tensor, positions: Tensor, sinks: int, recent: int | Tensor) -> Tensor:
        if isinstance(recent, Tensor) or scores.dtype != torch.float32:
            return super().worst_rows(scores, positions, sinks, recent)
        batch, heads, rows = positions.shape
        if scores.shape != positions.shape:
            scores = scores.expand_as(positions)
        slots = torch.empty(batch, heads, 1, dtype=torch.int64)
        self._c.worst_rows(
            slots, scores, *scores.stride(), positions, positions.stride(1), sinks, recent, batch, heads, rows
        )
        return slots

    def move_rows(self, columns: Columns, slots: Tensor, newest: int) -> None:
        batch, heads, capacity = columns[0].shape[:3]
        slots = slots.expand(batch, heads, 1).contiguous().long()  # a policy of someone else's may say it otherwise
        if self._c.move_rows(_native(columns), len(columns), capacity, slots, newest, batch * heads):
            raise PolicyError(
                f"the policy evicts a slot that is not in use: {slots.flatten().tolist()} of {newest + 1}."
            )

    def append_row(self, columns: Columns, slot: int, keys: Tensor, values: Tensor, positions: int) -> None:
        if keys.stride(3) != 1 or values.stride(3) != 1 or _needs_gradients(keys, values):
            super().append_row(columns, slot, keys, values, positions)
            return
        batch, heads, capacity = columns[0].shape[:3]
        size = keys.itemsize
        self._c.append_row(
            _native(columns), len(columns), capacity, slot, keys, size * keys.stride(0), size * keys.stride(1),
            values, size * values.stride(0), size * values.stride(1), positions, batch, heads,
        )  # fmt: skip

    def encode(self, codec: Codec, keys: Tensor, values: Tensor, slots: Tensor) -> PackedRows:
        if not _can_encode(codec, keys, values) or not slots.numel():
            return super().encode(codec, keys, values, slots)
        (batch, kv_heads, rows), key_dim, value_dim = slots.shape, keys.shape[3], values.shape[3]
        heads, tokens, slots = batch * kv_heads, codec.tokens or rows, slots.contiguous()
        blocks, groups = -(-rows // tokens), -(-value_dim // (codec.channels or value_dim))
        of_keys, of_values = (ctypes.byref(_Selection.of(each, slots, tokens)) for each in (keys, values))
        threads = _threads(8 * heads * rows * (key_dim + value_dim))

        tensors = {}
        if codec.separable:
            sizes = torch.empty(batch, kv_heads, blocks, value_dim)
            _check_slots(self._c.channel_sizes(sizes, of_values, heads, value_dim, threads))
            tensors["channel_scale"] = channel_scales(sizes)
        for name, dim, parameters in (("key", key_dim, (blocks, key_dim)), ("value", value_dim, (rows, groups))):
            size = packed_bytes(dim, codec.bits)
            tensors[f"{name}_codes"] = torch.empty(batch, kv_heads, rows, size, dtype=torch.uint8)
            for parameter in ("scale", "zero_point"):
                tensors[f"{name}_{parameter}"] = torch.empty(batch, kv_heads, *parameters, dtype=torch.float16)
        packed = PackedRows.in_blocks(codec, key_dim, value_dim, tensors)
        tier = ctypes.byref(_Tier.of_keys(packed))
        _check_slots(self._c.encode_keys(tier, of_keys, codec.bits, heads, threads))
        tier = ctypes.byref(_Tier.of_values(packed))
        _check_slots(self._c.encode_values(tier, of_values, codec.bits, heads, threads))
        return packed


CPU = CPUKernels()


# -- arguments ---------------------------------------------------------------------------------------------------------


class _StridedRows(ctypes.Structure):
    """`strided_rows` of cpu.c."""

    _fields_ = (
        ("first", c_void_p),
        *((name, c_int64) for name in ("of_sequence", "of_head", "of_row", "kind", "heads", "count")),
    )

    @classmethod
    def of(cls, rows: Tensor) -> _StridedRows:
        return cls(rows.data_ptr(), *rows.stride()[:3], _KINDS[rows.dtype], *rows.shape[1:3])


class _Selection(ctypes.Structure):
    """`selection` of cpu.c: rows to pack."""

    _fields_ = (
        ("rows", ctypes.POINTER(_StridedRows)),
        ("slots", c_void_p),
        *((name, c_int64) for name in ("count", "tokens")),
    )

    @classmethod
    def of(cls, rows: Tensor, slots: Tensor, tokens: int) -> _Selection:
        return cls(ctypes.pointer(_StridedRows.of(rows)), slots.data_ptr(), slots.shape[2], tokens)


class _Tier(ctypes.Structure):
    """`tier` of cpu.c: the keys or the values of packed rows."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "scale", "zero_point", "channel_scale", "blocks")),
        *((name, c_int64) for name in ("block_bytes", "rows", "count", "dim", "row_bytes", "groups", "channels")),
    )

    @classmethod
    def of_keys(cls, rows: PackedRows) -> _Tier:
        codes, scale, zero_point = (rows.tensors[f"key_{name}"] for name in ("codes", "scale", "zero_point"))
        return cls._of(rows, codes, scale, zero_point, rows.key_dim)

    @classmethod
    def of_values(cls, rows: PackedRows) -> _Tier:
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
    ) -> _Tier:
        blocks = rows.tensors.get("block")
        addresses = (
            None if each is None else each.data_ptr() for each in (codes, scale, zero_point, channel_scale, blocks)
        )
        block_bytes = 0 if blocks is None else blocks.itemsize
        channels = rows.codec.channels or dim
        return cls(*addresses, block_bytes, len(rows), rows.blocks, dim, codes.shape[3], groups, channels)


def _native(columns: Columns) -> Any:
    """`column`s of cpu.c: for each tensor, where it begins, and bytes of its rows."""
    if columns.native is None:
        # Not by stride(2), which means nothing where there is a single slot.
        sizes = (each.itemsize * math.prod(each.shape[3:]) for each in columns)
        numbers = [number for each, size in zip(columns, sizes, strict=True) for number in (each.data_ptr(), size)]
        columns.native = (c_int64 * len(numbers))(*numbers)
    return columns.native


def _threads(multiplications: int) -> int:
    return 1 if multiplications < _ALONE else torch.get_num_threads()


def _parts(rows: int) -> int:
    return -(-rows // _PART)


def _sinks(scoring: Scoring, batch: int) -> Tensor | None:
    """Attention sinks of every sequence and head, float32."""
    return None if scoring.sinks is None else scoring.sinks.float().expand(batch, -1).contiguous()


def _are_rows(*tensors: Tensor) -> bool:
    """Whether rows `[B, Hkv, S, D]` are of one known kind, evenly spaced, and whole vectors long."""
    return all(
        rows.dtype == tensors[0].dtype and _evenly_spaced(rows.dtype, rows.shape, rows.stride()) for rows in tensors
    )


@lru_cache(64)
def _evenly_spaced(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    one_after_the_other = strides[2:] == (shape[3], 1) and (shape[0] == 1 or strides[0] == shape[1] * strides[1])
    return dtype in _KINDS and shape[3] % _LANES == 0 and one_after_the_other


def _are_codes(rows: PackedRows) -> bool:
    """Whether rows of codes are whole vectors long, and so are groups of channels."""
    return _whole_vectors(rows.codec, rows.key_dim, rows.value_dim) and all(
        tensor.is_contiguous() for tensor in rows.tensors.values()
    )


def _can_encode(codec: Codec, keys: Tensor, values: Tensor) -> bool:
    """Whether rows are of known kinds, and become codes that are whole vectors long."""
    return (
        _whole_vectors(codec, keys.shape[3], values.shape[3])
        and all(rows.dtype in _KINDS and rows.stride(3) == 1 for rows in (keys, values))
        and not _needs_gradients(keys, values)
    )


def _whole_vectors(codec: Codec, key_dim: int, value_dim: int) -> bool:
    return key_dim % _LANES == 0 and value_dim % _LANES == 0 and (codec.channels or _LANES) % _LANES == 0


def _check_slots(failed: int) -> None:
    if failed:
        raise PolicyError("the policy packs a slot that is not in use.")


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
