"""Rows of the tensors of a table, `[B, Hkv, rows]` or `[B, Hkv, rows, D]`, each head having an index of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvprune.errors import PolicyError

EMPTY = -1
"""The position of a slot that holds no row, and the slot of a row that is not there."""


def owned(tensor: Tensor) -> Tensor:
    """The tensor in storage of its own and no larger: a view would keep, say, a fused QKV projection alive."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """The rows of an index, LongTensor `[B, Hkv, R]`, in its order and in storage of their own."""
    if tensor.ndim == 3:
        return tensor.gather(2, index)
    batch, heads, rows, dim = tensor.shape
    strides = tensor.stride()
    if not rows or strides[3] != 1 or any(stride % dim for stride in strides):
        sequences = torch.arange(batch, device=index.device)[:, None, None]
        return tensor[sequences, torch.arange(heads, device=index.device)[:, None], index]
    # The rows of one long matrix, wherever the model has left them, are several times faster to copy on a CPU than what
    # three indices, or a gather, name.
    of_sequence, of_head, of_row = (stride // dim for stride in strides[:3])
    last = (batch - 1) * of_sequence + (heads - 1) * of_head + (rows - 1) * of_row
    first = torch.arange(batch, device=index.device)[:, None, None] * of_sequence
    first = first + torch.arange(heads, device=index.device)[:, None] * of_head
    matrix = tensor.as_strided((last + 1, dim), (dim, 1))
    return matrix.index_select(0, (index * of_row + first).flatten()).view(*index.shape, dim)


def ranked(scores: Tensor, positions: Tensor) -> Tensor:
    """An int64 for every row that orders rows by score, ties by recency, exactly.

    The bits of a float32 read as an integer order like the float (negative ones after flipping), so score and position
    pack into one integer. NaN ranks below every number. scores, positions: `[B, Hkv, rows]`, positions int32.
    """
    scores = torch.nan_to_num(scores.float(), nan=-math.inf, posinf=math.inf, neginf=-math.inf).add_(0.0)  # no -0.0
    bits = scores.view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return torch.add(positions, bits.to(torch.int64), alpha=1 << 32)


def top_rows(ranks: Tensor, count: int | Tensor) -> Tensor:
    """Which rows are the `count` of highest rank, bool `[B, Hkv, rows]`; count may be a LongTensor `[B, Hkv or 1, 1]`.

    ranks: int64 `[B, Hkv, rows]`, different within a head, but for those of rows that are not to be chosen.
    """
    if isinstance(count, int):
        best = ranks.topk(count, dim=-1, sorted=False).indices
        return torch.zeros_like(ranks, dtype=torch.bool).scatter_(2, best, True)
    descending = ranks.sort(dim=-1, descending=True).values
    least = descending.gather(2, (count - 1).clamp(min=0).expand(*ranks.shape[:2], 1))
    return (ranks >= least) & (count > 0)


def true_rows(chosen: Tensor, first: int = 0) -> Tensor:
    """Indices of True, counted from `first`, ascending; -1 behind them where a head has fewer than another.

    chosen: bool `[B, Hkv, rows]`. Returns a LongTensor `[B, Hkv, most of any head]`.
    """
    rank = chosen.cumsum(-1)
    most = int(rank[:, :, -1].max()) if chosen.shape[2] else 0
    place = torch.where(chosen, rank - 1, most)  # the last place is for all that are not chosen
    index = torch.arange(first, first + chosen.shape[2], device=chosen.device).expand_as(place)
    return index.new_full((*chosen.shape[:2], most + 1), EMPTY).scatter_(2, place, index)[:, :, :most]


def those(slots: Tensor, chosen: Tensor) -> Tensor:
    """Of slots `[B, Hkv, R]` those that are chosen, bool of that shape, in their order, -1 behind them."""
    index = true_rows(chosen)
    return slots.gather(2, index.clamp(min=0)).masked_fill(index < 0, EMPTY)


def picked(counts: tuple[int, ...], rows: Tensor) -> tuple[int, ...]:
    """Of counts of sequences those of these rows; does not wait for the device where all are equal."""
    if len(set(counts)) == 1:
        return counts[:1] * len(rows)
    return tuple(counts[row] for row in rows.tolist())


def in_order(slots: Tensor, positions: Tensor, first: int = 0) -> Tensor:
    """Slots `[B, Hkv, R]` in the order of their positions, -1 last, all of them moved up by `first`.

    positions: of the rows that the slots count, `[B, Hkv, rows]`.
    """
    last = torch.iinfo(torch.int32).max
    order = positions.gather(2, slots.clamp(min=0)).masked_fill(slots < 0, last).argsort(dim=-1)
    slots = slots.gather(2, order)
    return torch.where(slots < 0, slots, slots + first)


def write(column: str, rows: Tensor, content: Any) -> None:
    """Write a column of this name, `[B, Hkv, rows]`, in place. Raises PolicyError for what does not fit."""
    try:
        rows.copy_(content)
    except (RuntimeError, TypeError) as error:
        given = list(content.shape) if isinstance(content, Tensor) else type(content).__name__
        raise PolicyError(
            f"the column {column!r} takes a tensor [batch, KV heads, rows], here {list(rows.shape)}, or what "
            f"broadcasts to it, and was given {given} ({error})."
        ) from None
