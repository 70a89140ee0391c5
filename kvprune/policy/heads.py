"""Which heads a process has: all of a layer's, or a share of them, where tensor parallelism splits the model.

With transformers' `tp_plan`, every process runs the same program on the same tokens, and its attention sees a share of
the heads. Its cache holds the rows of those, and what ranks rows head by head goes on as ever. What looks across heads
asks `Heads`, and that is the one place where caches of several processes talk to each other: in one all-reduce, and in
none where heads are not split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from kvprune.errors import UnsupportedModelError


@dataclass(frozen=True)
class Heads:
    """Share number `rank` of `size` equal ones of a layer's heads, in their order.

    query_heads, kv_heads: of the whole layer, over all processes. group: the processes. device: where they can talk.
    """

    rank: int = 0
    size: int = 1
    query_heads: int = 0
    kv_heads: int = 0
    group: Any = None
    device: torch.device | None = None

    def present(self, kv_heads: int) -> Heads:
        """The same for a layer with so many KV heads in this process: all, if they are, as where a plan splits MLPs."""
        return self if kv_heads < self.kv_heads else ALL_HEADS

    def check(self, query_heads: int, kv_heads: int) -> None:
        """Raise UnsupportedModelError unless a layer of so many heads has all of them, or an equal share of all."""
        whole = self.query_heads, self.kv_heads
        if self.size == 1 or any((query_heads * size, kv_heads * size) == whole for size in (1, self.size)):
            return
        raise UnsupportedModelError(
            f"tensor parallelism over {self.size} processes left a layer {query_heads} of its {self.query_heads} query "
            f"heads and {kv_heads} of its {self.kv_heads} KV heads here. kvprune needs an equal share of both in every "
            "process, or all of both: give a tp_plan that splits q_proj, k_proj and v_proj alike, or none of them."
        )

    @property
    def first_query_head(self) -> int:
        """The number, in the whole layer, of the first query head here."""
        return self.rank * self.query_heads // self.size

    @property
    def first_kv_head(self) -> int:
        """The number, in the whole layer, of the first KV head here."""
        return self.rank * self.kv_heads // self.size

    def sum(self, part: Tensor) -> Tensor:
        """The sum of what every process has here, tensors of one shape: the same in each of them, bit by bit."""
        if self.size == 1:
            return part
        total = part.to(self.device, copy=True)  # NCCL reduces nothing on a CPU, where the cache may live
        torch.distributed.all_reduce(total, group=self.group)
        return total.to(part.device)

    def gather(self, part: Tensor, width: int, filling: int) -> Tensor:
        """Rows of all heads of the layer, `[B, H, width]` int64, of those here, `[B, Hkv, rows]` with rows <= width.

        filling: what stands for rows that a head does not have.
        """
        if self.size == 1:
            return part
        heads = part.shape[1]
        every = part.new_zeros(len(part), heads * self.size, width)
        own = self.own(every)
        own.fill_(filling)
        own[:, :, : part.shape[2]] = part
        return self.sum(every)

    def own(self, every: Tensor) -> Tensor:
        """Of something that all heads have, `[B, H, ...]`, the part of those here."""
        heads = every.shape[1] // self.size
        return every[:, self.rank * heads : (self.rank + 1) * heads]

    def total(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """The sums of what every process counted, one a sequence."""
        return counts if self.size == 1 else tuple(self.sum(torch.tensor(counts)).tolist())

    def mean(self, scores: Tensor) -> Tensor:
        """The mean over all KV heads of the layer, `[B, Hkv, rows] -> [B, 1, rows]`: `scores` are of those here."""
        mean = scores.mean(1, keepdim=True)
        return mean if self.size == 1 else self.sum(mean) / self.size


ALL_HEADS = Heads()
