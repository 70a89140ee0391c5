"""Rows of codes in the coordinates of a `Basis`, and products with what they stand for.

Components share widths by 16, as the spectrum of their head asks for; `rotated_codes.py` says what codes mean. A row
has a scale of its keys and one of its values, and where they are clipped, an offset. Nothing else belongs to a row, and
nothing to a block of rows: any row may go, or move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.state import Saved, State
from kvprune.table.basis import Basis, Coordinates, lanes_of
from kvprune.table.packed_rows import PackedRows, Stretch
from kvprune.table.quantize import Codec, is_average
from kvprune.table.rotated_codes import LARGEST, Places, Quantizer, clipped, code_bytes, nearest, normal
from kvprune.table.rows import take_rows


@dataclass(frozen=True)
class RotatedCodec(Codec):
    """How rows are quantized in the coordinates of a basis.

    bits: of a component of a key, on average, from 2 to 8. value_bits: of a value; None for as many. Groups of
    components have whole bits, and what is left over of these is not taken. normal: keys at levels that are best for a
    normal distribution. key_clip, value_clip: quantiles of |z| at which rows are cut off, which then have an offset.
    What a `Codec` says of tokens and channels means nothing here.
    """

    bits: float  # type: ignore[assignment]  # other codecs have whole ones
    value_bits: float | None = None
    normal: bool = False
    key_clip: float | None = None
    value_clip: float | None = None

    def __post_init__(self) -> None:
        for bits in (self.bits, self.value_bits):
            if bits is not None and not is_average(bits):
                raise PolicyError(f"{bits!r} bits are not supported: choose a number from 2 to 8.")
        for kind in ("key", "value"):
            clip = self.clip_of(kind)
            if clip is not None and not 0 <= clip <= 1:
                raise PolicyError(f"{kind}_clip is a quantile, from 0 to 1, not {clip!r}.")
        if self.normal and self.key_clip is not None:
            raise PolicyError("keys at the levels of a normal distribution are not clipped: leave key_clip out.")

    @property
    def shares_nothing(self) -> bool:
        return True

    def bits_of(self, kind: str) -> float:
        return self.bits if kind == "key" or self.value_bits is None else self.value_bits

    def clip_of(self, kind: str) -> float | None:
        """kind: "key" or "value"."""
        return self.key_clip if kind == "key" else self.value_clip

    def is_normal(self, kind: str) -> bool:
        """kind: "key" or "value"."""
        return self.normal and kind == "key"

    def row_bytes(self, key_dim: int, value_dim: int) -> int:
        dims = (("key", key_dim), ("value", value_dim))
        return sum(code_bytes(dim, self.bits_of(kind)) + (2 if self.clip_of(kind) is None else 4) for kind, dim in dims)

    def block_bytes(self, key_dim: int, value_dim: int) -> int:
        """What a table holds of this codec beside rows: widths, and the basis."""
        dims = (key_dim, value_dim)
        return 1 + sum(dim * dim + 6 * dim + 5 * (dim // lanes_of(dim)) for dim in dims)


class RotatedRows(PackedRows):
    """Quantized keys and values of a layer, `R` rows per KV head, in the coordinates of a basis.

    key_codes [B, Hkv, R, bytes] uint8      value_codes [B, Hkv, R, bytes] uint8
    key_scale, value_scale [B, Hkv, R] float16, and key_offset, value_offset, where the codec clips them
    key_widths [B, Hkv, groups] uint8       value_widths [B, Hkv, groups] uint8, of all rows
    """

    _OF_ALL = ("key_widths", "value_widths")
    codec: RotatedCodec

    def __init__(
        self, codec: RotatedCodec, key_dim: int, value_dim: int, tensors: dict[str, Tensor], basis: Basis
    ) -> None:
        super().__init__(codec, key_dim, value_dim, tensors, ())
        self.basis = basis
        """Of the table that the rows are in, which holds it."""

    @classmethod
    def encode_in(
        cls, codec: RotatedCodec, basis: Basis, keys: Tensor, values: Tensor, quantized: Quantizer | None = None
    ) -> RotatedRows:
        """Quantize rows: keys `[B, Hkv, R, D]`, values `[B, Hkv, R, Dv]`. quantized: what does so faster."""
        numbers = {}
        for kind, rows, coordinates in (("key", keys, basis.keys), ("value", values, basis.values)):
            rows = torch.nan_to_num(rows.float(), nan=0.0).clamp_(-LARGEST, LARGEST)
            numbers[kind] = coordinates.of(rows)
        return cls._of_numbers(codec, basis, keys.shape[3], values.shape[3], numbers, quantized)

    @classmethod
    def _of_numbers(
        cls,
        codec: RotatedCodec,
        basis: Basis,
        key_dim: int,
        value_dim: int,
        numbers: dict[str, Tensor],
        quantized: Quantizer | None,
    ) -> RotatedRows:
        """numbers: z of keys and values, `[B, Hkv, R, D]` float32, by kind."""
        tensors: dict[str, Tensor] = {}
        for kind, coordinates in (("key", basis.keys), ("value", basis.values)):
            shape, size = tuple(numbers[kind].shape[:2]), code_bytes(coordinates.dim, codec.bits_of(kind))
            widths = coordinates.widths(codec.bits_of(kind), shape, numbers[kind].device)
            clip = codec.clip_of(kind)
            if clip is not None:
                codes, scale, tensors[f"{kind}_offset"] = clipped(numbers[kind], widths, size, clip)
            else:
                way = normal if codec.is_normal(kind) else quantized or nearest
                codes, scale = way(numbers[kind], widths, size)
            tensors |= {f"{kind}_codes": codes, f"{kind}_scale": scale, f"{kind}_widths": widths}
        return cls(codec, key_dim, value_dim, tensors, basis)

    def encoded_anew(self, codec: RotatedCodec, rows: Tensor, quantized: Quantizer | None = None) -> RotatedRows:
        """Some of these rows by another codec, LongTensor `[B, Hkv, R]`: what their codes stand for is quantized.

        They have not left the coordinates of the basis for that.
        """
        taken = {name: tensor if name in self._OF_ALL else take_rows(tensor, rows)
                 for name, tensor in self.tensors.items()}  # fmt: skip
        part, every = self._like(taken), Stretch(slice(0, rows.shape[2]), None)
        numbers = {
            kind: part._numbers(kind, every, coordinates)
            for kind, coordinates in (("key", self.basis.keys), ("value", self.basis.values))
        }
        return self._of_numbers(codec, self.basis, self.key_dim, self.value_dim, numbers, quantized)

    @property
    def blocks(self) -> int:
        """Rows share parameters with all others of their table, and with none in particular."""
        return 0

    def _like(self, tensors: dict[str, Tensor]) -> RotatedRows:
        return RotatedRows(self.codec, self.key_dim, self.value_dim, tensors, self.basis)

    def widths(self) -> dict[str, Tensor]:
        """Those that the basis asks for, by the names of their tensors."""
        codes = self.tensors["key_codes"]
        return {
            f"{kind}_widths": coordinates.widths(self.codec.bits_of(kind), tuple(codes.shape[:2]), codes.device)
            for kind, coordinates in (("key", self.basis.keys), ("value", self.basis.values))
        }

    # -- rows move, and are not decoded ------------------------------------------------------------------------------

    def append(self, other: PackedRows) -> None:
        for name, tensor in other.tensors.items():
            if name not in self._OF_ALL:
                self.tensors[name] = torch.cat([self.tensors[name], tensor], dim=2)

    def keep(self, rows: Tensor, empty: Tensor) -> None:
        if rows.shape[2] == len(self) and bool((rows == torch.arange(len(self), device=rows.device)).all()):
            return
        for name, tensor in self.tensors.items():
            if name not in self._OF_ALL:
                self.tensors[name] = take_rows(tensor, rows)

    # -- saved and restored ------------------------------------------------------------------------------------------

    def state(self) -> State:
        return State({"codec": asdict(self.codec), "rows": len(self)}, dict(self.tensors))

    @classmethod
    def restored_in(
        cls, saved: Saved, codec: RotatedCodec, heads: tuple[int, ...], key_dim: int, value_dim: int, basis: Basis
    ) -> RotatedRows:
        """The rows of a `state` of this codec. heads: `(B, Hkv)`. Raises CacheError."""
        rows, tensors = saved.count("rows"), {}
        for kind, coordinates in (("key", basis.keys), ("value", basis.values)):
            dim, bits = coordinates.dim, codec.bits_of(kind)
            tensors[f"{kind}_codes"] = saved.tensor(f"{kind}_codes", (*heads, rows, code_bytes(dim, bits)), torch.uint8)
            tensors[f"{kind}_scale"] = saved.tensor(f"{kind}_scale", (*heads, rows), torch.float16)
            if codec.clip_of(kind) is not None:
                tensors[f"{kind}_offset"] = saved.tensor(f"{kind}_offset", (*heads, rows), torch.float16)
            widths = saved.tensor(f"{kind}_widths", (*heads, dim // lanes_of(dim)), torch.uint8, within=(0, 8))
            # Kernels read codes wherever these widths lead.
            if not torch.equal(widths, coordinates.widths(bits, heads, widths.device)):
                raise saved.refused(f"has {kind}_widths that its basis does not have")
            tensors[f"{kind}_widths"] = widths
        return cls(codec, key_dim, value_dim, tensors, basis)

    # -- decoded, a few rows at a time -------------------------------------------------------------------------------

    def stretches(self) -> Iterator[Stretch]:
        size = self._most_rows()
        yield from (Stretch(slice(row, min(len(self), row + size)), None) for row in range(0, len(self), size))

    def decoded(self) -> tuple[Tensor, Tensor]:
        every = Stretch(slice(0, len(self)), None)
        return self.keys(every), self.values(every)

    def keys(self, stretch: Stretch) -> Tensor:
        return self.basis.keys.back(self._numbers("key", stretch, self.basis.keys))

    def values(self, stretch: Stretch) -> Tensor:
        return self.basis.values.back(self._numbers("value", stretch, self.basis.values))

    def _numbers(self, kind: str, stretch: Stretch, coordinates: Coordinates) -> Tensor:
        """z^, `[B, Hkv, rows, D]` float32."""
        places = Places.of(self.tensors[f"{kind}_widths"], coordinates.dim)
        codes = places.unpacked(self.tensors[f"{kind}_codes"][:, :, stretch.rows])
        numbers = places.numbers(codes, self.codec.is_normal(kind))
        numbers.mul_(self.tensors[f"{kind}_scale"][:, :, stretch.rows, None].float())
        offset = self.tensors.get(f"{kind}_offset")
        return numbers if offset is None else numbers.add_(offset[:, :, stretch.rows, None].float())

    # -- products with what the codes stand for ----------------------------------------------------------------------

    def dot_keys(self, queries: Tensor) -> Tensor:
        coordinates = self.basis.keys
        turned, means = coordinates.asked(queries)
        products = queries.new_empty(*queries.shape[:3], len(self))
        for stretch in self.stretches():
            numbers = self._numbers("key", stretch, coordinates)
            torch.matmul(turned, numbers.transpose(2, 3), out=products[..., stretch.rows])
        return products if means is None else products.add_(means)

    def sum_values(self, weights: Tensor) -> Tensor:
        total, coordinates = weights.new_zeros(*weights.shape[:3], self.value_dim), self.basis.values
        for stretch in self.stretches():
            total += torch.matmul(weights[..., stretch.rows], self._numbers("value", stretch, coordinates))
        return coordinates.added_up(total, weights.sum(-1, keepdim=True))
