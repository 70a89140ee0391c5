"""Hadamard matrices, which spread what is extraordinary in one component over all."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache  # for good: kernels keep addresses
def hadamard(dim: int, device: torch.device | None = None) -> Tensor:
    """Orthogonal `[dim, dim]` float32: blocks of the largest power of two that divides `dim`. Not to be written to."""
    with torch.inference_mode(False):  # or steps that want gradients could not use what another has made
        block = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        while dim % (2 * len(block)) == 0:
            block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
        return torch.block_diag(*[block / len(block) ** 0.5] * (dim // len(block))).half().float().to(device)


@cache
def hadamard_inverse(dim: int, device: torch.device | None = None) -> Tensor:
    """Of `hadamard`, whose numbers are rounded: not quite its transpose. Not to be written to."""
    with torch.inference_mode(False):
        return torch.linalg.inv(hadamard(dim, device))
