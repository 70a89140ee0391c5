"""TurboQuant: a fixed rotation, and levels that need no data. Zandieh et al., arXiv 2504.19874, ICLR 2026."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from kvprune.policy.aging import Aging
from kvprune.table.rotated_rows import RotatedCodec


@dataclass(frozen=True)
class TurboQuant(Aging):
    """Keeps every token, all but sinks and the newest at few bits, by what a rotation does to any vector.

    With H the normalised Hadamard matrix, in blocks where D is no power of 2, a key k is held as its size and the codes
    of its direction, whose components are nearly normally distributed, whatever k is:

        z = H k,    s = |k| / sqrt(D),    k^ = H s level(nearest level to z_i / s)

    at the levels of Lloyd and Max for a normal distribution. Values are turned alike, and have even levels, at the
    scale that fits a row best. Nothing is estimated, and nothing held beside rows.

    That is what vLLM ships: the paper's correction of products by signs of a second rotation is left out, as it costs a
    bit that is better spent on levels, and the first and last two layers stay exact. Here, sinks and the newest tokens
    do, too. The paper draws rotations at random.

    Settings: as of `Aging`, with bits=4 and two exact layers at either end.
    """

    bits: float = 4
    _: KW_ONLY
    edge_layers: int = 2
    edge_bits: float = 16

    def packed(self, bits: float, value_bits: float | None = None) -> RotatedCodec:
        return RotatedCodec(bits, value_bits=value_bits, normal=True)
