"""Attention of one query per sequence over packed rows, decoded in registers, and over loose ones, in one softmax.

The twin of `attention.packed.single_query`. Codes are read from memory once, as bytes, and nothing they stand for is
written back: a program unpacks a tile, applies the parameters in float32, and rounds it to the dtype of the queries, as
a cache in full precision would hold it. Each tier and the loose rows have a launch of their own; `combine` makes one
softmax of all their splits.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.kernels.gpu.decode import attend_segment, block_rows, marks_of
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
from kvprune.kernels.gpu.tiles import load_rows, matmul, padded, scored, tile_rows, with_dense_rows
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import packed_bytes

# Decoded to float32, a tile of keys or values has to fit in the registers of a program. Parameters that are looked up
# row by row are as large as decoded rows, and have to fit in shared memory.
_TILE_BYTES = 32 << 10
_TILE_BYTES_WITH_BLOCKS = 16 << 10


@triton.jit
def _unpacked(bytes_, BITS: tl.constexpr):
    """Codes of 1, 2 or 4 bits, `[N, bytes] -> [N, codes]`, in the order of `quantize.pack`: lowest bits first."""
    codes = tl.interleave(bytes_ & 15, bytes_ >> 4)
    if BITS <= 2:
        codes = tl.interleave(codes & 3, codes >> 2)
    if BITS == 1:
        codes = tl.interleave(codes & 1, codes >> 1)
    return codes


@triton.jit
def _codes(codes, slots, valid, BITS: tl.constexpr, BYTES: tl.constexpr, LOW: tl.constexpr, BLOCK_D: tl.constexpr):
    """Codes of rows as float32 `[N, BLOCK_D]`. Rows have BYTES bytes, of which the first LOW hold two bits of three."""
    if BITS == 8:
        found = load_rows(codes, slots, valid, BYTES, BYTES, BLOCK_D)
    elif BITS == 3:
        low = load_rows(codes, slots, valid, BYTES, LOW, BLOCK_D // 4)
        high = load_rows(codes + LOW, slots, valid, BYTES, BYTES - LOW, BLOCK_D // 8)
        found = _unpacked(low, 2) | (_unpacked(high, 1) << 2)
    else:
        found = _unpacked(load_rows(codes, slots, valid, BYTES, BYTES, BLOCK_D * BITS // 8), BITS)
    return found.to(tl.float32)


@triton.jit
def _of_blocks(parameters, blocks, valid, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Parameters of channels in these blocks of rows, float32 `[N, BLOCK_D]`."""
    return load_rows(parameters, blocks, valid, DIM, DIM, BLOCK_D).to(tl.float32)


@triton.jit
def _of_rows(parameters, slots, valid, DIM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Parameters of rows, that so many channels share, float32 `[N, BLOCK_D]`, or `[N, 1]` where all do."""
    if CHANNELS >= DIM:
        found = tl.load(parameters + slots, mask=valid, other=0.0)[:, None]
    else:
        dims = tl.arange(0, BLOCK_D)
        offsets = slots.to(tl.int64)[:, None] * tl.cdiv(DIM, CHANNELS) + (dims // CHANNELS)[None, :]
        found = tl.load(parameters + offsets, mask=valid[:, None] & (dims < DIM)[None, :], other=0.0)
    return found.to(tl.float32)


@triton.jit(do_not_specialize=CHANGING)
def _packed_kernel(
    queries, key_codes, key_scale, key_zero_point, value_codes, value_scale, value_zero_point, channel_scale, block,
    marks, lengths, outputs, maxima, sums, logits,
    length, blocks, stretch, first_split, splits, first_slot, kv_heads, scale, pair_stride, member_stride,
    queries_batch_stride, queries_head_stride, marks_batch_stride, marks_head_stride, marks_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SOFTCAP: tl.constexpr, BELOW_ZERO: tl.constexpr,
    BITS: tl.constexpr, CHANNELS: tl.constexpr, KEY_BYTES: tl.constexpr, KEY_LOW: tl.constexpr,
    VALUE_BYTES: tl.constexpr, VALUE_LOW: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One split of the rows of a tier and pair, for all query heads of the pair."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    members = tl.arange(0, BLOCK_G)
    own_length = length if lengths is None else tl.minimum(tl.load(lengths + pair), length)
    queries += batch * queries_batch_stride + kv_head * GROUP * queries_head_stride
    states = load_rows(queries, members, members < GROUP, queries_head_stride, DIM, BLOCK_D)
    key_codes += pair * length * KEY_BYTES
    value_codes += pair * length * VALUE_BYTES
    value_scale += pair * length * tl.cdiv(VALUE_DIM, CHANNELS)
    value_zero_point += pair * length * tl.cdiv(VALUE_DIM, CHANNELS)
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

    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    output = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    begin = split * stretch
    end = tl.minimum(begin + stretch, own_length)
    for first in range(begin, end, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        valid = slots < end
        if block is None:  # one row of parameters, which broadcasts
            numbers, known = tl.zeros([1], tl.int32), tl.full([1], True, tl.int1)
        else:
            numbers, known = tl.load(block + slots, mask=valid, other=0).to(tl.int32), valid
        tile = _codes(key_codes, slots, valid, BITS, KEY_BYTES, KEY_LOW, BLOCK_D)
        tile *= _of_blocks(key_scale, numbers, known, DIM, BLOCK_D)
        tile += _of_blocks(key_zero_point, numbers, known, DIM, BLOCK_D)
        seen = valid
        if marks is not None:
            seen = seen & (is_empty(marks, slots, valid, marks_stride, BELOW_ZERO) == 0)
        found = scored(states, tl.trans(tile.to(states.dtype)), scale, SOFTCAP)
        found = tl.where(seen[None, :], found, float("-inf"))
        if logits is not None:
            store_logits(logits, found, members, slots, length, member_stride, GROUP)
        weights, shrink, largest, total = folded(found, largest, total)
        tile = _codes(value_codes, slots, valid, BITS, VALUE_BYTES, VALUE_LOW, BLOCK_DV)
        tile *= _of_rows(value_scale, slots, valid, VALUE_DIM, CHANNELS, BLOCK_DV)
        tile += _of_rows(value_zero_point, slots, valid, VALUE_DIM, CHANNELS, BLOCK_DV)
        if channel_scale is not None:
            tile *= _of_blocks(channel_scale, numbers, known, VALUE_DIM, BLOCK_DV)
        output = output * shrink[:, None] + matmul(weights.to(states.dtype), tile.to(states.dtype))
    if logits is not None:
        attended = begin + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N) * BLOCK_N
        store_nothing(logits, attended, tl.minimum(begin + stretch, length), members, member_stride, GROUP, BLOCK_N)
    store_partial(
        outputs, maxima, sums, output, largest, total, pair, first_split + split, splits, members,
        GROUP, VALUE_DIM, BLOCK_DV,
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
    marks, marks_strides, below_zero = marks_of(empty)
    _packed_kernel[pairs, segment.splits](
        queries, held["key_codes"], held["key_scale"], held["key_zero_point"],
        held["value_codes"], held["value_scale"], held["value_zero_point"], held.get("channel_scale"),
        held.get("block"), marks, lengths, *vars(partials).values(),
        segment.length, tier.blocks, segment.stretch, segment.first_split, splits, segment.first_slot,
        queries.shape[1] // group, scoring.scale, partials.pair_stride, partials.member_stride,
        *queries.stride()[:2], *marks_strides,
        GROUP=group, DIM=dim, VALUE_DIM=value_dim, SOFTCAP=scoring.softcap, BELOW_ZERO=below_zero,
        BITS=bits, CHANNELS=min(tier.codec.channels or value_dim, value_dim),
        KEY_BYTES=packed_bytes(dim, bits), KEY_LOW=packed_bytes(dim, 2),
        VALUE_BYTES=packed_bytes(value_dim, bits), VALUE_LOW=packed_bytes(value_dim, 2),
        BLOCK_G=padded(group), BLOCK_N=_block_rows(tier), BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim),
        num_warps=4, num_stages=2 if "block" in held else 3,
    )  # fmt: skip


def _block_rows(tier: PackedRows) -> int:
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
        tiers: packed rows of 2, 3, 4 or 8 bits, with any parameters that `PackedRows` has.
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
    for tier, segment, own in zip(tiers, segments, of_heads, strict=False):
        _attend_tier(queries, tier, scoring, partials, segment, empty, own)
    attend_segment(queries, keys, values, scoring, partials, segments[-1], empty=empty, lengths=of_heads[-1])
    return combine(partials, kv_heads, queries.dtype, scoring.sinks, scores)
