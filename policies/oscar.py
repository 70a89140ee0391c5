"""OSCAR: rotations that a model's own queries, keys and values tell. arXiv 2605.17757."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from kvprune.policy.aging import Aging, learn_basis
from kvprune.policy.base import Step
from kvprune.policy.settings import check_number
from kvprune.saving.rotations import Rotations
from kvprune.table import spreading
from kvprune.table.rotated_rows import RotatedCodec
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class OSCAR(Aging):
    """Keeps every token, all but many sinks and the newest at 2 bits, in a basis that spreads what matters evenly.

        C_Q = E[q q^T],    w_i = k_i^T C_Q k_i / mean,    C_V = E[w v v^T],    R = U P H  of each

    with U the eigenvectors by falling eigenvalue, P that order with the bits of its numbers reversed, and H the
    normalised Hadamard matrix: every component of k R_K and v R_V holds as much of each eigenvector as all others, so
    they may have the same bits. A row is cut off at a quantile of |z|, and gets even levels from end to end.

    In the paper, a file has one rotation for all heads of a layer, from 30,000 tokens: `Rotations.measure` makes one,
    and `rotations` takes it, for prompts of any length. Without it, a prompt tells its own, head by head, from two
    times as many tokens as a key has numbers on; a shorter one gets H alone, its mean taken out.
    At 4 bits, clipping hurts: `OSCAR(4, key_clip=1, value_clip=1)`.

    Settings (beside those of `Aging`):
        key_clip, value_clip: the quantiles, 1 for no clipping.
        rotations: what `Rotations.measure` or `Rotations.load` returned, or the path of its file; None for those of
            the prompt. A saved cache has them, and needs no file.
    """

    files = frozenset({"rotations"})
    _: KW_ONLY
    sinks: int = 64
    residual: int = 256
    key_clip: float = 0.96
    value_clip: float = 0.92
    rotations: Rotations | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("key_clip", self.key_clip, low=0, high=1)
        check_number("value_clip", self.value_clip, low=0, high=1)
        if self.rotations is not None and not isinstance(self.rotations, Rotations):
            known = Rotations.load(self.rotations) if isinstance(self.rotations, str) else Rotations(self.rotations)
            object.__setattr__(self, "rotations", known)

    def attach(self, cache: Any, model: Any) -> None:
        if isinstance(self.rotations, Rotations):
            self.rotations.check(model, cache.pruned_layers)
        super().attach(cache, model)

    def packed(self, bits: float, value_bits: float | None = None) -> RotatedCodec:
        return RotatedCodec(bits, value_bits=value_bits, key_clip=self.key_clip, value_clip=self.value_clip)

    def observe(self, table: TokenTable, step: Step) -> None:
        if self.codec(step.depth, step.layers) is None:
            return
        if not isinstance(self.rotations, Rotations):
            learn_basis(table, step, self.bits, spreading.rotations)
        elif (table.basis is None or not table.basis.estimated) and not table.packed:
            heads = table.batch_size, table.kv_heads
            table.turn(self.rotations.basis(step.depth, heads, table.positions.device))
