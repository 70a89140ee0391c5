"""Numbers in the coordinates of a basis as codes of a few bits: three ways to quantize, and where the bits are.

A number z_i of a row, whose component has w bits, is found again from its code as

    z^_i = scale level_w(code) + offset

with one scale a row, and one offset, or none. Without a word on them, levels are even, step_w apart around 0, with the
step that is best for a Laplace distribution. The ways differ in how a row gets its scale:

    nearest     of several around the root mean square, the one whose codes come nearest, all components counted alike:
                weighed by the spectrum, outliers of the largest have it all, and answers are worse by far
    normal      the root mean square; levels are those of Lloyd and Max for a normal distribution, which components of
                a rotated row have nearly (TurboQuant, arXiv 2504.19874)
    clipped     such that the even levels reach from the least to the largest number, once those beyond a quantile of
                |z| are cut off at it (OSCAR, arXiv 2605.17757); offset is the middle of these

A number between two levels is off by no more than half of what they are apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvprune.table.basis import bits_in_all, lanes_of
from kvprune.table.quantize import rounded_down

# Best steps of 0 to 8 bits for a Laplace distribution of variance 1, whose tails are those of keys.
STEPS = (0.0, 1.4142, 1.0873, 0.7309, 0.4610, 0.2800, 0.1657, 0.0961, 0.0549)
# Codes of w bits are held as parts of 4, 4 or 2, and 1 bit, one after another, lowest bits first.
PARTS = ((0, 0, 0), (0, 0, 1), (0, 2, 0), (0, 2, 1), (4, 0, 0), (4, 0, 1), (4, 2, 0), (4, 2, 1), (4, 4, 0))
Quantizer = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""What `nearest` is."""

# A row's scale is one of these multiples of the root mean square of its components.
_SCALES = (0.75, 0.87, 1.0, 1.2, 1.5, 1.9, 2.5)
LARGEST = 65504.0  # of float16
_MOST_LEVELS = 256
_ROUNDS = 200  # of Lloyd's iteration, from where it has little left to do


def code_bytes(dim: int, bits: float) -> int:
    """Bytes of the components of a row, `bits` each on average."""
    lanes, in_all = lanes_of(dim), bits_in_all(dim, bits)
    if lanes % 8 == 0:  # every bit of a group takes whole bytes
        return in_all * lanes // 8
    return sum(-(-lanes * part // 8) for part in PARTS[in_all])  # there is one group


# -- levels ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def normal_levels(bits: int) -> tuple[float, ...]:
    """The 2**bits levels with the least squared error for a normal distribution of variance 1, ascending.

    Each is the mean of what is nearer to it than to any other (Lloyd 1957, Max 1960). Where levels are many, they lie
    as the cube root of the density does (Panter and Dite 1951), which is where the iteration begins.
    """
    count = 1 << bits
    with torch.inference_mode(False):
        normal = torch.distributions.Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu"))
        levels = normal.icdf((torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count) * 3**0.5
        for _ in range(_ROUNDS):
            ends = torch.nn.functional.pad((levels[1:] + levels[:-1]) / 2, (1, 0), value=-torch.inf)
            ends = torch.nn.functional.pad(ends, (0, 1), value=torch.inf)
            density = (-(ends**2) / 2).exp() / (2 * torch.pi) ** 0.5
            levels = -density.diff() / normal.cdf(ends).diff()
        return tuple(((levels - levels.flip(0)) / 2).tolist())


@lru_cache(maxsize=16)
def normal_table(device: torch.device) -> Tensor:
    """`normal_levels` of every width, 0 to 8, `[9, 256]` float32. Not to be written to."""
    with torch.inference_mode(False):
        made = torch.zeros(len(STEPS), _MOST_LEVELS, dtype=torch.float32, device="cpu")
        for width in range(1, len(STEPS)):
            made[width, : 1 << width] = torch.tensor(normal_levels(width), dtype=torch.float32, device="cpu")
        return made.to(device)


@lru_cache(maxsize=16)
def steps_table(device: torch.device) -> Tensor:
    """STEPS by width, float32. Not to be written to."""
    with torch.inference_mode(False):
        return torch.tensor(STEPS, dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def _parts_table(device: torch.device) -> Tensor:
    """Bits of the three parts, by width."""
    with torch.inference_mode(False):
        return torch.tensor(PARTS, device=device)


# -- where the bits are ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where the components of a row are. All `[B, Hkv, 1, D]`, those of parts with a dimension of 3 in front.

    byte: of a row, int64. shift: within it; mask: of so many bits; left: how far up in the code, uint8.
    width: w, int64; step: of a component, float32; middle: (2^w - 1) / 2.
    """

    byte: Tensor
    shift: Tensor
    mask: Tensor
    left: Tensor
    width: Tensor
    step: Tensor
    middle: Tensor

    @classmethod
    def of(cls, widths: Tensor, dim: int) -> Places:
        """widths: `[B, Hkv, groups]` uint8."""
        lanes = lanes_of(dim)
        steps, index = steps_table(widths.device), widths.long()
        held = _parts_table(widths.device)[index].movedim(-1, 0)  # [3, B, Hkv, groups]
        size = -(held * -lanes // 8)  # bytes of each part of each group, rounded up
        of_group = size.sum(0)
        first = (of_group.cumsum(-1) - of_group) + (size.cumsum(0) - size)
        bit = held[..., None] * torch.arange(lanes, device=widths.device)
        byte = (first[..., None] + bit // 8).flatten(-2)
        left = (held.cumsum(0) - held)[..., None].expand_as(bit).flatten(-2)
        mask = ((1 << held) - 1)[..., None].expand_as(bit).flatten(-2)
        width = index[..., None].expand(*index.shape, lanes).flatten(-2)
        middle = (((1 << width).float() - 1) / 2).unsqueeze(2)
        shift, mask, left = (each.unsqueeze(3).to(torch.uint8) for each in ((bit % 8).flatten(-2), mask, left))
        return cls(byte.unsqueeze(3), shift, mask, left, width.unsqueeze(2), steps[width].unsqueeze(2), middle)

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

    def numbers(self, codes: Tensor, normal: bool = False) -> Tensor:
        """What codes stand for in a row of scale 1 and no offset, float32. normal: which levels."""
        if normal:
            return normal_table(codes.device)[self.width, codes.long()]
        return (codes - self.middle).mul_(self.step)


# -- from numbers to codes ---------------------------------------------------------------------------------------------


def scales_of(numbers: Tensor) -> Tensor:
    """The scales that `nearest` tries for rows `[B, Hkv, R, D]`, float16 `[B, Hkv, R, so many]`."""
    return (root_mean_square(numbers) * torch.tensor(_SCALES, device=numbers.device)).clamp(max=LARGEST).half()


def root_mean_square(numbers: Tensor) -> Tensor:
    return numbers.square().mean(-1, keepdim=True).sqrt()


def nearest(numbers: Tensor, widths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes `[B, Hkv, R, size]` uint8, and scales `[B, Hkv, R]` float16, of z `[B, Hkv, R, D]` float32.

    widths: `[B, Hkv, groups]` uint8. size: bytes of a row.
    """
    places = Places.of(widths, numbers.shape[3])
    counted = (places.step > 0).float()
    found, least = torch.zeros_like(numbers), numbers.new_full((*numbers.shape[:3], 1), torch.inf)
    tried, scale = scales_of(numbers), numbers.new_zeros((*numbers.shape[:3], 1), dtype=torch.float16)
    for each in tried.split(1, dim=-1):
        codes = _even(numbers, places, each.float())
        off = (numbers - places.numbers(codes) * each.float()).mul_(counted)  # what has no bits costs the same
        cost = off.square_().sum(-1, keepdim=True)
        better = cost < least
        found, scale = torch.where(better, codes, found), torch.where(better, each, scale)
        least = torch.minimum(cost, least)
    return places.packed(found.to(torch.uint8), size), scale.squeeze(3)


def normal(numbers: Tensor, widths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The same, at the levels that are best for a normal distribution."""
    places, table = Places.of(widths, numbers.shape[3]), normal_table(numbers.device)
    scale = root_mean_square(numbers).clamp(max=LARGEST).half()
    one = torch.where(scale > 0, numbers / scale.float(), 0.0)
    found = torch.zeros_like(numbers, dtype=torch.uint8)
    for width in widths.unique().tolist():
        levels = table[width, : 1 << width]
        codes = torch.bucketize(one, (levels[1:] + levels[:-1]) / 2)
        found = torch.where(places.width == width, codes.to(torch.uint8), found)
    return places.packed(found, size), scale.squeeze(3)


def clipped(numbers: Tensor, widths: Tensor, size: int, quantile: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and offsets `[B, Hkv, R]` float16: even levels from end to end, the ends cut off at a quantile of |z|.

    quantile: from 0 to 1; between two numbers of a row, it is where a line from one to the other is.
    """
    places = Places.of(widths, numbers.shape[3])
    sizes, last = numbers.abs().sort(-1).values, numbers.shape[3] - 1
    below = min(int(quantile * last), max(last - 1, 0))
    most = torch.lerp(sizes[..., below, None], sizes[..., min(below + 1, last), None], quantile * last - below)
    numbers = torch.minimum(torch.maximum(numbers, -most), most)
    least, largest = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    offset = ((least + largest) / 2).clamp(-LARGEST, LARGEST).half()
    reach = torch.maximum(largest - offset.float(), offset.float() - least)  # of levels, from their middle
    widest = (places.middle * places.step).masked_fill(places.width == 0, torch.inf).amin(-1, keepdim=True)
    scale = -rounded_down(-(reach / widest).clamp(max=LARGEST))
    codes = _even(numbers - offset.float(), places, scale.float()).to(torch.uint8)
    return places.packed(codes, size), scale.squeeze(3), offset.squeeze(3)


def _even(numbers: Tensor, places: Places, scale: Tensor) -> Tensor:
    """Codes of the even levels of rows, float32; scale: `[B, Hkv, R, 1]` float32."""
    steps = places.step * scale
    codes = torch.where(steps > 0, numbers / steps, 0.0).add_(places.middle).round_()
    return torch.minimum(codes.clamp_(min=0), 2 * places.middle)
