"""Attention of one query per sequence over packed rows, decoded in registers, and over loose ones, in one softmax.

The twin of `attention.packed.single_query`. Codes are read from memory once, and nothing they stand for is written
back. Parameters that all rows share are applied to the query instead of each key, q.(s c + z) = (q s).c + q.z, and
those of a row to its weight instead of each value. A group of query heads fills few of the 16 rows of a tensor core's
tile, so the others hold the rest of what rounding takes from q s and from weights: keys are exact then. Where blocks or
groups of channels have parameters of their own, a program decodes a tile in float32, and rounds it to the dtype of the
queries, as a cache in full precision would hold it.

Rows in the coordinates of a basis are attended to by `rotated_decode.py`. Each tier and the loose rows have a launch of
their own; `combine` makes one softmax of all their splits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.kernels.gpu.codes import (
    digit_units,
    dot_codes,
    load_units,
    missing,
    paired_order,
    raised_codes,
    raised_pairs,
)
from kvprune.kernels.gpu.decode import attend_segment, block_rows, marks_of
from kvprune.kernels.gpu.rotated_decode import Turned, attend_rotated, rotated_block_rows
from kvprune.kernels.gpu.splits import (
    CHANGING,
    Partials,
    Segment,
    combine,
    folded,
    is_empty,
    store_logits,
    store_nothing,
    store_partial,
)
from kvprune.kernels.gpu.terms import for_terms, in_terms, numbers_of, of_channels, over_terms, planes_of
from kvprune.kernels.gpu.tiles import capped, ceil_div, matmul, padded, tile_rows, with_dense_rows
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import packed_bytes
from kvprune.table.rotated_rows import RotatedRows

# A tile of keys or values, decoded to float32, has to fit in the registers of a program. Parameters that are looked up
# row by row are as large as decoded rows, and have to fit in shared memory.
_TILE_BYTES = 32 << 10
_TILE_BYTES_WITH_BLOCKS = 16 << 10
# The compiler would take two registers more than leave room for a fourth program. An option of CUDA's alone.
_FOUR_PROGRAMS = {} if torch.version.hip else {"maxnreg": 128}


@triton.jit
def _of_blocks(parameters, blocks, known, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Parameters of channels in these blocks of rows, float32 `[blocks, BLOCK_D]`."""
    return load_units(parameters, blocks, known, DIM, DIM, BLOCK_D).to(tl.float32)


@triton.jit
def _of_rows(parameters, rows, valid, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Parameters of rows, `[rows]`, or `[rows, BLOCK]` of groups of channels."""
    if GROUPS == 1:
        return tl.load(parameters + rows, mask=valid, other=0.0)
    else:
        return load_units(parameters, rows, valid, GROUPS, GROUPS, BLOCK)


@triton.jit
def _of_groups(tile, scale, offset, CHANNELS: tl.constexpr):
    """`tile * scale + offset`, float32 `[N, D]`, where so many channels share parameters `[N]` or `[N, groups]`."""
    if scale.shape == tile.shape[:1]:
        return tile * scale[:, None] + offset[:, None]
    elif scale.shape[1] * CHANNELS == tile.shape[1]:
        groups = tl.reshape(tile, [scale.shape[0], scale.shape[1], CHANNELS])
        return tl.reshape(groups * scale[:, :, None] + offset[:, :, None], tile.shape)
    else:
        group = tl.minimum(tl.arange(0, tile.shape[1]) // CHANNELS, scale.shape[1] - 1)
        group = tl.broadcast_to(group[None, :], tile.shape)
        return tile * tl.gather(scale, group, 1) + tl.gather(offset, group, 1)


@triton.jit(do_not_specialize=CHANGING)
def _packed_kernel(
    queries, key_codes, key_scale, key_zero_point, value_codes, value_scale, value_zero_point, channel_scale, block,
    marks, lengths, outputs, maxima, sums, logits,
    length, blocks, tokens, stretch, first_split, splits, first_slot, kv_heads, scale, pair_stride, member_stride,
    queries_batch_stride, queries_head_stride, marks_batch_stride, marks_head_stride, marks_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SOFTCAP: tl.constexpr, BELOW_ZERO: tl.constexpr,
    BITS: tl.constexpr, CHANNELS: tl.constexpr, FOLDED: tl.constexpr, REGULAR: tl.constexpr,
    KEY_UNITS: tl.constexpr, KEY_LOW: tl.constexpr, VALUE_UNITS: tl.constexpr, VALUE_LOW: tl.constexpr,
    MEMBERS: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_LOW: tl.constexpr, BLOCK_HIGH: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """One split of the rows of a tier and pair, for all query heads of the pair.

    FOLDED: values have one scale a row, which goes into its weight. REGULAR: each block has `tokens` rows, in whole
    tiles, and follows the one before.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    own_length = length if lengths is None else tl.minimum(tl.load(lengths + pair), length)
    queries += batch * queries_batch_stride + kv_head * GROUP * queries_head_stride
    begin = split * stretch
    end = tl.minimum(begin + stretch, own_length)
    GROUPS: tl.constexpr = (VALUE_DIM + CHANNELS - 1) // CHANNELS
    key_codes += (pair * length + begin) * KEY_UNITS
    value_codes += (pair * length + begin) * VALUE_UNITS
    value_scale += pair * length * GROUPS
    value_zero_point += pair * length * GROUPS
    key_scale += pair * blocks * DIM
    key_zero_point += pair * blocks * DIM
    if channel_scale is not None:
        channel_scale += pair * blocks * VALUE_DIM
    if block is not None:
        block += pair * length
    if marks is not None:
        marks += batch * marks_batch_stride + kv_head * marks_head_stride + first_slot * marks_stride
    if logits is not None:
        logits += pair * pair_stride + first_slot

    ZERO: tl.constexpr = 1 << BITS  # what a raised code of 0 is
    dtype: tl.constexpr = queries.dtype.element_ty
    rows, members, each = tl.arange(0, TERMS * MEMBERS), tl.arange(0, MEMBERS), tl.arange(0, BLOCK_N)
    terms = rows // MEMBERS
    DIGITS: tl.constexpr = min(TERMS, 3)
    query, channels = numbers_of(queries, rows % MEMBERS, queries_head_stride, 0, 1, GROUP, DIM, BLOCK_D)
    if block is None:
        scales = of_channels(key_scale, channels, DIM)
        zero_points = of_channels(key_zero_point, channels, DIM) + scales * missing(channels, BITS)[None, :]
        largest_number = tl.maximum(tl.max(tl.abs(query * scales), 1), 1e-30)
        constants = tl.where(terms == 0, tl.sum(query * zero_points, 1), 0.0) * scale
        factors = digit_units(terms) * largest_number * scale
        planes = planes_of(
            queries, key_scale, rows % MEMBERS, terms, largest_number, queries_head_stride,
            BITS if BITS != 3 else 2, GROUP, DIM, BLOCK_LOW, DIGITS,
        )  # fmt: skip
        if BITS == 3:
            high_planes = planes_of(
                queries, key_scale, rows % MEMBERS, terms, largest_number, queries_head_stride,
                1, GROUP, DIM, BLOCK_HIGH, DIGITS,
            )  # fmt: skip
    else:
        states = tl.where((terms == 0)[:, None], query, 0.0).to(dtype)

    largest = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS, BLOCK_N], tl.float32)  # neither is added up over threads before the end
    constant_part = tl.zeros([MEMBERS, BLOCK_N], tl.float32)
    output = tl.zeros([TERMS * MEMBERS, BLOCK_DV], tl.float32)
    next_scale = _of_rows(value_scale, begin + each, begin + each < end, GROUPS, BLOCK_GROUPS)
    next_zero_point = _of_rows(value_zero_point, begin + each, begin + each < end, GROUPS, BLOCK_GROUPS)
    for first in range(begin, end, BLOCK_N):
        slots = first + each
        valid = slots < end
        # A tile ahead: these are too small to be fetched in the background, as codes are.
        row_scale, row_zero_point = next_scale.to(tl.float32), next_zero_point.to(tl.float32)
        behind = slots + BLOCK_N
        next_scale = _of_rows(value_scale, behind, behind < end, GROUPS, BLOCK_GROUPS)
        next_zero_point = _of_rows(value_zero_point, behind, behind < end, GROUPS, BLOCK_GROUPS)

        if block is None:
            low = load_units(key_codes, each, valid, KEY_UNITS, KEY_LOW, BLOCK_LOW)
            if BITS == 3:
                high = load_units(
                    key_codes + KEY_LOW, each, valid, KEY_UNITS, KEY_UNITS - KEY_LOW, BLOCK_HIGH
                )  # fmt: skip
                products = dot_codes(planes, low, 2) + 4 * dot_codes(high_planes, high, 1)
            else:
                products = dot_codes(planes, low, BITS)
            found = products.to(tl.float32) * factors[:, None] + constants[:, None]
        else:
            if REGULAR:
                number = first // tokens
                scales = of_channels(key_scale + number * DIM, channels, DIM)
                zero_points = of_channels(key_zero_point + number * DIM, channels, DIM)
            else:
                numbers = tl.load(block + slots, mask=valid, other=0).to(tl.int32)
                scales = _of_blocks(key_scale, numbers, valid, DIM, BLOCK_D)
                zero_points = _of_blocks(key_zero_point, numbers, valid, DIM, BLOCK_D)
            tile = raised_codes(key_codes, each, valid, BITS, KEY_UNITS, KEY_LOW, BLOCK_D)
            tile = tile * scales + (zero_points - scales * ZERO)
            found = matmul(states, tl.trans(tile.to(dtype))) * scale
        found = capped(over_terms(found, TERMS), SOFTCAP)
        seen = valid
        if marks is not None:
            seen = seen & (is_empty(marks, slots, valid, marks_stride, BELOW_ZERO) == 0)
        found = tl.where(seen[None, :], found, float("-inf"))
        if logits is not None:
            store_logits(logits, found, members, slots, length, member_stride, GROUP)

        weights, shrink, largest = folded(found, largest)
        total = total * shrink[:, None] + weights
        row_zero_point -= row_scale * ZERO
        if FOLDED:
            constant_part = constant_part * shrink[:, None] + weights * row_zero_point[None, :]
            weights = in_terms(weights * row_scale[None, :], terms, tl.bfloat16, TERMS)
            words = load_units(value_codes, each, valid, VALUE_UNITS, VALUE_UNITS, BLOCK_DV * BITS // 32)
            tile = raised_pairs(words, BITS)
        else:
            tile = raised_codes(value_codes, each, valid, BITS, VALUE_UNITS, VALUE_LOW, BLOCK_DV)
            tile = _of_groups(tile, row_scale, row_zero_point, CHANNELS)
            if channel_scale is not None and block is not None:
                if REGULAR:
                    value_channels = tl.arange(0, BLOCK_DV)
                    tile *= of_channels(channel_scale + number * VALUE_DIM, value_channels, VALUE_DIM)
                else:
                    tile *= _of_blocks(channel_scale, numbers, valid, VALUE_DIM, BLOCK_DV)
            weights = in_terms(weights, terms, dtype, TERMS)
            tile = tile.to(dtype)
        output = output * for_terms(shrink[:, None], TERMS) + matmul(weights, tile)
        key_codes += BLOCK_N * KEY_UNITS
        value_codes += BLOCK_N * VALUE_UNITS

    if logits is not None:
        attended = begin + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N) * BLOCK_N
        store_nothing(logits, attended, tl.minimum(begin + stretch, length), members, member_stride, GROUP, BLOCK_N)
    whole = over_terms(output, TERMS) + tl.sum(constant_part, 1)[:, None]
    dims = paired_order(BITS, BLOCK_DV) if FOLDED else tl.arange(0, BLOCK_DV)
    if channel_scale is not None and block is None:
        whole *= of_channels(channel_scale, dims, VALUE_DIM)
    store_partial(
        outputs, maxima, sums, whole, largest, tl.sum(total, 1), pair, first_split + split, splits, members, dims,
        GROUP, VALUE_DIM,
    )  # fmt: skip


def _attend_tier(
    queries: Tensor,
    tier: PackedRows,
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
    dim, bits = tier.key_dim, tier.codec.bits
    held = {name: tensor.contiguous() for name, tensor in tier.tensors.items()}
    block, channel_scale = held.get("block"), held.get("channel_scale")
    keys = _Units.of(held["key_codes"], dim, bits, widest=torch.uint8 if block is None else torch.int32)
    values = _Units.of(held["value_codes"], value_dim, bits)
    channels = min(tier.codec.channels or value_dim, value_dim)
    one_scale = channels == value_dim and (channel_scale is None or block is None)
    in_pairs = bits in (2, 4) and values.codes.dtype == torch.int32 and queries.dtype != torch.float32
    members = padded(group, 4)
    tokens = _regular_tokens(tier)
    marks, marks_strides, below_zero = marks_of(empty)
    _packed_kernel[pairs, segment.splits](
        queries, keys.codes, held["key_scale"], held["key_zero_point"],
        values.codes, held["value_scale"], held["value_zero_point"], channel_scale,
        block, marks, lengths, *vars(partials).values(),
        segment.length, tier.blocks, tokens, segment.stretch, segment.first_split, splits, segment.first_slot,
        queries.shape[1] // group, scoring.scale, partials.pair_stride, partials.member_stride,
        *queries.stride()[:2], *marks_strides,
        GROUP=group, DIM=dim, VALUE_DIM=value_dim, SOFTCAP=scoring.softcap, BELOW_ZERO=below_zero,
        BITS=bits, CHANNELS=channels, FOLDED=one_scale and in_pairs, REGULAR=tokens > 0,
        KEY_UNITS=keys.row, KEY_LOW=keys.low, VALUE_UNITS=values.row, VALUE_LOW=values.low,
        MEMBERS=members, TERMS=max(4 if queries.dtype == torch.float32 else 2, 16 // members),
        BLOCK_N=_block_rows(tier), BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim),
        BLOCK_LOW=padded(keys.low, 32), BLOCK_HIGH=padded(keys.row - keys.low, 32),
        BLOCK_GROUPS=padded(ceil_div(value_dim, channels), 1),
        num_warps=4, num_stages=2 if block is not None else 3,
        **(_FOUR_PROGRAMS if one_scale and in_pairs and members <= 8 and max(dim, value_dim) <= 128 else {}),
    )  # fmt: skip


@dataclass(frozen=True)
class _Units:
    """Codes of rows as bytes, or as words where rows are of whole ones: units of a row, and those with its low bits."""

    codes: Tensor
    row: int
    low: int

    @classmethod
    def of(cls, codes: Tensor, dim: int, bits: int, widest: torch.dtype = torch.int32) -> "_Units":
        row = packed_bytes(dim, bits)
        low = packed_bytes(dim, 2) if bits == 3 else row
        size = widest.itemsize
        if size == 1 or row % size or low % size or codes.storage_offset() % size:
            return cls(codes, row, low)
        return cls(codes.view(widest), row // size, low // size)


def _regular_tokens(tier: PackedRows) -> int:
    """Rows of each block, where each follows the one before in whole tiles and only the last may have fewer; else 0."""
    if "block" not in tier.tensors or not tier.runs or tier.runs[-1].stop < len(tier):
        return 0
    tokens = tier.runs[0].each
    last = tier.runs[1:]
    follow = all(run.start == run.block * tokens for run in tier.runs)
    shorter = not last or (len(last) == 1 and last[0].blocks == 1 and last[0].each < tokens)
    return tokens if follow and shorter and tokens % _block_rows(tier) == 0 else 0


def _block_rows(tier: PackedRows) -> int:
    if isinstance(tier, RotatedRows):
        return rotated_block_rows(tier)
    tile_bytes = _TILE_BYTES_WITH_BLOCKS if "block" in tier.tensors else _TILE_BYTES
    return tile_rows(max(tier.key_dim, tier.value_dim), 4, tile_bytes, 64)


def packed_decode_attention(
    queries: Tensor,
    tiers: Sequence[PackedRows],
    keys: Tensor,
    values: Tensor,
    scoring: Scoring,
    *,
    empty: Tensor | None = None,
    lengths: Tensor | None = None,
    scores: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One query per sequence that sees every row of a table but the empty ones: output `[B, Hq, 1, Dv]`, and scores.

    Slots are those of the tiers, one tier after another, and then those in full precision; S is how many there are.

    Args:
        queries: `[B, Hq, 1, D]`, float32, float16 or bfloat16.
        tiers: packed rows of 2, 3, 4 or 8 bits, with any parameters that `PackedRows` has, or `RotatedRows` of sizes
            of keys and values that 8 divides.
        keys, values: the rows in full precision, `[B, Hkv, rows, D]` and `[B, Hkv, rows, Dv]`, of the dtype of the
            queries; there may be none.
        empty: `[B, Hkv, S]`: bool, True where a slot is empty; or integers, below zero there, as positions are.
        lengths: int32 `[tiers + 1, B, Hkv]`: rows that each head has in each tier, and in full precision at last. The
            slots behind are not read.
        scores: None; "probabilities" for `[B, Hkv, G, S]` float32; "mean" or "max" for these reduced over the query
            heads of a KV head, `[B, Hkv, S]` float32. Slots that are not seen have 0.

    Raises PolicyError for other scores.
    """
    batch, kv_heads, loose, _ = keys.shape
    pairs, group, value_dim = batch * kv_heads, queries.shape[1] // kv_heads, values.shape[3]
    queries, keys, values = with_dense_rows(queries), with_dense_rows(keys), with_dense_rows(values)
    segments: list[Segment] = []
    for tier in tiers:
        segments.append(Segment.of(len(tier), pairs, _block_rows(tier), *segments[-1:]))
    segments.append(Segment.of(loose, pairs, block_rows(keys, values), *segments[-1:]))
    splits, slots = segments[-1].last_split, segments[-1].last_slot
    partials = Partials.empty(pairs, group, splits, value_dim, slots, keys.device, scores)
    of_heads = [None] * len(segments) if lengths is None else list(lengths.contiguous())
    turned: dict[int, tuple[Turned, list[Segment]]] = {}
    for tier, segment, own in zip(tiers, segments, of_heads, strict=False):
        if isinstance(tier, RotatedRows):
            if id(tier.basis) not in turned:
                turned[id(tier.basis)] = Turned(queries, tier.basis, kv_heads), []
            asking, answered = turned[id(tier.basis)]
            answered.append(segment)
            attend_rotated(asking, queries.dtype, tier, scoring, partials, segment, empty, own)
        else:
            _attend_tier(queries, tier, scoring, partials, segment, empty, own)
    for asking, answered in turned.values():
        asking.back(partials, answered)
    attend_segment(queries, keys, values, scoring, partials, segments[-1], empty=empty, lengths=of_heads[-1])
    return combine(partials, kv_heads, queries.dtype, scoring.sinks, scores)
