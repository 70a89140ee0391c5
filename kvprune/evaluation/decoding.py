"""Answers of many caches to one prompt that is read once, greedily, as `generate()` gives them to each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvprune.cache.models import cache_argument
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.errors import KVPruneError
from kvprune.evaluation.together import Together
from kvprune.policy.registry import parse

T = TypeVar("T")


@dataclass
class Reader:
    """Reads a prompt for many caches, and feeds all of them further tokens.

    known: empty caches that are shown the whole prompt at once. unknown: empty caches that are shown the document
    alone, and then read the question on their own. dtype: of what both hold, None for the model's. The rows of what is
    returned are those of `caches`: the full cache, the known ones, the unknown ones. Rows of a cache that is in
    `refused`, with what it has raised, mean nothing.
    """

    model: Any
    known: Sequence[PrunedCache] = ()
    unknown: Sequence[PrunedCache] = ()
    dtype: torch.dtype | None = None
    caches: list[PrunedCache] = field(init=False)

    def __post_init__(self) -> None:
        self.caches = [PrunedCache(self.model, parse("full")), *self.known, *self.unknown]
        self._together = Together(self.caches)
        self._seen = 0

    @property
    def refused(self) -> dict[PrunedCache, KVPruneError]:
        """Caches that could not serve what came, see `Together`."""
        return self._together.refused

    def of_each(self, asked: Callable[[PrunedCache], T]) -> dict[PrunedCache, T]:
        """What this finds in every cache that has refused nothing; one that does so now has nothing here either."""
        found = {}
        for cache in self.caches:
            if cache not in self.refused:
                with self._together.serving(cache):
                    found[cache] = asked(cache)
        return found

    @torch.inference_mode()
    def read(self, ids: Tensor, question: int | None = None) -> Tensor:
        """The logits after a prompt `[1, n]`, one row for every cache, `[caches, vocab]`.

        question: how many tokens come before the question; needed where there are unknown ones.
        """
        together = self._together
        if self.unknown:
            with together.shown(self.unknown, remember=True, dtype=self.dtype):
                self._forward(ids[:, :question])
            self.of_each(PrunedCache.end_prompt)  # or policies that wait for more would decide with the question
            with together.shown([], late=self.known, dtype=self.dtype):
                logits = self._forward(ids[:, question:])
            together.forget()
            together.caches, self._seen = list(self.unknown), question or 0
            asked = self._forward(ids[:, question:].expand(len(self.unknown), -1))
        else:
            with together.shown(self.known, dtype=self.dtype):
                logits = self._forward(ids)
            asked = logits[:0]
        together.caches = self.caches
        return torch.cat([logits.expand(1 + len(self.known), -1), asked])

    @torch.inference_mode()
    def feed(self, tokens: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """The logits after one more token for each of these rows, `[rows, vocab]`; tokens: `[rows]`."""
        self._together.caches = self.caches if rows is None else [self.caches[row] for row in rows]
        return self._forward(tokens[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(self._seen, self._seen + ids.shape[1], device=ids.device)[None].expand_as(ids)
        self._seen += ids.shape[1]
        output = self.model(ids, **cache_argument(self._together), position_ids=places, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits


@torch.inference_mode()
def greedy(
    reader: Reader,
    logits: Tensor,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    ends: Sequence[int] = (),
    done: Callable[[list[int]], bool] = lambda written: False,
) -> list[list[int]]:
    """What each row of a reader writes after these logits, up to and with one of `ends`, or until it is `done`.

    Of one that refuses a token, what it has written until then.
    """
    written: list[list[int]] = [[] for _ in reader.caches]
    rows = list(range(len(written)))
    for step in range(max_new_tokens):
        if step < min_new_tokens and ends:
            logits = logits.index_fill(1, torch.tensor(list(ends), device=logits.device), -torch.inf)
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            written[row].append(token)
        going = (row for row in rows if reader.caches[row] not in reader.refused)
        rows = [row for row in going if written[row][-1] not in ends and not done(written[row])]
        if not rows or step + 1 == max_new_tokens:
            break
        last = torch.tensor([written[row][-1] for row in rows], device=logits.device)
        logits = reader.feed(last, rows)
    return written


def fed(reader: Reader, ids: Tensor) -> Iterator[Tensor]:
    """Logits `[caches, vocab]` after each of the tokens `[n]`, which are fed one by one to every cache."""
    for token in ids:
        yield reader.feed(token.expand(len(reader.caches)))
