"""LazyLLM: a token goes as deep as the next token needs it. Fu et al., arXiv 2407.14057, 2024."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from kvprune.errors import PolicyError
from kvprune.passes.cascades import Staged
from kvprune.passes.schedule import Schedule, checked, share_after
from kvprune.policy.base import Step
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class LazyLLM(Staged):
    """After some layers, only the tokens that the newest query attends to most go on to deeper ones.

        s_i = (1 / H) sum_h A^l[h, N, i],   T = the ceil(share * N) tokens of largest s among those that layer l saw

    Deeper layers neither compute nor cache the others, so that a prompt is read faster and its cache is smaller. With
    `revive`, the tokens are chosen anew at every generated token: each layer attends to the chosen ones alone, and one
    that had stopped goes on from the layer where it did, by its hidden state, which is held. No layer computes a token
    twice. That makes the first token come sooner, not the ones after it; without `revive` what has stopped is gone, and
    generated tokens attend to all that layers hold.

    The last token decides, so give the prompt in one piece with the question in it: each chunk of a
    `prefill_chunk_size` is cut by its own last token. A second turn is cut as a prompt is, its tokens and the earlier
    ones together. While the past is recorded (assisted and prompt-lookup decoding) nothing stops.

    Settings:
        schedule: pairs (depth, share): after so much of the layers' number, rounded, such a share of all tokens so far
            goes on. Depths ascend, shares do not. As text: "0.5:0.7/0.9:0.3". Models of few layers want it late.
        revive: whether tokens that stopped may go on when a later token attends to them.

    Raises PolicyError for settings without meaning.
    """

    schedule: Schedule | str = ((0.5, 0.7), (0.7, 0.5), (0.9, 0.3))
    _: KW_ONLY
    revive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "schedule", checked(self.schedule))
        if not isinstance(self.revive, bool):
            raise PolicyError(f"revive must be True or False, not {self.revive!r}.")

    @property
    def revives(self) -> bool:
        return self.revive

    def share_after(self, layer: int, layers: int) -> float | None:
        return share_after(self.schedule, layer, layers)  # type: ignore[arg-type]

    def onward(self, table: TokenTable, step: Step) -> Tensor | None:
        share = self.share_after(step.depth, step.layers)
        if share is None or step.passage is None:
            return None
        return step.passage.best(step.heads.sum(step.passage.by_token(step.mass, table)), share)
