"""KIVI: keys per channel, values per token. Liu et al., arXiv 2402.02750, ICML 2024."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from kvprune.errors import PolicyError
from kvprune.policy.base import Decision, Policy, Step
from kvprune.policy.settings import check_count
from kvprune.table.quantize import Codec, is_width
from kvprune.table.rows import EMPTY
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
    """

    bits: int = 2
    _: KW_ONLY
    group_size: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_width(self.bits):
            raise PolicyError(f"bits={self.bits!r} is not supported: choose 2, 3, 4 or 8.")
        check_count("group_size", self.group_size, least=1)
        check_count("residual", self.residual, least=0)

    @property
    def codecs(self) -> tuple[Codec, ...]:
        return (Codec(self.bits, tokens=self.group_size, channels=self.group_size),)

    @property
    def buffer(self) -> int:
        return self.residual + self.group_size

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        if table.length - table.packed_length < self.buffer:
            return None
        positions = table.positions[:, :, table.packed_length :]
        rows = (positions >= 0).sum(-1, keepdim=True)
        ready = (rows - self.residual).clamp(min=0) // self.group_size * self.group_size
        most = int(ready.max())
        if most == 0:
            return None
        last = torch.iinfo(torch.int32).max
        oldest = positions.masked_fill(positions < 0, last).argsort(dim=-1)[:, :, :most] + table.packed_length
        oldest = oldest.masked_fill(torch.arange(most, device=oldest.device) >= ready, EMPTY)
        return Decision(quantize=tuple((codec, oldest) for codec in self.codecs))
