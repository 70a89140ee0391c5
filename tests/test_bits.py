"""One number of bytes for rows and bits: the allotment against brute force, and what it does in a cache."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import build, feed, generate, kept_everywhere, left_padded, shared, stepwise, storage_nbytes
from held import held_by
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor

from kvprune import Adaptive, BudgetError, Everywhere, PolicyError, PrunedCache, Pyramid, Uniform
from kvprune.cache.models import cache_argument
from kvprune.policies import (
    A2SF,
    H2O,
    TOVA,
    Bits,
    DropKV,
    KeyDiff,
    Keyformer,
    Knorm,
    KVzip,
    KVzipPlus,
    Random,
    SnapKV,
    StreamingLLM,
    parse,
)  # fmt: skip
from kvprune.policy.allotment import EXACT, Rows, allotted, doubted, error, steps, weights_of
from kvprune.policy.heads import Heads

# -- the allotment -----------------------------------------------------------------------------------------------------

prices = st.dictionaries(st.sampled_from([2, 3, 4, 8]), st.integers(5, 200), max_size=4).map(
    lambda packed: {**packed, EXACT: 264}
)


@given(prices, st.lists(st.floats(-30, 30), min_size=1, max_size=20))
def test_a_row_gets_the_bits_that_cost_least(prices, logarithms):
    """Of all precisions the one whose error and bytes, theta each, are least: tried one by one in numpy."""
    widths, begins = steps(prices)
    assert widths[0] == 0
    assert np.all(np.diff(begins) > 0)
    choices = np.array([0, *prices])
    cost = np.array([0, *prices.values()])
    for weight in 2.0 ** np.array(logarithms):
        chosen = widths[int(np.searchsorted(begins, weight, side="right"))]
        totals = weight * 4.0**-choices + cost
        assert totals[list(choices).index(chosen)] <= totals.min() * (1 + 1e-12)


def of_rows(weights: list[float], now: list[int], prices: dict[int, int], offered: tuple[int, ...]) -> Rows:
    ones = torch.ones(1, 1, len(weights), dtype=torch.bool)
    return Rows(
        torch.tensor(weights, dtype=torch.float64)[None, None],
        ~ones,
        ones,
        torch.tensor(now)[None, None],
        prices,
        offered,
    )


@given(
    weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5, unique=True),
    room=st.floats(0, 1.1),
    offered=st.sampled_from([(), (2,), (2, 4), (3, 8), (2, 3, 4, 8)]),
    data=st.data(),
)
def test_no_choice_of_as_many_bytes_has_less_error(weights, room, offered, data):
    """Of all choices for a few rows, tried one by one, none that takes no more bytes errs less; and the bytes fit.

    A row that is packed may have what it has, or any fewer of the bits on offer, or go.
    """
    widths = st.sampled_from([EXACT, EXACT, 4, *offered])  # 4 as what a generated token has, on offer or not
    now = data.draw(st.lists(widths, min_size=len(weights), max_size=len(weights)))
    prices = {2: 44, 3: 60, 4: 76, 8: 140, EXACT: 264}
    limit = room * prices[EXACT] * len(weights)
    table = of_rows(weights, now, prices, offered)
    bits = allotted([table], [torch.tensor([[limit]], dtype=torch.float64)], lambda sizes: sizes)[0][0, 0].tolist()
    choices = [[0, *(width for width in offered if width < own), own] for own in now]
    assert all(chosen in of_row for chosen, of_row in zip(bits, choices, strict=True))
    tried = np.array(list(product(*choices)))
    size = np.array([prices.get(width, 0) for width in range(EXACT + 1)])[tried].sum(1)
    total = (np.array(weights) * 4.0**-tried).sum(1)
    used = sum(prices.get(each, 0) for each in bits)
    least = sum(weight * error(each) for weight, each in zip(weights, bits, strict=True))
    assert used <= limit
    assert np.all((size > used) | (total >= least * (1 - 1e-9)))


@given(
    rows=st.lists(
        st.tuples(st.floats(1e-6, 1e6), st.sampled_from([EXACT, EXACT, 2, 4, 8]), st.booleans(), st.booleans()),
        min_size=1,
        max_size=9,
    ),
    theta=st.floats(-40, 40),
)
def test_bytes_are_counted_as_the_bits_of_rows_take_them(rows, theta):
    weights, now, always, there = zip(*rows, strict=True)
    table = of_rows(list(weights), list(now), {2: 44, 4: 76, 8: 140, EXACT: 264}, (2, 4))
    table = replace(table, always=torch.tensor([[always]]), there=torch.tensor([[there]]))
    asked = torch.tensor([[[2.0**theta]]], dtype=torch.float64)
    assert torch.equal(table.bytes_at(asked), table.sizes(table.bits(asked)))


@given(
    weights=st.lists(st.lists(st.floats(1e-6, 1e6), min_size=4, max_size=4), min_size=2, max_size=3),
    room=st.floats(0.05, 1.1),
    share=st.floats(0, 1),
)
def test_a_floor_is_what_a_head_would_have_by_itself(weights, room, share):
    """And no more of it: of all common thetas, tried one by one, the least that fits decides the rest."""
    prices = {2: 44, 4: 76, 8: 140, EXACT: 264}
    heads = torch.tensor(weights, dtype=torch.float64)[None]
    ones = torch.ones(heads.shape, dtype=torch.bool)
    table = Rows(heads, ~ones, ones, torch.full(heads.shape, EXACT), prices, (2, 4, 8))
    limit = room * prices[EXACT] * heads.numel()
    floor = torch.tensor([[share * limit / heads.shape[1]]], dtype=torch.float64)
    alone = allotted([table], [floor], lambda sizes: sizes)[0]

    def of_layer(sizes: list[Tensor]) -> list[Tensor]:
        return [each.sum(1, keepdim=True) for each in sizes]

    found = allotted([table], [torch.tensor([[limit]], dtype=torch.float64)], of_layer, [floor])[0]
    turns = (1 - 1e-12) * heads.view(-1, 1) / torch.tensor(steps(prices)[1], dtype=torch.float64)
    tried = [alone, *(torch.maximum(table.bits(turn), alone) for turn in turns.flatten())]
    sizes = [table.sizes(bits).sum().item() for bits in tried]
    assert (found >= alone).all()
    assert table.sizes(found).sum().item() == max(size for size in sizes if size <= limit)


def test_processes_tell_each_other_their_rows_once(monkeypatch):
    """Two with half of the heads each, whose rows lie in other slots, allot to them what one allots to all."""
    draw = torch.Generator().manual_seed(0)
    there = torch.rand(2, 4, 30, generator=draw) < 0.7
    weights = torch.rand(2, 4, 30, generator=draw, dtype=torch.float64)
    now = torch.tensor([2, 4, EXACT])[torch.randint(3, (2, 4, 30), generator=draw)]
    whole = Rows(weights, weights > 0.9, there, now, {2: 44, 4: 76, EXACT: 264}, (2, 4))
    every = weights, whole.always, there, now
    halves = [[F.pad(each[:, 2 * rank : 2 * rank + 2], (rank, 3 * rank)) for each in every] for rank in range(2)]
    parts = [Rows(*half, whole.prices, whole.offered) for half in halves]
    heads, said = [Heads(rank, 2, 8, 4) for rank in range(2)], []
    monkeypatch.setattr(Heads, "sum", lambda self, part: said.append(part) or part)
    for of, part in zip(heads, parts, strict=True):
        part.of_every_head(of, 30)
    assert len(said) == 2
    total = sum(said)
    monkeypatch.setattr(Heads, "sum", lambda self, part: total)
    limit = [torch.tensor([[5000.0], [9000.0]], dtype=torch.float64)]

    def of_layer(sizes: list[Tensor]) -> list[Tensor]:
        return [each.sum(1, keepdim=True) for each in sizes]

    expected = allotted([whole], limit, of_layer)[0]
    assert expected.unique().tolist() == [0, 2, 4, EXACT]
    for rank, (of, part) in enumerate(zip(heads, parts, strict=True)):
        found = part.of_these(of, allotted([part.of_every_head(of, 30)], limit, of_layer)[0])
        assert torch.equal(found[:, :, rank : rank + 30], expected[:, 2 * rank : 2 * rank + 2])
        assert not found[:, :, :rank].any()


def test_rows_of_equal_score_go_by_recency():
    """Of equal scores the more recent weighs more; NaN and what is below nothing weigh as nothing."""
    positions = torch.arange(6)[None, None]
    weights = weights_of(torch.tensor([2.0, 2.0, torch.nan, -1.0, 0.0, 3.0])[None, None], positions, 2.0)[0, 0]
    assert weights.argsort().tolist() == [2, 3, 4, 0, 1, 5]
    torch.testing.assert_close(weights[5].item(), 9.0, rtol=1e-9, atol=0)


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    share=st.floats(0, 1),
    scope=st.sampled_from(["head", "layer", "model"]),
    earlier=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_doubted_rows_weigh_nearly_alike_in_their_order(sizes, share, scope, earlier, seed):
    """Against numpy, pool by pool, of two sequences and heads; rows that do not compete stay as they are.

    earlier: tokens that every head has seen beside its slots. What has gone counts among those that score least.
    """
    draw = torch.Generator().manual_seed(seed)
    tables = []
    for size in sizes:
        shape = (2, 2, size)
        weights = torch.exp2(20 * torch.rand(shape, generator=draw, dtype=torch.float64))
        always, gone = (torch.rand(shape, generator=draw) < 0.2 for _ in range(2))
        tables.append(Rows(weights, always, ~gone, torch.full(shape, EXACT), {EXACT: 264}, ()))
    found = doubted(tables, [size + earlier for size in sizes], share, scope)
    competing = [(table.there & ~table.always).numpy() for table in tables]
    before, after = ([table.weights.numpy() for table in each] for each in (tables, found))
    for row in range(2):
        pools = {
            "head": [[(layer, head)] for layer in range(len(sizes)) for head in range(2)],
            "layer": [[(layer, 0), (layer, 1)] for layer in range(len(sizes))],
            "model": [[(layer, head) for layer in range(len(sizes)) for head in range(2)]],
        }[scope]
        for pool in pools:
            mine = np.concatenate([before[layer][row, head][competing[layer][row, head]] for layer, head in pool])
            theirs = np.concatenate([after[layer][row, head][competing[layer][row, head]] for layer, head in pool])
            gone = sum(sizes[layer] + earlier - tables[layer].there[row, head].sum().item() for layer, head in pool)
            few, order = max(0, int((len(mine) + gone) * share) - gone), mine.argsort()
            expected = mine.copy()
            if few:
                least = mine[order[min(few, len(mine) - 1)]]
                expected[order[:few]] = least * 2.0 ** (np.arange(few) / few - 1)
            np.testing.assert_allclose(theirs, expected, rtol=1e-12)
            assert few == len(mine) or (theirs.argsort() == order).all()
    for mine, theirs, own in zip(before, after, competing, strict=True):
        assert (mine[~own] == theirs[~own]).all()


# -- in a cache --------------------------------------------------------------------------------------------------------

SHARES = [Uniform(), Adaptive(floor=0.2), Everywhere(), Everywhere(floor=0.5)]
SCORES = {"a2sf": A2SF(), "h2o": H2O(), "keydiff": KeyDiff(), "kvzip": KVzip(), "kvzip_plus": KVzipPlus()}


def row_bytes(cache: PrunedCache) -> int:
    """Of all tables, without what is remembered until a token is generated."""
    return sum(layer.table.nbytes for layer in cache.layers)


def full_bytes(cache: PrunedCache) -> float:
    """Of all tokens at 16 bits a number."""
    return cache.dense_nbytes * 2 / cache.layers[0].table.dims[2].itemsize


@pytest.mark.parametrize("share", SHARES, ids=str)
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_bytes_are_kept_to_and_used(share, score):
    """After every prompt all rows and their columns take no more bytes than were given, and little less."""
    cache = PrunedCache(shared(), Bits(0.4, score=score, share=share, sinks=2, recent=4))
    for step, _ in enumerate(stepwise(shared(), left_padded([323]), cache, [250, 1, 1, 70, 1])):
        if step in (0, 3):
            cache.end_prompt()
            least = 0.93 if score != SCORES["keydiff"] else 0.8  # cosines are alike, and go together
            assert least * 0.4 * full_bytes(cache) < row_bytes(cache) <= 0.4 * full_bytes(cache)


@pytest.mark.parametrize("budget", ["60kB", 120, "0.5b"])
def test_budgets_of_every_kind(budget):
    """Bytes are bytes, tokens are as many at 16 bits, and a share is one of the bytes; in a batch, of all sequences."""
    cache = PrunedCache(shared(), Bits(budget, score=A2SF(), sinks=2, recent=4))
    feed(shared(), left_padded([250, 250]), cache, [250])
    cache.end_prompt()
    meant = {"60kB": 60_000, 120: 120 / 250 * full_bytes(cache), "0.5b": full_bytes(cache) / 2}[budget]
    assert 0.9 * meant < row_bytes(cache) <= meant


BEFORE = {
    "every token": H2O(0.5, sinks=1, recent=2),
    "interval": H2O(0.5, sinks=1, recent=2, interval=4),
    "heads compete": H2O(0.5, sinks=1, recent=2, share=Adaptive(0.2)),
}


@pytest.mark.parametrize("share", ["uniform", "adaptive", "everywhere"])
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_room_that_a_policy_before_keeps_for_tokens_to_come_is_not_on_top(before, share):
    """Whether rows are packed, dropped, or all of them stay; after a second prompt, too."""
    packed = set()
    for size in (5_000, 9_750):
        bits = Bits(f"{size}B", score=TOVA(), share=share, widths=(2, 8), sinks=1, recent=2)
        for policy in (bits, replace(bits, widths=())):
            cache = PrunedCache(shared(), before | policy)
            for step, _ in enumerate(stepwise(shared(), left_padded([70]), cache, [60, 1, 1, 8])):
                if step in (0, 3):
                    cache.end_prompt()
                    assert row_bytes(cache) <= size
                    packed |= {layer.table.packed_length > 0 for layer in cache.layers}
    assert packed == {False, True}


def test_eviction_alone_is_the_policy_of_the_scores():
    """With no widths, heads keep the very rows that the scorer would keep of as many."""
    for score in (A2SF(0.5, sinks=2, recent=4), KeyDiff(0.5, sinks=2, recent=4)):
        cache = PrunedCache(shared(), Bits(120, score=score, widths=(), share=Uniform(), sinks=2, recent=4))
        feed(shared(), left_padded([250]), cache, [250])
        count = cache.kept_positions(0).shape[2]
        assert not any(layer.table.packed for layer in cache.layers)
        inner = PrunedCache(shared(), type(score)(count, sinks=2, recent=4))
        feed(shared(), left_padded([250]), inner, [250])
        for layer in cache.pruned_layers:
            assert torch.equal(cache.kept_positions(layer), inner.kept_positions(layer))


GENERATING = [A2SF, H2O, TOVA, KeyDiff, Keyformer, SnapKV, Knorm, StreamingLLM]


@pytest.mark.parametrize("score", GENERATING, ids=lambda kind: kind.__name__)
def test_eviction_alone_with_an_interval_is_the_policy_of_the_scores(score):
    """With no widths, after every token heads hold the very rows that the scorer keeps of as many, at its intervals."""
    model, batch, sizes = shared(), left_padded([240, 190]), [150, *[1] * 90]
    settings = {"sinks": 2, "recent": 4, "interval": 7}
    policy = Bits(70, score=score(sinks=2, recent=4), widths=(), share=Uniform(), **settings)
    outer = PrunedCache(model, policy)
    steps = stepwise(model, batch, outer, sizes)
    next(steps)
    inner = PrunedCache(model, score(outer.kept_positions(0).shape[2], **settings))
    kept = set()
    for count, _ in enumerate(stepwise(model, batch, inner, sizes)):
        if count:
            next(steps)
        for row in range(2):
            assert kept_everywhere(outer, row) == kept_everywhere(inner, row)
        kept |= {place for head in kept_everywhere(outer, 1)[0] for place in head}
    assert max(kept) == 189


@pytest.mark.parametrize(
    ("score", "share", "generated"),
    [*((A2SF, share, 320) for share in SHARES), *((score, Everywhere(), 70) for score in GENERATING[1:])],
)
def test_bytes_are_kept_to_however_much_is_generated(score, share, generated):
    """At every interval rows take no more than their prompt did; in between, what has come since waits exactly."""
    interval = 32
    policy = Bits(0.4, score=score(), share=share, sinks=2, recent=4, interval=interval)
    cache, batch = PrunedCache(shared(), policy), left_padded([200 + generated])
    budget, exact, packed = 0.0, 0, set()
    for count, _ in enumerate(stepwise(shared(), batch, cache, [200, *[1] * generated])):
        if count == 0:
            cache.end_prompt()
            budget = 0.4 * full_bytes(cache)
            exact = sum(layer.table.token_bytes for layer in cache.layers)
        due = count % interval == 0
        waiting = 0 if due else exact * (count % interval + 8)  # and room for eight to come
        assert (0.8 * budget if due else 0) < row_bytes(cache) <= budget + waiting
        packed |= {place for _, _, place in codes_of(cache)} if due else set()
    assert max(packed) >= 200, "no generated token has lost bits"


def test_each_layer_goes_on_with_the_bytes_that_it_got():
    """Where all layers compete at the prompt; bytes that a short one leaves are for all of them alike."""
    for tokens in (200, 20):
        policy = Bits(60, score=A2SF(), share=Everywhere(), sinks=2, recent=4, interval=16)
        cache, batch = PrunedCache(shared(), policy), left_padded([tokens + 320])
        feed(shared(), batch, cache, [tokens])
        cache.end_prompt()
        assert row_bytes(cache) <= 60 * full_bytes(cache) / tokens
        given = [sum(layer.table.given) for layer in cache.layers]
        first = [layer.table.nbytes for layer in cache.layers]
        assert all((limit < 1.05 * nbytes) == (tokens == 200) for limit, nbytes in zip(given, first, strict=True))
        feed(shared(), batch, cache, [1] * 320, begin=tokens)
        assert row_bytes(cache) <= 60 * full_bytes(cache) / (tokens + 320)
        for limit, layer in zip(given, cache.layers, strict=True):
            assert 0.9 * limit < layer.table.nbytes <= limit + 100  # widths that all rows share


@pytest.mark.parametrize(("score", "power"), [(DropKV(), 1), (SnapKV(), 2), (KVzip(), 2)])
def test_scores_that_are_squares_count_as_they_are(score, power):
    kept = []
    for settings in ({}, {"power": power}, {"power": 3 - power}):
        cache = PrunedCache(shared(), Bits(0.3, score=score, sinks=2, recent=4, **settings))
        feed(shared(), left_padded([250]), cache, [250])
        cache.end_prompt()
        kept.append(sorted(layer.table.code_bits().flatten().tolist() for layer in cache.layers))
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("recent", [0, 4, 40])
def test_what_is_recent_to_the_scorer_is_pooled(recent):
    """A scorer alone keeps its window of 32 whatever it scores, and lends it nothing; here all but `recent` compete."""
    settings = {"sinks": 2, "recent": recent}
    cache = PrunedCache(shared(), Bits(170, score=SnapKV(kernel_size=7), widths=(), share=Uniform(), **settings))
    feed(shared(), left_padded([250]), cache, [250])
    inner = PrunedCache(shared(), SnapKV(cache.kept_positions(0).shape[2], kernel_size=7, **settings))
    feed(shared(), left_padded([250]), inner, [250])
    for layer in cache.pruned_layers:
        assert torch.equal(cache.kept_positions(layer), inner.kept_positions(layer))


@pytest.mark.parametrize("score", [Knorm(), Random(), H2O()], ids=str)
@pytest.mark.parametrize("share", [Uniform(), Adaptive(normalize="z")], ids=str)
def test_scores_of_any_sign_rank_rows(score, share):
    """Of a head with so many exact rows, these are the ones that score most."""
    cache = PrunedCache(shared(), Bits("0.5b", score=score, widths=(), share=share, sinks=2, recent=4))
    feed(shared(), left_padded([250]), cache, [250])
    for layer in cache.layers:
        heads = getattr(layer.table, "heads", None)
        for head in range(layer.table.kv_heads):
            kept = [at for at in layer.kept_positions()[0, head].tolist() if 2 <= at < 246]
            whole = PrunedCache(shared(), type(score)(1.0, sinks=2, recent=4))
            feed(shared(), left_padded([250]), whole, [250])
            scores = whole.policy.scores(whole.layers[layer.index].table, None)[0, head]
            assert heads is None or len(heads) == layer.table.kv_heads
            best_first = sorted(range(2, 246), key=lambda at: (float(scores[at]), at), reverse=True)
            assert set(best_first[: len(kept)]) == set(kept)


def test_what_a_prompt_was_given_exactly_stays_exact():
    """Only generated tokens age."""
    cache = PrunedCache(shared(), Bits("1b", score=H2O(), widths=(2,), sinks=2, recent=4))
    packed = []
    for _ in stepwise(shared(), left_padded([330]), cache, [250, *[1] * 70]):
        cache.end_prompt()
        codes = codes_of(cache)
        packed.append(sum(place < 246 for _, _, place in codes))
    assert 0 < packed[0] == packed[-1] < 246 * len(cache.layers) * cache.layers[0].table.kv_heads
    assert any(place >= 250 for _, _, place in codes)


@pytest.mark.parametrize("score", [H2O(), TOVA(), StreamingLLM()], ids=str)
def test_a_padded_batch_keeps_to_its_bytes(score):
    """Sequences of other lengths pack other numbers of rows, and take no padding for each other beyond the budget."""
    cache = PrunedCache(shared(), Bits("0.9b", score=score, share=Uniform(), sinks=2, recent=4))
    feed(shared(), left_padded([250, 160]), cache, [250])
    cache.end_prompt()
    assert row_bytes(cache) <= 0.9 * full_bytes(cache)


def test_a_sequence_of_a_batch_in_chunks_may_come_later():
    """A chunk that is padding alone asks for no bytes; nor does a share of no tokens of any other policy."""
    for policy in (Bits("0.5b", score=H2O(), share=Uniform(), sinks=2, recent=4), H2O("0.5b", sinks=2, recent=4)):
        cache = PrunedCache(shared(), policy)
        feed(shared(), left_padded([240, 120]), cache, [120, 120])
        assert cache.seen_tokens == 240


def test_where_layers_get_more_and_less_exact_rows_are_paid_first():
    """In full precision of 32 bits, too."""
    cache = PrunedCache(shared(), Bits(0.3, score=A2SF(), share=Pyramid()))
    feed(shared(), left_padded([240]), cache, [240])
    assert row_bytes(cache) <= 0.3 * full_bytes(cache)


def test_where_all_rows_stay_precision_is_mixed():
    """With bytes enough for all rows, none goes, and those of higher score have no fewer bits than others."""
    cache = PrunedCache(shared(), Bits(0.9, score=A2SF(), power=2, share=Uniform(), sinks=2, recent=4))
    feed(shared(), left_padded([250]), cache, [250])
    found = set()
    for layer in cache.layers:
        table = layer.table
        assert layer.kept_positions().tolist() == torch.arange(250).expand(1, table.kv_heads, -1).tolist()
        bits = torch.zeros(table.positions.shape, dtype=torch.int64).fill_(EXACT)
        bits[:, :, : table.packed_length] = table.code_bits()
        inner = (table.positions >= 2) & (table.positions < 246)
        for head in range(table.kv_heads):
            score, own = (each[0, head][inner[0, head]] for each in (table["score"], bits))
            ordered = own[score.argsort()]
            assert bool((ordered.diff() >= 0).all())
            found |= set(own.tolist())
    assert len(found) > 1


def test_a_budget_for_everything_is_the_stock_cache():
    """Nothing is packed then, while tokens are generated neither."""
    model, batch = shared(), left_padded([60, 45])
    stock = generate(model, batch, 50)
    cache = PrunedCache(model, Bits("10MB", score=A2SF()))
    assert torch.equal(generate(model, batch, 50, **cache_argument(cache)), stock)


def codes_of(cache: PrunedCache) -> dict[tuple[int, int, int], tuple[int, bytes]]:
    """Bits and codes of every packed row, by layer, head and position."""
    found = {}
    for layer in cache.layers:
        heads = getattr(layer.table, "heads", None)
        for number, (table, head) in enumerate(
            [(table, 0) for table in heads] if heads else [(layer.table, head) for head in range(layer.table.kv_heads)]
        ):
            first = 0
            for tier in table.packed:
                for row in range(len(tier)):
                    place = int(table.positions[0, head, first + row])
                    if place >= 0:
                        parts = (tier.tensors[name][0, head, row] for name in ("key_codes", "value_codes"))
                        code = b"".join(part.numpy().tobytes() for part in parts)
                        found[layer.index, number, place] = tier.codec.bits, code
                first += len(tier)
    return found


def test_codes_change_only_by_losing_bits_and_generated_tokens_age():
    """And only when a prompt is decided. Of generated tokens the newest stay exact, older ones get 4 bits."""
    cache = PrunedCache(shared(), Bits(0.4, score=A2SF(), sinks=2, recent=4, widths=(2, 3)))
    before = {}
    for step, _ in enumerate(stepwise(shared(), left_padded([400]), cache, [250, *[1] * 60, 60, *[1] * 3])):
        if step in (1, 40, 60, 61, 64):
            cache.end_prompt()
            now = codes_of(cache)
            both = before.keys() & now.keys()
            changed = {row for row in both if before[row] != now[row]}
            assert all(now[row][0] < before[row][0] for row in changed)
            gone = before.keys() - now.keys()
            assert bool(gone) == bool(changed) == (step == 61)
            if step == 60:
                aged = {place for _, _, place in now if place >= 250}
                assert 0 < min(aged) - 249 <= 1 + 4  # the prompt's newest are among those that aged first
                assert max(aged) < 310 - 4
                assert all(now[row][0] == 4 for row in now if row[2] >= 250)
            before = now


def bits_of(cache: PrunedCache) -> dict[tuple[int, int, int], tuple[int, bytes]]:
    """Bits and codes of every row, by layer, head and position; those in full precision have no codes."""
    exact = {
        (layer, head, place): (EXACT, b"")
        for layer in cache.pruned_layers
        for head, row in enumerate(cache.kept_positions(layer)[0].tolist())
        for place in row
        if place >= 0
    }
    return exact | codes_of(cache)


@given(
    score=st.sampled_from(sorted(SCORES)),
    share=st.sampled_from(SHARES),
    budget=st.floats(0.5, 0.9),
    widths=st.sets(st.sampled_from([2, 3, 4, 8])).map(sorted).map(tuple),
    aged_bits=st.sampled_from([2, 4]),
    interval=st.sampled_from([None, 5, 16]),
    turns=st.lists(st.tuples(st.integers(20, 70), st.integers(0, 45)), min_size=1, max_size=2),
)
@profile(max_examples=max(5, profile.default.max_examples // 8))
def test_rows_only_lose_bits_or_go(score, share, budget, widths, aged_bits, interval, turns):
    """Whatever comes: bits of a row never grow, codes change with them alone, and what went is not back."""
    score = SCORES[score]
    generated = {"aged_bits": aged_bits, "interval": interval if score.scores_generated else None}
    policy = Bits(budget, score=score, share=share, widths=widths, sinks=1, recent=3, **generated)
    cache, batch = PrunedCache(shared(), policy), left_padded([sum(map(sum, turns))])
    begin, before, gone = 0, {}, set()
    for prompt, generated in turns:
        for fed in ([prompt], [1] * generated):
            if fed:
                feed(shared(), batch, cache, fed, begin=begin)
            begin += sum(fed)
            now = bits_of(cache)  # which ends the prompt
            assert not gone & now.keys()
            gone |= before.keys() - now.keys()
            for row in before.keys() & now.keys():
                (had, code), (has, other) = before[row], now[row]
                assert has <= had
                assert has < had or code == other
            before = now


@pytest.mark.parametrize(("score", "interval"), [("a2sf", None), ("kvzip", None), ("a2sf", 16)])
def test_a_saved_cache_goes_on(tmp_path, score, interval):
    """As if it had not been saved, and with the policy and its scorer that the file names."""
    model = shared()
    cache = PrunedCache(model, Bits(0.4, score=SCORES[score], sinks=2, recent=4, interval=interval))
    batch = left_padded([260])
    feed(model, batch, cache, [200, 1])
    cache.save(tmp_path / "bits.safetensors")
    other = PrunedCache.load(tmp_path / "bits.safetensors", model)
    assert other.policy == cache.policy
    ours, theirs = (list(stepwise(model, batch, each, [1] * 40, begin=201)) for each in (cache, other))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert codes_of(cache) == codes_of(other)


@pytest.mark.parametrize("share", [Uniform(), Everywhere(0.1)], ids=str)
@pytest.mark.parametrize("interval", [None, 12])
def test_each_sequence_of_a_batch_is_as_if_alone(share, interval):
    """Padding takes no bytes and no part, whatever is generated."""
    model, lengths, generated = build("llama", dtype=torch.float64), [250, 190], [1] * 50
    batch = left_padded([length + len(generated) for length in lengths])
    together = PrunedCache(model, Bits(0.4, score=A2SF(), share=share, sinks=2, recent=4, interval=interval))
    feed(model, batch, together, [250, *generated])
    for row, length in enumerate(lengths):
        alone = PrunedCache(model, together.policy)
        own = {name: each[row : row + 1, 250 - length :] for name, each in batch.items()}
        feed(model, own, alone, [length, *generated])
        for mine, its in zip(held_by(together), held_by(alone), strict=True):
            assert torch.equal(mine.bits[row, :, : its.bits.shape[2]], its.bits[0])


def test_heads_that_part_pack_the_rows_that_were_meant():
    """Where a policy before has left other heads other rows in packed slots, and empty slots come anywhere."""
    model = build("llama", dtype=torch.float64)
    policy = H2O(14, sinks=1, recent=2) | Bits(44, score=TOVA(), share=Adaptive(0), widths=(8,), sinks=1, recent=1)
    for seed in range(8):
        cache = PrunedCache(model, policy)
        for _ in stepwise(model, left_padded([16 + seed], seed=seed), cache, [13, 3 + seed]):
            for held in held_by(cache):
                assert held.bits[0, :, [0, -1]].unique().tolist() == [EXACT]


def test_what_a_batch_packs_is_what_each_sequence_packs_alone():
    """Generated tokens behind a greeting that nothing was packed of stay exact, whatever is packed beside them."""
    batch, sizes = left_padded([320, 75]), [250, *[1] * 70]
    together = PrunedCache(shared(), Bits(0.4, score=A2SF(), share=Uniform(), sinks=2, recent=4))
    feed(shared(), batch, together, sizes)
    assert min(held.bits[0][held.bits[0] > 0].min() for held in held_by(together)) < EXACT
    for held in held_by(together):
        assert held.bits[1, :, :75].unique().tolist() == [EXACT]


def test_what_has_no_meaning_is_refused():
    """Settings, and bytes that do not hold what is always exact, before anything has changed."""
    for settings in (
        {"score": "kivi"}, {"score": 3}, {"widths": (5,)}, {"aged_bits": 16}, {"share": "nobody"}, {"power": -1},
        {"score": SnapKV(positions="cache")}, {"recent": 0.5},
    ):  # fmt: skip
        with pytest.raises(PolicyError):
            Bits(0.1, **settings)
    for settings in (
        {"interval": 0}, {"score": KVzip(), "interval": 32}, {"score": Keyformer(frozen_keys=True), "interval": 32},
    ):  # fmt: skip
        with pytest.raises(PolicyError, match=r"interval must|leave interval out, or take scores that go on"):
            Bits(0.1, **settings)
    Bits(0.1, score=KVzip(level="head", heads=((0.1, 0.2),)), interval=32)  # which reads nothing again
    with pytest.raises(BudgetError):
        Bits("nothing")
    for little in (0.01, "0.01b"):
        cache = PrunedCache(shared(), Bits(little, score=A2SF(), share=Uniform(), sinks=2, recent=4))
        feed(shared(), left_padded([100]), cache, [100])  # a fraction never is too little
        assert {tuple(head) for head in cache.kept_positions(0)[0].tolist()} == {(0, 1, 96, 97, 98, 99)}
    for tokens in (1, 100):  # at the first piece of a prompt, whatever comes
        cache = PrunedCache(shared(), Bits("1.5kB", score=A2SF()))
        with pytest.raises(BudgetError, match="the 5 exact ones"):
            feed(shared(), left_padded([tokens]), cache, [tokens])
        assert cache.seen_tokens == 0
    assert parse("bits:score=kvzip,budget=0.05b") == Bits("0.05b", score=KVzip())


def test_a_prompt_in_chunks_is_decided_as_in_one_piece():
    """What competes with other layers waits for the end of the prompt."""
    policy = Bits(0.4, score=A2SF(), sinks=2, recent=4)
    whole, pieces = (PrunedCache(shared(), policy) for _ in range(2))
    batch = left_padded([200])
    feed(shared(), batch, whole, [200])
    feed(shared(), batch, pieces, [90, 70, 40])
    for layer in whole.pruned_layers:
        assert torch.equal(whole.kept_positions(layer), pieces.kept_positions(layer))
    assert {row: bits for row, (bits, _) in codes_of(whole).items()} == {
        row: bits for row, (bits, _) in codes_of(pieces).items()
    }


@pytest.mark.parametrize("interval", [None, 16])
def test_forks_and_copies_of_a_sequence_go_on_alike(interval):
    """Repeated for several samples, forked, or neither: the same codes, and the same logits from there on."""
    model, batch = shared(), left_padded([240])
    cache = PrunedCache(model, Bits(0.4, score=A2SF(), sinks=2, recent=4, interval=interval))
    feed(model, batch, cache, [200, 1])
    fork, twice = cache.fork(), cache.fork()
    twice.batch_repeat_interleave(2)
    doubled = {name: each.repeat_interleave(2, dim=0) for name, each in batch.items()}
    alone = list(stepwise(model, batch, cache, [1] * 38, begin=201))
    forked = list(stepwise(model, batch, fork, [1] * 38, begin=201))
    both = list(stepwise(model, doubled, twice, [1] * 38, begin=201))
    heads = cache.layers[0].table.kv_heads
    first = {row: code for row, code in codes_of(twice).items() if row[1] < heads}
    assert codes_of(cache) == codes_of(fork) == first
    for one, other, pair in zip(alone, forked, both, strict=True):
        assert torch.equal(one, other)
        for row in range(2):
            torch.testing.assert_close(pair[row], one[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("interval", [None, 4])
def test_nothing_that_has_gone_stays_in_memory(interval):
    """Neither rows before they were packed, nor those of a cache that a fork came from, where loops are compiled."""
    model = build("qwen3", head_dim=16)
    cache = PrunedCache(model, Bits(0.5, score=A2SF(), interval=interval))
    for _ in stepwise(model, left_padded([300]), cache, [200, *[1] * 9, 40, *[1] * 9, 20]):
        assert cache.nbytes == storage_nbytes(cache)
        fork = cache.fork()
        assert fork.nbytes == storage_nbytes(fork)
    cache.reorder_cache(torch.tensor([0]))
    assert cache.nbytes == storage_nbytes(cache)


@pytest.mark.parametrize("policy", [H2O(0.3, share=Everywhere(), recent=4), Bits(0.3, score=H2O())], ids=str)
def test_one_layer_decides_when_the_prompt_has_ended_too(policy):
    """In pieces it keeps what it does of the whole, as models of several layers do."""
    model, batch = build("llama", num_hidden_layers=1), left_padded([64])
    whole, pieces = PrunedCache(model, policy), PrunedCache(model, policy)
    feed(model, batch, whole, [64])
    feed(model, batch, pieces, [20, 44])
    assert pieces.kept_positions(0).shape[2] < 40
    assert torch.equal(pieces.kept_positions(0), whole.kept_positions(0))


@pytest.mark.parametrize("share", [Uniform(), Adaptive(), Everywhere()], ids=str)
def test_where_there_are_bytes_no_score_drops_a_row(share):
    """Six tenths of the bytes hold all rows at a few bits, and scores that say nothing drop none of them."""
    rows = []
    for doubt in (0.75, 0.0):
        score = SnapKV(window=2, kernel_size=1)  # of a model with random weights: what it scores least means nothing
        cache = PrunedCache(shared(), Bits("0.6b", score=score, share=share, doubt=doubt))
        feed(shared(), left_padded([250]), cache, [250])
        cache.end_prompt()
        rows.append(min((layer.table.positions >= 0).sum(-1).min().item() for layer in cache.layers))
    assert rows[1] < rows[0] == 250
