"""Every policy against its brute-force twin of `reference.py`, step by step: kept tokens, scores and outputs."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor

from kvprune import Policy, Scoring
from kvprune.attention.outputs import Outputs
from kvprune.attention.rotary import Rotary
from kvprune.cache.layer import PrunedLayer
from kvprune.policies import (
    A2SF,
    H2O,
    TOVA,
    CriticalKV,
    DropKV,
    ExpectedAttention,
    KeyDiff,
    Keyformer,
    Knorm,
    KVCrush,
    Leverage,
    Random,
    SnapKV,
    StreamingLLM,
    TriAttention,
)

ROUNDING = {"atol": 1e-5, "rtol": 1e-4}
ROOM = 10_000

thorough = profile(max_examples=4 * profile.default.max_examples)


@dataclass(frozen=True)
class Twins:
    """A policy and the class that says by brute force what it should do."""

    policy: Callable[..., Policy]
    reference: Callable[..., reference.Ranking]
    exact: tuple[tuple[str, Any], ...] = ()
    """Settings of the policy alone that make it leave nothing out."""

    def make(self, settings: dict[str, Any]) -> Pair:
        return Pair(self.policy(**settings, **dict(self.exact)), [self.reference(**settings)])


@dataclass(frozen=True)
class Pair:
    """A policy with its settings, and as many links of a brute-force layer."""

    policy: Policy
    links: list[reference.Ranking]

    def __or__(self, other: Pair) -> Pair:
        return Pair(self.policy | other.policy, self.links + other.links)

    def __repr__(self) -> str:
        return str(self.policy)


TWINS = {
    "a2sf": Twins(A2SF, reference.A2SF, exact=(("epsilon", 0.0),)),
    "h2o": Twins(H2O, reference.H2O),
    "keyformer": Twins(Keyformer, reference.Keyformer),
    "snapkv": Twins(SnapKV, reference.SnapKV),
    "tova": Twins(TOVA, reference.TOVA),
    "streaming": Twins(StreamingLLM, reference.StreamingLLM),
    "knorm": Twins(Knorm, reference.Knorm),
    "random": Twins(Random, reference.Random),
    "keydiff": Twins(KeyDiff, reference.KeyDiff),
    "expected": Twins(ExpectedAttention, reference.ExpectedAttention),
    "tri": Twins(TriAttention, reference.TriAttention),
    "leverage": Twins(Leverage, reference.Leverage),
}

each_policy = pytest.mark.parametrize("name", TWINS)
NO_ATTENTION = ("knorm", "random", "keydiff", "expected", "tri", "leverage")
attention_policies = pytest.mark.parametrize("name", [name for name in TWINS if name not in NO_ATTENTION])


@dataclass(frozen=True)
class Shape:
    """A layer: `scale` is drawn large enough for attention to be far from uniform."""

    kv_heads: int = 2
    group: int = 2
    head_dim: int = 4
    scale: float = 1.0


@dataclass(frozen=True)
class Steps:
    """Tokens of each sequence in each step that feeds a prompt or a piece of one, and generated tokens after each."""

    prompts: tuple[tuple[int, ...], ...]
    generated: tuple[int, ...]
    seed: int = 0


# -- strategies --------------------------------------------------------------------------------------------------------

shapes = st.builds(
    Shape,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 8]),
    scale=st.sampled_from([0.2, 1.0]),
)
seeds = st.integers(0, 2**16)
kernels = st.sampled_from([1, 3, 5, 7])
intervals = st.integers(1, 5)
groups = st.sampled_from(["mean", "max"])


def aheads(kernel_size: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(0, kernel_size - 1)


@st.composite
def steps(draw: st.DrawFn, most_prompts: int = 3, most_sequences: int = 2) -> Steps:
    """One to three prompts (or pieces, or turns) of a small batch, with some generated tokens after each."""
    batch = draw(st.integers(1, most_sequences))
    prompt = st.tuples(*[st.integers(1, 18)] * batch)
    prompts = draw(st.lists(prompt, min_size=1, max_size=most_prompts))
    generated = draw(st.tuples(*[st.integers(0, 8)] * len(prompts)))
    return Steps(tuple(prompts), generated, draw(seeds))


@st.composite
def budgets(draw: st.DrawFn, *, sinks: int, recent: int | float | None) -> float | int:
    """A fraction, or a number of tokens that holds sinks and recent window."""
    if draw(st.booleans()):
        return draw(st.integers(1, 20)) / 20
    least = 12 if isinstance(recent, float) else sinks + (recent or 0)
    return draw(st.integers(max(1, least), 20))


@st.composite
def eviction(draw: st.DrawFn, **others: st.SearchStrategy[Any]) -> dict[str, Any]:
    """Settings that all evicting policies share, and those given."""
    sinks = draw(st.integers(0, 3))
    recent = draw(st.one_of(st.integers(0, 5), st.sampled_from([0.0, 0.1, 0.25, 0.5])))
    budget = draw(budgets(sinks=sinks, recent=recent))
    settings = draw(st.fixed_dictionaries(others))
    if "kernel_size" in settings:
        settings["ahead"] = draw(aheads(settings["kernel_size"]))
    return {"budget": budget, "sinks": sinks, "recent": recent, **settings}


@st.composite
def snapkv(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of SnapKV: with and without an interval, with its own recent window and with that of the paper."""
    sinks, window, kernel_size = draw(st.integers(0, 3)), draw(st.integers(1, 6)), draw(kernels)
    return {
        "budget": draw(budgets(sinks=sinks, recent=window)),
        "sinks": sinks,
        "window": window,
        "recent": draw(st.sampled_from([None, 1, window])),
        "kernel_size": kernel_size,
        "ahead": draw(aheads(kernel_size)),
        "pooling": draw(st.sampled_from(["max", "avg"])),
        "interval": draw(st.one_of(st.none(), intervals)),
        "group": draw(groups),
    }


temperatures = st.sampled_from([0.5, 1.0, 2.5])
SETTINGS = {
    "a2sf": eviction(
        forgetting_factor=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.3, 0.99)),
        kernel_size=kernels,
        interval=st.one_of(st.none(), intervals),
        group=groups,
    ),
    "h2o": eviction(kernel_size=kernels, interval=st.one_of(st.none(), intervals), group=groups),
    "keyformer": eviction(
        tau_init=temperatures,
        tau_end=temperatures,
        generation_length=st.integers(1, 10),
        noise=st.sampled_from([0, 1]),
        seed=st.integers(0, 2**40),
        frozen_keys=st.booleans(),
        kernel_size=kernels,
        interval=st.one_of(st.none(), intervals),
        group=groups,
    ),
    "snapkv": snapkv(),
    "tova": eviction(interval=intervals, kernel_size=kernels, group=groups),
    "streaming": st.integers(0, 4).flatmap(
        lambda sinks: st.fixed_dictionaries(
            {"budget": budgets(sinks=sinks, recent=1), "sinks": st.just(sinks), "interval": intervals}
        )
    ),
    "knorm": eviction(kernel_size=kernels, interval=st.one_of(st.none(), intervals)),
    "random": eviction(seed=st.integers(0, 2**40), interval=st.one_of(st.none(), intervals)),
    "keydiff": eviction(kernel_size=kernels, interval=st.one_of(st.none(), intervals)),
    "expected": eviction(
        future=st.integers(1, 6),
        covariance=st.booleans(),
        value_norm=st.booleans(),
        epsilon=st.sampled_from([0.0, 0.01]),
        interval=st.one_of(st.none(), intervals),
        group=groups,
    ),
    "tri": eviction(distances=st.integers(1, 5), interval=st.one_of(st.none(), intervals), group=groups),
    "leverage": eviction(ridge=st.sampled_from([0.01, 1.0]), interval=st.one_of(st.none(), intervals)),
}


def pairs(name: str) -> st.SearchStrategy[Pair]:
    return SETTINGS[name].map(TWINS[name].make)


def rotary(head_dim: int) -> Rotary:
    """Positions as `reference.turned` has them."""
    half = head_dim // 2

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        each = positions[..., None] * 10.0 ** (-torch.arange(half) / half)
        return each.cos(), each.sin()

    def apply(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        first, second = states.split(half, dim=-1)
        cosines, sines = cosines[:, None], sines[:, None]
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)

    return Rotary(angles, apply)


# -- the comparison ----------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """A pruned layer with a batch, and one brute-force layer for each of its sequences."""

    pair: Pair
    shape: Shape
    sequences: int
    scoring: Scoring
    random: torch.Generator

    def __post_init__(self) -> None:
        attention = torch.nn.Module()  # whose output projection is all that is asked for
        width, rows = 5, self.shape.kv_heads * self.shape.group * self.shape.head_dim
        attention.o_proj = torch.nn.Linear(rows, width, bias=False)
        torch.nn.init.normal_(attention.o_proj.weight, generator=self.random)
        self.attention = attention  # which nothing else keeps alive
        self.layer = PrunedLayer(self.pair.policy, 0, rotary=rotary(self.shape.head_dim), outputs=Outputs(attention))
        self.projection = attention.o_proj.weight.detach().double().T.reshape(-1, self.shape.head_dim, width).numpy()
        sinks = None if self.scoring.sinks is None else self.scoring.sinks.tolist()
        self.alone = [
            reference.Layer(
                *map(deepcopy, self.pair.links),
                scale=self.scoring.scale,
                softcap=self.scoring.softcap,
                sinks=sinks,
                projection=self.projection,
            )
            for _ in range(self.sequences)
        ]

    def draw(self, heads: int, length: int) -> Tensor:
        return torch.randn(self.sequences, heads, length, self.shape.head_dim, generator=self.random)

    def step(self, tokens: tuple[int, ...]) -> None:
        """Feed so many tokens of each sequence, padded on the left, and compare all that can be seen."""
        width, kv_heads = max(tokens), self.shape.kv_heads
        queries, keys, values = (
            self.draw(kv_heads * self.shape.group, width),
            self.draw(kv_heads, width),
            self.draw(kv_heads, width),
        )
        valid = torch.arange(width) >= width - torch.tensor(tokens)[:, None]
        prefill = self.layer.seen == 0 or width > 1
        self.layer.update(keys, values)
        output = self.layer.attend(queries, None if valid.all() else valid, self.scoring)
        for row, (alone, count) in enumerate(zip(self.alone, tokens, strict=True)):
            expected = alone.step(*(tensor[row, :, -count:] for tensor in (queries, keys, values)), prefill=prefill)
            assume(alone.smallest_gap > 1e-5)  # no choice that float32 rounding decides
            found = output[row, -count:].transpose(0, 1)
            torch.testing.assert_close(found, torch.tensor(expected).float(), **ROUNDING)
            self.compare_rows(row, alone)

    def compare_rows(self, row: int, alone: reference.Layer) -> None:
        table = self.layer.table
        listed = self.layer.kept_positions()[row]
        for head, kept in enumerate(alone.kept):
            slots = {int(position): slot for slot, position in enumerate(table.positions[row, head]) if position >= 0}
            assert sorted(slots) == kept
            assert [position for position in listed[head].tolist() if position >= 0] == kept
            order = [slots[position] for position in kept]
            for name, source in (("keys", alone.keys), ("values", alone.values)):
                expected = torch.tensor(source[head, kept]).float()
                assert torch.equal(getattr(table, name)[row, head, order], expected)
            for column, scores in self.scored(alone):
                found = table[column][row, head, order]
                torch.testing.assert_close(found, torch.tensor(scores[head, kept]).float(), **ROUNDING)

    def scored(self, alone: reference.Layer) -> list[tuple[str, Any]]:
        """Score columns of the table, and what the brute-force links of one sequence have for them."""
        one = len(alone.links) == 1
        return [
            ("score" if one else f"{index}.score", link.score)
            for index, link in enumerate(alone.links)
            if not isinstance(link, reference.StreamingLLM)
        ]


def compare(pair: Pair, shape: Shape, steps: Steps, *, softcap: float | None = None, sinks: bool = False) -> Comparison:
    """Feed the steps to the policy and to brute force, and compare after each."""
    random = torch.Generator().manual_seed(steps.seed)
    logits = torch.randn(shape.kv_heads * shape.group, generator=random) if sinks else None
    sequences = len(steps.prompts[0])
    comparison = Comparison(pair, shape, sequences, Scoring(shape.scale, softcap, logits), random)
    for prompt, generated in zip(steps.prompts, steps.generated, strict=True):
        comparison.step(prompt)
        for _ in range(generated):
            comparison.step((1,) * sequences)
    return comparison


# -- each policy -------------------------------------------------------------------------------------------------------


@each_policy
@thorough
@given(data=st.data(), shape=shapes, steps=steps(most_sequences=1))
def test_policy_equals_its_formula(name, data, shape, steps):
    """Over turns of a prompt and generated tokens, a policy keeps, scores and attends as its formula says."""
    compare(data.draw(pairs(name)), shape, steps)


@each_policy
@thorough
@given(data=st.data(), shape=shapes, steps=steps())
def test_padded_batch_equals_the_formula_for_each_sequence(name, data, shape, steps):
    """In a batch with left padding, each sequence keeps, scores and attends as the formula says of it alone."""
    compare(data.draw(pairs(name)), shape, steps)


@attention_policies
@pytest.mark.parametrize(("softcap", "sinks"), [(1.0, False), (None, True), (1.5, True)])
@given(data=st.data(), shape=shapes, steps=steps(most_prompts=2))
def test_soft_capped_logits_and_attention_sinks(name, softcap, sinks, data, shape, steps):
    """The same holds for models that cap their logits and for those with an attention sink in every head."""
    compare(data.draw(pairs(name)), shape, steps, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize(
    "pair",
    [
        TWINS["streaming"].make({"budget": 0.6, "sinks": 0}),
        TWINS["h2o"].make({"budget": 0.45, "sinks": 0, "recent": 0}),
        TWINS["h2o"].make({"budget": 2, "sinks": 0, "recent": 1}) | TWINS["tova"].make({"budget": 0.4}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("prompts", [((5, 1), (1, 2)), ((1, 2), (2, 2)), ((9, 2), (2, 3)), ((12, 3),)], ids=str)
@given(generated=st.integers(1, 4), seed=seeds)
def test_each_sequence_of_a_batch_goes_by_its_own_budget(pair, prompts, generated, seed):
    """Under a fraction, sequences of a batch have different budgets, and none waits for another to reach its own."""
    compare(pair, Shape(), Steps(prompts, (generated,) * len(prompts), seed))


@pytest.mark.parametrize("prompts", [((1, 1), (1, 2), (1, 2)), ((4, 4), (1, 3), (3, 1)), ((2, 3), (5, 1))], ids=str)
@pytest.mark.parametrize("interval", [None, 1])
@given(window=st.integers(2, 6), generated=st.integers(0, 3), seed=seeds)
def test_a_window_of_queries_reaches_back_over_padding(prompts, interval, window, generated, seed):
    """A window counts a sequence's own queries, not the columns that padding has put between them."""
    pair = TWINS["snapkv"].make({"budget": 20, "sinks": 0, "window": window, "kernel_size": 1, "interval": interval})
    compare(pair, Shape(), Steps(prompts, (0,) * (len(prompts) - 1) + (generated,), seed))


VALUE_AWARE = {
    "critical": snapkv().flatmap(
        lambda drawn: st.sampled_from([0.0, 0.3, 0.5, 1.0]).map(
            lambda first: Twins(CriticalKV, reference.CriticalKV).make({**drawn, "first_stage": first})
        )
    ),
    "snapkv": snapkv().map(lambda drawn: TWINS["snapkv"].make({**drawn, "value_aware": True})),
    "tova": SETTINGS["tova"].map(lambda drawn: TWINS["tova"].make({**drawn, "value_aware": True})),
    "dropkv": snapkv().map(Twins(DropKV, reference.DropKV).make),
}


@pytest.mark.parametrize("name", VALUE_AWARE)
@given(data=st.data(), shape=shapes, steps=steps())
def test_what_values_add_to_the_output(name, data, shape, steps):
    """What looks at values, beside attention, scores and keeps what the formula says, in any batch."""
    compare(data.draw(VALUE_AWARE[name]), shape, steps)


@pytest.mark.parametrize("name", ["a2sf", "snapkv"])
@given(data=st.data(), shape=shapes, steps=steps(), share=st.sampled_from([0, 0.2, 0.5, 1]), seed=seeds,
       anchor=st.sampled_from(["mean", "alternate", "random"]))  # fmt: skip
def test_representatives_of_what_is_dropped(name, data, shape, steps, share, seed, anchor):
    """KVCrush spends a share of the budget of a policy before it as its formula says; no share leaves that as it is."""
    pair = data.draw(pairs(name))
    for link in pair.links:
        link.crush = reference.KVCrush(share, anchor, seed) if share else None
    compare(Pair(pair.policy | KVCrush(share, anchor=anchor, seed=seed), pair.links), shape, steps)


# -- how a prompt comes ------------------------------------------------------------------------------------------------


@each_policy
@given(data=st.data(), shape=shapes, chunks=st.lists(st.integers(2, 9), min_size=2, max_size=5), seed=seeds)
def test_chunks_that_evict_nothing_before_the_last(name, data, shape, chunks, seed):
    """A prompt in chunks, of which only the last exceeds the budget, leaves what it leaves in one piece."""
    budget = data.draw(st.integers(max(8, sum(chunks[:-1])), max(8, sum(chunks) - 1)))
    settings = {**data.draw(SETTINGS[name]), "budget": budget}
    settings.update(sinks=min(settings["sinks"], 2), recent=2 if name != "streaming" else 1)
    pair = TWINS[name].make(settings)
    pieces = compare(pair, shape, Steps(tuple((chunk,) for chunk in chunks), (0,) * len(chunks), seed))
    alone = pieces.alone[0]
    whole = reference.Layer(*map(copy, pair.links), scale=shape.scale)
    whole.step(alone.queries, alone.keys, alone.values)
    assert alone.kept == whole.kept


@each_policy
@given(data=st.data(), shape=shapes, generated=st.integers(0, 6), seed=seeds)
def test_a_second_turn_evicts_again(name, data, shape, generated, seed):
    """A second turn after generated tokens is scored over what is left, and cut to the budget again."""
    settings = {**data.draw(SETTINGS[name]), "budget": 9, "sinks": 2}
    settings.update(recent=3 if name != "streaming" else 1)
    pair = TWINS[name].make(settings)
    comparison = compare(pair, shape, Steps(((15,), (8,)), (generated, 0), seed))
    assert {len(kept) for kept in comparison.alone[0].kept} == {9}


# -- chains ------------------------------------------------------------------------------------------------------------


@thorough
@given(first=pairs("a2sf"), second=pairs("streaming"), shape=shapes, steps=steps())
def test_chain_of_a2sf_and_streaming_llm(first, second, shape, steps):
    """Both links decide at every step, the second over what the first has left."""
    compare(first | second, shape, steps)


@thorough
@given(first=pairs("h2o"), second=pairs("tova"), shape=shapes, steps=steps())
def test_chain_of_h2o_and_tova(first, second, shape, steps):
    """Each link has a score of its own, whatever the other drops."""
    compare(first | second, shape, steps)


@given(generated=st.integers(1, 6), seed=seeds)
def test_tova_averages_over_heads_that_keep_different_tokens(generated, seed):
    """What TOVA averages over the heads is the attention to a token, wherever in its head's table that token is."""
    chain = TWINS["h2o"].make({"budget": 6, "sinks": 0, "recent": 1}) | TWINS["tova"].make({"budget": 4})
    compare(chain, Shape(kv_heads=3), Steps(((12,),), (generated,), seed))


@thorough
@given(first=pairs("snapkv"), second=pairs("a2sf"), third=pairs("h2o"), shape=shapes, steps=steps())
def test_chain_of_three(first, second, third, shape, steps):
    """A chain may be as long as you like."""
    compare(first | second | third, shape, steps)


# -- ties --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tova", "snapkv", "streaming"])
@pytest.mark.parametrize("tokens", [[20], [20, 1, 1, 1], [12, 6, 1, 1]], ids=str)
def test_ties_go_to_the_more_recent_token(name, tokens):
    """Where attention is uniform, what is kept beside the sinks is the newest."""
    interval = {"interval": 1, "window": 1, "kernel_size": 1} if name == "snapkv" else {}
    layer = PrunedLayer(TWINS[name].policy(6, sinks=2, **interval), 0)
    for count in tokens:
        keys = torch.zeros(1, 2, count, 4)
        layer.update(keys, torch.randn(1, 2, count, 4))
        layer.attend(torch.randn(1, 4, count, 4), None, Scoring(1.0))
    newest = sum(tokens)
    assert layer.kept_positions()[0].tolist() == [[0, 1, *range(newest - 4, newest)]] * 2


# -- what A2SF leaves out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [230, 260, 300])
def test_a2sf_is_within_epsilon_of_its_formula(length):
    """The default epsilon, under which a long prompt's first rows are not read, costs no score more than itself."""
    shape = Shape(kv_heads=1, group=1)
    exact, default = A2SF(ROOM, epsilon=0.0), A2SF(ROOM)
    queries, keys, values = (torch.randn(1, 1, length, shape.head_dim) for _ in range(3))
    alone = reference.Layer(reference.A2SF(ROOM), scale=1.0)
    alone.step(queries[0], keys[0], values[0])
    for policy, tolerance in ((exact, 1e-5), (default, default.epsilon + 1e-5)):
        layer = PrunedLayer(policy, 0)
        layer.update(keys, values)
        layer.attend(queries, None, Scoring(1.0))
        error = layer.table["score"][0].double() - torch.tensor(alone.links[0].score)
        assert error.abs().max() <= tolerance
