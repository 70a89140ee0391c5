"""What a policy may ask a replay for.

In a replay, tokens that are in the cache run through the model once more, as queries over the full cache that leave
nothing behind: no rows, no positions, no counts. What they attend to becomes a column of the table, by which the policy
then decides. `passes/replay.py` does that; here is the policy's side of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from kvprune.errors import PolicyError


@dataclass(frozen=True)
class Replay:
    """What to run again, and what of it to write down: see `attention_maxima`.

    column: of the policy's columns, float32, that becomes the larger of what it is and what a replay finds.
    chunk: tokens that run again at a time; each chunk is replayed over the cache alone, without the other chunks.
    softmax: over what probabilities are taken: "cache", all rows and the replay's own keys, as the model attends; or
        "chunk", the sinks, the rows of the chunk and the replay's own keys, and then only rows of the chunk are scored.
    sinks: how many first tokens are sinks, which the softmax over a chunk takes in, and scores of heads leave out.
    group: how the query heads of a KV head are reduced, "mean" or "max".
    values: whether to multiply what a query head gives to a row by the norm of what its value becomes in the output of
        the layer, and to divide by the norm of the query's hidden state.
    first, later: ids to begin the first chunk with, and every other. repeated: how many of the tokens before a later
        chunk come behind those. before: ids that then come, in all chunks.
    """

    column: str = "score"
    chunk: int = 2048
    softmax: str = "cache"
    sinks: int = 4
    group: str = "max"
    values: bool = False
    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    repeated: int = 0
    before: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.softmax not in ("cache", "chunk"):
            raise PolicyError(f'the softmax of a replay goes over "cache" or "chunk", not {self.softmax!r}.')

    def as_run(self) -> Self:
        """This, without what changes nothing that is found: two that are equal then are one replay."""
        return self if self.softmax == "chunk" else replace(self, sinks=0)
