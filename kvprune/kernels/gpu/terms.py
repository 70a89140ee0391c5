"""Queries and weights of packed rows as sums of terms: numbers with more bits than a tensor core takes.

A term has a row of its own in the tile of a product, `[terms * members, N]`: a tile has more rows than a group has
heads.
"""

import triton
import triton.language as tl

from kvprune.kernels.gpu.codes import digit


@triton.jit
def numbers_of(
    queries, members, stride, FIRST: tl.constexpr, STEP: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every STEP-th channel of queries from the FIRST on, float32 `[members, BLOCK]`, and which channels these are."""
    channels = FIRST + STEP * tl.arange(0, BLOCK)
    mask = (members < GROUP)[:, None] & (channels < DIM)[None, :]
    numbers = tl.load(queries + members[:, None] * stride + channels[None, :], mask=mask, other=0.0)
    return numbers.to(tl.float32), channels


@triton.jit
def of_channels(parameters, channels, DIM: tl.constexpr):
    """Parameters of the channels of one block, float32 `[1, channels]`."""
    return tl.load(parameters + channels, mask=channels < DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def planes_of(
    queries, key_scale, members, terms, largest, stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """Digits of query times scale, over the largest such product, for `dot_codes`."""
    planes = ()
    for place in tl.static_range(8 // BITS):
        numbers, channels = numbers_of(queries, members, stride, place, 8 // BITS, GROUP, DIM, BLOCK)
        numbers *= of_channels(key_scale, channels, DIM)
        planes = planes + (digit(numbers / largest[:, None], terms, DIGITS),)  # type: ignore[assignment]
    return planes


@triton.jit
def over_terms(tile, TERMS: tl.constexpr):
    """Sums over the terms, `[terms * members, N] -> [members, N]`."""
    return tl.sum(tl.reshape(tile, [TERMS, tile.shape[0] // TERMS, tile.shape[1]]), 0)


@triton.jit
def for_terms(tile, TERMS: tl.constexpr):
    """The same for all terms, `[members, N] -> [terms * members, N]`."""
    same = tl.broadcast_to(tile[None, :, :], [TERMS, tile.shape[0], tile.shape[1]])
    return tl.reshape(same, [TERMS * tile.shape[0], tile.shape[1]])


@triton.jit
def in_terms(weights, terms, TYPE: tl.constexpr, TERMS: tl.constexpr):
    """Weights as sums of two numbers of this type, in the rows of the first two terms."""
    weights = for_terms(weights, TERMS)
    rounded = weights.to(TYPE)
    rest = (weights - rounded.to(tl.float32)).to(TYPE)
    return tl.where((terms == 0)[:, None], rounded, tl.where((terms == 1)[:, None], rest, tl.zeros_like(rest)))
