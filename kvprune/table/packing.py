"""The packed rows of a table, one `PackedRows` a codec: a tier. Their slots come first, tier by tier."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from kvprune.state import Saved
from kvprune.table.basis import Basis
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec
from kvprune.table.rotated_rows import RotatedCodec, RotatedRows
from kvprune.table.rows import true_rows
from kvprune.table.split_rows import SplitCodec, SplitRows


def keep(tiers: list[PackedRows], kept: Tensor) -> list[Tensor]:
    """Keep these packed rows as they are, bool `[B, Hkv, all of them]`, and free the others; changes `tiers`.

    Returns, tier by tier, in which slots its rows have been so far, LongTensors `[B, Hkv, R]`; -1 for rows that are
    nothing.
    """
    order, first = [], 0
    for tier in tiers:
        size = len(tier)
        slots = true_rows(kept[:, :, first : first + size], first)
        empty = slots < 0
        order.append(slots)
        # A row that is nothing may as well stay where it is: then, often, none has to move.
        where = torch.arange(slots.shape[2], device=slots.device).expand_as(slots)
        tier.keep(torch.where(empty, where, slots - first), empty)
        first += size
    tiers[:] = [tier for tier in tiers if len(tier)]
    return [slots for slots in order if slots.shape[2]]


def add_to(tiers: list[PackedRows], order: list[Tensor], parts: Sequence[tuple[Tensor, PackedRows]]) -> None:
    """Put new rows behind those of their codec's tier; changes `tiers`, and those in it, and `order`.

    order: what `keep` returns. parts: slots `[B, Hkv, R]` that the rows were in, and the rows.
    """
    for slots, rows in parts:
        number = next((number for number, other in enumerate(tiers) if other.codec == rows.codec), len(tiers))
        if number == len(tiers):
            tiers.append(rows)
            order.append(slots)
        else:
            tiers[number].append(rows)
            order[number] = torch.cat([order[number], slots], dim=2)


def turn(tiers: list[PackedRows], basis: Basis, *, widen: bool = False) -> None:
    """Let rows of codes know the basis of the table that they are in; changes them.

    widen: whether it is another one for sequences that have no rows among them yet, and may have other widths.
    """
    for tier in tiers:
        if isinstance(tier, RotatedRows):
            tier.basis = basis
            tier.tensors |= tier.widths() if widen else {}


def restored(
    saved: Saved, codecs: Sequence[Codec], heads: tuple[int, ...], key_dim: int, value_dim: int, basis: Basis
) -> PackedRows:
    """The rows of a tier's `state`. codecs: one of which it must be. heads: `(B, Hkv)`. Raises CacheError."""
    told = saved.fact("codec", dict)
    codec = next((codec for codec in codecs if asdict(codec) == told), None)
    if codec is None:
        raise saved.refused(f"is packed as {reprlib.repr(told)}, which the policy does not do")
    if isinstance(codec, RotatedCodec):
        return RotatedRows.restored_in(saved, codec, heads, key_dim, value_dim, basis)
    kind = SplitRows if isinstance(codec, SplitCodec) else PackedRows
    return kind.restored(saved, codec, heads, key_dim, value_dim)


def nbytes(tiers: list[PackedRows]) -> int:
    """Bytes of the storages behind codes and their parameters."""
    return sum(tensor.untyped_storage().nbytes() for tier in tiers for tensor in tier.tensors.values())
