"""What the kernels of attention mass are launched with, of queries, keys, weights, noise and positions."""

import math
from typing import Any

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights, Scoring
from kvprune.kernels.gpu.noise import layer_word
from kvprune.kernels.gpu.tiles import padded

STRIDES = ("batch_stride", "head_stride", "stride")
_LOG2_ZERO = -1e4  # finite, so that 0 times it is 0, and a decay of 0 to the power of 0 is 1


def common_arguments(
    queries: Tensor,
    keys: Tensor,
    row_weights: RowWeights,
    scoring: Scoring,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    in_order: bool,
) -> dict[str, Any]:
    """Arguments that both kernels take."""
    batch, query_heads, length, dim = queries.shape
    kv_heads = keys.shape[1]
    count = min(row_weights.last, length) if row_weights.rows is None else row_weights.rows.shape[-1]
    return {
        **_weights(row_weights, batch, queries.device),
        **_noise(row_weights, queries.device),
        **_positions(query_positions, key_positions, batch, kv_heads),
        "count": count, "queries_length": length, "keys_length": keys.shape[2], "kv_heads": kv_heads,
        "scale": scoring.scale, "SOFTCAP": scoring.softcap, "IN_ORDER": in_order or key_positions is None,
        "GROUP": query_heads // kv_heads, "DIM": dim, "BLOCK_D": padded(dim),
        **{f"queries_{name}": stride for name, stride in zip(STRIDES, queries.stride(), strict=False)},
        **{f"keys_{name}": stride for name, stride in zip(STRIDES, keys.stride(), strict=False)},
    }  # fmt: skip


def _weights(row_weights: RowWeights, batch: int, device: torch.device) -> dict[str, Any]:
    """Rows that are weighed: so many of the last, by exponent, or those that are named."""
    decay = row_weights.decay
    log2_decay = math.log2(decay) if decay > 0 else _LOG2_ZERO
    if row_weights.rows is None:
        return {"chosen": None, "weights": None, "chosen_stride": 0, "log2_decay": log2_decay}
    rows = row_weights.rows.to(device).contiguous()
    weights = row_weights.weights.to(device).contiguous()  # type: ignore[union-attr]
    stride = rows.shape[-1] if rows.ndim == 2 and rows.shape[0] == batch else 0
    return {"chosen": rows, "weights": weights, "chosen_stride": stride, "log2_decay": log2_decay}


def _noise(row_weights: RowWeights, device: torch.device) -> dict[str, Any]:
    noise = row_weights.noise
    if noise is None:
        return {"NOISY": False, "layer_word": 0, "noise_scale": 0.0, "temperature": 1.0, "temperatures": None}
    per_row = isinstance(noise.temperature, Tensor)
    return {
        "NOISY": True,
        "layer_word": layer_word(noise),
        "noise_scale": float(noise.scale),
        "temperature": 1.0 if per_row else float(noise.temperature),
        "temperatures": noise.temperature.to(device).contiguous() if per_row else None,  # type: ignore[union-attr]
    }


def _positions(queries: Tensor | None, keys: Tensor | None, batch: int, kv_heads: int) -> dict[str, Any]:
    if queries is None or keys is None:
        return {"query_positions": None, "key_positions": None, **dict.fromkeys(_POSITION_STRIDES, 0)}
    return {"query_positions": queries, "key_positions": keys, **position_strides(queries, keys, batch, kv_heads)}


_POSITION_STRIDES = (
    "query_positions_batch_stride",
    "query_positions_stride",
    *(f"key_positions_{name}" for name in STRIDES),
)


def position_strides(queries: Tensor, keys: Tensor, batch: int, kv_heads: int) -> dict[str, int]:
    """Those of positions `[B or 1, L]` and `[B or 1, Hkv or 1, S]`; 0 for what all have in common."""
    strides = queries.expand(batch, -1).stride() + keys.expand(batch, kv_heads, -1).stride()
    return dict(zip(_POSITION_STRIDES, strides, strict=True))
