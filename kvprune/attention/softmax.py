"""Outputs of attention over dense rows: those of the model's own softmax attention, exact.

Queries `[B, Hq, L, D]`, keys `[B, Hkv, S, D]`, values `[B, Hkv, S, Dv]`, outputs `[B, Hq, L, Dv]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.attention.backends import SDPA, Sdpa, fused_attention
from kvprune.attention.mass import Scoring, grouped, hidden_keys, row_blocks, row_probabilities


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, backend: Sdpa = SDPA
) -> tuple[Tensor, Tensor | None]:
    """The queries are the newest `L` of the `S` keys, in order; query `i` sees keys `0 .. S - L + i`.

    Returns the output and, where the backend tells it, the log-sum-exp of every query's logits `[B, Hq, L]`.
    """
    rows, length = queries.shape[2], keys.shape[2]
    if scoring.plain and backend.takes(queries, keys, values):
        return backend.causal(queries, keys, values, scoring.scale)
    output = queries.new_empty(*queries.shape[:3], values.shape[3])
    for block in row_blocks(rows, queries.shape[0] * queries.shape[1] * length, queries.device):
        seen = length - rows + block.stop
        size = block.stop - block.start
        visible = torch.ones(size, seen, dtype=torch.bool, device=queries.device).tril_(seen - size)
        output[:, :, block] = _block(
            queries[:, :, block], keys[:, :, :seen], values[:, :, :seen], scoring, visible[None, None]
        )
    return output, None


def positional_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: Scoring,
    query_positions: Tensor,
    key_positions: Tensor,
) -> Tensor:
    """A query sees the keys at its position or before; keys at position -1 are empty, queries at -1 are padding.

    query_positions: `[B or 1, L]`. key_positions: `[B, Hkv, S]`. The output of a query that sees nothing is zero, as in
    scaled_dot_product_attention (torch 2.5 and later).
    """
    group = queries.shape[1] // keys.shape[1]
    output = queries.new_empty(*queries.shape[:3], values.shape[3])
    for block in row_blocks(queries.shape[2], queries.shape[0] * queries.shape[1] * keys.shape[2], queries.device):
        visible = ~hidden_keys(query_positions[:, block], key_positions).squeeze(2)
        blind = ~visible.any(-1, keepdim=True)
        visible |= blind
        visible, blind = (tensor.repeat_interleave(group, dim=1) for tensor in (visible, blind))
        output[:, :, block] = _block(queries[:, :, block], keys, values, scoring, visible).masked_fill(blind, 0.0)
    return output


def _block(queries: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, visible: Tensor) -> Tensor:
    if scoring.plain:
        return fused_attention(queries, keys, values, scoring.scale, visible)
    kv_heads = keys.shape[1]
    hidden = ~visible.unflatten(1, (kv_heads, -1) if visible.shape[1] > 1 else (1, 1))
    return _weighted_values(row_probabilities(queries, keys, scoring, hidden), values)


def _weighted_values(probabilities: Tensor, values: Tensor) -> Tensor:
    """`[B, Hkv, G, L, S] x [B, Hkv, S, Dv] -> [B, Hq, L, Dv]`."""
    batch, kv_heads, group, rows, length = probabilities.shape
    flat = probabilities.to(values.dtype).view(batch * kv_heads, group * rows, length)
    output = torch.bmm(flat, values.reshape(batch * kv_heads, length, -1))
    return output.view(batch, kv_heads * group, rows, -1)


def single_query_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: Scoring,
    empty: Tensor | None,
    with_probabilities: bool,
) -> tuple[Tensor, Tensor | None]:
    """One query per sequence that sees every row but the empty ones.

    empty: bool `[B, Hkv, S]`, None if no slot is empty. Returns the output `[B, Hq, 1, Dv]` and, where they were asked
    for, the probabilities `[B, Hkv, G, S]` float32.
    """
    output = None
    if scoring.plain and (not with_probabilities or queries.dtype != torch.float32):
        # The queries of a group become rows of their KV head: no key is repeated, and one mask serves them all.
        folded = grouped(queries, keys.shape[1]).unflatten(0, keys.shape[:2])
        visible = None if empty is None else ~empty[:, :, None]
        output = fused_attention(folded, keys, values, scoring.scale, visible).flatten(1, 2).unsqueeze(2)
        if not with_probabilities:
            return output, None
    hidden = None if empty is None else empty[:, :, None, None]
    probabilities = row_probabilities(queries, keys, scoring, hidden)
    if output is None:
        output = _weighted_values(probabilities, values)
    return output, probabilities.squeeze(3)
