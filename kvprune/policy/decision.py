"""`Decision`: what a policy says of the rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.table.quantize import Codec
from kvprune.table.rows import EMPTY
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Decision:
    """Which rows stay, and at what precision. Give slots to `keep`, to `evict`, to `quantize`, or the first and last.

    keep: LongTensor `[B, Hkv, rows]`; -1 for an empty row, where a sequence keeps fewer than another. The table shrinks
        to exactly these rows and the rest of its memory is freed.
    evict: LongTensor `[B, Hkv, k]`: these rows are overwritten in place, and every head holds k slots less. Empty slots
        may be named too.
    exact: of slots to evict, that each holds a row, which need not be looked at again then.
    quantize: codecs, each with the slots to pack by it, LongTensor `[B, Hkv, rows]` in the order of their positions, -1
        for none. All other rows stay as they are, or go: beside slots to keep, those to quantize are among them. Rows
        that are packed already, those before slot `table.packed_length`, may lose bits, where their codec and the new
        one let rows share nothing (`RotatedCodec`); none gains any.
    apart: whether sequences and heads are stored one by one where they would take padding for each other; those that
        `keep` leaves other numbers of rows than other heads of their sequence are so in any case.
    """

    keep: Tensor | None = None
    evict: Tensor | None = None
    exact: bool = False
    quantize: tuple[tuple[Codec, Tensor], ...] | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        given = tuple(part is not None for part in (self.keep, self.evict, self.quantize))
        if sum(given) != 1 and given != (True, False, True):
            raise PolicyError(
                "a Decision takes one of: the slots to keep, the slots to evict, the slots to quantize; or those to "
                "keep and, among them, those to quantize."
            )
        for slots in self._slots():
            if not isinstance(slots, Tensor) or slots.dtype != torch.int64 or slots.ndim != 3:
                told = f"{slots.dtype} {list(slots.shape)}" if isinstance(slots, Tensor) else repr(slots)
                raise PolicyError(
                    f"slots are a LongTensor [batch, KV heads, rows], not {told}: of a mask, take "
                    "mask.int().topk(count).indices, or what `Eviction` makes of scores."
                )

    def _slots(self) -> tuple[Tensor, ...]:
        packed = () if self.quantize is None else tuple(slots for _, slots in self.quantize)
        return tuple(slots for slots in (self.keep, self.evict) if slots is not None) + packed

    def check(self, table: TokenTable) -> None:
        """Raise PolicyError for slots that the table does not have, or that cannot be treated so, or are named twice.

        Waits for the device.
        """
        for slots in self._slots():
            if slots.shape[:2] != table.positions.shape[:2]:
                shape = list(table.positions.shape[:2])
                raise PolicyError(f"slots are of {shape} sequences and KV heads here, not of {list(slots.shape[:2])}.")
            outside = (slots < EMPTY) | (slots >= table.length)
            if bool(outside.any() | (_times(slots, table.length) > 1).any()):
                raise PolicyError(
                    f"a Decision names slots from 0 to {table.length - 1} at most once each, or -1 for an empty row."
                )
        if not self.quantize:
            return
        most = 1 if self.keep is None else _times(self.keep, table.length)
        if bool((_times(torch.cat([slots for _, slots in self.quantize], dim=2), table.length) > most).any()):
            raise PolicyError("a Decision quantizes a slot by one codec, and those alone that it keeps.")
        for codec, slots in self.quantize:
            _check_precision(table, codec, slots)


def _times(slots: Tensor, length: int) -> Tensor:
    """How often each of so many slots is named, int32 `[B, Hkv, length]`."""
    index = torch.where((slots < 0) | (slots > length), length, slots)  # where empty rows are counted
    times = torch.zeros(*slots.shape[:2], length + 1, dtype=torch.int32, device=slots.device)
    return times.scatter_add_(2, index, torch.ones_like(index, dtype=torch.int32))[:, :, :length]


def _check_precision(table: TokenTable, codec: Codec, slots: Tensor) -> None:
    """Raise PolicyError where packed rows would become anything but the same with fewer bits."""
    packed = (slots >= 0) & (slots < table.packed_length)
    if not bool(packed.any()):
        return
    index = slots.clamp(min=0, max=table.packed_length - 1)
    alone = table.of_codecs(lambda own: own.shares_nothing).gather(2, index) > 0
    of_keys, of_values = (
        table.of_codecs(lambda own, kind=kind: own.bits_of(kind)).gather(2, index) - codec.bits_of(kind)  # type: ignore[misc]
        for kind in ("key", "value")
    )
    loses = alone & (of_keys >= 0) & (of_values >= 0) & (of_keys + of_values > 0)
    if not codec.shares_nothing or bool((packed & ~loses).any()):
        raise PolicyError(
            "a packed row can go, or lose bits if its codec and the new one let rows share nothing (RotatedCodec), and "
            f"gains none: {codec} is no such codec for all slots below {table.packed_length} that it was given."
        )
