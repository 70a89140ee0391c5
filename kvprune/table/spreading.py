"""Rotations in which every component holds as much of what counts as any other. OSCAR, arXiv 2605.17757.

    C_Q = E[q q^T],    w_i = k_i^T C_Q k_i / mean,    C_V = E[w v v^T],    R = U P H  of each

with U the eigenvectors by falling eigenvalue, P that order with the bits of its numbers reversed, and H the normalised
Hadamard matrix. All of it is of one head; where heads share a rotation, it is that of the mean of their C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.table.hadamard import hadamard


def rotations(keys: Tensor, values: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """R_K `[D, D]` and R_V `[Dv, Dv]` of keys `[n, D]`, values `[n, Dv]` and queries `[m, D]` of a head, float32."""
    of_queries = queries.T @ queries / len(queries)
    return spread(of_queries), spread(weighed_values(keys, values, of_queries))


def weighed_values(keys: Tensor, values: Tensor, of_queries: Tensor) -> Tensor:
    """C_V `[..., Dv, Dv]` of keys `[..., n, D]`, values `[..., n, Dv]` and C_Q `[..., D, D]` in any scale, float32."""
    weights = ((keys @ of_queries) * keys).sum(-1, keepdim=True)
    weights = weights / weights.mean(-2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return values.mT @ (weights * values) / values.shape[-2]


def spread(covariance: Tensor) -> Tensor:
    """U P H, `[D, D]`; where H is in blocks, every block gets eigenvectors from the largest to the smallest."""
    dim = len(covariance)
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)
    size = dim & -dim  # the largest power of two that divides it
    reversed_bits = [int(f"{number + size:b}"[:0:-1] or "0", 2) for number in range(size)]
    order = [number * (dim // size) + block for block in range(dim // size) for number in reversed_bits]
    return vectors[:, order] @ hadamard(dim, covariance.device)
