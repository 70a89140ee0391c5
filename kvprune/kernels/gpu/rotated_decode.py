"""Attention of one query per sequence over rows in the coordinates of a basis: the tiers of `RotatedRows` in
`packed_decode.py`.

A code c of w bits stands for a step times c less its middle, which is a sum over its bits,

    c - (2^w - 1) / 2 = sum over s of  2^(s-1) sigma_s,     sigma_s = 1 for a bit that is set, else -1

so a program never puts codes together, whose widths differ from component to component: it multiplies bits, as signs,
with what each bit is worth times the query. Signs are exact in a bfloat16, and a query is the sum of two. Sums of
weights are kept for every bit too, and put together at the end. Scales of rows are applied to logits and weights.

The query is turned before, and what weights add up is turned once for each split, so neither a key nor a value is ever
turned back. Components share widths by 16, or 8, which a program reads: from where on bits of a group lie in a row is
the sum of the widths before. Keys at levels that are not even are looked up, code by code.
"""

from collections.abc import Sequence
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.kernels.gpu.codes import load_words, paired_order, signs
from kvprune.kernels.gpu.decode import marks_of
from kvprune.kernels.gpu.splits import (
    CHANGING,
    Partials,
    Segment,
    folded,
    is_empty,
    store_logits,
    store_nothing,
    store_partial,
)
from kvprune.kernels.gpu.terms import for_terms, in_terms, over_terms
from kvprune.kernels.gpu.tiles import capped, ceil_div, matmul, padded, tile_rows
from kvprune.table.basis import Basis, Coordinates, lanes_of
from kvprune.table.rotated_codes import PARTS, STEPS, normal_table, steps_table
from kvprune.table.rotated_rows import RotatedRows

# A tile of signs has to fit in the registers of a program, and in the shared memory of small GPUs: of 64 rows of 512, 4
# bits of 128 components. One of codes that are looked up has to fit several times over.
_MOST_SIGNS = 512
_ROWS, _FEW_ROWS = 64, 16
_TILE_BYTES = 8 << 10
# Of 256 signs a row, and with a few registers less than the compiler would take, three programs have room. For CUDA.
_THREE_PROGRAMS = {} if torch.version.hip else {"maxnreg": 168}
_ANY = (True, True, True)


@triton.jit
def _groups(widths, group, GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """Width of these groups, int32, and widths of all before, added up; 0 beyond the last."""
    groups = tl.arange(0, BLOCK_GROUPS)
    every = tl.load(widths + groups, mask=groups < GROUPS, other=0).to(tl.int32)
    width = tl.sum(tl.where(groups[None, :] == group[:, None], every[None, :], 0), 1)
    return width, tl.sum(tl.where(groups[None, :] < group[:, None], every[None, :], 0), 1)


@triton.jit
def _parts_of(width):
    """Bits of the first and second part of codes; what is left is the third: see `PARTS`."""
    return tl.where(width >= 4, 4, 0), tl.where(width == 8, 4, width & 2)


@triton.jit
def _bits_of_rows(widths, places, GROUPS: tl.constexpr, LANES: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """Of bits of a row: component, width of its codes, and what the bit adds to a code, float32; 0 beyond the last."""
    groups = tl.arange(0, BLOCK_GROUPS)
    _, ends = _groups(widths, groups + 1, GROUPS, BLOCK_GROUPS)
    group = tl.sum((places[:, None] >= ends[None, :] * LANES).to(tl.int32), 1)
    width, before = _groups(widths, group, GROUPS, BLOCK_GROUPS)
    bit = places - before * LANES
    four, middle = _parts_of(width)
    behind_four, behind_middle = bit >= four * LANES, bit >= (four + middle) * LANES
    below = tl.where(behind_middle, four + middle, tl.where(behind_four, four, 0))
    size = tl.where(behind_middle, 1, tl.where(behind_four, middle, four))
    size = tl.maximum(size, 1)
    within = bit - below * LANES
    worth = (1 << (below + within % size)).to(tl.float32)
    return group * LANES + within // size, width, tl.where(group < GROUPS, worth, 0.0)


@triton.jit
def _bit_of(width, before, lane, number, LANES: tl.constexpr):
    """Where in a row the bit of this number, of the code of a component, is."""
    four, middle = _parts_of(width)
    of_four, of_middle = number < four, number < four + middle
    below = tl.where(of_four, 0, tl.where(of_middle, four, four + middle))
    size = tl.where(of_four, four, tl.where(of_middle, middle, 1))
    return (before + below) * LANES + lane * size + number - below


@triton.jit
def _column_of(bit):
    """The column of `signs` that a bit has: `paired_order` the other way round."""
    within = bit % 32
    return bit - within + 2 * (within % 16) + within // 16


@triton.jit
def _part(codes, rows, valid, bits, first, lanes, STRIDE: tl.constexpr):
    """The lowest `bits` bits, `[channels]`, of codes `[rows, channels]`, which begin in byte `first` of a group."""
    bit = lanes * bits
    byte = tl.minimum(first + (bit >> 3), STRIDE - 1)  # where there are no bits, it may be behind the row
    found = tl.load(codes + (rows[:, None] * STRIDE + byte[None, :]), mask=valid[:, None], other=0).to(tl.int32)
    return (found >> (bit & 7)[None, :]) & ((1 << bits) - 1)[None, :]


@triton.jit
def _codes(
    codes, rows, valid, width, first, lanes, STRIDE: tl.constexpr, LANES: tl.constexpr,
    FOUR: tl.constexpr, MIDDLE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Codes `[rows, channels]`, int32. FOUR, MIDDLE, ONE: whether any width has such a part: see `PARTS`."""
    four, middle = _parts_of(width)
    found = tl.zeros([rows.shape[0], width.shape[0]], tl.int32)
    if FOUR:
        found += _part(codes, rows, valid, four, first, lanes, STRIDE)
    if MIDDLE:
        found += _part(codes, rows, valid, middle, first + four * (LANES // 8), lanes, STRIDE) << four[None, :]
    if ONE:
        before = four + middle
        found += _part(codes, rows, valid, width & 1, first + before * (LANES // 8), lanes, STRIDE) << before[None, :]
    return found


@triton.jit(do_not_specialize=CHANGING)
def _rotated_kernel(
    turned, constants, key_codes, key_scale, key_offset, key_widths,
    value_codes, value_scale, value_offset, value_widths, steps, levels,
    marks, lengths, of_bits, outputs, maxima, sums, logits,
    length, stretch, first_split, splits, first_slot, kv_heads, scale, pair_stride, member_stride,
    marks_batch_stride, marks_head_stride, marks_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SOFTCAP: tl.constexpr, BELOW_ZERO: tl.constexpr,
    KEY_UNITS: tl.constexpr, VALUE_UNITS: tl.constexpr, LANES: tl.constexpr, VALUE_LANES: tl.constexpr,
    KEY_FOUR: tl.constexpr, KEY_MIDDLE: tl.constexpr, KEY_ONE: tl.constexpr, VALUE_MOST: tl.constexpr,
    MEMBERS: tl.constexpr, TERMS: tl.constexpr, KEY_TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_WORDS: tl.constexpr, BLOCK_VALUE_WORDS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BLOCK_VALUE_GROUPS: tl.constexpr,
):  # fmt: skip
    """One split of the rows of a tier and pair, for all query heads of the pair; its output is not turned back.

    levels: of keys, where they are not even; their units are bytes then. of_bits: for sums of bits of values,
    `[pairs, splits, GROUP, bits]`. VALUE_MOST: bits that a code of values may have.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    own_length = length if lengths is None else tl.minimum(tl.load(lengths + pair), length)
    begin = split * stretch
    end = tl.minimum(begin + stretch, own_length)
    key_codes += (pair * length + begin) * KEY_UNITS
    value_codes += (pair * length + begin) * VALUE_UNITS
    key_scale += pair * length
    value_scale += pair * length
    if key_offset is not None:
        key_offset += pair * length
    if value_offset is not None:
        value_offset += pair * length
    if marks is not None:
        marks += batch * marks_batch_stride + kv_head * marks_head_stride + first_slot * marks_stride
    if logits is not None:
        logits += pair * pair_stride + first_slot
    turned += pair * GROUP * DIM
    key_widths += pair * (DIM // LANES)
    value_widths += pair * (VALUE_DIM // VALUE_LANES)

    members, each = tl.arange(0, MEMBERS), tl.arange(0, BLOCK_N)
    terms = tl.arange(0, TERMS * MEMBERS) // MEMBERS
    channels, asking = tl.arange(0, BLOCK_D), members < GROUP
    if levels is None:
        bits = paired_order(1, 32 * BLOCK_WORDS)
        component, width, worth = _bits_of_rows(key_widths, bits, DIM // LANES, LANES, BLOCK_GROUPS)
        query = tl.load(
            turned + members[:, None] * DIM + component[None, :], mask=asking[:, None] & (worth > 0)[None, :], other=0.0
        )
        query *= (tl.load(steps + width) * worth * -0.5)[None, :]
    else:
        width, before = _groups(key_widths, channels // LANES, DIM // LANES, BLOCK_GROUPS)
        query = tl.load(
            turned + members[:, None] * DIM + channels[None, :], mask=asking[:, None] & (channels < DIM)[None, :],
            other=0.0,
        )  # fmt: skip
    states = in_terms(query, terms, KEY_TYPE, TERMS)
    constant = tl.zeros([MEMBERS], tl.float32)
    if constants is not None:
        constant = tl.load(constants + pair * GROUP + members, mask=asking, other=0.0)
    whole_query = tl.zeros([MEMBERS], tl.float32)
    if key_offset is not None:
        mask = asking[:, None] & (channels < DIM)[None, :]
        whole_query = tl.sum(tl.load(turned + members[:, None] * DIM + channels[None, :], mask=mask, other=0.0), 1)

    largest = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS, BLOCK_N], tl.float32)  # neither is added up over threads before the end
    constant_part = tl.zeros([MEMBERS, BLOCK_N], tl.float32)
    output = tl.zeros([TERMS * MEMBERS, 32 * BLOCK_VALUE_WORDS], tl.float32)
    for first in range(begin, end, BLOCK_N):
        slots = first + each
        valid = slots < end
        if levels is None:
            tile = signs(load_words(key_codes, each, valid, KEY_UNITS, BLOCK_WORDS))
        else:
            codes = _codes(
                key_codes, each, valid, width, before * (LANES // 8), channels & (LANES - 1), KEY_UNITS, LANES,
                KEY_FOUR, KEY_MIDDLE, KEY_ONE,
            )  # fmt: skip
            tile = tl.load(levels + width[None, :] * 256 + codes)
        row_scale = tl.load(key_scale + slots, mask=valid, other=0.0).to(tl.float32)
        found = over_terms(matmul(states, tl.trans(tile.to(KEY_TYPE))), TERMS) * row_scale[None, :]
        if key_offset is not None:
            row_offset = tl.load(key_offset + slots, mask=valid, other=0.0).to(tl.float32)
            found += whole_query[:, None] * row_offset[None, :]
        found = capped((found + constant[:, None]) * scale, SOFTCAP)
        seen = valid
        if marks is not None:
            seen = seen & (is_empty(marks, slots, valid, marks_stride, BELOW_ZERO) == 0)
        found = tl.where(seen[None, :], found, float("-inf"))
        if logits is not None:
            store_logits(logits, found, members, slots, length, member_stride, GROUP)

        weights, shrink, largest = folded(found, largest)
        total = total * shrink[:, None] + weights
        if value_offset is not None:
            row_offset = tl.load(value_offset + slots, mask=valid, other=0.0).to(tl.float32)
            constant_part = constant_part * shrink[:, None] + weights * row_offset[None, :]
        row_scale = tl.load(value_scale + slots, mask=valid, other=0.0).to(tl.float32)
        weights = in_terms(weights * row_scale[None, :], terms, tl.bfloat16, TERMS)
        tile = signs(load_words(value_codes, each, valid, VALUE_UNITS, BLOCK_VALUE_WORDS))
        output = output * for_terms(shrink[:, None], TERMS) + matmul(weights, tile)
        key_codes += BLOCK_N * KEY_UNITS
        value_codes += BLOCK_N * VALUE_UNITS

    if logits is not None:
        attended = begin + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N) * BLOCK_N
        store_nothing(logits, attended, tl.minimum(begin + stretch, length), members, member_stride, GROUP, BLOCK_N)
    # Put together through memory: sums of bits lie with other threads than those of components do.
    of_bits += ((pair * splits + split) * GROUP + members)[:, None] * (32 * BLOCK_VALUE_WORDS)
    columns, components = tl.arange(0, 32 * BLOCK_VALUE_WORDS), tl.arange(0, BLOCK_DV)
    tl.store(of_bits + columns[None, :], over_terms(output, TERMS), mask=asking[:, None])
    tl.debug_barrier()
    width, before = _groups(value_widths, components // VALUE_LANES, VALUE_DIM // VALUE_LANES, BLOCK_VALUE_GROUPS)
    whole = tl.zeros([MEMBERS, BLOCK_DV], tl.float32)
    for number in tl.static_range(VALUE_MOST):
        column = _column_of(_bit_of(width, before, components % VALUE_LANES, number, VALUE_LANES))
        mask = asking[:, None] & (number < width)[None, :]
        whole += tl.load(of_bits + column[None, :], mask=mask, other=0.0) * (-0.5 * (1 << number))
    whole = whole * tl.load(steps + width)[None, :] + tl.sum(constant_part, 1)[:, None]
    store_partial(
        outputs, maxima, sums, whole, largest, tl.sum(total, 1), pair, first_split + split, splits, members,
        components, GROUP, VALUE_DIM,
    )  # fmt: skip


class Turned:
    """Queries turned to meet codes, once for all tiers that share a basis, and their sums turned back.

    turned: `[B, Hkv, G, D]` float32. means: their products with the mean of keys, `[B, Hkv, G, 1]`, or None.
    """

    def __init__(self, queries: Tensor, basis: Basis, kv_heads: int) -> None:
        self.basis = basis
        self.turned, self.means = basis.keys.asked(queries.float().unflatten(1, (kv_heads, -1)).squeeze(3))

    def back(self, partials: Partials, segments: Sequence[Segment]) -> None:
        """Outputs of these segments as those of values, not of their coordinates; in place."""
        runs: list[list[int]] = []
        for segment in segments:
            if runs and runs[-1][1] == segment.first_split:
                runs[-1][1] = segment.last_split
            else:
                runs.append([segment.first_split, segment.last_split])
        for first_split, last_split in runs:
            self._back(partials, first_split, last_split)

    def _back(self, partials: Partials, first_split: int, last_split: int) -> None:
        _, kv_heads, group, _ = self.turned.shape
        found, sums = (each[:, :, first_split:last_split] for each in (partials.outputs, partials.sums))
        rows = -1, kv_heads, group * found.shape[2]
        turned = self.basis.values.added_up(found.reshape(*rows, found.shape[3]), sums.reshape(*rows, 1))
        found.copy_(turned.view(found.shape))


def rotated_block_rows(tier: RotatedRows) -> int:
    """Rows of a tile."""
    signs_of_row = 32 * max(_words(tier, "key"), _words(tier, "value"))
    rows = _ROWS if signs_of_row <= _MOST_SIGNS else _FEW_ROWS
    return min(rows, tile_rows(tier.key_dim, 4, _TILE_BYTES, 32)) if tier.codec.is_normal("key") else rows


def attend_rotated(
    queries: Turned,
    dtype: torch.dtype,
    tier: RotatedRows,
    scoring: Scoring,
    partials: Partials,
    segment: Segment,
    empty: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Leave in `partials` what the splits of one tier come to, not turned back. empty: of all slots of the table.

    dtype: of the queries before they were turned.
    """
    if segment.splits == 0:
        return
    pairs, group, splits, value_dim = partials.outputs.shape
    dim, device = tier.key_dim, partials.outputs.device
    held = {name: tensor.contiguous() for name, tensor in tier.tensors.items()}
    marks, marks_strides, below_zero = marks_of(empty)
    exact, members = dtype == torch.float32, padded(group, 8)
    lanes, value_lanes = lanes_of(dim), lanes_of(value_dim)
    normal = tier.codec.is_normal("key")
    key_codes = held["key_codes"] if normal else _in_units(held["key_codes"])
    value_codes = _in_units(held["value_codes"])
    words, value_words = _words(tier, "key"), _words(tier, "value")
    of_bits = torch.empty(pairs * splits * group * 32 * value_words, dtype=torch.float32, device=device)
    four, middle, one = _parts(tier.basis.keys, tier.codec.bits_of("key")) if normal else _ANY
    _rotated_kernel[pairs, segment.splits](
        queries.turned, queries.means,
        key_codes, held["key_scale"], held.get("key_offset"), held["key_widths"],
        value_codes, held["value_scale"], held.get("value_offset"), held["value_widths"],
        steps_table(device), normal_table(device) if normal else None,
        marks, lengths, of_bits, *vars(partials).values(),
        segment.length, segment.stretch, segment.first_split, splits, segment.first_slot,
        queries.turned.shape[1], scoring.scale, partials.pair_stride, partials.member_stride, *marks_strides,
        GROUP=group, DIM=dim, VALUE_DIM=value_dim, SOFTCAP=scoring.softcap, BELOW_ZERO=below_zero,
        KEY_UNITS=key_codes.shape[3], VALUE_UNITS=value_codes.shape[3], LANES=lanes, VALUE_LANES=value_lanes,
        KEY_FOUR=four, KEY_MIDDLE=middle, KEY_ONE=one,
        VALUE_MOST=_most_bits(tier.basis.values, tier.codec.bits_of("value")),
        MEMBERS=members, TERMS=2, KEY_TYPE=tl.float32 if exact and normal else tl.bfloat16,
        BLOCK_N=rotated_block_rows(tier), BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim),
        BLOCK_WORDS=words, BLOCK_VALUE_WORDS=value_words,
        BLOCK_GROUPS=padded(dim // lanes, 1), BLOCK_VALUE_GROUPS=padded(value_dim // value_lanes, 1),
        num_warps=8 if normal else 4, num_stages=3,
        **(_THREE_PROGRAMS if max(words, value_words) <= 8 and not normal else {}),
    )  # fmt: skip


def _words(tier: RotatedRows, kind: str) -> int:
    """Words of a row, as many as a tile has."""
    return padded(ceil_div(tier.tensors[f"{kind}_codes"].shape[3], 4), 1)


def _in_units(codes: Tensor) -> Tensor:
    """Codes as words, or as halves of words, or bytes, where rows are not of whole ones."""
    for unit in (torch.int32, torch.int16):
        if codes.shape[3] % unit.itemsize == 0 and codes.storage_offset() % unit.itemsize == 0:
            return codes.view(unit)
    return codes


def _parts(coordinates: Coordinates, bits: float) -> tuple[bool, ...]:
    """Which parts codes may have: of all components the same where no spectrum, and no fraction, tells otherwise."""
    alike = coordinates.spectrum is None and bits == int(bits)
    return tuple(part > 0 for part in PARTS[int(bits)]) if alike else _ANY


def _most_bits(coordinates: Coordinates, bits: float) -> int:
    """Bits that a code may have."""
    return ceil(bits) if coordinates.spectrum is None else len(STEPS) - 1
