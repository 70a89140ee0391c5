"""`Kernels`: all operations that have several implementations, in PyTorch."""

from __future__ import annotations

from kvprune.attention.operations import AttentionOperations
from kvprune.table.operations import RowOperations


class Kernels(RowOperations, AttentionOperations):
    """PyTorch's, on every device. Other kernels override what they do better, and pass on what they cannot do."""


TORCH = Kernels()
