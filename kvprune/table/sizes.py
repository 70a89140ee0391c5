"""`Sizes`: how many bytes a table takes, and how many a row of it does."""

from __future__ import annotations

from kvprune.table import packing
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec
from kvprune.table.storage import Storage


class Sizes:
    """The part of a `TokenTable` that budgets and reports ask. Nothing here changes the table."""

    packed: list[PackedRows]
    _storage: Storage

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
        return self._storage.nbytes + packing.nbytes(self.packed)

    @property
    def kv_nbytes(self) -> int:
        """The part of `nbytes` that is keys and values, or stands for them: codes and their parameters."""
        return self._storage.kv_nbytes + packing.nbytes(self.packed)

    @property
    def code_nbytes(self) -> int:
        """The part of `kv_nbytes` that is no parameter: codes, and what is in full precision."""
        return self._storage.kv_nbytes + sum(tier.code_nbytes for tier in self.packed)

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
