"""`Steady`: the counts of a layer whose decode steps change no shape any more.

At its budget, a policy that evicts at every token overwrites one row a step, so all that differs from step to step are
the contents of tensors and a few counts. torch.compile guards on ints and would compile every step anew, and a CUDA
graph replays the ints it was recorded with: a compiled step reads and advances its counts on the device, here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.recording import Graphs, Recording


@dataclass
class Steady:
    """counts: LongTensor `[2 + B]`: columns seen, tokens generated since the prompt, and the tokens of each sequence.

    ahead: whether compiled steps have counted on, past the ints of the layer. in_graph: whether a step is being run
    that is to be recorded, which must not depend on them.
    """

    counts: Tensor
    ahead: bool = False
    in_graph: bool = False
    recording: Recording | None = field(default=None, repr=False)

    def recorded(self, graphs: Graphs) -> Recording:
        """The step of this state, which is recorded where `graphs` say so."""
        if self.recording is None:
            self.recording = Recording(graphs)
        return self.recording

    @classmethod
    def of(cls, seen: int, generated: int, tokens: tuple[int, ...], device: torch.device) -> Steady:
        return cls(torch.tensor([seen, generated, *tokens], device=device))

    @staticmethod
    def bytes_for(batch_size: int) -> int:
        """Bytes that `counts` takes."""
        return 8 * (2 + batch_size)

    @property
    def seen(self) -> Tensor:
        """Scalar."""
        return self.counts[0]

    @property
    def generated(self) -> Tensor:
        """Scalar."""
        return self.counts[1]

    @property
    def tokens(self) -> Tensor:
        """`[B, 1, 1]`."""
        return self.counts[2:].view(-1, 1, 1)

    def advance(self) -> None:
        """Count a step of one token."""
        self.counts.add_(1)
        if torch.compiler.is_dynamo_compiling():
            self.ahead = True  # written and never read where steps are traced, so nothing guards on it

    def read(self) -> tuple[int, int, tuple[int, ...]]:
        """Seen, generated, tokens, as ints; waits for the device."""
        self.ahead = False
        seen, generated, *tokens = self.counts.tolist()
        return seen, generated, tuple(tokens)


class Counted:
    """A count of a layer that compiled steps advance on the device: an attribute that catches up when it is read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:  # asked for on the class
            return self
        if layer.steady is not None and layer.steady.ahead:
            layer.catch_up()
        return getattr(layer, self.name)

    def __set__(self, layer: Any, value: Any) -> None:
        setattr(layer, self.name, value)


def pin(tensors: list[Tensor]) -> None:
    """Tell torch.compile that these tensors stay where they are, so that CUDA graphs write to them in place."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)
