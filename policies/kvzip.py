"""KVzip and KVzip+: what it takes to repeat the context. Kim et al., arXiv 2505.23416, NeurIPS 2025."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Self

from kvprune.errors import PolicyError
from kvprune.passes.replays import ReplayedEviction
from kvprune.policy.replaying import Replay
from kvprune.policy.settings import check_count
from kvprune.policy.shares import Everywhere, Share

EVERYWHERE = Everywhere(floor=0.0)
_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with"
_REPEATED = 8  # tokens of the chunk before that a later chunk's instruction ends with


@dataclass(frozen=True)
class KVzip(ReplayedEviction):
    """Keeps the rows that the model attends to when it reads the context a second time, whatever the question will be.

        S_k = max over replayed queries j, and query heads g of a KV head, of  P[g, j, k]

    When a prompt has ended, what is new runs once more over the full cache, in chunks, and leaves nothing but its
    scores; all of it is scored, a chat template and a system prompt too. A later prompt replays what came since, the
    answers among it. Generated tokens are not evicted before.

    The heads of all layers compete for rows. As published, `softmax="chunk"`, `chunk=2048`, and every chunk comes
    behind an instruction (`with_instruction`). On the embedded model, the softmax over the whole cache and no
    instruction choose as well, and short chunks better: a replay stands behind the context, and the farther it reaches,
    the less it is like what the model has been trained on.

    Settings (beside those of `Eviction`):
        share: who gets rows; `Everywhere`, unless said otherwise.
        chunk: tokens that are replayed at a time; memory for one chunk's activations is needed beside the cache.
        softmax: of a replayed query, over "cache", all rows of the cache and the replay itself, or over "chunk": the
            sinks, the rows of its chunk, and the replay itself.
        first_ids, later_ids: token ids of an instruction before the first chunk, and before every other, which then
            goes on with the last 8 tokens of the chunk before. answer_ids: what ends it and begins the answer.
    """

    _: KW_ONLY
    group: str = "max"
    interval: int | None = None
    share: Share = EVERYWHERE
    chunk: int = 512
    softmax: str = "cache"
    first_ids: tuple[int, ...] = ()
    later_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chunk", self.chunk, least=1)
        for name in ("first_ids", "later_ids", "answer_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, tuple | list) or not all(type(each) is int and each >= 0 for each in ids):
                raise PolicyError(f"{name} are token ids, such as tuple(tokenizer(text).input_ids), not {ids!r}.")
            object.__setattr__(self, name, tuple(ids))
        self.replay  # noqa: B018 - raises for settings without meaning

    @classmethod
    def with_instruction(cls, tokenizer: Any, budget: float | int | str = 0.25, **settings: Any) -> Self:
        """With the instruction of the paper in the words of a tokenizer, and in its chat template if it has one."""
        answer = "\n"
        if getattr(tokenizer, "chat_template", None) is not None:
            turn = [{"role": "user", "content": "\x00"}]
            written = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            answer = written.partition("\x00")[2]
        ids = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (_FIRST, _LATER, answer))
        first, later, answer_ids = ids
        return cls(budget, first_ids=first, later_ids=later, answer_ids=answer_ids, **settings)

    @property
    def replay(self) -> Replay:
        return Replay(
            chunk=self.chunk,
            softmax=self.softmax,
            sinks=self.sinks,
            group=self.group,
            first=self.first_ids,
            later=self.later_ids,
            repeated=_REPEATED if self.later_ids else 0,
            before=self.answer_ids,
        )


@dataclass(frozen=True)
class KVzipPlus(KVzip):
    """KVzip that weighs what is attended to by what it adds to the output of the layer.

        S_k = max over j and g of  P[g, j, k] * |W_o^(g) v_k| / |x_j|

    with W_o^(g) the part of the output projection that a query head has, and x_j the input of the attention module.
    """

    @property
    def replay(self) -> Replay:
        return replace(super().replay, values=True)
