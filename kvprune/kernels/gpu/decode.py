"""Attention of one query per sequence over a cache in full precision, with the row of probabilities it gives anyway.

The twin of `attention.softmax.single_query_attention`. All query heads of a KV head share a program, so every key and
value is read once.

A group has fewer heads than the 16 rows that tensor cores want. It is padded to 16 nevertheless: the step is bound by
memory, and even with most rows wasted, tensor cores need a twentieth of the time that the keys take to arrive.
Broadcast products on the other cores would need shuffles between threads for every logit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.kernels.gpu.splits import (
    CHANGING,
    Partials,
    Segment,
    combine,
    extent,
    folded,
    is_empty,
    store_logits,
    store_nothing,
    store_partial,
)
from kvprune.kernels.gpu.tiles import load_rows, matmul, padded, scored, tile_rows, with_dense_rows

# Keys and values of one tile are 16 KiB each: with two tiles on their way, a program takes 72 KiB of shared memory, so
# that three fit on a multiprocessor of a large GPU, and one on those that have 99 KiB.
_TILE_BYTES = 16 << 10


@triton.jit(do_not_specialize=CHANGING)
def _decode_kernel(
    queries, keys, values, marks, lengths, starts, outputs, maxima, sums, logits,
    length, stretch, first_split, splits, first_slot, kv_heads, scale, pair_stride, member_stride,
    queries_batch_stride, queries_head_stride, keys_batch_stride, keys_head_stride, keys_stride,
    values_batch_stride, values_head_stride, values_stride, marks_batch_stride, marks_head_stride, marks_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SOFTCAP: tl.constexpr, BELOW_ZERO: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One split of the rows of a pair, for all its query heads."""
    pair, split = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    members = tl.arange(0, BLOCK_G)
    first_row, own_length = extent(pair, length, lengths, starts)
    if starts is not None:
        length = own_length
    keys += batch * keys_batch_stride + kv_head * keys_head_stride + first_row * keys_stride
    values += batch * values_batch_stride + kv_head * values_head_stride + first_row * values_stride
    queries += batch * queries_batch_stride + kv_head * GROUP * queries_head_stride
    states = load_rows(queries, members, members < GROUP, queries_head_stride, DIM, BLOCK_D)
    if marks is not None:
        marks += batch * marks_batch_stride + kv_head * marks_head_stride + first_slot * marks_stride
    if logits is not None:
        logits += pair.to(tl.int64) * pair_stride + first_row + first_slot

    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)  # not added up over threads before the end
    output = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    begin = split * stretch
    end = tl.minimum(begin + stretch, own_length)
    for first in range(begin, end, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        valid = slots < end
        tile = load_rows(keys, slots, valid, keys_stride, DIM, BLOCK_D)
        seen = valid
        if marks is not None:
            seen = seen & (is_empty(marks, slots, valid, marks_stride, BELOW_ZERO) == 0)
        found = tl.where(seen[None, :], scored(states, tl.trans(tile), scale, SOFTCAP), float("-inf"))
        if logits is not None:
            store_logits(logits, found, members, slots, length, member_stride, GROUP)
        weights, shrink, largest = folded(found, largest)
        total = total * shrink[:, None] + weights
        tile = load_rows(values, slots, valid, values_stride, VALUE_DIM, BLOCK_DV)
        output = output * shrink[:, None] + matmul(weights.to(tile.dtype), tile)
    if logits is not None:
        attended = begin + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N) * BLOCK_N
        store_nothing(logits, attended, tl.minimum(begin + stretch, length), members, member_stride, GROUP, BLOCK_N)
    store_partial(
        outputs, maxima, sums, output, largest, tl.sum(total, 1), pair, first_split + split, splits, members,
        tl.arange(0, BLOCK_DV), GROUP, VALUE_DIM,
    )  # fmt: skip


def block_rows(keys: Tensor, values: Tensor) -> int:
    """Rows of a tile of keys or values."""
    return tile_rows(max(keys.shape[-1], values.shape[-1]), keys.itemsize, _TILE_BYTES, 64)


def marks_of(empty: Tensor | None) -> tuple[Tensor | None, tuple[int, ...], bool]:
    """What says which slots are empty, its strides, and whether it does so by numbers below zero."""
    if empty is None:
        return None, (0, 0, 0), False
    flags = empty.dtype == torch.bool
    return empty.view(torch.uint8) if flags else empty, empty.stride(), not flags


def attend_segment(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: Scoring,
    partials: Partials,
    segment: Segment,
    *,
    empty: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
) -> None:
    """Leave in `partials` what the splits of one segment come to.

    queries: `[B, Hq, 1, D]`. keys: `[B, Hkv, S, D]`, or, with `starts`, `[total, D]`. The others: see
    `decode_attention`.
    """
    pairs, group, splits, value_dim = partials.outputs.shape
    kv_heads = queries.shape[1] // group
    dim = queries.shape[3]
    if segment.splits == 0:
        return
    marks, marks_strides, below_zero = marks_of(empty)
    key_strides = (0, 0, keys.stride(0)) if starts is not None else keys.stride()[:3]
    value_strides = (0, 0, values.stride(0)) if starts is not None else values.stride()[:3]
    _decode_kernel[pairs, segment.splits](
        queries, keys, values, marks, lengths, starts, *vars(partials).values(),
        segment.length, segment.stretch, segment.first_split, splits, segment.first_slot, kv_heads, scoring.scale,
        partials.pair_stride, partials.member_stride,
        *queries.stride()[:2], *key_strides, *value_strides, *marks_strides,
        GROUP=group, DIM=dim, VALUE_DIM=value_dim, SOFTCAP=scoring.softcap, BELOW_ZERO=below_zero,
        BLOCK_G=padded(group), BLOCK_N=block_rows(keys, values),
        BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim),
        num_warps=4, num_stages=3,
    )  # fmt: skip


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: Scoring,
    *,
    empty: Tensor | None = None,
    lengths: Tensor | None = None,
    scores: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One query per sequence that sees every row but the empty ones: output `[B, Hq, 1, Dv]`, and scores.

    Args:
        queries: `[B, Hq, 1, D]`. keys: `[B, Hkv, S, D]`. values: `[B, Hkv, S, Dv]`. All of one dtype: float32,
            float16 or bfloat16.
        empty: `[B, Hkv, S]`: bool, True where a slot is empty; or integers, below zero there, as positions are.
        lengths: int32 `[B, Hkv]`: rows of each head, of which there may be fewer than S. The slots behind are not read.
        scores: None; "probabilities" for `[B, Hkv, G, S]` float32; "mean" or "max" for these reduced over the query
            heads of a KV head, `[B, Hkv, S]` float32. Slots that are not seen have 0.

    Raises PolicyError for other scores.
    """
    batch, kv_heads, slots, _ = keys.shape
    group, value_dim = queries.shape[1] // kv_heads, values.shape[3]
    queries, keys, values = with_dense_rows(queries), with_dense_rows(keys), with_dense_rows(values)
    segment = Segment.of(slots, batch * kv_heads, block_rows(keys, values))
    partials = Partials.empty(batch * kv_heads, group, segment.splits, value_dim, slots, keys.device, scores)
    lengths = None if lengths is None else lengths.contiguous()
    attend_segment(queries, keys, values, scoring, partials, segment, empty=empty, lengths=lengths)
    return combine(partials, kv_heads, queries.dtype, scoring.sinks, scores)


def varlen_decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: Scoring,
    starts: Tensor,
    longest: int,
    *,
    lengths: Tensor | None = None,
    scores: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same over heads whose rows lie one head after another, so that heads of any length need no padding.

    Args:
        queries: `[B, Hq, 1, D]`. keys: `[total, D]`. values: `[total, Dv]`.
        starts: int32 or int64 `[B * Hkv + 1]`; rows `starts[i] .. starts[i + 1] - 1` are those of sequence `i // Hkv`
            and KV head `i % Hkv`.
        lengths: int32 or int64 `[B * Hkv]`: rows of each head, where there is room for more; scores of the others mean
            nothing.
        longest: no head has more rows; a number, as the launch must not wait for the device.
        scores: None; "probabilities" for `[G, total]` float32; "mean" or "max" for `[total]` float32.

    Raises PolicyError for other scores.
    """
    pairs = starts.shape[0] - 1
    kv_heads = pairs // queries.shape[0]
    group, value_dim = queries.shape[1] // kv_heads, values.shape[1]
    queries, keys, values = with_dense_rows(queries), with_dense_rows(keys), with_dense_rows(values)
    segment = Segment.of(longest, pairs, block_rows(keys, values))
    partials = Partials.empty(pairs, group, segment.splits, value_dim, keys.shape[0], keys.device, scores, flat=True)
    attend_segment(queries, keys, values, scoring, partials, segment, starts=starts, lengths=lengths)
    return combine(partials, kv_heads, queries.dtype, scoring.sinks, scores, starts=starts, longest=longest)
