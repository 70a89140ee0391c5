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


def probabilities(queries, keys, visible, scale, softcap=None, sinks=None, noise=None, temperatures=None):
    """Attention probabilities `[Hq, L, S]`; a row that sees nothing is zero.

    queries: `[Hq, L, D]`. keys: `[Hkv, S, D]`. visible: bool `[Hkv, L, S]`. sinks: `[Hq]`, one more logit per head.
    noise: `[Hq, L, S]`, is added to the logits. temperatures: `[L]`, divide what that makes.
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
            if noise is not None:
                logits = logits + noise[head, row, seen]
            if temperatures is not None:
                logits = logits / temperatures[row]
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


# -- noise by counter --------------------------------------------------------------------------------------------------


def murmur(word):
    """The finalizer of MurmurHash3 on 32 bits."""
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


def hash_of(seed, *counters):
    """A hash of a seed of 64 bits and counters, one after the other; an int below 2**32."""
    word = 0
    for counter in (seed % 2**32, seed >> 32, *counters):
        word = murmur((word * 0x9E3779B9 + counter + 1) % 2**32)
    return word


def uniform(word):
    """The middle of one of 2**23 equal parts of (0, 1); the word is read as a signed number, the lowest comes first."""
    signed = word - 2**32 if word >= 2**31 else word
    return ((signed >> 9) + 2**22 + 0.5) / 2**23


def gumbel(seed, layer, heads, queries, keys):
    """Noise `[heads, L, S]` for queries and keys at these positions."""
    noise = np.zeros((heads, len(queries), len(keys)))
    columns = [murmur(position % 2**32 ^ 0x7FEB352D) for position in keys]
    for head in range(heads):
        for index, position in enumerate(queries):
            row = hash_of(seed, layer, head, position)
            noise[head, index] = [-math.log(-math.log(uniform(murmur(row ^ column)))) for column in columns]
    return noise


# -- layers and policies -----------------------------------------------------------------------------------------------


class Layer:
    """One layer with one sequence: all it ever saw, the positions that each KV head keeps, and the policies."""

    def __init__(self, *links: Ranking, scale: float, softcap=None, sinks=None, projection=None) -> None:
        self.links = links
        self.scale, self.softcap, self.sinks = scale, softcap, sinks
        self.projection = projection
        """What the output projection makes of unit vectors of each query head, `[Hq, D, hidden]`."""
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

    def look(self, positions: Iterable[int], noise=None, temperatures=None):
        """Probabilities `[Hq, L, T]` of the queries at these positions, over rows kept now that are not after them."""
        positions = list(positions)
        visible = np.zeros((len(self.kept), len(positions), self.tokens), bool)
        for head, kept in enumerate(self.kept):
            for row, position in enumerate(positions):
                visible[head, row, [key for key in kept if key <= position]] = True
        return probabilities(
            self.queries[:, positions], self.keys, visible, self.scale, self.softcap, self.sinks, noise, temperatures
        )

    def value_size(self, head: int, position: int) -> float:
        """|v W_o|_1, mean over the query heads of a KV head."""
        value, group = self.values[head, position].astype(np.float64), len(self.queries) // len(self.keys)
        mine = self.projection[head * group : (head + 1) * group]
        return float(np.mean([np.abs(value @ each).sum() for each in mine]))


class Ranking:
    """Keeps the sinks, the recent window, and the rows of highest score; a tie goes to the more recent token.

    `score`, `[Hkv, T]`, is what a policy's score column holds; subclasses update it in `observe`.
    """

    def __init__(
        self, budget, *, sinks=4, recent=32, interval=1, group="mean", kernel_size=1, ahead=None, value_aware=False
    ) -> None:
        self.budget, self.sinks, self.recent = budget, sinks, recent
        self.interval, self.group, self.kernel_size = interval, group, kernel_size
        self.ahead = kernel_size // 2 if ahead is None else ahead
        self.value_aware = value_aware
        self.crush: KVCrush | None = None
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
        worth = []
        for kept, head in zip(layer.kept, range(len(layer.kept)), strict=True):
            always = [position for position in kept if position < self.sinks or position >= window]
            others = [position for position in kept if self.sinks <= position < window]
            value = {position: self.score[head, position] for position in others}
            if self.kernel_size > 1:
                lending = {position: self.score[head, position] for position in kept if position < window}
                lending = {position: score for position, score in lending.items() if score > -math.inf}
                value = {each: self.pooled(lending, each) if each in lending else -math.inf for each in others}
            worth.append((always, value))
        if self.crush is not None:
            self.crush.decide(self, layer, capacity, worth)
            return
        for head, (always, value) in enumerate(worth):
            layer.kept[head] = sorted(always + self.chosen(layer, head, value, max(0, capacity - len(always))))

    def chosen(self, layer: Layer, head: int, value: dict[int, float], room: int) -> list[int]:
        """Of positions and what they are worth, `room` that stay."""
        if self.value_aware:
            value = {position: score * layer.value_size(head, position) for position, score in value.items()}
        return self.best(layer, value, room)

    def best(self, layer: Layer, value: dict[int, float], room: int) -> list[int]:
        """The positions of highest value; of equal ones the more recent."""
        best_first = sorted(value, key=lambda position: (value[position], position), reverse=True)
        if 0 < room < len(best_first):
            last, first_out = value[best_first[room - 1]], value[best_first[room]]
            if last != first_out:
                layer.smallest_gap = min(layer.smallest_gap, (last - first_out) / abs(last))
        return best_first[:room]

    def pooled(self, lending: dict[int, float], position: int) -> float:
        """The highest score of a neighbour that lends."""
        return max(lending[neighbour] for neighbour in self.neighbours(position) if neighbour in lending)

    def neighbours(self, position: int) -> range:
        """Those whose scores reach a position: `ahead` before it, and what is left of the kernel behind it."""
        return range(position - self.ahead, position - self.ahead + self.kernel_size)


class KVCrush:
    """A share of the budget goes to representatives of what would be dropped; see the steps below."""

    def __init__(self, share=0.25, anchor="mean", seed=0) -> None:
        self.share, self.anchor, self.seed = share, anchor, seed
        self.representatives: list[set[int]] = []

    def decide(
        self, base: Ranking, layer: Layer, capacity: int, worth: list[tuple[list[int], dict[int, float]]]
    ) -> None:
        heads = range(len(worth))
        self.representatives = self.representatives or [set() for _ in heads]
        bits = [set(base.best(layer, value, -(-len(value) // 2))) for _, value in worth]
        counts, candidates, rows = [], [], []
        for always, value in worth:
            rows.append(min(capacity, len(always) + len(value)))
            counts.append(max(0, min(math.floor(Fraction(str(self.share)) * rows[-1]), rows[-1] - len(always))))
            important = base.best(layer, value, max(0, rows[-1] - len(always) - counts[-1]))
            candidates.append(set(value) - set(important))
        dropped = set().union(*candidates)
        anchor = {
            "mean": [2 * len(bits[head] & dropped) >= len(dropped) for head in heads],
            "alternate": [head % 2 == 1 for head in heads],
            "random": [uniform(hash_of(self.seed, 0, head)) < 0.5 for head in heads],
        }[self.anchor]
        distance = {each: sum((each in bits[head]) != anchor[head] for head in heads) for each in dropped}
        for head, (always, value) in enumerate(worth):
            if len(always) + len(value) - capacity > (0 if layer.prefill else 1):
                order = sorted(candidates[head], key=lambda position: (distance[position], position))
                number = min(counts[head], len(order))
                groups: list[list[int]] = [[] for _ in range(number)]
                for place, position in enumerate(order if number else ()):
                    groups[place * number // len(order)].append(position)
                self.representatives[head] = {
                    position for group in groups for position in base.best(layer, {at: value[at] for at in group}, 1)
                }
            mine = self.representatives[head] & set(value)
            others = {position: worth for position, worth in value.items() if position not in mine}
            layer.kept[head] = sorted(
                [*always, *mine, *base.best(layer, others, max(0, rows[head] - len(always) - len(mine)))]
            )
            self.representatives[head] = mine


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


class Keyformer(Ranking):
    """F <- F + softmax((x + noise) / tau), query by query; tau rises with every token that is generated.

    frozen_keys: tokens that were in the recent window of the prompt, or came later, are dropped when they leave it.
    """

    def __init__(
        self, budget, *, sinks=0, recent=0.3, tau_init=1.0, tau_end=2.0, generation_length=128, noise=1.0, seed=0,
        frozen_keys=False, **settings,
    ) -> None:  # fmt: skip
        super().__init__(budget, sinks=sinks, recent=recent, **settings)
        self.tau_init, self.tau_end, self.generation_length = tau_init, tau_end, generation_length
        self.noise, self.seed, self.frozen_keys = noise, seed, frozen_keys

    def temperature(self, generated: int) -> float:
        return self.tau_init + (self.tau_end - self.tau_init) * min(1, generated / self.generation_length)

    def observe(self, layer: Layer, new: range) -> None:
        self.grow(layer)
        before = layer.generated - len(new)  # generated tokens before this step
        generated = [0 if layer.prefill else before + row + 1 for row in range(len(new))]
        noise = self.noise * gumbel(self.seed, 0, len(layer.queries), new, range(layer.tokens))
        seen = layer.look(new, noise, [self.temperature(count) for count in generated])
        self.score += by_kv_head(seen, len(layer.kept), self.group).sum(1)

    def decide(self, layer: Layer) -> None:
        held = self.score
        if self.frozen_keys and not layer.prefill:
            first = layer.prompt_tokens - self.recent_tokens(self.capacity(layer.prompt_tokens))
            self.score = np.where(np.arange(layer.tokens) >= first, -np.inf, held)
        super().decide(layer)
        self.score = held


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


class CriticalKV(SnapKV):
    """A part of the room by attention, rounded down, and the rest by (attention + epsilon) * |W_o v|."""

    def __init__(self, budget, *, first_stage=0.5, value_epsilon=32e-4, **settings) -> None:
        super().__init__(budget, **settings)
        self.first_stage, self.value_epsilon = first_stage, value_epsilon

    def chosen(self, layer: Layer, head: int, value: dict[int, float], room: int) -> list[int]:
        first = self.best(layer, value, math.floor(Fraction(str(self.first_stage)) * room))
        rest = {
            position: (score + self.value_epsilon) * layer.value_size(head, position)
            for position, score in value.items()
            if position not in first
        }
        return first + self.best(layer, rest, room - len(first))


class DropKV(SnapKV):
    """How much the output of the newest `window` queries would change without a row, squared."""

    def __init__(self, budget, *, pooling="avg", epsilon=1e-6, **settings) -> None:
        super().__init__(budget, pooling=pooling, **settings)
        self.epsilon = epsilon

    def observe(self, layer: Layer, new: range) -> None:
        self.grow(layer)
        if not self.due(layer):
            return
        begin = 0 if self.interval is not None else layer.last_generated + 1
        seen = layer.look(range(max(begin, layer.tokens - self.window), layer.tokens))
        group = len(seen) // len(layer.kept)
        lost = np.zeros((len(seen), layer.tokens))
        for head, rows in enumerate(seen):
            values = layer.values[head // group].astype(np.float64)
            for row in rows:
                for key in np.flatnonzero(row):
                    others = row.copy()
                    others[key] = 0
                    if others.any() and 1 - row[key] > self.epsilon:
                        lost[head, key] += (((others @ values) / (1 - row[key]) - row @ values) ** 2).sum()
        lost = lost.reshape(len(layer.kept), group, -1)
        self.score = lost.mean(1) if self.group == "mean" else lost.max(1)


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


class Knorm(Ranking):
    """F = -||k||."""

    def observe(self, layer: Layer, new: range) -> None:
        self.score = -np.sqrt((layer.keys**2).sum(-1))


class Random(Ranking):
    """F = a number in (0, 1) of seed, layer, KV head and position."""

    def __init__(self, budget, *, seed=0, **settings) -> None:
        super().__init__(budget, **settings)
        self.seed = seed

    def observe(self, layer: Layer, new: range) -> None:
        self.score = np.array([
            [uniform(hash_of(self.seed, 0, head, position)) for position in range(layer.tokens)]
            for head in range(len(layer.kept))
        ])  # fmt: skip


def turned(states, positions, back=False):
    """States `[..., T, D]` turned by positions `[T]`: channel i and i + D/2 by position / 10^(2i/D)."""
    half = states.shape[-1] // 2
    angles = np.outer(positions, 10.0 ** (-np.arange(half) / half)) * (-1 if back else 1)
    first, second = states[..., :half], states[..., half:]
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class Statistics(Ranking):
    """Looks at the keys of all rows when a decision is due, and at prompts' queries before positions turned them."""

    def __init__(self, budget, *, interval=128, **settings) -> None:
        super().__init__(budget, interval=interval, **settings)
        self.asked: list[int] = []

    def observe(self, layer: Layer, new: range) -> None:
        self.grow(layer)
        if layer.prefill:
            # A new list: the links of several sequences are shallow copies of one.
            self.asked = self.asked + [position for position in new if position >= self.sinks]
        if not self.due(layer):
            return
        group = len(layer.queries) // len(layer.kept)
        unturned = turned(layer.queries[:, self.asked], self.asked, back=True)
        for head, kept in enumerate(layer.kept):
            scores = [self.of_query_head(layer, head, kept, unturned[head * group + member]) for member in range(group)]
            together = np.mean(scores, 0) if self.group == "mean" else np.max(scores, 0)
            self.score[head, kept] = self.finished(layer, head, kept, together)

    def of_query_head(self, layer: Layer, head: int, kept: list[int], queries):
        """Scores of the rows that are kept by one query head, whose queries are `[n, D]`."""
        raise NotImplementedError

    def finished(self, layer: Layer, head: int, kept: list[int], scores):
        return scores


class ExpectedAttention(Statistics):
    """F = (softmax of s R mu.k + s^2/2 k.(R C R^T) k over rows that are no sinks + epsilon) * ||v||."""

    def __init__(self, budget, *, future=512, covariance=True, value_norm=True, epsilon=0.0, **settings) -> None:
        super().__init__(budget, **settings)
        self.future, self.covariance, self.value_norm, self.epsilon = future, covariance, value_norm, epsilon

    def of_query_head(self, layer: Layer, head: int, kept: list[int], queries):
        dim = layer.keys.shape[-1]
        unit = np.repeat(np.eye(dim)[:, None], self.future, 1)
        rotation = turned(unit, layer.tokens + np.arange(self.future)).mean(1).T  # columns are what unit vectors become
        mean = queries.sum(0) / max(1, len(queries))
        spread = queries.T @ queries / max(1, len(queries)) - np.outer(mean, mean)
        scores = np.zeros(len(kept))
        others = [index for index, position in enumerate(kept) if position >= self.sinks]
        logits = []
        for index in others:
            key = layer.keys[head, kept[index]]
            logit = layer.scale * rotation @ mean @ key
            if self.covariance:
                logit += layer.scale**2 / 2 * key @ rotation @ spread @ rotation.T @ key
            logits.append(logit)
        if others:
            scores[others] = softmax(np.array(logits))
        return scores

    def finished(self, layer: Layer, head: int, kept: list[int], scores):
        norms = np.linalg.norm(layer.values[head, kept], axis=-1)
        return (scores + self.epsilon) * norms if self.value_norm else scores


class TriAttention(Statistics):
    """s = mean over distances of Re sum_f mu_f conj(k_f) + sum_f (E|q_f| - |mu_f|) |k_f|, z-normalised."""

    def __init__(self, budget, *, group="max", distances=17, **settings) -> None:
        super().__init__(budget, group=group, **settings)
        self.distances = [2**power for power in range(distances)]

    def of_query_head(self, layer: Layer, head: int, kept: list[int], queries):
        half = layer.keys.shape[-1] // 2
        count = max(1, len(queries))
        mean = queries.sum(0) / count
        seen_from = np.mean([turned(mean[None], [layer.tokens - 1 + distance])[0] for distance in self.distances], 0)
        pairs = queries[:, :half] + 1j * queries[:, half:]
        spread = abs(pairs).sum(0) / count - abs(pairs.sum(0) / count)
        keys = layer.keys[head, kept]
        scores = keys @ seen_from + abs(keys[:, :half] + 1j * keys[:, half:]) @ spread
        return (scores - scores.mean()) / max(scores.std(), 1e-12)


class Leverage(Ranking):
    """F = x.(X^T X + ridge)^-1 x of keys that are turned back and centred."""

    def __init__(self, budget, *, interval=128, ridge=1e-4, **settings) -> None:
        super().__init__(budget, interval=interval, **settings)
        self.ridge = ridge

    def observe(self, layer: Layer, new: range) -> None:
        self.grow(layer)
        if not self.due(layer):
            return
        for head, kept in enumerate(layer.kept):
            keys = turned(layer.keys[head, kept], kept, back=True)
            keys = keys - keys.mean(0)
            gram = keys.T @ keys
            gram += np.eye(len(gram)) * max(np.trace(gram) / len(gram), 1e-12) * self.ridge
            self.score[head, kept] = np.einsum("nd,de,ne->n", keys, np.linalg.inv(gram), keys)


class KeyDiff(Ranking):
    """F = -cos(k, the mean of normalized keys that are kept), when a decision is due."""

    def __init__(self, budget, *, interval=128, **settings) -> None:
        super().__init__(budget, interval=interval, **settings)

    def observe(self, layer: Layer, new: range) -> None:
        self.grow(layer)
        if not self.due(layer):
            return
        for head, kept in enumerate(layer.kept):
            unit = layer.keys[head] / np.linalg.norm(layer.keys[head], axis=-1, keepdims=True)
            anchor = unit[kept].mean(0)
            self.score[head, kept] = -(unit[kept] @ anchor) / np.linalg.norm(anchor)
