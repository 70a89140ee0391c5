"""PyramidDrop: of the middle of a prompt, each stage of layers keeps half. Xing et al., arXiv 2410.17247, CVPR 2025."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.passes.cascades import Staged
from kvprune.policy.base import Step
from kvprune.policy.passage import share_of
from kvprune.policy.settings import check_count, check_number
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class PyramidDrop(Staged):
    """The layers are `stages` of equal size; at the end of each but the last, tokens that the last one ignores stop.

        after stage s:  the ceil(share**s * M) tokens of largest (1 / H) sum_h A^l[h, N, i] go on, of M in the middle

    The paper's middle is an image: what stands before and behind it always goes on. Here it is what the first
    `keep_first` and the last `keep_last` tokens leave. What stops is not computed by deeper layers, nor cached there,
    and does not come back; generated tokens attend to all that layers hold. The attention is what the last layer of a
    stage has computed; the published code computes that of the next layer once more for it.
    Give the prompt in one piece, with the question at its end: each chunk is cut by its own last token, and so is a
    second turn, its tokens and the earlier ones together. While the past is recorded (assisted and prompt-lookup
    decoding) nothing stops.

    Settings:
        share: of the middle's tokens that reached a stage, the part that goes on to the next.
        stages: of layers; depths are rounded. With 1 nothing stops.
        keep_first: tokens of a sequence's beginning that always go on.
        keep_last: tokens of its end that always go on: the question.

    Raises PolicyError for settings without meaning.
    """

    share: float = 0.5
    _: KW_ONLY
    stages: int = 4
    keep_first: int = 4
    keep_last: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("share", self.share, low=0, high=1)
        if self.share == 0:
            raise PolicyError("share must be above 0: write 0.5 to keep half of what reaches a stage.")
        check_count("stages", self.stages, least=1)
        check_count("keep_first", self.keep_first, least=0)
        check_count("keep_last", self.keep_last, least=1)

    def share_after(self, layer: int, layers: int) -> float | None:
        """Of the middle."""
        ended = [stage for stage in range(1, self.stages) if round(stage * layers / self.stages) == layer + 1]
        return self.share ** max(ended) if ended and layer + 1 < layers else None

    def onward(self, table: TokenTable, step: Step) -> Tensor | None:
        share = self.share_after(step.depth, step.layers)
        if share is None or step.passage is None:
            return None
        middles = [max(0, tokens - self.keep_first - self.keep_last) for tokens in step.passage.tokens]
        counts = [
            tokens - middle + (share_of(middle, share) if middle else 0)
            for tokens, middle in zip(step.passage.tokens, middles, strict=True)
        ]
        importance = step.heads.sum(step.passage.by_token(step.mass, table))
        return step.passage.top(importance, counts, first=self.keep_first, recent=self.keep_last)
