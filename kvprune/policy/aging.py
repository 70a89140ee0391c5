"""`Aging`: what policies share whose rows lose bits by age alone, and those that quantize in a basis."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.policy.base import Decision, Policy
from kvprune.policy.settings import check_count
from kvprune.policy.step import Step
from kvprune.table.basis import MIXED_FROM, Basis, Rotate
from kvprune.table.quantize import is_average
from kvprune.table.rotated_rows import RotatedCodec
from kvprune.table.rows import EMPTY
from kvprune.table.token_table import TokenTable

_EXACT = 16
# First tokens, whose keys and values are like no others': in a basis made for those, they would lose most.
ROTATED_SINKS = 4
# Generated tokens that are packed together.
_TOGETHER = 32


def learn_basis(table: TokenTable, step: Step, bits: float, rotate: Rotate | None = None) -> None:
    """Take a sequence's basis from a prompt's queries, keys and values, once there are enough of them.

    bits: of keys, on average. rotate: as of `Basis.estimate`. It stays when rows have been packed in it: a later
    prompt changes nothing. Changes the table.
    """
    if not step.prefill or step.source is None:
        return
    learning = table.may_learn
    if not bool(learning.any()):
        return
    asked = (step.query_positions >= 0).expand(table.batch_size, -1)
    with torch.no_grad():
        held = (table.positions[:, :, table.packed_length :] >= 0) & learning[:, None, None]
        basis = Basis.estimate(step.source.states, table.keys, table.values, asked, held, bits >= MIXED_FROM, rotate)
        table.turn(basis, learning)


def oldest(table: TokenTable, *, residual: int, together: int, sinks: int | Tensor = 0) -> Tensor | None:
    """Slots of the rows to pack, LongTensor `[B, Hkv, R]` by position, -1 for none; None where it is too early.

    Of rows in full precision the newest `residual` stay, those at positions below `sinks`, an int or LongTensor
    `[B, 1, 1]`, and what does not make another `together`.
    """
    least = sinks if isinstance(sinks, int) else 0
    if table.length - table.packed_length < residual + together + least:
        return None
    positions = table.positions[:, :, table.packed_length :]
    old = positions >= sinks
    ready = (old.sum(-1, keepdim=True) - residual).clamp(min=0) // together * together
    most = int(ready.max())
    if most == 0:
        return None
    last = torch.iinfo(torch.int32).max
    slots = positions.masked_fill(~old, last).argsort(dim=-1)[:, :, :most] + table.packed_length
    return slots.masked_fill(torch.arange(most, device=slots.device) >= ready, EMPTY)


@dataclass(frozen=True)
class Aging(Policy):
    """Base of policies that keep every token, all but sinks and the newest at few bits, in the coordinates of a basis.

    Settings:
        bits: of a number of a key, on average, from 2 to 8; groups of 16 numbers have whole ones, so where a key has 64
            there are quarters, and 2.6 is 2.5. value_bits: of a value; None for as many.
        sinks: first tokens that stay exact. residual: newest tokens that stay exact; 32 more may wait.
        edge_layers: so many of the first layers, and of the last, get edge_bits. edge_bits: from 2 to 8, or 16 for full
            precision.
    """

    bits: float = 2
    _: KW_ONLY
    value_bits: float | None = None
    sinks: int = 4
    residual: int = 128
    edge_layers: int = 0
    edge_bits: float = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bits", "value_bits", "edge_bits"):
            bits = getattr(self, name)
            if bits is None and name == "value_bits":
                continue
            exact = name == "edge_bits" and bits == _EXACT
            if not (is_average(bits) or exact):
                also = ", or 16 for full precision" if name == "edge_bits" else ""
                raise PolicyError(f"{name}={bits!r} is not supported: choose a number from 2 to 8{also}.")
            if bits == int(bits):
                object.__setattr__(self, name, int(bits))
        for name in ("sinks", "residual", "edge_layers"):
            check_count(name, getattr(self, name), least=0)

    def codec(self, depth: int, layers: int) -> RotatedCodec | None:
        """Of the layer of this number, among so many; None where rows stay in full precision."""
        if self.edge_layers <= depth < layers - self.edge_layers:
            return self.packed(self.bits, self.value_bits)
        return None if self.edge_bits == _EXACT else self.packed(self.edge_bits)

    def packed(self, bits: float, value_bits: float | None = None) -> RotatedCodec:
        """How rows are quantized at so many bits: at even levels around zero, unless a policy says otherwise."""
        return RotatedCodec(bits, value_bits=value_bits)

    @property
    def codecs(self) -> tuple[RotatedCodec, ...]:
        layers = 2 * self.edge_layers + 1
        found = (self.codec(depth, layers) for depth in (0, self.edge_layers))
        return tuple(dict.fromkeys(codec for codec in found if codec is not None))

    def codecs_at(self, depth: int, layers: int) -> tuple[RotatedCodec, ...]:
        codec = self.codec(depth, layers)
        return () if codec is None else (codec,)

    @property
    def buffer(self) -> int:
        return self.residual + self.sinks + _TOGETHER

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        codec = self.codec(step.depth, step.layers)
        if codec is None:
            return None
        slots = oldest(table, residual=self.residual, together=_TOGETHER, sinks=self.sinks)
        return None if slots is None else Decision(quantize=self.parted(table, codec, slots))

    def parted(self, table: TokenTable, codec: RotatedCodec, slots: Tensor) -> tuple[tuple[RotatedCodec, Tensor], ...]:
        """The slots `[B, Hkv, R]` of rows to pack, in the order of their positions, by codec: one for all here."""
        return ((codec, slots),)
