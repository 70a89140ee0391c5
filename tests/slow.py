"""What a pruned cache should do, slowly: its table in plain Python, and the stock model seeing just the rows of it.

Nothing is cached here. Of every token and KV head it is written down how long its sequence was when the row left, so
what any query could see is known for good, and the stock model, run over the whole history with masks that say so,
gives the logits and the attention of the newest step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from masked import Masked
from torch import Tensor

from kvprune import Eviction
from kvprune.policies import A2SF, H2O, TOVA, Bits, StreamingLLM

Rows = list[list[list[list[int]]]]
"""Positions of kept rows, ascending: `[layer][sequence][KV head]`."""

MOST_UNDECIDED = 8
"""Newest queries of a step whose observation waits for `crop`, while the past is recorded."""
ROUNDING = 1e-4
"""Scores of kvprune are float32: where one is less than this share above another, either row may stay."""


# -- scores --------------------------------------------------------------------------------------------------------

Scores = list[list[float]]
"""Of one layer and sequence, `[KV head][position]`."""
Rule = Callable[[Any, Scores, Any], Scores]
"""Scores after a step: of a policy, the scores before, and what each KV head's new queries saw, `[head][query]`."""


def forgetting(factor: Callable[[Any], float]) -> Rule:
    """F <- factor * F + P[q], query by query: A2SF, and H2O, which forgets nothing."""

    def scores(policy: Any, before: Scores, seen: Any) -> Scores:
        after = []
        for score, rows in zip(before, seen, strict=True):
            for row in rows:
                score = [factor(policy) * old + new for old, new in zip(score, row, strict=True)]
            after.append(score)
        return after

    return scores


def newest(policy: Any, before: Scores, seen: Any) -> Scores:
    """TOVA: the newest query's attention, averaged over all heads."""
    if not seen[0]:
        return before
    rows = [head[-1] for head in seen]
    return [[sum(column) / len(rows) for column in zip(*rows, strict=True)]] * len(rows)


def by_age(policy: Any, before: Scores, seen: Any) -> Scores:
    """StreamingLLM: the newer the better."""
    return [[float(position) for position in range(len(score))] for score in before]


RULES: dict[type, Rule] = {
    A2SF: forgetting(lambda policy: policy.forgetting_factor),
    H2O: forgetting(lambda policy: 1.0),
    TOVA: newest,
    StreamingLLM: by_age,
}


def recent_tokens(policy: Eviction | Bits, capacity: int) -> int:
    if isinstance(policy.recent, float):
        return math.ceil(Fraction(str(policy.recent)) * capacity)
    return policy.recent


def capacity_of(policy: Eviction | Bits, prompt_tokens: int) -> int | None:
    """Rows that a KV head may keep; None for a budget in bytes."""
    if isinstance(policy, Bits) or isinstance(policy.budget, str):
        return None
    if isinstance(policy.budget, int):
        return policy.budget
    least = next(n for n in range(1, 1000) if policy.sinks + recent_tokens(policy, n) <= n)
    return max(least, math.ceil(Fraction(str(policy.budget)) * prompt_tokens))


# -- the table -----------------------------------------------------------------------------------------------------


@dataclass
class History:
    """One sequence. `left` and `score` are of `[layer][KV head][position]`."""

    layers: int
    kv_heads: int
    ids: list[int] = field(default_factory=list)
    columns: list[bool] = field(default_factory=list)
    """Of the model's input so far, which are no padding."""
    prompt_tokens: int = 0
    left: list[list[list[float]]] = field(init=False)
    """How many tokens there were when a row left; infinite while it is here."""
    score: list[Scores] = field(init=False)
    heads: list[set[int]] | None = None
    """Of every layer the KV heads that the sequence has in it, where some have stopped; None if nobody knows."""

    def __post_init__(self) -> None:
        self.left, self.score = ([[[] for _ in range(self.kv_heads)] for _ in range(self.layers)] for _ in range(2))

    def append(self, ids: list[int], columns: list[bool]) -> None:
        self.ids += ids
        self.columns += columns
        for layer, filling in ((self.left, math.inf), (self.score, 0.0)):
            for heads in layer:
                for head in heads:
                    head += [filling] * len(ids)

    def newest(self, columns: int) -> int:
        """How many tokens there are in the newest columns."""
        return sum(self.columns[len(self.columns) - columns :])

    def drop_newest(self, columns: int) -> int:
        """Forget so many columns; how many tokens that were."""
        dropped = self.newest(columns)
        tokens = len(self.ids) - dropped
        del self.columns[len(self.columns) - columns :], self.ids[tokens:]
        for layer in (*self.left, *self.score):
            for head in layer:
                del head[tokens:]
        self.prompt_tokens = min(self.prompt_tokens, tokens)
        if not tokens:
            self.heads = None  # it begins anew
        return dropped

    def kept(self, layer: int, head: int) -> list[int]:
        return [position for position, left in enumerate(self.left[layer][head]) if left == math.inf]


@dataclass
class Undecided:
    """A step whose newest columns may still be taken back."""

    columns: int
    prefill: bool


class SlowCache:
    """The table of a `PrunedCache`, which it follows from step to step: what is done to the one is done to the other.

    It says how many rows stay, and which have to; and which ones do, of a policy whose rule it is told, one of `RULES`.
    Either way it takes over what it was shown: rows whose scores differ by a rounding are the cache's to choose.
    """

    def __init__(self, model: Masked, links: Sequence[Any], *, exact: bool, rule: Rule | None = None) -> None:
        """exact: whether rows keep their precision, and a prompt all of its tokens, so that logits can be foretold."""
        self.model, self.exact = model, exact
        self.evicting = tuple(link for link in links if isinstance(link, Eviction | Bits))
        self.rule = rule
        self.reset()

    def reset(self) -> None:
        self.sequences: list[History] = []
        self.seen = self.generated = self.last_eviction = 0
        self.undecided: Undecided | None = None
        self.shown = 0  # columns that layers have seen: all but those that a prompt filter kept from them
        self.oldest = 0  # of these, that sliding windows still hold
        self.recording = False
        self.due: list[Eviction | Bits] = []

    def fork(self) -> SlowCache:
        return copy.deepcopy(self, {id(shared): shared for shared in (self.model, self.evicting)})

    @property
    def tokens(self) -> list[int]:
        return [len(each.ids) for each in self.sequences]

    # -- a step ----------------------------------------------------------------------------------------------------

    def step(
        self, ids: list[list[int]], width: int, found: Rows, chosen: list[list[int]] | None = None
    ) -> list[Tensor] | None:
        """Feed new tokens, left-padded to a width; of each sequence, the logits of its new tokens, if it can tell.

        found: what the cache keeps after the step. chosen: of each sequence, what a prompt filter has let in.
        """
        if self.undecided is not None:
            self.undecided.prefill |= self.undecided.columns > 1
            self._commit(self._older(found))
        first = not self.sequences
        if first:
            self.sequences = [History(len(self.model.layers), self.model.kv_heads) for _ in ids]
        prefill = first or (width > 1 and not self.recording)
        for each, new in zip(self.sequences, ids, strict=True):
            each.append(new, [False] * (width - len(new)) + [True] * len(new))
        self.seen += width
        self.shown += width if chosen is None else self._leave_out(ids, chosen)
        if not self.recording:
            self._move_window()
        if prefill:
            self._begin_generating()
        else:
            self.generated += max(map(len, ids))
        attended = self._attend() if self.exact and any(self.tokens) else None
        if self.recording:
            waiting = min(width, MOST_UNDECIDED)
            self._observe(width, waiting, attended)
            self.undecided, self.due = Undecided(waiting, prefill), []
            self.check(found)
        else:
            self._decide(width, prefill, attended, found)
        if attended is None:
            return None
        return [row[len(each.ids) - len(new) : len(each.ids)]
                for row, each, new in zip(attended[0], self.sequences, ids, strict=True)]  # fmt: skip

    def _older(self, found: Rows) -> Rows:
        """Without the rows of tokens that are still to come."""
        return [
            [
                [[position for position in head if position < len(each.ids)] for head in heads]
                for each, heads in zip(self.sequences, layer, strict=True)
            ]
            for layer in found
        ]

    def _leave_out(self, ids: list[list[int]], chosen: list[list[int]]) -> int:
        """Of the newest tokens, those that were not chosen; how many columns that leaves."""
        most = 0
        for each, new, staying in zip(self.sequences, ids, chosen, strict=True):
            came = set(range(len(each.ids) - len(new), len(each.ids)))
            most = max(most, len(came & set(staying)))
            for position in came - set(staying):
                for layer in each.left:
                    for head in layer:
                        head[position] = 0
        self.last_eviction = self.seen
        return most

    def _begin_generating(self) -> None:
        self.generated = 0
        for each in self.sequences:
            each.prompt_tokens = len(each.ids)

    def _attend(self) -> tuple[Tensor, list[Tensor]]:
        left = [[torch.tensor(each.left[layer]).double() for each in self.sequences]
                for layer in range(len(self.model.layers))]  # fmt: skip
        return self.model.run([each.ids for each in self.sequences], left)

    def _commit(self, found: Rows) -> None:
        """Decide about a step that waited: its columns are all accepted."""
        undecided, self.undecided = self.undecided, None
        if undecided.prefill:
            self._begin_generating()
        attended = self._attend() if self.rule and any(self.tokens) else None
        self._decide(undecided.columns, undecided.prefill, attended, found)

    def _decide(self, columns: int, prefill: bool, attended: tuple[Tensor, list[Tensor]] | None, found: Rows) -> None:
        self._observe(columns, 0, attended)
        before = self.generated - max(each.newest(columns) for each in self.sequences)
        self.due = [
            link
            for link in self.evicting
            if prefill or (link.interval and self.generated // link.interval != before // link.interval)
        ]
        self.check(found, self.due)

    def _observe(self, columns: int, waiting: int, attended: tuple[Tensor, list[Tensor]] | None) -> None:
        """Update the scores by the newest columns, without those that wait."""
        if self.rule is None or attended is None:
            return
        first = self.evicting[0]
        policy: Any = first.scorer if isinstance(first, Bits) else first
        for row, each in enumerate(self.sequences):
            tokens = len(each.ids)
            queries = slice(tokens - each.newest(columns), tokens - each.newest(waiting))
            for layer, probabilities in enumerate(attended[1]):
                seen = probabilities[row, :, :, queries, :tokens]
                seen = seen.amax(1) if policy.group == "max" else seen.mean(1)
                each.score[layer] = self.rule(policy, each.score[layer], seen.tolist())

    # -- rows that stay --------------------------------------------------------------------------------------------

    def check(self, found: Rows, due: Sequence[Eviction | Bits] = ()) -> None:
        """Compare with the rows that the cache keeps, after these links of its chain have decided."""
        for layer, sequences in enumerate(found):
            for each, heads in zip(self.sequences, sequences, strict=True):
                for head, kept in enumerate(heads):
                    before = each.kept(layer, head)
                    self._check_head(each, before, kept, each.score[layer][head], due)
                    for position in set(before) - set(kept):
                        each.left[layer][head][position], self.last_eviction = len(each.ids), self.seen

    def _check_head(
        self, each: History, before: list[int], kept: list[int], score: list[float], due: Sequence[Eviction | Bits]
    ) -> None:
        assert kept == sorted(set(kept))
        assert set(kept) <= set(before), "a row came back, or is of no token"
        limits = [capacity_of(link, each.prompt_tokens) for link in due]
        # Where heads compete, how many rows one keeps is for `test_shares` to say: here, which ones, and how they fare.
        if None not in limits and all(link.share.scope == "head" for link in due):
            assert len(kept) == min([len(before), *limits])
        always = set(before)
        for link, limit in zip(due, limits, strict=True):
            window = len(each.ids) - recent_tokens(link, limit or 1)
            always &= {position for position in before if position < link.sinks or position >= window}
        assert always <= set(kept), "a sink or a recent token is gone"
        in_bytes = any(limit is None and not isinstance(link, Bits) for link, limit in zip(due, limits, strict=True))
        if self.rule is None or in_bytes:
            return
        best_first = sorted(set(before) - always, key=lambda position: (score[position], position), reverse=True)
        expected = always.union(best_first[: len(kept) - len(always)])
        if expected != set(kept):
            missed = max(score[position] for position in expected - set(kept))
            instead = min(score[position] for position in set(kept) - expected)
            assert missed - instead <= ROUNDING * missed, "a row of lower score stayed"

    # -- everything else -------------------------------------------------------------------------------------------

    def _first_in_window(self, columns: int) -> int:
        """The oldest column that a sliding window shows to the token after so many."""
        return 0 if self.model.window is None else max(0, columns - self.model.window + 1)

    def _move_window(self) -> None:
        self.oldest = max(self.oldest, self._first_in_window(self.shown))

    def can_crop(self, columns: int) -> bool:
        """Whether nothing is gone that was there so many columns ago."""
        if self.model.window is not None and self.shown >= self.model.window and not self.recording:
            return False  # not even by none, as transformers has it
        return self.seen - columns >= self.last_eviction and self.oldest <= self._first_in_window(self.shown - columns)

    def crop(self, columns: int, found: Rows) -> None:
        """Forget the newest columns, and decide about those that waited. found: what the cache keeps after it."""
        self.seen -= columns
        self.shown -= columns
        self._move_window()
        if columns:
            self.generated = max(0, self.generated - max(each.drop_newest(columns) for each in self.sequences))
        if self.undecided is not None:
            self.undecided.columns -= columns
            if self.undecided.columns > 0:
                self._commit(found)
                return
            self.undecided = None
        self.check(found)

    def select(self, rows: list[int]) -> None:
        self.sequences = [copy.deepcopy(self.sequences[row]) for row in rows]


class StoppingCache(SlowCache):
    """The same of a policy that lets tokens, or heads, stop before the last layer: which ones, the cache is asked.

    links: what follows it. goes_on: of so many tokens of a first prompt, how many every layer has. heads: how many KV
    heads every layer has. always: whether it decides anew after every token; else only after prompts.
    """

    def __init__(
        self,
        model: Masked,
        links: Sequence[Any],
        goes_on: Callable[[int], Sequence[int]],
        heads: Sequence[int],
        *,
        always: bool,
    ) -> None:
        super().__init__(model, links, exact=False)
        self.goes_on, self.most_heads, self.always = goes_on, heads, always
        self.came: list[int] = []  # tokens of each sequence, in a step that lets some stop

    def step(
        self, ids: list[list[int]], width: int, found: Rows, chosen: list[list[int]] | None = None
    ) -> list[Tensor] | None:
        stops = not self.recording and (self.always or width > 1 or not self.sequences)
        self.came = [len(new) for new in ids] if stops else []
        result = super().step(ids, width, found, chosen)
        self.came = []
        return result

    def check(self, found: Rows, due: Sequence[Eviction | Bits] = ()) -> None:
        for row in range(len(self.sequences)):
            self._take_heads(row, found)
        for layer, sequences in enumerate(found if self.came else ()):
            for each, heads, came in zip(self.sequences, sequences, self.came, strict=True):
                self._take(each, layer, heads, came)
        super().check(found, due)

    def _take_heads(self, row: int, found: Rows) -> None:
        """Those that a sequence begins with are as many as they should be, some of those below, and stay."""
        each = self.sequences[row]
        if not each.ids:
            return
        there = [{head for head, kept in enumerate(layer[row]) if kept} for layer in found]
        if each.heads is None:
            if self.came and self.came[row] == len(each.ids):
                assert [len(heads) for heads in there] == list(self.most_heads)
                assert all(above <= below for below, above in pairwise(there))
            each.heads = there
        assert there == each.heads
        for rows, left in zip(each.left, there, strict=True):
            for head in set(range(len(rows))) - left:
                rows[head] = [0.0] * len(each.ids)

    def _take(self, each: History, layer: int, heads: list[list[int]], came: int) -> None:
        tokens = len(each.ids)
        for head, kept in enumerate(heads):
            assert set(kept) <= set(range(tokens))
            if each.heads is None or head not in each.heads[layer]:
                continue
            if not self.evicting:
                assert kept == next(filter(None, heads), [])
                assert len(kept) == tokens or layer
            if came:
                assert tokens - 1 in kept
            if came == tokens and not self.evicting:
                assert len(kept) == self.goes_on(tokens)[layer]
            if set(kept) != {*each.kept(layer, head)}:  # where the new tokens are already
                self.last_eviction = self.seen
            each.left[layer][head] = [math.inf if position in kept else 0.0 for position in range(tokens)]
