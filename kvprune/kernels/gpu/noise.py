"""Gumbel noise in registers: the counter-based numbers of `attention.noise`, bit for bit, and never in memory."""

import triton
import triton.language as tl

from kvprune.attention import noise
from kvprune.attention.noise import Gumbel

_GOLDEN = tl.constexpr(noise._GOLDEN)
_COLUMN = tl.constexpr(noise._COLUMN)


def layer_word(gumbel: Gumbel) -> int:
    """The hash of seed and layer, ready for the next counter, as an int32, which is what kernels take."""
    return noise._signed(gumbel.word * noise._GOLDEN + 1)


@triton.jit
def _mix(bits):
    """The finalizer of MurmurHash3 on uint32, where shifts bring in zeros and products wrap around."""
    bits ^= bits >> 16
    bits *= 0x85EBCA6B
    bits ^= bits >> 13
    bits *= 0xC2B2AE35
    bits ^= bits >> 16
    return bits


@triton.jit
def row_words(word, heads, positions):
    """Hashes of query heads and query positions, uint32. word: `layer_word`, int32; the others int32 that broadcast."""
    head_words = _mix(heads.to(tl.uint32) + word.to(tl.uint32))
    return _mix(positions.to(tl.uint32) + (head_words * _GOLDEN + 1))


@triton.jit
def column_words(positions):
    """Hashes of key positions, uint32."""
    return _mix(positions.to(tl.uint32) ^ _COLUMN)


@triton.jit
def minus_gumbel(rows, columns):
    """`log(-log(u))` of words that broadcast, float32: what `Gumbel.perturb` subtracts, `scale` times."""
    bits = _mix(rows ^ columns).to(tl.int32, bitcast=True)
    uniform = (bits >> 9).to(tl.float32) * 2**-23 + (0.5 + 2**-24)  # exact: no rounding, so no matter whether fused
    return tl.log(-tl.log(uniform))
