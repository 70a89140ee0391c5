"""Rows of codes in the coordinates of a `Basis`, and products with what they stand for.

Components share widths by 16, as the spectrum of their head asks for. Of width w, component i of a row is

    code = round(z_i / (scale step_w) + (2^w - 1) / 2),     z^_i = scale step_w (code - (2^w - 1) / 2)

with step_w what is best for a Laplace distribution, and one scale a row, float16: of several around the root
mean square of z, the one whose codes come nearest, all components counted alike: weighed by the spectrum, outliers of
the largest have it all, and answers are worse by far. A component whose code is neither the first nor the last is off
by no more than half a step. Nothing else belongs to a row, and nothing to a block of rows: any row may go, or move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.state import Saved, State
from kvprune.table.basis import Basis, Coordinates, lanes_of
from kvprune.table.packed_rows import PackedRows, Stretch
from kvprune.table.quantize import Codec, is_width
from kvprune.table.rows import take_rows

# Best steps of 0 to 8 bits for a Laplace distribution of variance 1, whose tails are those of keys.
STEPS = (0.0, 1.4142, 1.0873, 0.7309, 0.4610, 0.2800, 0.1657, 0.0961, 0.0549)
# Codes of w bits are held as parts of 4, 4 or 2, and 1 bit, one after another, lowest bits first.
PARTS = ((0, 0, 0), (0, 0, 1), (0, 2, 0), (0, 2, 1), (4, 0, 0), (4, 0, 1), (4, 2, 0), (4, 2, 1), (4, 4, 0))
Quantizer = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""What `quantize` is."""

# A row's scale is one of these multiples of the root mean square of its components.
_SCALES = (0.75, 0.87, 1.0, 1.2, 1.5, 1.9, 2.5)
_LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class RotatedCodec(Codec):
    """How rows are quantized in the coordinates of a basis.

    bits: of a component of a key, on average, 2, 3, 4 or 8. value_bits: of a value; None for as many. What a `Codec`
    says of tokens and channels means nothing here.
    """

    value_bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_bits is not None and not is_width(self.value_bits):
            raise PolicyError(f"{self.value_bits!r} bits are not supported: choose 2, 3, 4 or 8.")

    def bits_of(self, kind: str) -> int:
        """kind: "key" or "value"."""
        return self.bits if kind == "key" or self.value_bits is None else self.value_bits

    def row_bytes(self, key_dim: int, value_dim: int) -> int:
        return code_bytes(key_dim, self.bits_of("key")) + code_bytes(value_dim, self.bits_of("value")) + 4

    def block_bytes(self, key_dim: int, value_dim: int) -> int:
        """What a table holds of this codec beside rows: widths, and the basis."""
        dims = (key_dim, value_dim)
        return sum(dim * dim + 6 * dim + 5 * (dim // lanes_of(dim)) for dim in dims)


def code_bytes(dim: int, bits: int) -> int:
    """Bytes of the components of a row, `bits` each on average."""
    lanes = lanes_of(dim)
    return sum(-(-lanes * part // 8) for part in PARTS[bits]) * (dim // lanes)


class RotatedRows(PackedRows):
    """Quantized keys and values of a layer, `R` rows per KV head, in the coordinates of a basis.

    key_codes [B, Hkv, R, bytes] uint8      value_codes [B, Hkv, R, bytes] uint8
    key_scale, value_scale [B, Hkv, R] float16
    key_widths [B, Hkv, groups] uint8       value_widths [B, Hkv, groups] uint8, of all rows
    """

    _OF_ALL = ("key_widths", "value_widths")

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
        tensors: dict[str, Tensor] = {}
        for kind, rows, coordinates in (("key", keys, basis.keys), ("value", values, basis.values)):
            rows = torch.nan_to_num(rows.float(), nan=0.0).clamp_(-_LARGEST, _LARGEST)
            widths = coordinates.widths(codec.bits_of(kind), tuple(rows.shape[:2]), rows.device)
            codes, scale = (quantized or quantize)(
                coordinates.of(rows), widths, code_bytes(coordinates.dim, codec.bits_of(kind))
            )
            tensors |= {f"{kind}_codes": codes, f"{kind}_scale": scale, f"{kind}_widths": widths}
        return cls(codec, keys.shape[3], values.shape[3], tensors, basis)

    @property
    def blocks(self) -> int:
        """Rows share parameters with all others of their table, and with none in particular."""
        return 0

    def _like(self, tensors: dict[str, Tensor]) -> RotatedRows:
        return RotatedRows(self.codec, self.key_dim, self.value_dim, tensors, self.basis)  # type: ignore[arg-type]

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
        places = _Places.of(self.tensors[f"{kind}_widths"], coordinates.dim)
        codes = places.unpacked(self.tensors[f"{kind}_codes"][:, :, stretch.rows])
        return places.numbers(codes).mul_(self.tensors[f"{kind}_scale"][:, :, stretch.rows, None].float())

    # -- products with what the codes stand for ----------------------------------------------------------------------

    def dot_keys(self, queries: Tensor) -> Tensor:
        """q.(m + M z) = q.m + (M^T q).z"""
        coordinates = self.basis.keys
        turned = torch.matmul(queries, coordinates.turning(queries.device))
        products = queries.new_empty(*queries.shape[:3], len(self))
        for stretch in self.stretches():
            numbers = self._numbers("key", stretch, coordinates)
            torch.matmul(turned, numbers.transpose(2, 3), out=products[..., stretch.rows])
        if coordinates.mean is not None:
            products += torch.matmul(queries, coordinates.mean.float()[..., None])
        return products

    def sum_values(self, weights: Tensor) -> Tensor:
        """sum_i w_i (m + M z_i) = m sum_i w_i + M sum_i w_i z_i"""
        total, coordinates = weights.new_zeros(*weights.shape[:3], self.value_dim), self.basis.values
        for stretch in self.stretches():
            total += torch.matmul(weights[..., stretch.rows], self._numbers("value", stretch, coordinates))
        total = torch.matmul(total, coordinates.turning(weights.device).transpose(-1, -2))
        if coordinates.mean is not None:
            total += weights.sum(-1, keepdim=True) * coordinates.mean.float()[:, :, None]
        return total


@lru_cache(maxsize=16)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Steps, and bits of the three parts, by width."""
    return torch.tensor(STEPS, device=device), torch.tensor(PARTS, device=device)


@dataclass(frozen=True)
class _Places:
    """Where the components of a row are. All `[B, Hkv, 1, D]`, those of parts with a dimension of 3 in front.

    byte: of a row, int64. shift: within it; mask: of so many bits; left: how far up in the code, uint8.
    step: of a component, float32; middle: (2^w - 1) / 2.
    """

    byte: Tensor
    shift: Tensor
    mask: Tensor
    left: Tensor
    step: Tensor
    middle: Tensor

    @classmethod
    def of(cls, widths: Tensor, dim: int) -> _Places:
        """widths: `[B, Hkv, groups]` uint8."""
        lanes = lanes_of(dim)
        steps, parts = _tables(widths.device)
        index = widths.long()
        held = parts[index].movedim(-1, 0)  # [3, B, Hkv, groups]
        size = -(held * -lanes // 8)  # bytes of each part of each group, rounded up
        of_group = size.sum(0)
        first = (of_group.cumsum(-1) - of_group) + (size.cumsum(0) - size)
        bit = held[..., None] * torch.arange(lanes, device=widths.device)
        byte = (first[..., None] + bit // 8).flatten(-2)
        left = (held.cumsum(0) - held)[..., None].expand_as(bit).flatten(-2)
        mask = ((1 << held) - 1)[..., None].expand_as(bit).flatten(-2)
        width = index[..., None].expand(*index.shape, lanes).flatten(-2)
        middle = ((1 << width).float() - 1) / 2
        shift, mask, left = (each.unsqueeze(3).to(torch.uint8) for each in ((bit % 8).flatten(-2), mask, left))
        return cls(byte.unsqueeze(3), shift, mask, left, steps[width].unsqueeze(2), middle.unsqueeze(2))

    def unpacked(self, packed: Tensor) -> Tensor:
        """Codes `[B, Hkv, r, D]` uint8 of rows `[B, Hkv, r, bytes]`."""
        shape = (*packed.shape[:3], self.byte.shape[-1])
        last = max(packed.shape[3] - 1, 0)  # where a part has no bits, its place may be behind the row
        found = torch.zeros(shape, dtype=torch.uint8, device=packed.device)
        for byte, shift, mask, left in zip(self.byte, self.shift, self.mask, self.left, strict=True):
            found |= (packed.gather(3, byte.clamp(max=last).expand(shape)) >> shift & mask) << left
        return found

    def packed(self, codes: Tensor, size: int) -> Tensor:
        """The other way round: `size` bytes a row."""
        made = torch.zeros(*codes.shape[:3], size, dtype=torch.int32, device=codes.device)
        for byte, shift, mask, left in zip(self.byte, self.shift, self.mask, self.left, strict=True):
            part = (codes >> left & mask) << shift
            made.scatter_add_(3, byte.clamp(max=size - 1).expand(codes.shape), part.int())
        return made.to(torch.uint8)

    def numbers(self, codes: Tensor) -> Tensor:
        """What codes stand for in a row of scale 1, float32."""
        return (codes - self.middle).mul_(self.step)


def scales_of(numbers: Tensor) -> Tensor:
    """The scales to try for rows `[B, Hkv, R, D]`, float16 `[B, Hkv, R, so many]`."""
    size = numbers.square().mean(-1, keepdim=True).sqrt()
    return (size * torch.tensor(_SCALES, device=size.device)).clamp(max=_LARGEST).half()


def quantize(numbers: Tensor, widths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes `[B, Hkv, R, size]` uint8, and scales `[B, Hkv, R]` float16, of z `[B, Hkv, R, D]` float32.

    widths: `[B, Hkv, groups]` uint8. size: bytes of a row.
    """
    places = _Places.of(widths, numbers.shape[3])
    counted, most = (places.step > 0).float(), 2 * places.middle
    found, least = torch.zeros_like(numbers), numbers.new_full((*numbers.shape[:3], 1), torch.inf)
    tried, scale = scales_of(numbers), numbers.new_zeros((*numbers.shape[:3], 1), dtype=torch.float16)
    for each in tried.split(1, dim=-1):
        steps = places.step * each.float()
        codes = torch.where(steps > 0, numbers / steps, 0.0).add_(places.middle).round_()
        codes = torch.minimum(codes.clamp_(min=0), most)
        off = (numbers - places.numbers(codes) * each.float()).mul_(counted)  # what has no bits costs the same
        cost = off.square_().sum(-1, keepdim=True)
        better = cost < least
        found, scale = torch.where(better, codes, found), torch.where(better, each, scale)
        least = torch.minimum(cost, least)
    return places.packed(found.to(torch.uint8), size), scale.squeeze(3)
