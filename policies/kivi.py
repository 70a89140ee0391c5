"""KIVI: keys per channel, values per token. Liu et al., arXiv 2402.02750, ICML 2024."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from kvprune.errors import PolicyError
from kvprune.policy.aging import ROTATED_SINKS, learn_basis, oldest
from kvprune.policy.base import Decision, Policy, Step
from kvprune.policy.settings import check_count, check_flag, check_number
from kvprune.table.quantize import Codec, is_width
from kvprune.table.rotated_rows import RotatedCodec
from kvprune.table.split_rows import SplitCodec
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class KIVI(Policy):
    """Keeps every token, all but the newest at few bits.

    Outliers of keys sit in a few channels, those of values do not: keys share their parameters per channel, over groups
    of `group_size` tokens, and values per token, over groups of `group_size` channels. The newest `residual` tokens,
    and older ones that do not fill a group yet, stay in full precision. What is packed is never quantized again.

    A token's key and value are packed together; in the paper, a key may be packed up to `residual` tokens earlier.

    Settings:
        bits: 2, 3, 4 or 8. group_size: tokens, and channels, that share parameters. residual: tokens.
        rotate: quantize principal components in place of channels, as the prompt's own queries, keys and values have
            them: `bits` on average, more where the spectrum is large, and one scale a row. Groups then say no more than
            when rows are packed, and the first 4 tokens stay exact. See `Spectral`.
        theta: of 4 or 8 bits, generated tokens read the upper half of every key, and the lower half only in heads where
            no key has got a probability of at least theta by that; 0.05 in the paper, SpAtten (arXiv 2012.09852), where
            that is progressive quantization. None reads all bits, 0 upper halves alone. `cache.report()` counts bytes.
    """

    bits: int = 2
    _: KW_ONLY
    group_size: int = 32
    residual: int = 128
    rotate: bool = False
    theta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_width(self.bits):
            raise PolicyError(f"bits={self.bits!r} is not supported: choose 2, 3, 4 or 8.")
        check_count("group_size", self.group_size, least=1)
        check_count("residual", self.residual, least=0)
        check_flag("rotate", self.rotate)
        if self.theta is not None:
            check_number("theta", self.theta, low=0, high=1)
            if self.rotate or self.bits not in (4, 8):
                raise PolicyError("theta reads keys in halves of 4 or 8 bits: write bits=8, and leave out rotate.")

    @property
    def codecs(self) -> tuple[Codec, ...]:
        if self.rotate:
            return (RotatedCodec(self.bits),)
        if self.theta is not None:
            return (SplitCodec(self.bits, self.group_size, self.group_size, theta=float(self.theta)),)
        return (Codec(self.bits, tokens=self.group_size, channels=self.group_size),)

    @property
    def buffer(self) -> int:
        return self.residual + self.group_size + self._sinks

    @property
    def _sinks(self) -> int:
        return ROTATED_SINKS if self.rotate else 0

    def observe(self, table: TokenTable, step: Step) -> None:
        if self.rotate:
            learn_basis(table, step, self.bits)

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        slots = oldest(table, residual=self.residual, together=self.group_size, sinks=self._sinks)
        return None if slots is None else Decision(quantize=tuple((codec, slots) for codec in self.codecs))
