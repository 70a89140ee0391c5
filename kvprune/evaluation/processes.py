"""Several processes on one evaluation, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_TO_MEET = timedelta(minutes=5)
_TO_FINISH = timedelta(days=7)  # one process may have much longer prompts than another
# Of torchrun, which accelerate uses, and of the MPIs that accelerate starts on CPUs.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


@dataclass
class Processes:
    """Which process this is, and how many there are. Inside `with`, they are connected and can wait for each other."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    _group: Any = field(default=None, compare=False)

    @classmethod
    def from_environment(cls) -> Processes:
        """What a launcher has set in the environment; one process where there is no launcher."""
        for index, count, local_index in _VARIABLES:
            if index in os.environ and count in os.environ:
                local = os.environ.get(local_index, os.environ[index])
                return cls(int(os.environ[index]), int(os.environ[count]), int(local))
        return cls()

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def owns(self, number: int) -> bool:
        """Whether this process does the unit of work of that number; independent of what has been done already."""
        return number % self.count == self.index

    def __enter__(self) -> Processes:
        if self.count > 1:  # now, so that a failure to connect shows before the work is done
            dist.init_process_group("gloo", rank=self.index, world_size=self.count, timeout=_TO_MEET)
            self._group = dist.new_group(timeout=_TO_FINISH)
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            self._group = None
            dist.destroy_process_group()

    def wait(self) -> None:
        """Return once all processes have arrived here."""
        if self._group is not None:
            dist.barrier(self._group)
