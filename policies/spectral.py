"""Spectral: few bits for principal components, estimated from the prompt itself."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property

from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.policy.aging import Aging, learn_basis
from kvprune.policy.base import Step
from kvprune.policy.budget import share
from kvprune.policy.settings import check_number
from kvprune.policy.shares import NEVER_KEPT
from kvprune.table.quantize import BITS, is_average
from kvprune.table.rotated_rows import RotatedCodec
from kvprune.table.rows import ranked, those, top_rows
from kvprune.table.token_table import TokenTable

_MORE = 2  # bits of outliers


@dataclass(frozen=True)
class Spectral(Aging):
    """Keeps every token, all but sinks and the newest at few bits, which go where a head's spectrum is large.

    Keys of a head, their mean taken out, become uncorrelated components in a basis in which an error of any of them
    moves the head's logits by its eigenvalue lambda_i: components of large lambda get more bits than those of small,
    one after another, each where it takes most of

        sum over i of  lambda_i D(bits_i),     D(b) what b bits leave of a component of variance 1

    until they have as many on average as `bits` says; and likewise values, for the error of the output. See
    `kvprune/table/basis.py` for the formula, and for who did so before: here, the prompt's own queries, keys and values
    tell, and no file. From 3 bits on, components that share a width are mixed, so that what is extraordinary in one is
    spread over 16. A prompt of fewer than two times as many tokens as a key has numbers tells no more than the mean,
    and its rows are turned by a Hadamard matrix.

    What is unlike the rest of a text, such as numbers in prose, is what a later question asks for, and lies far out in
    these coordinates, where few bits lose most: of the rows of a head, the share `outliers` of largest leverage
    |z_k|^2 / D + |z_v|^2 / Dv, with z the components at variance 1, gets `outlier_bits`. In four texts of 2,000 tokens,
    53 to 73 % of the keys of a number's digits, and 63 to 88 % of the values, were among the farthest tenth (SmolLM2).

    A row has one scale, and shares nothing with other rows: any may be evicted. The basis costs as many bytes as D / 2
    tokens of the head in 16 bits.

    Settings (beside those of `Aging`):
        outliers: a share of rows, from 0 to 1, rounded up, of every head and of all that are packed together; their
            bits come on top of `bits`. outlier_bits: from 2 to 8, or None for two more than other rows of the layer
            have, of keys and of values; where all have as many, there are no outliers.
    """

    _: KW_ONLY
    outliers: float = 0.1
    outlier_bits: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("outliers", self.outliers, low=0, high=1)
        if self.outlier_bits is not None and not is_average(self.outlier_bits):
            raise PolicyError(
                f"outlier_bits={self.outlier_bits!r} is not supported: choose a number from 2 to 8, or outliers=0."
            )

    def of_outliers(self, codec: RotatedCodec) -> RotatedCodec | None:
        """How outliers among rows of a codec are packed; None where they have as many bits as all."""
        others = codec.bits_of("key"), codec.bits_of("value")
        if self.outlier_bits is None:
            keys, values = (min(bits + _MORE, BITS[-1]) for bits in others)
        else:
            keys, values = (max(bits, self.outlier_bits) for bits in others)
        if not self.outliers or (keys, values) == others:
            return None
        return self.packed(keys, None if values == keys else values)

    def _with_outliers(self, codecs: tuple[RotatedCodec, ...]) -> tuple[RotatedCodec, ...]:
        also = (self.of_outliers(codec) for codec in codecs)
        return tuple(dict.fromkeys((*codecs, *(codec for codec in also if codec is not None))))

    @cached_property
    def codecs(self) -> tuple[RotatedCodec, ...]:
        return self._with_outliers(super().codecs)

    def codecs_at(self, depth: int, layers: int) -> tuple[RotatedCodec, ...]:
        return self._with_outliers(super().codecs_at(depth, layers))

    def observe(self, table: TokenTable, step: Step) -> None:
        codec = self.codec(step.depth, step.layers)
        if codec is not None:
            learn_basis(table, step, codec.bits)

    def parted(self, table: TokenTable, codec: RotatedCodec, slots: Tensor) -> tuple[tuple[RotatedCodec, Tensor], ...]:
        of_outliers = self.of_outliers(codec)
        if of_outliers is None:
            return super().parted(table, codec, slots)
        there, loose = slots >= 0, (slots - table.packed_length).clamp(min=0)
        positions = table.positions[:, :, table.packed_length :].gather(2, loose)
        ranks = ranked(table.leverage().gather(2, loose), positions).masked_fill(~there, NEVER_KEPT)
        far = top_rows(ranks, share(self.outliers, there.sum(-1, keepdim=True)))
        return (codec, those(slots, there & ~far)), (of_outliers, those(slots, far))
