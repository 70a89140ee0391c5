"""OSCAR: rotations that a model's own queries, keys and values tell. arXiv 2605.17757."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from kvprune.policy.aging import Aging, learn_basis
from kvprune.policy.base import Step
from kvprune.policy.settings import check_number
from kvprune.table.basis import hadamard
from kvprune.table.rotated_rows import RotatedCodec
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class OSCAR(Aging):
    """Keeps every token, all but many sinks and the newest at 2 bits, in a basis that spreads what matters evenly.

        C_Q = E[q q^T],    w_i = k_i^T C_Q k_i / mean,    C_V = E[w v v^T],    R = U P H  of each

    with U the eigenvectors by falling eigenvalue, P that order with the bits of its numbers reversed, and H the
    normalised Hadamard matrix: every component of k R_K and v R_V holds as much of each eigenvector as all others, so
    they may have the same bits. A row is cut off at a quantile of |z|, and gets even levels from end to end.

    In the paper, a file has one rotation for all heads of a layer, from 30,000 tokens; here a prompt tells its own,
    head by head, from two times as many tokens as a key has numbers on. A shorter one gets H alone, its mean taken out.
    At 4 bits, clipping hurts: `OSCAR(4, key_clip=1, value_clip=1)`.

    Settings (beside those of `Spectral`):
        key_clip, value_clip: the quantiles, 1 for no clipping.
    """

    _: KW_ONLY
    sinks: int = 64
    residual: int = 256
    key_clip: float = 0.96
    value_clip: float = 0.92

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("key_clip", self.key_clip, low=0, high=1)
        check_number("value_clip", self.value_clip, low=0, high=1)

    def packed(self, bits: int, value_bits: int | None = None) -> RotatedCodec:
        return RotatedCodec(bits, value_bits=value_bits, key_clip=self.key_clip, value_clip=self.value_clip)

    def observe(self, table: TokenTable, step: Step) -> None:
        if self.codec(step.depth, step.layers) is not None:
            learn_basis(table, step, self.bits, rotations)


def rotations(keys: Tensor, values: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """R_K `[D, D]` and R_V `[Dv, Dv]` of keys `[n, D]`, values `[n, Dv]` and queries `[m, D]` of a head, float32."""
    of_queries = queries.T @ queries / len(queries)
    weights = ((keys @ of_queries) * keys).sum(-1, keepdim=True)
    weights = weights / weights.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return _spread(of_queries), _spread(values.T @ (weights * values) / len(values))


def _spread(covariance: Tensor) -> Tensor:
    """U P H; where H is in blocks, every block gets eigenvectors from the largest to the smallest."""
    dim = len(covariance)
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)
    size = dim & -dim  # the largest power of two that divides it
    reversed_bits = [int(f"{number + size:b}"[:0:-1] or "0", 2) for number in range(size)]
    order = [number * (dim // size) + block for block in range(dim // size) for number in reversed_bits]
    return vectors[:, order] @ hadamard(dim, covariance.device)
