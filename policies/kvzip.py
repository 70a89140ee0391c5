"""KVzip and KVzip+: what it takes to repeat the context. Kim et al., arXiv 2505.23416, NeurIPS 2025."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from kvprune.cache.models import kv_heads, layer_config, text_config
from kvprune.errors import PolicyError
from kvprune.passes.replays import ReplayedEviction
from kvprune.policy.replaying import Replay
from kvprune.policy.settings import check_count
from kvprune.policy.shares import Everywhere, Share
from kvprune.policy.step import Step
from kvprune.saving.heads import HeadScores
from kvprune.table.token_table import TokenTable

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
        level: "row", or "head": all rows of a head count as much as its best one does, sinks left out. So some heads
            keep everything, and the others sinks, the recent window and what is newest.
        heads: with level="head", the scores of heads, measured once and for all (`HeadScores.measure`), of each layer
            one a KV head, or the file that they were saved to. Nothing is replayed then.
        first_ids, later_ids: token ids of an instruction before the first chunk, and before every other, which then
            goes on with the last 8 tokens of the chunk before. answer_ids: what ends it and begins the answer.
    """

    files = frozenset({"heads"})
    _: KW_ONLY
    group: str = "max"
    interval: int | None = None
    share: Share = EVERYWHERE
    chunk: int = 512
    softmax: str = "cache"
    level: str = "row"
    heads: tuple[tuple[float, ...], ...] | str = ()
    first_ids: tuple[int, ...] = ()
    later_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", _scores_of(self.heads))  # first: what replays asks whether there are any
        super().__post_init__()
        check_count("chunk", self.chunk, least=1)
        for name in ("first_ids", "later_ids", "answer_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, tuple | list) or not all(type(each) is int and each >= 0 for each in ids):
                raise PolicyError(f"{name} are token ids, such as tuple(tokenizer(text).input_ids), not {ids!r}.")
            object.__setattr__(self, name, tuple(ids))
        if self.level not in ("row", "head"):
            raise PolicyError(f'level is "row" or "head", not {self.level!r}.')
        if self.heads and self.level != "head":
            raise PolicyError('scores of heads are for level="head": say so, or leave heads out.')
        self._replay  # noqa: B018 - raises for settings without meaning

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
    def replay(self) -> Replay | None:
        return None if self.heads else self._replay

    @property
    def _replay(self) -> Replay:
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

    def attach(self, cache: Any, model: Any) -> None:
        layers = [layer_config(text_config(model), index) for index in cache.pruned_layers]
        if self.heads and [len(layer) for layer in self.heads] != [kv_heads(layer) for layer in layers]:
            raise PolicyError(
                f"heads holds scores of {' + '.join(str(len(layer)) for layer in self.heads)} heads, and "
                f"{type(model).__name__} has {' + '.join(str(kv_heads(layer)) for layer in layers)} KV heads in its "
                "layers with full attention: measure this model."
            )
        super().attach(cache, model)

    def scores(self, table: TokenTable, step: Step) -> Tensor:
        if self.level == "row":
            return super().scores(table, step)
        if self.heads:
            known = torch.tensor(self.heads[step.depth], dtype=torch.float32, device=table.positions.device)
            return step.heads.own(known[None, :, None]).expand(table.positions.shape)
        rows = super().scores(table, step)
        return rows.masked_fill(table.positions < self.sinks, 0.0).amax(-1, keepdim=True).expand(rows.shape)


@dataclass(frozen=True)
class KVzipPlus(KVzip):
    """KVzip that weighs what is attended to by what it adds to the output of the layer.

        S_k = max over j and g of  P[g, j, k] * |W_o^(g) v_k| / |x_j|

    with W_o^(g) the part of the output projection that a query head has, and x_j the input of the attention module.
    """

    @property
    def _replay(self) -> Replay:
        return replace(super()._replay, values=True)


def _scores_of(heads: Any) -> tuple[tuple[float, ...], ...]:
    """Scores of heads as a setting holds them. Raises PolicyError."""
    if isinstance(heads, str):
        return HeadScores.load(heads).scores
    try:
        scores = tuple(tuple(float(score) for score in layer) for layer in heads)
    except (TypeError, ValueError, RuntimeError):
        scores = ((-1.0,),)
    if not all(layer and all(0 <= score < math.inf for score in layer) for layer in scores):
        raise PolicyError(f"heads are scores of at least 0 for the KV heads of each layer, not {heads!r}.")
    return scores
