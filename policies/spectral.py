"""Spectral: few bits for principal components, estimated from the prompt itself."""

from __future__ import annotations

from dataclasses import dataclass

from kvprune.policy.aging import Aging, learn_basis
from kvprune.policy.base import Step
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Spectral(Aging):
    """Keeps every token, all but sinks and the newest at few bits, which go where a head's spectrum is large.

    Keys of a head, their mean taken out, become uncorrelated components in a basis in which an error of any of them
    moves the head's logits by its eigenvalue lambda_i: components of large lambda get more bits than those of small,

        bits_i = max(0, 1/2 log2(lambda_i / theta)),     as many on average as `bits` says

    and likewise values, for the error of the output. See `kvprune/table/basis.py` for the formula, and for who did so
    before: here, the prompt's own queries, keys and values tell, and no file. From 4 bits on, components that share a
    width are mixed, so that what is extraordinary in one is spread over 16. A prompt of fewer than two times as many
    tokens as a key has numbers tells no more than the mean, and its rows are turned by a Hadamard matrix.

    A row has one scale, and shares nothing with other rows: any may be evicted. The basis costs as many bytes as D / 2
    tokens of the head in 16 bits.
    """

    def observe(self, table: TokenTable, step: Step) -> None:
        codec = self.codec(step.depth, step.layers)
        if codec is not None:
            learn_basis(table, step, codec.bits)
