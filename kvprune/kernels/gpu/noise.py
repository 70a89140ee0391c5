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
    return _mixed(bits ^ (bits >> 16))


@triton.jit
def _mixed(bits):
    """What is left of `_mix` behind its first shift."""
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
def shifted(words):
    """Words of rows or columns as `log2_exponential` takes them: the first shift of `_mix` is done before they meet."""
    return words ^ (words >> 16)


@triton.jit
def log2_exponential(rows, columns):
    """`log2(-log(u))` of `shifted` words that broadcast, float32: times log(2) what `Gumbel.perturb` subtracts."""
    # As a signed number the word counts from the middle of its range; its upper 23 bits are digits of a number in 1..2.
    digits = ((_mixed(rows ^ columns) ^ 0x80000000) >> 9) | 0x3F800000
    uniform = digits.to(tl.float32, bitcast=True) - (1 - 2**-24)  # exact: no rounding, so no matter whether fused
    return tl.log2(-_log(uniform))


@triton.jit
def _log(x):
    """log of normal numbers, to 3e-7 of itself: of m 2**e with m in [sqrt(1/2), sqrt(2)), a series in m - 1.

    The GPU's own is off by 1e-7, which near 1 is as much as the number is.
    """
    bits = x.to(tl.int32, bitcast=True)
    above = (bits - 0x3F3504F3) >> 23  # e: 0x3f3504f3 is sqrt(1/2)
    z = (bits - (above << 23)).to(tl.float32, bitcast=True) - 1.0
    series = -1.010689303e-1 * z + 1.622258519e-1
    series = series * z - 1.725083233e-1
    series = series * z + 1.990016508e-1
    series = series * z - 2.496990884e-1
    series = series * z + 3.333505895e-1
    series = series * z - 5.000036513e-1
    series = series * z + 1.0
    return series * z + above.to(tl.float32) * 0.693147181
