"""Rows whose keys are read in two halves: the most significant bits first, the others where those do not say enough.

A key's code of b bits is held as two codes of b / 2 bits, in tensors of their own:

    code = high 2^(b/2) + low,     x^ = code * scale + zero_point,     x^_high = the same with low = (2^(b/2) - 1) / 2

so that what the low bits add to a logit is a product of its own, `q . scale (low - (2^(b/2) - 1) / 2)`, and the high
bits are not read again for it. Values are held as ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.state import Saved, State
from kvprune.table.packed_rows import PackedRows, Stretch
from kvprune.table.quantize import Codec, pack, packed_bytes, unpack


@dataclass(frozen=True)
class SplitCodec(Codec):
    """A `Codec` whose keys are read in two halves. bits: 4 or 8. theta: see `attention.packed.single_query`."""

    theta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (4, 8):
            raise PolicyError(f"keys are read in halves of 4 or 8 bits, not of {self.bits}.")

    @property
    def half(self) -> int:
        """Bits of each half."""
        return self.bits // 2

    def row_bytes(self, key_dim: int, value_dim: int) -> int:
        whole = super().row_bytes(key_dim, value_dim)
        return whole - packed_bytes(key_dim, self.bits) + 2 * packed_bytes(key_dim, self.half)


class SplitRows(PackedRows):
    """`PackedRows` with `key_codes` of the high bits, and `key_low_codes`, alike, of the low ones."""

    codec: SplitCodec
    bytes_read = 0
    """Of keys' codes, by steps of one token so far; copies go on from what they were made of."""
    bytes_held = 0
    """What those steps would have read of both halves."""

    @classmethod
    def of(cls, codec: SplitCodec, rows: PackedRows) -> SplitRows:
        """Rows that were quantized to as many bits, in two halves from here on."""
        codes = unpack(rows.tensors["key_codes"], codec.bits, rows.key_dim)
        low = pack(codes & (1 << codec.half) - 1, codec.half)
        tensors = rows.tensors | {"key_codes": pack(codes >> codec.half, codec.half), "key_low_codes": low}
        return cls(codec, rows.key_dim, rows.value_dim, tensors, rows.runs)

    def _like(self, tensors: dict[str, Tensor]) -> SplitRows:
        other = SplitRows(self.codec, self.key_dim, self.value_dim, tensors, self.runs)
        other.bytes_read, other.bytes_held = self.bytes_read, self.bytes_held
        return other

    def of_head(self, sequence: int, head: int) -> PackedRows:
        alone = super().of_head(sequence, head)
        if sequence or head:  # the first one goes on with what all have read
            alone.bytes_read = alone.bytes_held = 0  # type: ignore[attr-defined]
        return alone

    def state(self) -> State:
        state = super().state()
        state.facts["read"] = [self.bytes_read, self.bytes_held]
        return state

    @classmethod
    def restored(cls, saved: Saved, codec: Codec, heads: tuple[int, ...], key_dim: int, value_dim: int) -> PackedRows:
        rows = super().restored(saved, codec, heads, key_dim, value_dim)
        rows.bytes_read, rows.bytes_held = saved.counts("read", 1 << 62, length=2)  # type: ignore[attr-defined]
        return rows

    @property
    def code_nbytes(self) -> int:
        return super().code_nbytes + self.tensors["key_low_codes"].nbytes

    @classmethod
    def _row_shapes(cls, codec: Codec, key_dim: int, value_dim: int) -> dict[str, int]:
        half = packed_bytes(key_dim, codec.bits // 2)
        return super()._row_shapes(codec, key_dim, value_dim) | {"key_codes": half, "key_low_codes": half}

    def _codes(self, name: str, stretch: Stretch, count: int) -> Tensor:
        if name != "key_codes":
            return super()._codes(name, stretch, count)
        high, low = (
            unpack(self.tensors[half][:, :, stretch.rows], self.codec.half, count)
            for half in ("key_codes", "key_low_codes")
        )
        return (high << self.codec.half | low).float()

    # -- products with one half --------------------------------------------------------------------------------------

    @property
    def _middle(self) -> float:
        return ((1 << self.codec.half) - 1) / 2

    def dot_high(self, queries: Tensor) -> Tensor:
        """q.k of a few queries `[B, Hkv, M, D]` float32 with every row by its high bits alone, `[B, Hkv, M, R]`."""
        products = queries.new_empty(*queries.shape[:3], len(self))
        for stretch in self.stretches():
            high = unpack(self.tensors["key_codes"][:, :, stretch.rows], self.codec.half, self.key_dim).float()
            high.mul_(1 << self.codec.half).add_(self._middle)
            self._by_block(high, stretch, "key_scale", torch.Tensor.mul_)
            self._by_block(high, stretch, "key_zero_point", torch.Tensor.add_)
            torch.matmul(queries, high.transpose(2, 3), out=products[..., stretch.rows])
        bytes_read = self.tensors["key_codes"].nbytes
        self.bytes_read += bytes_read
        self.bytes_held += 2 * bytes_read
        return products

    def dot_low(self, queries: Tensor, sequence: Tensor, head: Tensor) -> Tensor:
        """What low bits add to that, for some heads and no others, `[n, M, R]` float32.

        queries: `[n, M, D]` float32. sequence, head: LongTensors `[n]`, which heads they are of.
        """
        products = queries.new_empty(*queries.shape[:2], len(self))
        scales, codes = self.tensors["key_scale"], self.tensors["key_low_codes"]
        for stretch in self.stretches():
            read = codes[sequence, head, stretch.rows]
            self.bytes_read += read.nbytes
            low = unpack(read, self.codec.half, self.key_dim).float().sub_(self._middle)
            if stretch.blocks is None:
                block = self.tensors["block"][sequence, head, stretch.rows].long()
                of_rows = scales[sequence, head].gather(1, block[..., None].expand(-1, -1, self.key_dim))
                low.mul_(of_rows)
            else:
                of_blocks = scales[sequence, head, stretch.blocks].unsqueeze(2)
                low.unflatten(1, (of_blocks.shape[1], -1)).mul_(of_blocks)
            torch.matmul(queries, low.transpose(1, 2), out=products[..., stretch.rows])
        return products


def whole(codec: SplitCodec) -> Codec:
    """The codec that quantizes alike, and holds codes in one piece."""
    return Codec(codec.bits, codec.tokens, codec.channels, codec.separable)
