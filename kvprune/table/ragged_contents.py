"""`RaggedContents`: what is in a table whose heads hold different numbers of rows, and how policies see it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvprune.table.basis import Basis
from kvprune.table.flat import Flat
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec
from kvprune.table.rows import EMPTY
from kvprune.table.storage import is_of_all_slots
from kvprune.table.token_table import TokenTable


class RaggedContents(TokenTable):
    """The part of a `RaggedTable` that only looks."""

    heads: list[TokenTable]
    _kv_heads: int
    _flat: Flat | None
    _shown: dict[str, Tensor]

    is_ragged = True

    # -- what is in it: nothing changes ----------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return len(self.heads) // self._kv_heads

    @property
    def kv_heads(self) -> int:
        return self._kv_heads

    @property
    def packed_length(self) -> int:
        return max(head.packed_length for head in self.heads)

    @property
    def length(self) -> int:
        return self.packed_length + max(head.length - head.packed_length for head in self.heads)

    @property
    def capacity(self) -> int:
        return self.length + self._spare

    @property
    def _spare(self) -> int:
        """Rows that every head has room for."""
        return min(head.capacity - head.length for head in self.heads)

    @property
    def rows(self) -> int:
        return max(head.rows for head in self.heads)

    @property
    def flat(self) -> Flat | None:
        """The heads one behind another, where nothing is packed, and no head has an empty slot."""
        return self._flat if all(head.dense for head in self.heads) else None

    @property
    def packed(self) -> list[PackedRows]:  # type: ignore[override]
        """Of all heads."""
        return [tier for head in self.heads for tier in head.packed]

    @property
    def basis(self) -> Basis | None:  # type: ignore[override]
        """Of one head; each has its own."""
        return self.heads[0].basis

    @property
    def may_learn(self) -> Tensor:
        every = torch.cat([head.may_learn for head in self.heads])
        return every.view(self.batch_size, self.kv_heads).all(1)

    @property
    def has_gaps(self) -> bool:
        return any(head.has_gaps for head in self.heads)

    def row_totals(self) -> tuple[int, ...]:
        if not all(head.dense for head in self.heads):
            return tuple((self.positions >= 0).sum((1, 2)).tolist())
        totals = [head.length for head in self.heads]
        return tuple(sum(totals[first : first + self.kv_heads]) for first in range(0, len(totals), self.kv_heads))

    @property
    def keys(self) -> Tensor:
        """Of the rows in full precision, `[B, Hkv, length - packed_length, D]`: a copy, zero where a slot is empty."""
        return self._padded([head.keys for head in self.heads], loose=True)

    @property
    def values(self) -> Tensor:
        return self._padded([head.values for head in self.heads], loose=True)

    def newest_keys(self, count: int) -> Tensor:
        return self._stacked([head.newest_keys(count) for head in self.heads])

    def newest_values(self, count: int) -> Tensor:
        return self._stacked([head.newest_values(count) for head in self.heads])

    def of_codecs(self, told: Callable[[Codec], float]) -> Tensor:
        made = torch.zeros(len(self.heads), self.packed_length, dtype=torch.float64, device=self.positions.device)
        for head, whole in zip(self.heads, made, strict=True):
            whole[self.packed_length - head.packed_length :] = head.of_codecs(told)[0, 0]
        return made.unflatten(0, (-1, self.kv_heads))

    def leverage(self) -> Tensor:
        return self._padded([head.leverage() for head in self.heads], loose=True)

    def all_keys(self) -> Tensor:
        return self._padded([head.all_keys() for head in self.heads])

    def all_values(self) -> Tensor:
        return self._padded([head.all_values() for head in self.heads])

    @property
    def positions(self) -> Tensor:
        return self._show("positions")

    def __getitem__(self, column: str) -> Tensor:
        return self._show(self.heads[0].column_name(column))

    def tensors(self) -> dict[str, Tensor]:
        if self._flat is not None:
            bases = {
                f"heads.{number}.basis.{name}": tensor
                for number, head in enumerate(self.heads)
                if head.basis is not None
                for name, tensor in head.basis.tensors().items()
            }
            return {**self._flat.held(), **bases}
        return {
            f"heads.{number}.{name}": tensor
            for number, head in enumerate(self.heads)
            for name, tensor in head.tensors().items()
        }

    @property
    def dims(self) -> tuple[int, int, torch.dtype]:
        return self.heads[0].dims

    # -- bytes -----------------------------------------------------------------------------------------------------

    @property
    def token_bytes(self) -> int:
        return len(self.heads) * self.heads[0].token_bytes  # which all heads have alike

    @property
    def kv_token_bytes(self) -> int:
        return len(self.heads) * self.heads[0].kv_token_bytes

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors().values())

    @property
    def kv_nbytes(self) -> int:
        if self._flat is not None:
            flat = self._flat.tensors["keys"].nbytes + self._flat.tensors["values"].nbytes
            return flat + sum(head._basis_nbytes for head in self.heads)
        return sum(head.kv_nbytes for head in self.heads)

    @property
    def code_nbytes(self) -> int:
        return self.kv_nbytes if self._flat is not None else sum(head.code_nbytes for head in self.heads)

    def packed_row_bytes(self, codec: Codec) -> int:
        return len(self.heads) * self.heads[0].packed_row_bytes(codec)

    def block_bytes(self, codec: Codec) -> int:
        if codec.shares_nothing:  # then there is one block, whatever a head holds
            return len(self.heads) * self.heads[0].block_bytes(codec)
        return sum(head.block_bytes(codec) for head in self.heads)

    # -- columns as policies see them ------------------------------------------------------------------------------

    def padded(self, parts: list[Tensor]) -> Tensor:
        """Of what the slots of every head have, `[1, 1, ..., slots]`, one `[B, Hkv, ..., length]`; 0 where none is."""
        return self._padded([part.movedim(-1, 2) for part in parts]).movedim(2, -1)

    def _padded(self, parts: list[Tensor], filling: float = 0, *, loose: bool = False) -> Tensor:
        """Of `[1, 1, slots, ...]` of each head `[B, Hkv, length, ...]`, or of the rows in full precision alone."""
        packed, width = (0, self.length - self.packed_length) if loose else (self.packed_length, self.length)
        made = parts[0].new_full((len(parts), width, *parts[0].shape[3:]), filling)
        for head, part, whole in zip(self.heads, parts, made, strict=True):
            split = 0 if loose else head.packed_length
            whole[packed - split : packed] = part[0, 0, :split]
            whole[width - (part.shape[2] - split) :] = part[0, 0, split:]
        return made.unflatten(0, (-1, self.kv_heads))

    def _stacked(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1).unflatten(1, (-1, self.kv_heads)).squeeze(0)

    def _show(self, name: str) -> Tensor:
        if name not in self._shown:
            filling = EMPTY if name == "positions" else 0
            if self._flat is not None:
                spread = self._flat.spread(name, self.length, filling, self.kernels)
                self._shown[name] = spread.unflatten(0, (-1, self.kv_heads))
            else:
                parts = [head._storage.rows(name) for head in self.heads]
                self._shown[name] = self._padded(parts, filling, loose=not is_of_all_slots(name))
        return self._shown[name]
