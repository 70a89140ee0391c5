"""What each policy keeps, by brute force: one layer and one sequence, from the formulas, dense and in float64.

Nothing here comes from kvprune. Arrays run over every position that a sequence ever had; a row that was evicted is
simply no longer in `kept`, and nobody looks at it.

Shapes: `Hq` query heads, `Hkv` KV heads, `L` queries, `S` keys, `D` head dim, `T` tokens of the sequence so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np


def probabilities(queries, keys, visible, scale, softcap=None, sinks=None):
    """Attention probabilities `[Hq, L, S]`; a row that sees nothing is zero.

    queries: `[Hq, L, D]`. keys: `[Hkv, S, D]`. visible: bool `[Hkv, L, S]`. sinks: `[Hq]`, one more logit per head.
    """
    queries, keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    group = len(queries) // len(keys)
    result = np.zeros((*queries.shape[:2], keys.shape[1]))
    for head in range(len(queries)):
        for row, query in enumerate(queries[head]):
            seen = np.flatnonzero(visible[head // group, row])
            logits = keys[head // group, seen] @ query * scale
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            if sinks is not None:
                logits = np.append(logits, float(sinks[head]))
            if len(logits):
                weights = np.exp(logits - logits.max())
                result[head, row, seen] = (weights / weights.sum())[: len(seen)]
    return result


def causal(rows, length, kv_heads=1):
    """bool `[Hkv, rows, length]`: queries are the newest of the keys, and see themselves and what came before."""
    visible = np.arange(length)[None, :] <= np.arange(length - rows, length)[:, None]
    return np.broadcast_to(visible, (kv_heads, rows, length))


def by_kv_head(probabilities, kv_heads, group="mean"):
    """`[Hq, L, S] -> [Hkv, L, S]`: the mean or the maximum over the query heads of each KV head, row by row."""
    grouped = probabilities.reshape(kv_heads, -1, *probabilities.shape[1:])
    return grouped.mean(1) if group == "mean" else grouped.max(1)


def mass(probabilities, weights, kv_heads, group="mean"):
    """Weighted attention mass `[Hkv, S]` of probabilities `[Hq, L, S]` and weights `[L]`."""
    return (by_kv_head(probabilities, kv_heads, group) * np.asarray(weights, np.float64)[None, :, None]).sum(1)


def share(part, whole):
    """`part` of `whole` tokens, rounded up; the part is the number that a person wrote, not its binary neighbour."""
    return math.ceil(Fraction(str(part)) * whole)


class Layer:
    """One layer with one sequence: all it ever saw, the positions that each KV head keeps, and the policies."""

    def __init__(self, *links: Ranking, scale: float, softcap=None, sinks=None) -> None:
        self.links = links
        self.scale, self.softcap, self.sinks = scale, softcap, sinks
        self.tokens = 0
        self.prompt_tokens = 0
        self.generated = 0  # since the last prefill step
        self.last_generated = -1  # position of the newest token that was generated
        self.prefill = True
        self.kept: list[list[int]] = []
        self.smallest_gap = math.inf
        """The smallest difference, relative to the larger one, between the scores of a kept and of a dropped row."""

    def step(self, queries, keys, values, *, prefill=None):
        """Feed new tokens: queries `[Hq, L, D]`, keys and values `[Hkv, L, D]`; the attention output `[Hq, L, D]`.

        prefill: whether they are a prompt; by default the first step is, and any with more than one token.
        """
        new = [np.asarray(tensor, np.float64) for tensor in (queries, keys, values)]
        count = new[0].shape[1]
        if self.tokens == 0:
            self.queries, self.keys, self.values = new
            self.kept = [[] for _ in new[1]]
        else:
            held = (self.queries, self.keys, self.values)
            self.queries, self.keys, self.values = (
                np.concatenate(pair, axis=1) for pair in zip(held, new, strict=True)
            )
        positions = range(self.tokens, self.tokens + count)
        self.prefill = (self.tokens == 0 or count > 1) if prefill is None else prefill
        self.tokens += count
        for kept in self.kept:
            kept.extend(positions)
        if self.prefill:
            self.prompt_tokens, self.generated = self.tokens, 0
        else:
            self.generated += count
            self.last_generated = self.tokens - 1

        seen = self.look(positions)
        group = len(self.queries) // len(self.keys)
        output = np.stack([seen[head] @ self.values[head // group] for head in range(len(seen))])
        for link in self.links:
            link.observe(self, positions)
        for link in self.links:
            link.decide(self)
        return output

    def look(self, positions: Iterable[int]):
        """Probabilities `[Hq, L, T]` of the queries at these positions, over rows kept now that are not after them."""
        positions = list(positions)
        visible = np.zeros((len(self.kept), len(positions), self.tokens), bool)
        for head, kept in enumerate(self.kept):
            for row, position in enumerate(positions):
                visible[head, row, [key for key in kept if key <= position]] = True
        return probabilities(
            self.queries[:, positions], self.keys, visible, self.scale, softcap=self.softcap, sinks=self.sinks
        )


class Ranking:
    """Keeps the sinks, the recent window, and the rows of highest score; a tie goes to the more recent token.

    `score`, `[Hkv, T]`, is what a policy's score column holds; subclasses update it in `observe`.
    """

    def __init__(self, budget, *, sinks=4, recent=32, interval=1, group="mean", kernel_size=1) -> None:
        self.budget, self.sinks, self.recent = budget, sinks, recent
        self.interval, self.group, self.kernel_size = interval, group, kernel_size
        self.score = np.zeros((0, 0))

    def observe(self, layer: Layer, new: range) -> None:
        """Update the score after a step whose tokens have the positions `new`."""

    def grow(self, layer: Layer) -> None:
        """Zeros for the new tokens."""
        grown = np.zeros((len(layer.kept), layer.tokens))
        grown[: len(self.score), : self.score.shape[1]] = self.score
        self.score = grown

    def look(self, layer: Layer, positions: Iterable[int]):
        """Attention `[Hkv, L, T]` that the queries at these positions give as a group."""
        return by_kv_head(layer.look(positions), len(layer.kept), self.group)

    def due(self, layer: Layer) -> bool:
        """After every prefill step, and every `interval` generated tokens."""
        return layer.prefill or (self.interval is not None and layer.generated % self.interval == 0)

    def recent_tokens(self, capacity: int) -> int:
        return share(self.recent, capacity) if isinstance(self.recent, float) else self.recent

    def capacity(self, prompt_tokens: int) -> int:
        if isinstance(self.budget, int):
            return self.budget
        least = next(n for n in range(1, 10_000) if self.sinks + self.recent_tokens(n) <= n)
        return max(least, share(self.budget, prompt_tokens))

    def decide(self, layer: Layer) -> None:
        if not self.due(layer):
            return
        capacity = self.capacity(layer.prompt_tokens)
        window = layer.tokens - self.recent_tokens(capacity)
        for head, kept in enumerate(layer.kept):
            always = [position for position in kept if position < self.sinks or position >= window]
            others = [position for position in kept if self.sinks <= position < window]
            value = {position: self.score[head, position] for position in others}
            if layer.prefill and self.kernel_size > 1:
                lending = {position: self.score[head, position] for position in kept if position < window}
                value = {position: self.pooled(lending, position) for position in others}
            best_first = sorted(others, key=lambda position: (value[position], position), reverse=True)
            room = max(0, capacity - len(always))
            layer.kept[head] = sorted(always + best_first[:room])
            if 0 < room < len(best_first):
                last, first_out = value[best_first[room - 1]], value[best_first[room]]
                if last != first_out:
                    layer.smallest_gap = min(layer.smallest_gap, (last - first_out) / abs(last))

    def pooled(self, lending: dict[int, float], position: int) -> float:
        """The highest score of a neighbour that lends."""
        return max(lending[neighbour] for neighbour in self.neighbours(position) if neighbour in lending)

    def neighbours(self, position: int) -> range:
        reach = self.kernel_size // 2
        return range(position - reach, position + reach + 1)


class A2SF(Ranking):
    """F <- gamma * F + P[q], query by query."""

    def __init__(self, budget, *, forgetting_factor=0.95, **settings) -> None:
        super().__init__(budget, **settings)
        self.forgetting_factor = forgetting_factor

    def observe(self, layer: Layer, new: range) -> None:
        self.grow(layer)
        seen = self.look(layer, new)
        for row in range(len(new)):
            self.score = self.forgetting_factor * self.score + seen[:, row]


class H2O(Ranking):
    """F <- F + P[q], query by query."""

    def observe(self, layer: Layer, new: range) -> None:
        self.grow(layer)
        self.score += self.look(layer, new).sum(1)


class SnapKV(Ranking):
    """z = sum of P[q] over the newest `window` queries, at the end of a prompt or when an interval has passed.

    Without an interval, the window ends where generated tokens begin. Earlier queries see what is kept now.
    """

    def __init__(self, budget, *, window=32, kernel_size=7, pooling="max", recent=None, interval=None, **settings):
        recent = window if recent is None else recent
        super().__init__(budget, recent=recent, kernel_size=kernel_size, interval=interval, **settings)
        self.window, self.pooling = window, pooling

    def observe(self, layer: Layer, new: range) -> None:
        self.grow(layer)
        if self.due(layer):
            begin = 0 if self.interval is not None else layer.last_generated + 1
            self.score = self.look(layer, range(max(begin, layer.tokens - self.window), layer.tokens)).sum(1)

    def pooled(self, lending: dict[int, float], position: int) -> float:
        if self.pooling == "max":
            return super().pooled(lending, position)
        # Divided by the whole kernel: what is missing counts as zero, as in the paper's code.
        return sum(lending.get(neighbour, 0.0) for neighbour in self.neighbours(position)) / self.kernel_size


class TOVA(Ranking):
    """The newest query's attention, averaged over all heads: every KV head has the same scores."""

    def __init__(self, budget, *, sinks=0, recent=1, **settings) -> None:
        super().__init__(budget, sinks=sinks, recent=recent, **settings)

    def observe(self, layer: Layer, new: range) -> None:
        newest = self.look(layer, [new[-1]])[:, 0]
        self.score = np.repeat(newest.mean(0, keepdims=True), len(newest), axis=0)


class StreamingLLM(Ranking):
    """The first `sinks` tokens and the newest ones."""

    def __init__(self, budget, *, sinks=4, recent=1, **settings) -> None:
        super().__init__(budget, sinks=sinks, recent=recent, **settings)

    def observe(self, layer: Layer, new: range) -> None:
        self.score = np.array([range(1, layer.tokens + 1)] * len(layer.kept), np.float64)
