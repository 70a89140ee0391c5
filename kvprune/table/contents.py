"""`Contents`: what is in a table, and how many bytes it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvprune.errors import CacheError
from kvprune.table import packing
from kvprune.table.basis import Basis
from kvprune.table.operations import TORCH_ROWS, RowOperations
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec
from kvprune.table.rows import EMPTY, those
from kvprune.table.storage import Storage


class Contents:
    """The part of a `TokenTable` that only looks. Nothing here changes the table."""

    packed: list[PackedRows]
    basis: Basis | None
    dense: bool
    _kernels: RowOperations
    _storage: Storage
    _most_rows: int

    is_ragged = False
    """Whether heads lie apart, each with rows of its own number."""

    @property
    def kernels(self) -> RowOperations:
        """What moves rows: PyTorch's where torch.compile makes kernels of its own of them."""
        return TORCH_ROWS if torch.compiler.is_compiling() else self._kernels

    @property
    def batch_size(self) -> int:
        return self._storage.batch_size

    @property
    def kv_heads(self) -> int:
        return self._storage.kv_heads

    @property
    def length(self) -> int:
        """Slots in use."""
        return self._storage.length

    @property
    def packed_length(self) -> int:
        """Slots whose keys and values are codes: the first ones."""
        return self._storage.packed_length

    @property
    def capacity(self) -> int:
        """Slots in use and spare ones."""
        return self._storage.capacity

    @property
    def rows(self) -> int:
        """Most rows that a KV head may hold: slots in use, without the holes that evicted rows left."""
        return self._most_rows if self.packed else self.length

    @property
    def keys(self) -> Tensor:
        """Of the rows in full precision, `[B, Hkv, length - packed_length, D]`: a view."""
        return self._storage.rows("keys")

    @property
    def values(self) -> Tensor:
        """Of the rows in full precision, `[B, Hkv, length - packed_length, Dv]`: a view."""
        return self._storage.rows("values")

    @property
    def positions(self) -> Tensor:
        """Logical positions, `[B, Hkv, length]` int32; -1 where a slot is empty. A view."""
        return self._storage.rows("positions")

    @property
    def has_gaps(self) -> bool:
        """Whether there are slots that hold nothing in any head. Waits for the device where slots are empty."""
        return not self.dense and self.length > int((self.positions >= 0).sum(-1).max())

    def row_totals(self) -> tuple[int, ...]:
        """Rows of each sequence in all heads here. Waits for the device where slots are empty."""
        if self.dense:
            return (self.length * self.kv_heads,) * self.batch_size
        return tuple((self.positions >= 0).sum((1, 2)).tolist())

    @property
    def newest_exact(self) -> int:
        """How many of the newest rows of every head are in full precision, without a gap; 0 where a slot is empty.

        Waits for the device where rows are packed.
        """
        if not self.dense:
            return 0
        if not self.packed:
            return self.length
        newest = self.positions[:, :, : self.packed_length].amax(-1, keepdim=True)
        return int((self.positions[:, :, self.packed_length :] > newest).sum(-1).min())

    @property
    def may_learn(self) -> Tensor:
        """Of which sequences nothing is packed, and no basis was estimated, bool `[B]`."""
        packed = (self.positions[:, :, : self.packed_length] >= 0).flatten(1).any(1)
        return ~packed if self.basis is None or self.basis.own is None else ~(packed | self.basis.own)

    def newest_keys(self, count: int) -> Tensor:
        """Of the rows that were appended last, `[B, Hkv, count, D]`; none of them has been packed, or moved."""
        keys = self.keys
        return keys[:, :, keys.shape[2] - count :]

    def newest_values(self, count: int) -> Tensor:
        """Of the rows that were appended last, `[B, Hkv, count, Dv]`, as `newest_keys`."""
        values = self.values
        return values[:, :, values.shape[2] - count :]

    def code_bits(self) -> Tensor:
        """Whole bits of the numbers of packed rows' keys, int64 `[B, Hkv, packed_length]`; 0 where there is no row."""
        return self.of_codecs(lambda codec: codec.bits).long()

    def of_codecs(self, told: Callable[[Codec], float]) -> Tensor:
        """What is told of the codec of every packed row, float64 `[B, Hkv, packed_length]`; 0 where there is no row."""
        each = torch.tensor([told(tier.codec) for tier in self.packed for _ in range(len(tier))], dtype=torch.float64)
        positions = self.positions[:, :, : self.packed_length]
        return each.to(positions.device).expand(positions.shape).masked_fill(positions < 0, 0)

    def named(self, slots: Tensor) -> Tensor:
        """Which slots are among these, LongTensor `[B, Hkv, R]` with -1 for none: bool `[B, Hkv, length]`."""
        named = torch.zeros(*slots.shape[:2], self.length + 1, dtype=torch.bool, device=slots.device)
        return named.scatter_(2, torch.where(slots < 0, self.length, slots), True)[:, :, : self.length]

    def encoded(self, codec: Codec, slots: Tensor) -> Iterator[tuple[Tensor, PackedRows]]:
        """The rows in slots `[B, Hkv, R]` by a codec: those of every tier, and those in full precision, by themselves.

        Yields the slots of each part, and its rows.
        """
        first = 0
        for tier in self.packed:
            own = those(slots, (slots >= first) & (slots < first + len(tier)))
            if own.shape[2]:
                yield own, self.kernels.encode_anew(codec, tier, (own - first).clamp(min=0))
            first += len(tier)
        own = those(slots, slots >= first) if first else slots
        if own.shape[2]:
            loose = (own - first).clamp(min=EMPTY)
            yield own, self.kernels.encode(codec, self.keys, self.values, loose, self.basis)

    @torch.no_grad()
    def leverage(self) -> Tensor:
        """`Basis.leverage` of the rows in full precision, float32 `[B, Hkv, length - packed_length]`."""
        return (self.basis or Basis.fixed(*self._dims())).leverage(self.keys, self.values)

    def all_keys(self) -> Tensor:
        """Of every row, `[B, Hkv, length, D]`: packed ones are decoded, which takes as much memory for as long."""
        return self._with_packed(self.keys, 0)

    def all_values(self) -> Tensor:
        """Of every row, `[B, Hkv, length, Dv]`, as `all_keys`."""
        return self._with_packed(self.values, 1)

    def _with_packed(self, exact: Tensor, part: int) -> Tensor:
        if not self.packed:
            return exact
        return torch.cat([*(tier.decoded()[part].to(exact.dtype) for tier in self.packed), exact], dim=2)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the table holds, at full capacity."""
        held = dict(self._storage.tensors)
        for number, tier in enumerate(self.packed):
            held.update({f"packed.{number}.{name}": tensor for name, tensor in tier.tensors.items()})
        if self.basis is not None:
            held.update({f"basis.{name}": tensor for name, tensor in self.basis.tensors().items()})
        return held

    def check_step(self, keys: Tensor, values: Tensor, kv_heads: int | None = None) -> None:
        """Raise CacheError where new keys and values do not fit this table.

        kv_heads: that are to come, some of which may have no rows here.
        """
        if keys.shape[0] != self.batch_size:
            raise CacheError(
                f"this cache holds a batch of {self.batch_size}, and the model was called with a batch of "
                f"{keys.shape[0]}. Make a new PrunedCache, or call reset() to start over."
            )
        key_dim, value_dim, dtype = self.dims
        kv_heads = kv_heads or self.kv_heads
        for name, new, dim in (("keys", keys, key_dim), ("values", values, value_dim)):
            if new.shape[1] != kv_heads or new.shape[3] != dim or new.dtype != dtype:
                raise CacheError(
                    f"this cache holds {name} of {kv_heads} heads of {dim} in {dtype}, and was given "
                    f"{new.shape[1]} heads of {new.shape[3]} in {new.dtype}: it belongs to another model. "
                    "Make a PrunedCache for each model."
                )

    @property
    def dims(self) -> tuple[int, int, torch.dtype]:
        """Numbers of a key, of a value, and their dtype."""
        return *self._dims(), self._storage.tensors["keys"].dtype

    # -- how many bytes it takes -----------------------------------------------------------------------------------

    @property
    def token_bytes(self) -> int:
        """Bytes of one slot in full precision over all sequences and heads, all columns included."""
        return self._storage.token_bytes

    @property
    def kv_token_bytes(self) -> int:
        """The part of `token_bytes` that is keys and values."""
        return self._storage.kv_token_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the table, spare slots included."""
        return self._storage.nbytes + packing.nbytes(self.packed) + self._basis_nbytes

    @property
    def kv_nbytes(self) -> int:
        """The part of `nbytes` that is keys and values, or stands for them: codes and their parameters."""
        return self._storage.kv_nbytes + packing.nbytes(self.packed) + self._basis_nbytes

    @property
    def _basis_nbytes(self) -> int:
        return 0 if self.basis is None else self.basis.nbytes

    @property
    def code_nbytes(self) -> int:
        """The part of `kv_nbytes` that is no parameter: codes, and what is in full precision."""
        return self._storage.kv_nbytes + sum(tier.code_nbytes for tier in self.packed)

    def whole(self, name: str) -> Tensor:
        """Keys or values in full precision with their spare slots: the same tensor until they move elsewhere."""
        return self._storage.tensors[name]

    def packed_row_bytes(self, codec: Codec) -> int:
        """What `token_bytes` is for a row that this codec has packed."""
        key_dim, value_dim = self._dims()
        of_blocks = -(-codec.block_bytes(key_dim, value_dim) // codec.tokens) if codec.tokens else 0
        rows = self._storage.batch_size * self._storage.kv_heads
        return rows * (codec.row_bytes(key_dim, value_dim) + of_blocks) + self._storage.lasting_bytes

    def block_bytes(self, codec: Codec) -> int:
        """Parameters that blocks of this codec's rows share, of one block more and of those there are.

        Where rows pay for the blocks they fill, this is for those that evicted rows have left thinly filled.
        """
        tiers = [tier for tier in self.packed if tier.codec == codec]
        paid = sum(len(tier) // codec.tokens for tier in tiers) if codec.tokens else 0
        blocks = 1 + max(0, sum(tier.blocks for tier in tiers) - paid)
        return self._storage.batch_size * self._storage.kv_heads * blocks * codec.block_bytes(*self._dims())

    def _dims(self) -> tuple[int, int]:
        return self._storage.tensors["keys"].shape[3], self._storage.tensors["values"].shape[3]
