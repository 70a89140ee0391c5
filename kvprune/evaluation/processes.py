"""Several processes on one evaluation, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

_PATIENCE = timedelta(days=7)  # one process may have much longer prompts than another


@dataclass(frozen=True)
class Processes:
    """Which process this is, and how many there are, from the environment that launchers set."""

    index: int = 0
    count: int = 1
    local_index: int = 0

    @classmethod
    def from_environment(cls) -> Processes:
        index, count, local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        return cls(index, count, local)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def owns(self, number: int) -> bool:
        """Whether this process does the unit of work of that number; it never depends on what is done already."""
        return number % self.count == self.index

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count == 1:
            return
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        dist.barrier()

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
