"""`attention_maxima` on a GPU: the most that any query of a head gives to a key, without writing a probability.

Behind the log-sum-exp of the rows, the logarithm of what a row gives is its logit less a number of that row. So the
kernel takes a maximum of logits, and one exponential of every key.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.kernels.gpu.arguments import STRIDES, position_strides
from kvprune.kernels.gpu.mass import MASS_TILES, log2_logits, log_sum_exp
from kvprune.kernels.gpu.tiles import ceil_div, key_order, load_rows, padded, with_dense_rows

# These change from chunk to chunk: see mass.py.
_CHANGING = (
    "queries_length keys_length query_positions_batch_stride key_positions_batch_stride key_positions_head_stride"
).split()


@triton.jit(do_not_specialize=_CHANGING)
def _maxima_kernel(
    queries, keys, shift, best, query_positions, key_positions,
    queries_length, keys_length, kv_heads, scale,
    queries_batch_stride, queries_head_stride, queries_stride, keys_batch_stride, keys_head_stride, keys_stride,
    query_positions_batch_stride, query_positions_stride,
    key_positions_batch_stride, key_positions_head_stride, key_positions_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The maximum of a block of keys over the queries of one head. shift: `[B, Hq, L]`, in base 2."""
    pair, member = tl.program_id(1), tl.program_id(2)
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    head = kv_head * GROUP + member
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_positions += batch * key_positions_batch_stride + kv_head * key_positions_head_stride
    order = key_order(slots, keys_length, key_positions, key_positions_stride)
    keys += batch * keys_batch_stride + kv_head * keys_head_stride
    tile = tl.trans(load_rows(keys, slots, slots < keys_length, keys_stride, DIM, BLOCK_D))
    queries += batch * queries_batch_stride + head * queries_head_stride
    query_positions += batch * query_positions_batch_stride
    row = pair.to(tl.int64) * GROUP + member

    own = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    for first in range(0, queries_length, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        valid = rows < queries_length
        positions = tl.load(query_positions + rows.to(tl.int64) * query_positions_stride, mask=valid, other=-1)
        states = load_rows(queries, rows, valid, queries_stride, DIM, BLOCK_D)
        of_rows = tl.load(shift + row * queries_length + rows, mask=valid, other=float("inf"))
        logits = log2_logits(states, tile, scale, None, None, 0.0, 1.0, SOFTCAP, False) - of_rows[:, None]
        own = tl.maximum(own, tl.where(order[None, :] <= positions[:, None], logits, float("-inf")))
    tl.store(best + row * keys_length + slots, tl.exp2(tl.max(own, 0)), mask=slots < keys_length)


def attention_maxima(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    scoring: Scoring,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    lse: Tensor | None = None,
) -> Tensor:
    """The largest of `w[q] * P[b, g, q, k]` over queries, `[B, Hkv, G, S]` float32; 0 where no query sees a key.

    Args:
        queries: `[B, Hq, L, D]`. keys: `[B, Hkv, S, D]`, of the same dtype: float32, float16 or bfloat16.
        weights: w, `[B or 1, L]` float32, at least 0.
        query_positions: `[B or 1, L]`, -1 for padding. key_positions: `[B or 1, Hkv or 1, S]`, -1 for empty.
        lse: log-sum-exp of every query over all keys, sinks included, `[B, Hq, L]`, where the caller has it.
    """
    batch, query_heads, length, dim = queries.shape
    kv_heads, keys_length = keys.shape[1:3]
    queries, keys = with_dense_rows(queries), with_dense_rows(keys)
    best = torch.empty(batch, kv_heads, query_heads // kv_heads, keys_length, dtype=torch.float32, device=keys.device)
    if length == 0 or keys_length == 0:
        return best.zero_()
    if lse is None:
        lse = log_sum_exp(queries, keys, scoring, query_positions, key_positions)
    shift = lse.float() * math.log2(math.e) - weights.log2()[:, None]
    shift = shift.masked_fill(shift == -math.inf, math.inf).contiguous()  # of a row that sees nothing
    tiles = MASS_TILES[False].of(length, dim, keys.itemsize)
    _maxima_kernel[ceil_div(keys_length, tiles["BLOCK_N"]), batch * kv_heads, query_heads // kv_heads](
        queries, keys, shift, best, query_positions, key_positions,
        **position_strides(query_positions, key_positions, batch, kv_heads),
        queries_length=length, keys_length=keys_length, kv_heads=kv_heads, scale=scoring.scale,
        **{f"queries_{name}": stride for name, stride in zip(STRIDES, queries.stride(), strict=False)},
        **{f"keys_{name}": stride for name, stride in zip(STRIDES, keys.stride(), strict=False)},
        GROUP=query_heads // kv_heads, DIM=dim, SOFTCAP=scoring.softcap, BLOCK_D=padded(dim), **tiles,
    )  # fmt: skip
    return best
