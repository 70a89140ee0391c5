"""Rows of codes that stand for keys and values, and products with what they stand for."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.state import Saved, State
from kvprune.table.quantize import LARGEST, Codec, channel_scales, pack, packed_bytes, quantize, unpack
from kvprune.table.rows import take_rows

# A block of decoded rows should stay in the cache of the processor.
_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


@dataclass(frozen=True)
class Run:
    """Rows `start .. stop - 1`, of which every head has `each` to a block, from block `block` on."""

    start: int
    stop: int
    block: int
    each: int

    @property
    def blocks(self) -> int:
        return (self.stop - self.start) // self.each


@dataclass(frozen=True)
class Stretch:
    """Rows to decode together. blocks: those they belong to, alike many rows of each; None where that is not so."""

    rows: slice
    blocks: slice | None


class PackedRows:
    """Quantized keys and values of a layer, `R` rows per KV head, of one codec.

    Codes and the parameters of a value belong to a row and move with it; the parameters of key channels belong to a
    block of rows that were quantized together, which each row knows by number. What is once written never changes.

        key_codes [B, Hkv, R, bytes] uint8      value_codes [B, Hkv, R, bytes] uint8
        value_scale, value_zero_point [B, Hkv, R, groups] float16      block [B, Hkv, R], while there are several
        key_scale, key_zero_point [B, Hkv, blocks, D] float16          channel_scale [B, Hkv, blocks, Dv] float16
    """

    _OF_BLOCKS = ("key_scale", "key_zero_point", "channel_scale")

    def __init__(
        self, codec: Codec, key_dim: int, value_dim: int, tensors: dict[str, Tensor], runs: tuple[Run, ...]
    ) -> None:
        self.codec = codec
        self.key_dim, self.value_dim = key_dim, value_dim
        self.tensors = tensors
        self.runs = runs
        """The first rows, as far as no look at their block numbers is needed."""

    @classmethod
    def encode(cls, codec: Codec, keys: Tensor, values: Tensor, empty: Tensor | None = None) -> PackedRows:
        """Quantize rows: keys `[B, Hkv, R, D]`, values `[B, Hkv, R, Dv]`, in the order of their positions.

        empty: bool `[B, Hkv, R]`, empty rows, which do not influence the parameters of others.
        """
        key_dim, value_dim = keys.shape[3], values.shape[3]
        rows = keys.shape[2]
        tokens = min(codec.tokens or rows, rows)  # a single block that is not full is not padded
        blocks = -(-rows // tokens)
        missing = blocks * tokens - rows
        if missing and empty is None:
            empty = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)

        def in_blocks(rows: Tensor, filling: float) -> Tensor:
            rows = F.pad(rows, (0, 0, 0, missing), value=filling) if missing else rows
            return rows.unflatten(2, (blocks, tokens))

        keys, values = in_blocks(_finite(keys), 0.0), in_blocks(_finite(values), 0.0)
        nothing = None if empty is None else in_blocks(empty[..., None], True)

        codes, scale, zero_point = quantize(keys, codec.bits, 3, nothing)
        tensors = {
            "key_codes": pack(codes.flatten(2, 3), codec.bits),
            "key_scale": scale.squeeze(3),
            "key_zero_point": zero_point.squeeze(3),
        }
        if codec.separable:
            sizes = values.abs() if nothing is None else values.abs().masked_fill_(nothing, 0.0)
            channel_scale = channel_scales(sizes.amax(3, keepdim=True))
            values = values / channel_scale.float()
            tensors["channel_scale"] = channel_scale.squeeze(3)
        channels = min(codec.channels or value_dim, value_dim)
        groups = -(-value_dim // channels)
        values = values.flatten(2, 3)
        if groups * channels > value_dim:  # the last group is filled up with copies of its last number
            filling = values[..., -1:].expand(*values.shape[:-1], groups * channels - value_dim)
            values = torch.cat([values, filling], dim=-1)
        codes, scale, zero_point = quantize(values.unflatten(3, (groups, channels)), codec.bits, 4)
        tensors["value_codes"] = pack(codes.flatten(3)[..., :value_dim].contiguous(), codec.bits)
        tensors["value_scale"], tensors["value_zero_point"] = scale.squeeze(4), zero_point.squeeze(4)
        if missing:  # of a single head, the slice is contiguous, and would keep what it is a slice of
            tensors = {name: tensor if name in cls._OF_BLOCKS
                       else tensor[:, :, :rows].clone(memory_format=torch.contiguous_format)
                       for name, tensor in tensors.items()}  # fmt: skip
        return cls.in_blocks(codec, key_dim, value_dim, tensors)

    @classmethod
    def in_blocks(cls, codec: Codec, key_dim: int, value_dim: int, tensors: dict[str, Tensor]) -> PackedRows:
        """Rows that were quantized together, `codec.tokens` to a block, from their tensors but for block numbers."""
        batch, heads, rows = tensors["key_codes"].shape[:3]
        tokens = codec.tokens or rows
        whole = rows - rows % tokens
        runs = [Run(0, whole, 0, tokens)] if whole else []
        if rows > whole:
            runs.append(Run(whole, rows, whole // tokens, rows - whole))
        blocks = tensors["key_scale"].shape[2]
        if blocks > 1:
            number = torch.arange(blocks, device=tensors["key_codes"].device).repeat_interleave(tokens)[:rows]
            tensors["block"] = number.to(_number_type(blocks)).expand(batch, heads, -1).contiguous()
        return cls(codec, key_dim, value_dim, tensors, tuple(runs))

    def __len__(self) -> int:
        return self.tensors["key_codes"].shape[2]

    @property
    def blocks(self) -> int:
        return self.tensors["key_scale"].shape[2]

    @property
    def code_nbytes(self) -> int:
        return self.tensors["key_codes"].nbytes + self.tensors["value_codes"].nbytes

    # -- rows move, and are not decoded ------------------------------------------------------------------------------

    def append(self, other: PackedRows) -> None:
        """Add the rows of other blocks behind these."""
        if self.runs and self.runs[-1].stop == len(self):
            rows, last = len(self), self.runs[-1]
            for run in other.runs:
                moved = Run(run.start + rows, run.stop + rows, run.block + self.blocks, run.each)
                if last.each == moved.each and last.stop == moved.start and last.block + last.blocks == moved.block:
                    self.runs = self.runs[:-1] + (Run(last.start, moved.stop, last.block, last.each),)
                else:
                    self.runs += (moved,)
                last = self.runs[-1]
        blocks = self.blocks + other.blocks
        mine, theirs = self._block_numbers(0, blocks), other._block_numbers(self.blocks, blocks)
        for name, tensor in other.tensors.items():
            if name != "block":
                self.tensors[name] = torch.cat([self.tensors[name], tensor], dim=2)
        self.tensors["block"] = torch.cat([mine, theirs], dim=2)

    def _block_numbers(self, first: int, blocks: int) -> Tensor:
        """Block of every row, `[B, Hkv, R]`, counted from `first`, in a type for so many blocks."""
        if "block" in self.tensors:
            return self.tensors["block"].to(_number_type(blocks)) + first
        shape = self.tensors["key_codes"].shape[:3]
        return torch.full(shape, first, dtype=_number_type(blocks), device=self.tensors["key_codes"].device)

    def keep(self, rows: Tensor, empty: Tensor) -> None:
        """Keep these rows, in this order. rows: LongTensor `[B, Hkv, R']`. empty: bool, rows that are empty now.

        Parameters of blocks that no row belongs to any more are freed.
        """
        if rows.shape[2] == len(self) and bool((rows == torch.arange(len(self), device=rows.device)).all()):
            return
        for name, tensor in self.tensors.items():
            if name not in self._OF_BLOCKS:
                self.tensors[name] = take_rows(tensor, rows)
        if "block" not in self.tensors:
            self.runs = (Run(0, len(self), 0, len(self)),) if len(self) else ()
            return
        block = self.tensors["block"].long()
        first = int(((block == 0) & ~empty).sum(-1).min())  # rows are in order, those of the first block lead
        self.runs = (Run(0, first, 0, first),) if first else ()
        used = torch.zeros(self.blocks, dtype=torch.bool, device=block.device)
        used[block[~empty]] = True
        if not bool(used.all()):
            number = (used.cumsum(0) - 1).clamp(min=0)
            for name in self._OF_BLOCKS:
                if name in self.tensors:
                    self.tensors[name] = self.tensors[name][:, :, used]
            self.tensors["block"] = number[block].to(_number_type(self.blocks))

    def select_batch(self, sequences: Tensor) -> PackedRows:
        return self._like({name: tensor.index_select(0, sequences) for name, tensor in self.tensors.items()})

    def of_head(self, sequence: int, head: int) -> PackedRows:
        """The rows of one sequence and head, in storage of their own."""
        part = (slice(sequence, sequence + 1), slice(head, head + 1))
        return self._like({name: tensor[part].clone() for name, tensor in self.tensors.items()})

    def clone(self) -> PackedRows:
        return self._like({name: tensor.clone() for name, tensor in self.tensors.items()})

    def _like(self, tensors: dict[str, Tensor]) -> PackedRows:
        return PackedRows(self.codec, self.key_dim, self.value_dim, tensors, self.runs)

    # -- saved and restored ------------------------------------------------------------------------------------------

    def state(self) -> State:
        facts = {"codec": asdict(self.codec), "rows": len(self), "blocks": self.blocks}
        return State({**facts, "runs": [list(astuple(run)) for run in self.runs]}, dict(self.tensors))

    @classmethod
    def _row_shapes(cls, codec: Codec, key_dim: int, value_dim: int) -> dict[str, int]:
        """How many numbers a row has in the tensors of rows, block numbers left out."""
        groups = -(-value_dim // min(codec.channels or value_dim, value_dim))
        return {
            "key_codes": packed_bytes(key_dim, codec.bits),
            "value_codes": packed_bytes(value_dim, codec.bits),
            "value_scale": groups,
            "value_zero_point": groups,
        }

    @classmethod
    def restored(cls, saved: Saved, codec: Codec, heads: tuple[int, ...], key_dim: int, value_dim: int) -> PackedRows:
        """The rows of a `state` of this codec. heads: `(B, Hkv)`. Raises CacheError."""
        rows, blocks = saved.count("rows"), saved.count("blocks", least=1)
        expected = {name: (rows, size) for name, size in cls._row_shapes(codec, key_dim, value_dim).items()}
        expected |= {"key_scale": (blocks, key_dim), "key_zero_point": (blocks, key_dim)}
        if codec.separable:
            expected["channel_scale"] = (blocks, value_dim)
        tensors = {
            name: saved.tensor(name, (*heads, *shape), torch.uint8 if name.endswith("codes") else torch.float16)
            for name, shape in expected.items()
        }
        if blocks > 1 or saved.has("block"):  # kernels read parameters wherever these numbers point
            numbers = _number_type(blocks)
            tensors["block"] = saved.tensor("block", (*heads, rows), numbers, within=(0, blocks - 1))
        return cls(codec, key_dim, value_dim, tensors, _restored_runs(saved, rows, blocks))

    # -- decoded, a few rows at a time -------------------------------------------------------------------------------

    def stretches(self) -> Iterator[Stretch]:
        """All rows, in stretches that are small once decoded."""
        first, size = 0, self._most_rows()
        for run in self.runs:
            many = max(1, size // run.each)  # blocks at a time, or a part of one
            for block in range(0, run.blocks, many):
                blocks = slice(run.block + block, run.block + min(run.blocks, block + many))
                start, stop = run.start + block * run.each, min(run.stop, run.start + (block + many) * run.each)
                yield from (Stretch(slice(row, min(stop, row + size)), blocks) for row in range(start, stop, size))
            first = run.stop
        yield from (Stretch(slice(row, min(len(self), row + size)), None) for row in range(first, len(self), size))

    def _most_rows(self) -> int:
        """Rows of a stretch."""
        codes = self.tensors["key_codes"]
        limit = _BLOCK_BYTES.get(codes.device.type, _BLOCK_BYTES["cpu"])
        return max(1, limit // (4 * codes.shape[0] * codes.shape[1] * max(self.key_dim, self.value_dim, 1)))

    def decoded(self) -> tuple[Tensor, Tensor]:
        """All keys and all values, by the block number of each row: to look at, and to test the faster ways with."""
        every = Stretch(slice(0, len(self)), None if "block" in self.tensors else slice(0, self.blocks))
        return self.keys(every), self.values(every)

    def keys(self, stretch: Stretch) -> Tensor:
        """Decoded keys, `[B, Hkv, rows, D]` float32."""
        codes = self._codes("key_codes", stretch, self.key_dim)
        self._by_block(codes, stretch, "key_scale", torch.Tensor.mul_)
        return self._by_block(codes, stretch, "key_zero_point", torch.Tensor.add_)

    def values(self, stretch: Stretch) -> Tensor:
        """Decoded values, `[B, Hkv, rows, Dv]` float32."""
        codes = self._codes("value_codes", stretch, self.value_dim)
        codes.mul_(self._by_channel("value_scale", stretch)).add_(self._by_channel("value_zero_point", stretch))
        return self._by_block(codes, stretch, "channel_scale", torch.Tensor.mul_) if self.codec.separable else codes

    def _codes(self, name: str, stretch: Stretch, count: int) -> Tensor:
        return unpack(self.tensors[name][:, :, stretch.rows], self.codec.bits, count).float()

    def _by_block(self, rows: Tensor, stretch: Stretch, name: str, operation: Callable[..., Tensor]) -> Tensor:
        """Combine rows `[B, Hkv, r, D]` in place with the parameters of their blocks."""
        parameters = self.tensors[name]
        if stretch.blocks is None:
            block = self.tensors["block"][:, :, stretch.rows].long()
            operation(rows, parameters.gather(2, block[..., None].expand(-1, -1, -1, parameters.shape[3])))
        else:
            of_blocks = parameters[:, :, stretch.blocks].unsqueeze(3)
            operation(rows.unflatten(2, (of_blocks.shape[2], -1)), of_blocks)
        return rows

    def _by_channel(self, name: str, stretch: Stretch) -> Tensor:
        """Parameters of groups of channels, for channels: `[B, Hkv, rows, Dv or 1]`."""
        parameters = self.tensors[name][:, :, stretch.rows]
        if parameters.shape[3] == 1:
            return parameters
        return parameters.repeat_interleave(self.codec.channels, dim=3)[..., : self.value_dim]  # type: ignore[arg-type]

    # -- products with what the codes stand for ----------------------------------------------------------------------

    def dot_keys(self, queries: Tensor) -> Tensor:
        """q.k of a few queries `[B, Hkv, M, D]` float32 with every row, `[B, Hkv, M, R]` float32.

        Of rows of one block, the parameters go into the queries: q.(s c + z) = (q s).c + q.z.
        """
        products = queries.new_empty(*queries.shape[:3], len(self))
        for stretch in self.stretches():
            if stretch.blocks is None or stretch.blocks.stop - stretch.blocks.start > 1:
                torch.matmul(queries, self.keys(stretch).transpose(2, 3), out=products[..., stretch.rows])
                continue
            scale, zero_point = (
                self.tensors[f"key_{name}"][:, :, stretch.blocks].float() for name in ("scale", "zero_point")
            )
            codes = self._codes("key_codes", stretch, self.key_dim)
            product = torch.matmul(queries * scale, codes.transpose(2, 3))
            products[..., stretch.rows] = product.add_(torch.matmul(queries, zero_point.transpose(2, 3)))
        return products

    def sum_values(self, weights: Tensor) -> Tensor:
        """Weighted sums of the values, weights `[B, Hkv, M, R]` float32 -> `[B, Hkv, M, Dv]` float32.

        Of rows of one block, the parameters of tokens go into the weights, and those of channels into the sum.
        """
        total = weights.new_zeros(*weights.shape[:3], self.value_dim)
        one_group = self.tensors["value_scale"].shape[3] == 1
        for stretch in self.stretches():
            of_rows = weights[..., stretch.rows]
            several = stretch.blocks is None or stretch.blocks.stop - stretch.blocks.start > 1
            if not one_group or (several and self.codec.separable):
                total += torch.matmul(of_rows, self.values(stretch))
                continue
            scale, zero_point = (
                self.tensors[f"value_{name}"][:, :, stretch.rows].float() for name in ("scale", "zero_point")
            )
            codes = self._codes("value_codes", stretch, self.value_dim)
            part = torch.matmul(of_rows * scale.transpose(2, 3), codes).add_(torch.matmul(of_rows, zero_point))
            if self.codec.separable:
                part *= self.tensors["channel_scale"][:, :, stretch.blocks]
            total += part
        return total


def _restored_runs(saved: Saved, rows: int, blocks: int) -> tuple[Run, ...]:
    """Runs that follow one another, from the first row on, with no more rows and blocks than there are."""
    listed = saved.fact("runs", list)
    runs: list[Run] = []
    for start, stop, block, each in saved.many_counts("runs", width=4):
        begins = runs[-1].stop if runs else 0
        if start != begins or stop > rows or not 0 < each <= stop - start or (stop - start) % each:
            raise saved.refused(f"has runs {reprlib.repr(listed)} of {rows} rows")
        runs.append(Run(start, stop, block, each))
        if block + runs[-1].blocks > blocks:
            raise saved.refused(f"has runs {reprlib.repr(listed)} of {blocks} blocks")
    return tuple(runs)


def _finite(numbers: Tensor) -> Tensor:
    return torch.nan_to_num(numbers.float(), nan=0.0).clamp_(-LARGEST, LARGEST)


def _number_type(count: int) -> torch.dtype:
    return torch.uint8 if count <= 1 << 8 else torch.int16 if count <= 1 << 15 else torch.int32
