"""Quantizers for keys and values.

Uniform, asymmetric, b bits: with parameters `scale` and `zero_point` of a group of numbers,

    code = round((x - zero_point) / scale),     x^ = code * scale + zero_point,     |x - x^| <= scale / 2

Keys share parameters per channel, over the tokens of a block. Values share them per token, over a group of channels;
*channel-separable* values are first divided by c_j = sqrt(max over the block's tokens of |v_j|), so that one outlier
channel does not cost all others their precision (ZipCache).

Parameters are float16, rounded outwards so that the range they span holds every number of the group; arithmetic is
float32. Codes are packed along the channels of a row, so a row can move without being decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.errors import PolicyError

BITS = (2, 3, 4, 8)
LARGEST = 65504.0  # of float16


def is_width(bits: object) -> bool:
    """Whether codes can have so many bits."""
    return isinstance(bits, Integral) and bits in BITS  # 4.0 is in BITS, too


def is_average(bits: object) -> bool:
    """Whether codes whose widths differ can have so many bits on average."""
    return isinstance(bits, int | float) and not isinstance(bits, bool) and BITS[0] <= bits <= BITS[-1]


@dataclass(frozen=True)
class Codec:
    """How rows are quantized. Rows of one codec are stored together.

    bits: 2, 3, 4 or 8. tokens: that share the parameters of a key channel; None for all that are quantized at once.
    channels: that share the parameters of a value; None for all. separable: channel-separable values.
    """

    bits: int
    tokens: int | None = None
    channels: int | None = None
    separable: bool = False

    def __post_init__(self) -> None:
        if not is_width(self.bits):
            raise PolicyError(f"{self.bits!r} bits are not supported: choose 2, 3, 4 or 8.")

    @property
    def shares_nothing(self) -> bool:
        """Whether a row has all its parameters to itself, so that it may lose bits without touching another."""
        return False

    def bits_of(self, kind: str) -> float:
        """kind: "key" or "value"."""
        return self.bits

    def row_bytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of one row: its codes, and the parameters and block number that are its own."""
        groups = -(-value_dim // (self.channels or value_dim))
        return packed_bytes(key_dim, self.bits) + packed_bytes(value_dim, self.bits) + 4 * groups + 2

    def block_bytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of the parameters that the rows of one block share."""
        return 4 * key_dim + (2 * value_dim if self.separable else 0)


# -- bit packing -------------------------------------------------------------------------------------------------------


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    if bits == 3:
        return packed_bytes(count, 2) + packed_bytes(count, 1)
    return -(-count * bits // 8)


# The word with a byte for each code of a byte, and the steps that spread them: a shifted copy laid over, then a mask.
_SPREAD = {
    4: (torch.int16, [(4, 0x0F0F)]),
    2: (torch.int32, [(12, 0x000F000F), (6, 0x03030303)]),
    1: (torch.int64, [(28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101)]),
}


def pack(codes: Tensor, bits: int) -> Tensor:
    """`[..., n]` uint8 below 2**bits -> `[..., packed_bytes(n, bits)]` uint8. Three bits are stored as two and one."""
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=-1)
    each = 8 // bits
    size = packed_bytes(codes.shape[-1], bits)
    codes = F.pad(codes, (0, each * size - codes.shape[-1])).unflatten(-1, (size, each))
    packed = codes[..., 0].clone()
    for place in range(1, each):
        packed |= codes[..., place] << place * bits
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes that `pack` packed, `[..., count]` uint8.

    Each byte widens to a word of as many bytes as it holds codes, and its bits move apart until each has one.
    """
    if bits == 8:
        return packed
    if bits == 3:
        low, high = packed.split([packed_bytes(count, 2), packed_bytes(count, 1)], dim=-1)
        return unpack(low, 2, count) | unpack(high, 1, count) << 2
    word, steps = _SPREAD[bits]
    codes = packed.to(word, memory_format=torch.contiguous_format)
    for shift, mask in steps:
        codes |= codes << shift
        codes &= mask
    return codes.view(torch.uint8)[..., :count]


# -- one group of numbers ----------------------------------------------------------------------------------------------


def quantize(numbers: Tensor, bits: int, dim: int, empty: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 of the shape of `numbers`, and scale and zero point, float16, of size 1 along `dim`.

    numbers: float32. dim: along which numbers share parameters. empty: bool, broadcastable; these numbers are nothing.
    """
    lowest = numbers if empty is None else numbers.masked_fill(empty, torch.inf)
    highest = numbers if empty is None else numbers.masked_fill(empty, -torch.inf)
    zero_point = rounded_down(lowest.amin(dim, keepdim=True).clamp(-LARGEST, LARGEST))
    span = highest.amax(dim, keepdim=True).clamp(-LARGEST, LARGEST) - zero_point.float()
    levels = (1 << bits) - 1
    scale = -rounded_down((-span.clamp(min=0) / levels).clamp(min=-LARGEST))
    step = scale.float()
    codes = (numbers - zero_point.float()).div_(torch.where(step > 0, step, 1.0)).round_().clamp_(0, levels)
    return codes.to(torch.uint8), scale, zero_point


def channel_scales(sizes: Tensor) -> Tensor:
    """What channels are divided by, float16: the root of their largest magnitude, float32, or 1 where that is none."""
    scale = sizes.sqrt().half()
    return scale.masked_fill_(scale == 0, 1.0)


def rounded_down(numbers: Tensor) -> Tensor:
    """The largest float16 that is not above."""
    half = numbers.half()
    return torch.where(half.float() > numbers, _next_below(half), half)


def _next_below(half: Tensor) -> Tensor:
    """The next smaller float16."""
    bits = half.view(torch.int16)
    below = torch.where(bits > 0, bits - 1, torch.where(bits == 0, -32767, bits + 1))  # 0x8001 is the first below zero
    return below.to(torch.int16).view(torch.float16)
