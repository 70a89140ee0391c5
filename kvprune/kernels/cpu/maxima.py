"""Attention and the most that any query gives to a key, by the loops of maxima.c."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.attention.mass import Scoring
from kvprune.kernels.cpu.arguments import KINDS, LANES, TILE, StridedRows, floats, needs_gradients, sinks_of


def in_one_pass(
    c: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None,
    weights: Tensor,
    scoring: Scoring,
    query_positions: Tensor,
    key_positions: Tensor,
) -> tuple[Tensor | None, Tensor] | None:
    """See `AttentionOperations.attention_maxima`. c: the compiled loops."""
    rows = [keys] if values is None else [keys, values]
    if c.attend_maxima is None or scoring.softcap is not None or needs_gradients(queries, *rows):
        return None
    if any(each.dtype not in KINDS or each.stride(3) != 1 for each in rows) or queries.dtype not in KINDS:
        return None
    if values is not None and values.shape[3] % LANES:
        return None
    (batch, kv_heads, length, dim), (query_heads, count) = keys.shape, queries.shape[1:3]
    heads, group, threads = batch * kv_heads, query_heads // kv_heads, torch.get_num_threads()
    value_dim = 0 if values is None else values.shape[3]
    padded = -(-length // TILE) * TILE
    output = None if values is None else floats(batch, query_heads, count, value_dim)
    best = floats(batch, kv_heads, group, padded)
    failed = c.attend_maxima(
        output, best, floats(heads * padded * dim), torch.empty(heads * padded // TILE, dtype=torch.int32),
        floats(threads * best.numel()), ctypes.byref(StridedRows.of(keys)),
        None if values is None else ctypes.byref(StridedRows.of(values)),
        (queries.float() * scoring.scale).contiguous(),
        F.pad(key_positions.int().expand(batch, kv_heads, length), (0, padded - length), value=-1).contiguous(),
        query_positions.int().expand(batch, count)[:, None].expand(-1, kv_heads, -1).contiguous(),
        weights.float().expand(batch, count)[:, None].expand(-1, kv_heads, -1).contiguous(),
        sinks_of(scoring, batch), heads, group, count, length, dim, value_dim, threads,
    )  # fmt: skip
    if failed:
        return None
    return None if output is None else output.to(queries.dtype), best[..., :length]
