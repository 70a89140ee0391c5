"""`CPUKernels`: the compiled loops as operations on tensors."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.attention.noise import Gumbel
from kvprune.errors import PolicyError
from kvprune.kernels.cpu import maxima, ragged, rotated
from kvprune.kernels.cpu.arguments import (
    KINDS,
    LANES,
    STRETCHES,
    TILE,
    Selection,
    StridedRows,
    Tier,
    are_rows,
    can_encode,
    check_slots,
    floats,
    native,
    needs_gradients,
    parts_of,
    sinks_of,
    threads_for,
)
from kvprune.kernels.cpu.loading import library
from kvprune.kernels.reference import Kernels
from kvprune.table.basis import Basis
from kvprune.table.operations import Columns, FlatColumns
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec, channel_scales, packed_bytes
from kvprune.table.ragged import RaggedTable
from kvprune.table.rotated_codes import Quantizer
from kvprune.table.rotated_rows import RotatedCodec, RotatedRows
from kvprune.table.rows import take_rows
from kvprune.table.split_rows import SplitCodec
from kvprune.table.token_table import TokenTable


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
        if scoring.softcap is not None or not are_rows(keys, values) or needs_gradients(queries, keys):
            return super().single_query(queries, keys, values, scoring, empty, with_probabilities)
        (batch, kv_heads, rows, dim), value_dim = keys.shape, values.shape[3]
        heads, group = batch * kv_heads, queries.shape[1] // kv_heads
        positions = None if empty is None else empty.int().neg_().contiguous()  # -1 where empty
        probabilities = floats(batch, kv_heads, group, rows)
        output = floats(batch, heads // batch * group, 1, value_dim)
        self._c.single_query(
            output, probabilities, queries.float().contiguous(), keys, keys.stride(1), values, values.stride(1),
            positions, rows, sinks_of(scoring, batch), floats(heads * parts_of(rows) * group * value_dim),
            scoring.scale, KINDS[keys.dtype], heads, group, rows, dim, value_dim,
            threads_for(heads * group * rows * (dim + value_dim)),
        )  # fmt: skip
        return output.to(queries.dtype), probabilities

    def flat_single_query(
        self, queries: Tensor, table: RaggedTable, scoring: Scoring, with_probabilities: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        flat = table.flat
        if flat is None:
            return super().flat_single_query(queries, table, scoring, with_probabilities)
        keys, values = flat.tensors["keys"], flat.tensors["values"]
        whole = keys.dtype in KINDS and keys.shape[1] % LANES == 0 and values.shape[1] % LANES == 0
        if scoring.softcap is not None or not whole or needs_gradients(queries, keys):
            return super().flat_single_query(queries, table, scoring, with_probabilities)
        batch, query_heads, _, dim = queries.shape
        heads, value_dim, width = len(table.heads), values.shape[1], table.length
        group = query_heads // table.kv_heads
        probabilities = floats(batch, table.kv_heads, group, width)
        output = floats(batch, query_heads, 1, value_dim)
        parts = parts_of(len(keys)) + heads  # at most
        self._c.flat_query(
            output, probabilities, queries.float().contiguous(), keys, values, flat.starts, flat.lengths,
            sinks_of(scoring, batch), floats(parts * group * value_dim), scoring.scale, KINDS[keys.dtype],
            heads, group, width, dim, value_dim, threads_for(group * len(keys) * (dim + value_dim)),
        )  # fmt: skip
        return output.to(queries.dtype), probabilities

    def ragged_single_query(
        self, queries: Tensor, table: RaggedTable, scoring: Scoring, with_probabilities: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        found = ragged.single_query(self._c, queries, table, scoring)
        return super().ragged_single_query(queries, table, scoring, with_probabilities) if found is None else found

    def packed_single_query(
        self, queries: Tensor, table: TokenTable, scoring: Scoring, with_probabilities: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        keys, values = table.keys, table.values
        if (
            scoring.softcap is not None
            or not are_rows(keys, values)
            or not all(ragged.can_take(self._c, tier) for tier in table.packed)
            or needs_gradients(queries, keys)
        ):
            return super().packed_single_query(queries, table, scoring, with_probabilities)
        (batch, kv_heads, loose, dim), value_dim = keys.shape, values.shape[3]
        heads, group = batch * kv_heads, queries.shape[1] // kv_heads
        length, kind = table.length, KINDS[keys.dtype]
        threads = threads_for(heads * group * length * (dim + value_dim))
        wide, scale = queries.float().contiguous(), scoring.scale
        weights = floats(batch, kv_heads, group, length)

        first, asked = 0, None
        for tier in table.packed:
            if isinstance(tier, RotatedRows):
                asked = asked or rotated.Asked.of(wide.view(batch, kv_heads, group, dim), scale, tier.basis.keys)
                asked.dots(self._c, weights, first, tier, threads)
            else:
                codes = ctypes.byref(Tier.of_keys(tier))
                self._c.packed_dots(weights, length, first, wide, codes, scale, tier.codec.bits, heads, group, threads)
            first += len(tier)
        self._c.dots(weights, length, first, wide, keys, keys.stride(1), scale, loose, kind, heads, group, dim, threads)
        positions = None if table.dense else table.positions
        stride = 0 if positions is None else positions.stride(1)
        self._c.softmax(weights, positions, stride, sinks_of(scoring, batch), heads, group, length, threads)

        parts = parts_of(loose) + sum(parts_of(len(tier)) for tier in table.packed if not isinstance(tier, RotatedRows))
        sums = floats(heads * parts * group * value_dim)
        turned: rotated.Sums | None = None
        first, part = 0, 0
        for tier in table.packed:
            if isinstance(tier, RotatedRows):
                turned = turned or rotated.Sums(weights, tier.basis.values)
                turned.add(self._c, first, tier, threads)
                first += len(tier)
                continue
            codes = ctypes.byref(Tier.of_values(tier))
            self._c.packed_sums(
                sums, parts, part, weights, length, first, codes, tier.codec.bits, heads, group, threads
            )
            first, part = first + len(tier), part + parts_of(len(tier))
        self._c.sums(
            sums, parts, part, weights, length, first, values, values.stride(1), loose, kind, heads, group, value_dim,
            threads,
        )  # fmt: skip
        output = floats(batch, queries.shape[1], 1, value_dim)
        self._c.add_parts(output, sums, heads, parts, group * value_dim)
        if turned is not None:
            output += turned.output().view_as(output)
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
            or needs_gradients(probabilities)
            or (noise is not None and not (one_position and noise.scale and isinstance(noise.temperature, float)))
        ):
            return super().query_mass(probabilities, group, noise, query_positions, key_positions)
        mass = floats(batch, kv_heads, keys)
        if noise is None or query_positions is None or key_positions is None:
            self._c.mean(mass, probabilities, batch * kv_heads, heads, keys, threads_for(probabilities.numel()))
            return mass
        self._c.noisy_query(
            mass, torch.empty_like(mass), probabilities, key_positions, key_positions.stride(1), noise.word,
            int(query_positions), noise.scale, noise.temperature, batch, kv_heads, heads, keys,
            threads_for(32 * probabilities.numel()),
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
        if not noise.scale or not logits.is_contiguous() or needs_gradients(logits):
            return super().noisy_weights(logits, noise, scoring, query_positions, key_positions)
        batch, kv_heads, group, rows, keys = logits.shape
        positions = key_positions.int().expand(batch, kv_heads, keys).contiguous()
        totals = floats(batch, kv_heads, group, rows)
        sinks = sinks_of(scoring, batch)
        self._c.noisy_weights(
            logits, totals, positions,
            query_positions.int().expand(batch, rows)[:, None].expand(-1, kv_heads, -1).contiguous(),
            noise.column_words(positions),
            noise.row_words(query_positions, kv_heads, group).expand(batch, -1, -1, -1).contiguous(),
            sinks, None if lse is None or sinks is not None else lse.float().contiguous(),
            torch.as_tensor(noise.temperature, dtype=torch.float32).expand(rows).contiguous(),
            noise.scale, batch * kv_heads, group, rows, keys, threads_for(32 * logits.numel()),
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
        if keys.dtype not in KINDS or keys.stride(3) != 1 or needs_gradients(queries, keys):
            return None
        if noise is not None and (noise.scale, noise.temperature) != (1.0, 1.0):
            return None
        (batch, kv_heads, length, dim), (query_heads, rows) = keys.shape, queries.shape[1:3]
        heads, group = batch * kv_heads, query_heads // kv_heads
        scaled = (queries.float() * scoring.scale).contiguous()
        lse = lse.float().contiguous()
        weights = (weights / group)[:, None].expand(-1, kv_heads, -1).contiguous()
        limits = (places + 1)[:, None].expand(batch, kv_heads, -1).contiguous()
        mass = floats(batch, kv_heads, length)
        rows_of_keys, threads = ctypes.byref(StridedRows.of(keys)), torch.get_num_threads()
        if noise is None or query_positions is None or key_positions is None:
            self._c.mass_from_lse(
                mass, rows_of_keys, scaled, lse, weights, limits, heads, group, rows, length, dim, threads
            )
            return mass
        padded = -(-length // TILE) * TILE
        column_words = noise.column_words(key_positions).expand(batch, kv_heads, length)
        failed = self._c.noisy_mass_from_lse(
            mass, floats(heads * padded * dim), floats(heads * padded * STRETCHES), rows_of_keys,
            scaled, F.pad(column_words, (0, padded - length)).contiguous(),
            noise.row_words(query_positions, kv_heads, group).expand(batch, -1, -1, -1).contiguous(),
            lse, weights, limits, heads, group, rows, length, dim, threads,
        )  # fmt: skip
        return None if failed else mass

    def attention_maxima(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor | None,
        weights: Tensor,
        scoring: Scoring,
        query_positions: Tensor,
        key_positions: Tensor,
        *,
        lse: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor] | None:
        if lse is not None and values is None:  # then a product and a running maximum are all that is left
            return None
        return maxima.in_one_pass(self._c, queries, keys, values, weights, scoring, query_positions, key_positions)

    # -- scores ------------------------------------------------------------------------------------------------------

    def largest_near(self, scores: Tensor, positions: Tensor, before: int, after: int, recent: int | Tensor) -> Tensor:
        batch, heads, rows = positions.shape
        pooled = floats(batch, heads, rows)
        begins = torch.as_tensor(recent).long().flatten().expand(batch).contiguous()
        threads = threads_for(batch * heads * rows * min(before + 1 + after, rows))
        failed = scores.dtype != torch.float32 or self._c.largest_near(
            pooled, scores, *scores.stride(), positions, positions.stride(1), begins, before, after, batch, heads, rows,
            threads,
        )  # fmt: skip
        return super().largest_near(scores, positions, before, after, recent) if failed else pooled

    # -- rows of a table ---------------------------------------------------------------------------------------------

    def worst_rows(
        self, scores: Tensor, positions: Tensor, sinks: int, recent: int | Tensor, stay: Tensor | None = None
    ) -> Tensor:
        if isinstance(recent, Tensor) or scores.dtype != torch.float32:
            return super().worst_rows(scores, positions, sinks, recent, stay)
        batch, heads, rows = positions.shape
        if scores.shape != positions.shape:
            scores = scores.expand_as(positions)
        slots = torch.empty(batch, heads, 1, dtype=torch.int64)
        self._c.worst_rows(
            slots, scores, *scores.stride(), positions, positions.stride(1),
            stay, 0 if stay is None else stay.stride(1), sinks, recent, batch, heads, rows,
        )  # fmt: skip
        return slots

    def move_rows(self, columns: Columns, slots: Tensor, newest: int) -> None:
        batch, heads, capacity = columns[0].shape[:3]
        slots = slots.expand(batch, heads, 1).contiguous().long()  # a policy of someone else's may say it otherwise
        if self._c.move_rows(native(columns), len(columns), capacity, slots, newest, batch * heads):
            raise PolicyError(
                f"the policy evicts a slot that is not in use: {slots.flatten().tolist()} of {newest + 1}."
            )

    def append_row(self, columns: Columns, slot: int, keys: Tensor, values: Tensor, positions: int) -> None:
        batch, heads, capacity = columns[0].shape[:3]
        told_apart = columns.before and batch * heads > 1  # heads are not alike many slots apart in every tensor
        if told_apart or keys.stride(3) != 1 or values.stride(3) != 1 or needs_gradients(keys, values):
            super().append_row(columns, slot, keys, values, positions)
            return
        size = keys.itemsize
        self._c.append_row(
            native(columns), len(columns), capacity, slot, keys, size * keys.stride(0), size * keys.stride(1),
            values, size * values.stride(0), size * values.stride(1), positions, batch, heads,
        )  # fmt: skip

    def append_rows(self, columns: FlatColumns, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        if keys.stride(3) != 1 or values.stride(3) != 1 or needs_gradients(keys, values):
            super().append_rows(columns, keys, values, positions)
            return
        (batch, heads), size = keys.shape[:2], keys.itemsize
        self._c.append_rows(
            native(columns), len(columns), columns.starts, columns.lengths, keys, size * keys.stride(0),
            size * keys.stride(1), values, size * values.stride(0), size * values.stride(1), positions.contiguous(),
            batch, heads,
        )  # fmt: skip

    def drop_rows(self, columns: FlatColumns, slots: Tensor, width: int) -> None:
        slots = slots.contiguous()
        if self._c.drop_rows(
            native(columns), len(columns), columns.starts, columns.lengths, slots, width, slots.numel()
        ):
            raise PolicyError(f"the policy evicts a slot that holds no row: {slots.flatten().tolist()} of {width}.")

    def spread(self, column: Tensor, starts: Tensor, lengths: Tensor, width: int, filling: float) -> Tensor:
        if column.ndim > 1 or column.itemsize != 4 or filling not in (0, -1):
            return super().spread(column, starts, lengths, width, filling)
        if filling and column.dtype != torch.int32:
            return super().spread(column, starts, lengths, width, filling)
        padded = column.new_empty(len(lengths), width)
        self._c.spread(padded, column, starts, lengths, 0xFFFFFFFF if filling else 0, width, len(lengths))
        return padded

    def collect(self, column: Tensor, padded: Tensor, starts: Tensor, lengths: Tensor) -> None:
        if column.ndim > 1 or column.itemsize != 4:
            super().collect(column, padded, starts, lengths)
            return
        self._c.collect(column, padded.contiguous(), starts, lengths, padded.shape[1], len(lengths))

    def quantizer(self, *dims: int) -> Quantizer | None:
        return rotated.quantizer(self._c) if rotated.are_there(self._c) and rotated.fits(*dims) else None

    def encode(
        self, codec: Codec, keys: Tensor, values: Tensor, slots: Tensor, basis: Basis | None = None
    ) -> PackedRows:
        if isinstance(codec, SplitCodec) or not can_encode(codec, keys, values) or not slots.numel():
            return super().encode(codec, keys, values, slots, basis)
        if isinstance(codec, RotatedCodec):
            quantizer = self.quantizer(keys.shape[3], values.shape[3])
            index, basis = slots.clamp(min=0), basis or Basis.fixed(keys.shape[3], values.shape[3])
            taken = take_rows(keys, index), take_rows(values, index)
            return RotatedRows.encode_in(codec, basis, *taken, quantizer)
        (batch, kv_heads, rows), key_dim, value_dim = slots.shape, keys.shape[3], values.shape[3]
        heads, tokens, slots = batch * kv_heads, codec.tokens or rows, slots.contiguous()
        blocks, groups = -(-rows // tokens), -(-value_dim // (codec.channels or value_dim))
        of_keys, of_values = (ctypes.byref(Selection.of(each, slots, tokens)) for each in (keys, values))
        threads = threads_for(8 * heads * rows * (key_dim + value_dim))

        tensors = {}
        if codec.separable:
            sizes = floats(batch, kv_heads, blocks, value_dim)
            check_slots(self._c.channel_sizes(sizes, of_values, heads, value_dim, threads))
            tensors["channel_scale"] = channel_scales(sizes)
        for name, dim, parameters in (("key", key_dim, (blocks, key_dim)), ("value", value_dim, (rows, groups))):
            size = packed_bytes(dim, codec.bits)
            tensors[f"{name}_codes"] = torch.empty(batch, kv_heads, rows, size, dtype=torch.uint8)
            for parameter in ("scale", "zero_point"):
                tensors[f"{name}_{parameter}"] = torch.empty(batch, kv_heads, *parameters, dtype=torch.float16)
        packed = PackedRows.in_blocks(codec, key_dim, value_dim, tensors)
        tier = ctypes.byref(Tier.of_keys(packed))
        check_slots(self._c.encode_keys(tier, of_keys, codec.bits, heads, threads))
        tier = ctypes.byref(Tier.of_values(packed))
        check_slots(self._c.encode_values(tier, of_values, codec.bits, heads, threads))
        return packed


CPU = CPUKernels()
