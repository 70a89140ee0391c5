"""What the kernels share: sizes of tiles, the visibility of keys, and logits."""

import torch
import triton
import triton.language as tl

_NEVER = tl.constexpr(2**31 - 1)  # the position of an empty slot: later than every query
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# Triton's own of these two may run in kernels as well, and take some microseconds each: as long as a launch, in all.
def padded(size: int, least: int = 16) -> int:
    """The next power of two, which the extent of every tile must be; tensor cores take no fewer than 16."""
    return max(least, 1 << (size - 1).bit_length())


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def tile_rows(head_dim: int, itemsize: int, tile_bytes: int, most: int) -> int:
    """Rows of a tile `[rows, head_dim]` that takes so many bytes of on-chip memory: a power of two, 16 to `most`."""
    return max(16, min(most, tile_bytes // (padded(head_dim) * itemsize)))


def with_dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only where numbers of a row do not lie side by side: kernels take any other strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def load_rows(pointer, row_offsets, row_mask, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[rows, BLOCK_D]`, zero beyond DIM and where the mask is False. row_offsets: int32 or int64 `[rows]`.

    A long table holds more than 2**31 numbers, so offsets are 64 bits wide.
    """
    dims = tl.arange(0, BLOCK_D)
    offsets = row_offsets.to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(pointer + offsets, mask=row_mask[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def key_order(slots, length, positions, stride):
    """Positions of keys, int32: a query sees what is not above its own. Slots themselves where `positions` is None."""
    if positions is None:
        order = slots
    else:
        order = tl.load(positions + slots.to(tl.int64) * stride, mask=slots < length, other=-1).to(tl.int32)
    return tl.where((slots < length) & (order >= 0), order, _NEVER)


@triton.jit
def matmul(a, b):
    """`a @ b` in float32. Products of float32 are not rounded to TF32."""
    if _INTERPRETED:  # its dot takes the bits of a bfloat16 for an integer (Triton 3.4 to 3.9)
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def capped(logits, SOFTCAP: tl.constexpr):
    """Logits under the soft cap."""
    if SOFTCAP is not None:  # tanh(x) = 2 sigmoid(2x) - 1; tanh itself is no function of Triton's own
        logits = SOFTCAP * (2 * tl.sigmoid(2 * logits / SOFTCAP) - 1)
    return logits


@triton.jit
def scored(queries, keys_transposed, scale, SOFTCAP: tl.constexpr):
    """Logits `[M, N]` float32 under the soft cap."""
    return capped(matmul(queries, keys_transposed) * scale, SOFTCAP)
