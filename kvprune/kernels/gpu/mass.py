"""`attention_mass` on a GPU: the sum over weighed rows of attention probabilities, without writing any of them.

The twin of `kvprune.attention_mass`, in two kernels. The first finds the log-sum-exp of every weighed row, as
flash attention does; where that is known already, it is left out. With it, a probability is a function of one logit. So
in the second kernel a program owns a block of keys, loops over rows and query heads, and adds up columns in registers:
every number is written once, by one program, in a fixed order.

Noise (`RowWeights.noise`) is made in registers in both kernels.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvprune.attention.mass import GROUPS, RowWeights, Scoring
from kvprune.errors import PolicyError
from kvprune.kernels.gpu.arguments import STRIDES, common_arguments
from kvprune.kernels.gpu.noise import column_words, log2_exponential, row_words, shifted
from kvprune.kernels.gpu.tiles import (
    ceil_div,
    key_order,
    load_rows,
    matmul,
    padded,
    scored,
    tile_rows,
    with_dense_rows,
)


@dataclass(frozen=True)
class _Tiles:
    """rows and keys of a tile, where they have 128 numbers of 16 bits; fewer where they are wider.

    warps: of a program whose tile is not cut down. stages: loads that are under way.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    def of(self, count: int, dim: int, itemsize: int) -> dict[str, int]:
        """Sizes and options of a launch over so many rows."""
        rows, keys = (tile_rows(dim, itemsize, each * _ROW_BYTES, each) for each in (self.rows, self.keys))
        rows = min(rows, padded(count))
        warps = self.warps if rows * keys >= self.rows * self.keys else 4
        return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": self.stages}


_ROW_BYTES = 256
# With noise and without. 99 KiB of shared memory, which is what small GPUs have, and registers are enough for these.
_LSE_TILES = {False: _Tiles(128, 64, 8, 2), True: _Tiles(64, 32, 4, 3)}
MASS_TILES = {False: _Tiles(64, 128, 8, 2), True: _Tiles(64, 64, 4, 2)}
# Few rows over many keys: the keys are split until there are about four programs for each multiprocessor of a large
# GPU. A constant, not the number of multiprocessors, so that a sum is rounded alike on every GPU.
_PROGRAMS = 512
_LEAST_STRETCH = 512
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _weighed(
    rows, batch, count, queries_length, keys_length, log2_decay,
    chosen, weights, chosen_stride, positions, positions_batch_stride, positions_stride, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Of weighed rows the index in the step, what they see, position and weight.

    They see the keys whose order (`key_order`) is at most this number. -1: sees nothing and counts nothing.
    """
    valid = rows < count
    if chosen is None:
        indices = queries_length - count + rows
        ages = tl.maximum(count - 1 - rows, 0)
        row_weights = tl.exp2(ages.to(tl.float32) * log2_decay)
    else:
        indices = tl.load(chosen + batch * chosen_stride + rows, mask=valid, other=0).to(tl.int32)
        row_weights = tl.load(weights + batch * chosen_stride + rows, mask=valid, other=0.0)
    seen = keys_length - queries_length + indices
    if positions is None:
        own = seen
    else:
        offsets = batch * positions_batch_stride + indices.to(tl.int64) * positions_stride
        own = tl.load(positions + offsets, mask=valid, other=-1).to(tl.int32)
        if not IN_ORDER:
            seen = own
    row_weights = tl.where(valid & (seen >= 0) & (own >= 0), row_weights, 0.0)
    return indices, tl.where(row_weights != 0, seen, -1), own, row_weights


@triton.jit
def log2_logits(
    states, tile, scale, rows, columns, noise_scale, cooling, SOFTCAP: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """Logits `[M, N]` in base 2: `Gumbel.perturb` of those of queries and keys, with hashes of rows and columns."""
    if SOFTCAP is None:
        logits = matmul(states, tile) * (scale * _LOG2_E)
    else:
        logits = scored(states, tile, scale, SOFTCAP) * _LOG2_E
    if NOISY:
        logits = (logits - noise_scale * log2_exponential(rows[:, None], columns[None, :])) * cooling
    return logits


@triton.jit
def _columns(slots, order, length, positions, stride, IN_ORDER: tl.constexpr):
    """Hashes of keys, and so of their positions."""
    if IN_ORDER and (positions is not None):
        order = tl.load(positions + slots.to(tl.int64) * stride, mask=slots < length, other=-1).to(tl.int32)
    return shifted(column_words(order))


@triton.jit
def _cooling(temperatures, temperature, indices, valid):
    """One over the temperature of each row, or of all."""
    if temperatures is None:
        cooling = 1.0 / temperature
    else:
        cooling = 1.0 / tl.load(temperatures + indices, mask=valid, other=1.0)[:, None]
    return cooling


# These change from step to step: a kernel compiled for a multiple of 16 would be compiled again at the next.
_CHANGING = (
    "count queries_length keys_length layer_word stretch chosen_stride lse_batch_stride lse_head_stride "
    "query_positions_batch_stride key_positions_batch_stride key_positions_head_stride"
).split()


@triton.jit(do_not_specialize=_CHANGING)
def _lse_kernel(
    queries, keys, partial,
    chosen, weights, query_positions, key_positions, temperatures,
    count, queries_length, keys_length, kv_heads, stretch, scale, log2_decay, layer_word, noise_scale, temperature,
    queries_batch_stride, queries_head_stride, queries_stride, keys_batch_stride, keys_head_stride, keys_stride,
    chosen_stride, query_positions_batch_stride, query_positions_stride,
    key_positions_batch_stride, key_positions_head_stride, key_positions_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, SOFTCAP: tl.constexpr, NOISY: tl.constexpr, IN_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a tile of rows over a stretch of keys, `[splits, B, Hq, R]`.

    The query heads of a KV head are rows of one tile, so that a key is read once for all of them.
    """
    split, pair = tl.program_id(1), tl.program_id(2)
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    members = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, heads = members // GROUP, (pair % kv_heads) * GROUP + members % GROUP
    indices, seen, positions, _ = _weighed(
        rows, batch, count, queries_length, keys_length, log2_decay, chosen, weights, chosen_stride,
        query_positions, query_positions_batch_stride, query_positions_stride, IN_ORDER,
    )  # fmt: skip
    states = load_rows(
        queries + batch * queries_batch_stride + heads.to(tl.int64)[:, None] * queries_head_stride,
        indices, rows < count, queries_stride, DIM, BLOCK_D,
    )  # fmt: skip
    keys += batch * keys_batch_stride + kv_head * keys_head_stride
    if key_positions is not None:
        key_positions += batch * key_positions_batch_stride + kv_head * key_positions_head_stride
    row_hashes, cooling = None, None
    if NOISY:
        row_hashes = shifted(row_words(layer_word, heads, positions))
        cooling = _cooling(temperatures, temperature, indices, rows < count)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum(split * stretch + stretch, keys_length)
    if IN_ORDER:  # none after the newest row is seen
        end = tl.minimum(end, tl.max(seen) + 1)
    for first in range(split * stretch, end, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        order = key_order(slots, keys_length, None if IN_ORDER else key_positions, key_positions_stride)
        tile = load_rows(keys, slots, slots < keys_length, keys_stride, DIM, BLOCK_D)
        columns = _columns(slots, order, keys_length, key_positions, key_positions_stride, IN_ORDER) if NOISY else None
        logits = log2_logits(states, tl.trans(tile), scale, row_hashes, columns, noise_scale, cooling, SOFTCAP, NOISY)
        logits = tl.where(order[None, :] <= seen[:, None], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        largest = larger
    target = partial + (split.to(tl.int64) * tl.num_programs(2) + pair) * GROUP * count
    # Of a row that sees anything, the total is at least 1: of one that does not, -inf stays.
    lse = (largest + tl.log2(tl.maximum(total, 1e-30))) / _LOG2_E
    tl.store(target + (members % GROUP) * count + rows, lse, mask=rows < count)


@triton.jit(do_not_specialize=_CHANGING)
def _mass_kernel(
    queries, keys, lse, mass,
    chosen, weights, query_positions, key_positions, temperatures,
    count, queries_length, keys_length, kv_heads, scale, log2_decay, layer_word, noise_scale, temperature,
    queries_batch_stride, queries_head_stride, queries_stride, keys_batch_stride, keys_head_stride, keys_stride,
    chosen_stride, query_positions_batch_stride, query_positions_stride,
    key_positions_batch_stride, key_positions_head_stride, key_positions_stride,
    lse_batch_stride, lse_head_stride, lse_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, SOFTCAP: tl.constexpr, NOISY: tl.constexpr, IN_ORDER: tl.constexpr,
    LARGEST_HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mass of a block of keys of one KV head."""
    pair = tl.program_id(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if key_positions is not None:
        key_positions += batch * key_positions_batch_stride + kv_head * key_positions_head_stride
    order = key_order(slots, keys_length, None if IN_ORDER else key_positions, key_positions_stride)
    oldest = tl.min(order)
    columns = _columns(slots, order, keys_length, key_positions, key_positions_stride, IN_ORDER) if NOISY else None
    keys += batch * keys_batch_stride + kv_head * keys_head_stride
    tile = tl.trans(load_rows(keys, slots, slots < keys_length, keys_stride, DIM, BLOCK_D))
    queries += batch * queries_batch_stride + kv_head * GROUP * queries_head_stride
    lse += batch * lse_batch_stride + kv_head * GROUP * lse_head_stride

    ALL_ROWS: tl.constexpr = IN_ORDER and (chosen is None)
    first_row = 0
    if ALL_ROWS:  # no row before the block sees it
        first_row = tl.maximum(tl.program_id(0) * BLOCK_N - keys_length + count, 0) // BLOCK_M * BLOCK_M
    # The heads are what the outer loop goes over, so that loads of the inner one are under way early; but a maximum
    # over heads needs them side by side.
    OUTER: tl.constexpr = 1 if LARGEST_HEAD else GROUP
    INNER: tl.constexpr = GROUP if LARGEST_HEAD else 1
    own = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for outer in range(OUTER):
        for first in range(first_row, count, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            indices, seen, positions, row_weights = _weighed(
                rows, batch, count, queries_length, keys_length, log2_decay, chosen, weights, chosen_stride,
                query_positions, query_positions_batch_stride, query_positions_stride, IN_ORDER,
            )  # fmt: skip
            if ALL_ROWS or (tl.max(seen) >= oldest):
                visible = order[None, :] <= seen[:, None]
                cooling = _cooling(temperatures, temperature, indices, rows < count) if NOISY else None
                together = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for inner in range(INNER):
                    member = outer + inner
                    states = load_rows(
                        queries + member * queries_head_stride, indices, rows < count, queries_stride, DIM, BLOCK_D
                    )
                    row_hashes = None
                    if NOISY:
                        row_hashes = shifted(row_words(layer_word, kv_head.to(tl.int32) * GROUP + member, positions))
                    logits = log2_logits(states, tile, scale, row_hashes, columns, noise_scale, cooling, SOFTCAP, NOISY)
                    of_rows = tl.load(lse + member * lse_head_stride + rows * lse_stride, mask=rows < count, other=0.0)
                    logits -= of_rows[:, None] * _LOG2_E
                    probabilities = tl.exp2(tl.where(visible, logits, float("-inf")))
                    together = tl.maximum(together, probabilities) if LARGEST_HEAD else probabilities
                own += together * row_weights[:, None]
    total = tl.sum(own, 0)
    if not LARGEST_HEAD:
        total /= GROUP
    tl.store(mass + pair.to(tl.int64) * keys_length + slots, total, mask=slots < keys_length)


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    row_weights: RowWeights,
    scoring: Scoring,
    *,
    group: str = "mean",
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    in_order: bool = False,
    lse: Tensor | None = None,
) -> Tensor:
    """Weighted attention mass of every key, `[B, Hkv, S]` float32: what `kvprune.attention_mass` returns.

    Args:
        queries: `[B, Hq, L, D]`. keys: `[B, Hkv, S, D]`, of the same dtype: float32, float16 or bfloat16.
        row_weights, scoring, group, query_positions, key_positions, in_order: as there. Rows of weight zero, and rows
            that cannot see a block of keys, are not computed for it.
        lse: log-sum-exp of the weighed rows, `[B, Hq, R]` float32, where the caller has it: R is the number of
            weighed rows, in their order, and the sum includes attention sinks. With noise it is that of noisy logits.

    Raises PolicyError for a group that is neither "mean" nor "max".
    """
    if group not in GROUPS:
        raise PolicyError(f'group must be "mean" or "max", not {group!r}.')
    batch, _, length, dim = queries.shape
    kv_heads, keys_length = keys.shape[1:3]
    queries, keys = with_dense_rows(queries), with_dense_rows(keys)
    count = min(row_weights.last, length) if row_weights.rows is None else row_weights.rows.shape[-1]
    mass = torch.empty(batch, kv_heads, keys_length, dtype=torch.float32, device=keys.device)
    if count == 0 or keys_length == 0:
        return mass.zero_()
    if in_order and row_weights.noise is None:  # then positions would only repeat what the slots say
        query_positions = key_positions = None

    common = common_arguments(queries, keys, row_weights, scoring, query_positions, key_positions, in_order)
    if lse is None:
        lse = _lse(queries, keys, scoring, common)
    tiles = MASS_TILES[common["NOISY"]].of(count, dim, keys.itemsize)
    _mass_kernel[ceil_div(keys_length, tiles["BLOCK_N"]), batch * kv_heads](
        queries,
        keys,
        lse,
        mass,
        **common,
        **{f"lse_{name}": stride for name, stride in zip(STRIDES, lse.stride(), strict=True)},
        LARGEST_HEAD=group == "max",
        **tiles,
    )
    return mass


def log_sum_exp(
    queries: Tensor, keys: Tensor, scoring: Scoring, query_positions: Tensor, key_positions: Tensor
) -> Tensor:
    """Log-sum-exp of every query over the keys that it sees, sinks included, `[B, Hq, L]` float32; see above.

    queries, keys: numbers of a row lie side by side.
    """
    every = RowWeights.uniform(queries.shape[2])
    return _lse(
        queries, keys, scoring, common_arguments(queries, keys, every, scoring, query_positions, key_positions, False)
    )


def _lse(queries: Tensor, keys: Tensor, scoring: Scoring, common: dict[str, Any]) -> Tensor:
    """Log-sum-exp of the weighed rows, attention sinks included, `[B, Hq, R]` float32; -inf where nothing is seen."""
    batch, query_heads = queries.shape[:2]
    kv_heads, length, count = keys.shape[1], keys.shape[2], common["count"]
    members = count * query_heads // kv_heads
    tiles = _LSE_TILES[common["NOISY"]].of(members, queries.shape[3], keys.itemsize)
    programs = ceil_div(members, tiles["BLOCK_M"])
    splits = max(1, min(_PROGRAMS // (programs * batch * kv_heads), ceil_div(length, _LEAST_STRETCH)))
    stretch = ceil_div(ceil_div(length, splits), tiles["BLOCK_N"]) * tiles["BLOCK_N"]
    splits = ceil_div(length, stretch)
    partial = torch.empty(splits, batch, query_heads, count, dtype=torch.float32, device=keys.device)
    _lse_kernel[programs, splits, batch * kv_heads](queries, keys, partial, **common, stretch=stretch, **tiles)
    lse = partial[0] if splits == 1 else partial.logsumexp(0)
    return lse if scoring.sinks is None else torch.logaddexp(lse, scoring.sinks.float()[:, None])
