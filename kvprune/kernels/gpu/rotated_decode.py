"""Attention of one query per sequence over rows in the coordinates of a basis: the tiers of `RotatedRows` in
`packed_decode.py`.

The query is turned before, so a program multiplies codes with it as they are, less their middle: both are exact in a
bfloat16, and a query is the sum of two. Steps of components are applied to the query, scales of rows to logits and
weights, and what weights add up is turned once for each split. So neither a key nor a value is ever turned back.

Components share widths by 16, or 8, which a program reads: from where on codes of a group lie in a row is the sum of
the widths before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvprune.attention.mass import Scoring
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
from kvprune.kernels.gpu.tiles import capped, matmul, padded, tile_rows
from kvprune.table.basis import Coordinates, lanes_of
from kvprune.table.rotated_codes import PARTS, code_bytes, normal_table, steps_table
from kvprune.table.rotated_rows import RotatedRows

# A tile of codes, as int32, has to fit in the registers of a program several times over, with what is to be known of
# every component: where its parts are, and how far they are to be shifted.
_TILE_BYTES = 8 << 10
_ANY = (True, True, True)


@triton.jit
def _layout(widths, channels, DIM: tl.constexpr, LANES: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """Width of each component, and in which byte of a row its group begins, int32 `[channels]`."""
    groups = tl.arange(0, BLOCK_GROUPS)
    every = tl.load(widths + groups, mask=groups < DIM // LANES, other=0).to(tl.int32)
    group = channels // LANES
    before = tl.where(groups[None, :] < group[:, None], every[None, :], 0)
    width = tl.load(widths + group, mask=channels < DIM, other=0).to(tl.int32)
    return width, tl.sum(before, 1) * (LANES // 8)


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
    four = tl.where(width >= 4, 4, 0)
    middle = tl.where(width == 8, 4, width & 2)
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
    marks, lengths, outputs, maxima, sums, logits,
    length, stretch, first_split, splits, first_slot, kv_heads, scale, pair_stride, member_stride,
    marks_batch_stride, marks_head_stride, marks_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SOFTCAP: tl.constexpr, BELOW_ZERO: tl.constexpr,
    KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, LANES: tl.constexpr, VALUE_LANES: tl.constexpr,
    KEY_FOUR: tl.constexpr, KEY_MIDDLE: tl.constexpr, KEY_ONE: tl.constexpr,
    VALUE_FOUR: tl.constexpr, VALUE_MIDDLE: tl.constexpr, VALUE_ONE: tl.constexpr,
    MEMBERS: tl.constexpr, TERMS: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BLOCK_VALUE_GROUPS: tl.constexpr,
):  # fmt: skip
    """One split of the rows of a tier and pair, for all query heads of the pair; its output is not turned back.

    levels: of keys, where they are not even.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    own_length = length if lengths is None else tl.minimum(tl.load(lengths + pair), length)
    begin = split * stretch
    end = tl.minimum(begin + stretch, own_length)
    key_codes += (pair * length + begin) * KEY_BYTES
    value_codes += (pair * length + begin) * VALUE_BYTES
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

    members, each = tl.arange(0, MEMBERS), tl.arange(0, BLOCK_N)
    terms = tl.arange(0, TERMS * MEMBERS) // MEMBERS
    channels, value_channels = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    width, first_byte = _layout(key_widths + pair * (DIM // LANES), channels, DIM, LANES, BLOCK_GROUPS)
    value_width, value_first_byte = _layout(
        value_widths + pair * (VALUE_DIM // VALUE_LANES), value_channels, VALUE_DIM, VALUE_LANES, BLOCK_VALUE_GROUPS
    )  # fmt: skip
    middles, value_middles = ((1 << width) - 1) * 0.5, ((1 << value_width) - 1) * 0.5
    query = tl.load(
        turned + (pair * GROUP + members)[:, None] * DIM + channels[None, :],
        mask=(members < GROUP)[:, None] & (channels < DIM)[None, :], other=0.0,
    )  # fmt: skip
    whole_query = tl.sum(query, 1)
    if levels is None:
        query *= tl.load(steps + width)[None, :]
    states = in_terms(query, terms, TYPE, TERMS)
    constant = tl.zeros([MEMBERS], tl.float32)
    if constants is not None:
        constant = tl.load(constants + pair * GROUP + members, mask=members < GROUP, other=0.0)

    largest = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS, BLOCK_N], tl.float32)  # neither is added up over threads before the end
    constant_part = tl.zeros([MEMBERS, BLOCK_N], tl.float32)
    output = tl.zeros([TERMS * MEMBERS, BLOCK_DV], tl.float32)
    for first in range(begin, end, BLOCK_N):
        slots = first + each
        valid = slots < end
        codes = _codes(
            key_codes, each, valid, width, first_byte, channels & (LANES - 1), KEY_BYTES, LANES,
            KEY_FOUR, KEY_MIDDLE, KEY_ONE,
        )  # fmt: skip
        if levels is None:
            tile = codes.to(tl.float32) - middles[None, :]
        else:
            tile = tl.load(levels + width[None, :] * 256 + codes)
        row_scale = tl.load(key_scale + slots, mask=valid, other=0.0).to(tl.float32)
        found = over_terms(matmul(states, tl.trans(tile.to(TYPE))), TERMS) * row_scale[None, :]
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
        weights = in_terms(weights * row_scale[None, :], terms, TYPE, TERMS)
        codes = _codes(
            value_codes, each, valid, value_width, value_first_byte, value_channels & (VALUE_LANES - 1), VALUE_BYTES,
            VALUE_LANES, VALUE_FOUR, VALUE_MIDDLE, VALUE_ONE,
        )  # fmt: skip
        tile = codes.to(tl.float32) - value_middles[None, :]
        output = output * for_terms(shrink[:, None], TERMS) + matmul(weights, tile.to(TYPE))
        key_codes += BLOCK_N * KEY_BYTES
        value_codes += BLOCK_N * VALUE_BYTES

    if logits is not None:
        attended = begin + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N) * BLOCK_N
        store_nothing(logits, attended, tl.minimum(begin + stretch, length), members, member_stride, GROUP, BLOCK_N)
    whole = over_terms(output, TERMS) * tl.load(steps + value_width)[None, :] + tl.sum(constant_part, 1)[:, None]
    store_partial(
        outputs, maxima, sums, whole, largest, tl.sum(total, 1), pair, first_split + split, splits, members,
        value_channels, GROUP, VALUE_DIM,
    )  # fmt: skip


def rotated_block_rows(tier: RotatedRows) -> int:
    """Rows of a tile."""
    return tile_rows(max(tier.key_dim, tier.value_dim), 4, _TILE_BYTES, 32)


def attend_rotated(
    queries: Tensor,
    tier: RotatedRows,
    scoring: Scoring,
    partials: Partials,
    segment: Segment,
    empty: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Leave in `partials` what the splits of one tier come to. empty: of all slots of the table."""
    if segment.splits == 0:
        return
    pairs, group, splits, value_dim = partials.outputs.shape
    dim, keys, values = tier.key_dim, tier.basis.keys, tier.basis.values
    kv_heads = queries.shape[1] // group
    wide = queries.float().view(-1, kv_heads, group, dim)
    turned = torch.matmul(wide, keys.turning(queries.device)).contiguous()
    means = None if keys.mean is None else torch.matmul(wide, keys.mean.float()[..., None]).contiguous()
    held = {name: tensor.contiguous() for name, tensor in tier.tensors.items()}
    marks, marks_strides, below_zero = marks_of(empty)
    key_parts, value_parts = _parts(keys, tier.codec.bits_of("key")), _parts(values, tier.codec.bits_of("value"))
    exact, members = queries.dtype == torch.float32, padded(group, 8)
    lanes, value_lanes = lanes_of(dim), lanes_of(value_dim)
    _rotated_kernel[pairs, segment.splits](
        turned, means, held["key_codes"], held["key_scale"], held.get("key_offset"), held["key_widths"],
        held["value_codes"], held["value_scale"], held.get("value_offset"), held["value_widths"],
        steps_table(queries.device), normal_table(queries.device) if tier.codec.is_normal("key") else None,
        marks, lengths, *vars(partials).values(),
        segment.length, segment.stretch, segment.first_split, splits, segment.first_slot,
        kv_heads, scoring.scale, partials.pair_stride, partials.member_stride, *marks_strides,
        GROUP=group, DIM=dim, VALUE_DIM=value_dim, SOFTCAP=scoring.softcap, BELOW_ZERO=below_zero,
        KEY_BYTES=code_bytes(dim, tier.codec.bits_of("key")),
        VALUE_BYTES=code_bytes(value_dim, tier.codec.bits_of("value")),
        LANES=lanes, VALUE_LANES=value_lanes,
        KEY_FOUR=key_parts[0], KEY_MIDDLE=key_parts[1], KEY_ONE=key_parts[2],
        VALUE_FOUR=value_parts[0], VALUE_MIDDLE=value_parts[1], VALUE_ONE=value_parts[2],
        MEMBERS=members, TERMS=2, TYPE=tl.float32 if exact else tl.bfloat16,
        BLOCK_N=rotated_block_rows(tier), BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim),
        BLOCK_GROUPS=padded(dim // lanes, 1), BLOCK_VALUE_GROUPS=padded(value_dim // value_lanes, 1),
        num_warps=8 if max(dim, value_dim) <= 128 else 16, num_stages=2,
    )  # fmt: skip
    _turn_back(partials, segment, values, kv_heads)


def _parts(coordinates: Coordinates, bits: float) -> tuple[bool, ...]:
    """Which parts codes may have: of all components the same where no spectrum, and no fraction, tells otherwise."""
    alike = coordinates.spectrum is None and bits == int(bits)
    return tuple(part > 0 for part in PARTS[int(bits)]) if alike else _ANY


def _turn_back(partials: Partials, segment: Segment, values: Coordinates, kv_heads: int) -> None:
    """The outputs of a segment's splits as those of values, not of their coordinates."""
    found = partials.outputs[:, :, segment.first_split : segment.last_split]
    pairs, group, splits, dim = found.shape
    numbers = found.reshape(-1, kv_heads, group * splits, dim)
    turned = torch.matmul(numbers, values.turning(found.device).transpose(-1, -2))
    if values.mean is not None:
        sums = partials.sums[:, :, segment.first_split : segment.last_split]
        turned += sums.reshape(-1, kv_heads, group * splits, 1) * values.mean.float()[:, :, None]
    found.copy_(turned.view(pairs, group, splits, dim))
