"""KVzip: what it takes to repeat the context. Kim et al., arXiv 2505.23416, NeurIPS 2025."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from kvprune.passes.replays import ReplayedEviction
from kvprune.policy.replaying import Replay
from kvprune.policy.settings import check_count


@dataclass(frozen=True)
class KVzip(ReplayedEviction):
    """Keeps the rows that the model attends to when it reads the context a second time, whatever the question will be.

        S_k = max over replayed queries j, and query heads g of a KV head, of  P[g, j, k]

    After every prompt, what is new runs once more over the full cache, in chunks, and leaves nothing but its scores.

    Settings (beside those of `Eviction`):
        chunk: tokens that are replayed at a time.
        softmax: of a replayed query, over "cache", all rows of the cache and the replay itself, or, as published, over
            "chunk": the sinks, the rows of its chunk, and the replay itself.
    """

    _: KW_ONLY
    group: str = "max"
    interval: int | None = None
    chunk: int = 2048
    softmax: str = "cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chunk", self.chunk, least=1)
        self.replay  # noqa: B018 - raises for settings without meaning

    @property
    def replay(self) -> Replay:
        return Replay(chunk=self.chunk, softmax=self.softmax, sinks=self.sinks, group=self.group)
