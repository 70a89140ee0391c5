"""Shares of a budget over heads and layers: their formulas by brute force, exact totals, and what a cache keeps."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise

import pytest
import torch
from families import build, feed, kept_everywhere, left_padded, stepwise
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from kvprune import Adaptive, Everywhere, PolicyError, PrunedCache, Pyramid, Share, Uniform
from kvprune.policies import A2SF, H2O, AdaKV, Keyformer, Knorm, KVzip, PyramidKV, Random, SnapKV, parse
from kvprune.policy.registry import described, from_description
from kvprune.policy.shares import ALWAYS_KEPT, NEVER_KEPT
from kvprune.table.rows import ranked

FLOORS = [0, 0.2, 0.5, 1]
floors = st.sampled_from(FLOORS)


# -- formulas ----------------------------------------------------------------------------------------------------------


def adakv(scores: list[list[float]], always: list[int], budget: int, floor: Fraction) -> list[int]:
    """Rows of every head, by the definition: count the best rows of all heads, mix with the budget, round, fill up.

    scores: of the rows that compete, with ties nowhere. always: rows of each head that it keeps anyway.
    """
    heads = range(len(scores))
    held = [always[head] + len(scores[head]) for head in heads]
    total = min(budget * len(scores), sum(held))
    if total == sum(held):
        return held
    best = sorted(((score, head) for head in heads for score in scores[head]), reverse=True)
    counts = list(always)
    for _, head in best[: total - sum(always)]:
        counts[head] += 1
    exact = [floor * budget + (1 - floor) * count for count in counts]
    rows = [math.floor(each) for each in exact]
    for head in sorted(heads, key=lambda head: (rows[head] - exact[head], head))[: total - sum(rows)]:
        rows[head] += 1
    rows = [min(mine, most) for mine, most in zip(rows, held, strict=True)]
    taken = [sorted(scores[head], reverse=True)[max(0, rows[head] - always[head]) :] for head in heads]
    others = sorted(((score, head) for head in heads for score in taken[head]), reverse=True)
    for _, head in others[: total - sum(rows)]:
        rows[head] += 1
    return rows


@given(
    held=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 15)), min_size=1, max_size=5),
    budget=st.integers(3, 14),
    floor=floors,
    seed=st.integers(0, 2**16),
)
def test_rows_of_heads_are_those_of_adakv(held, budget, floor, seed):
    """Adaptive counts are the formula's, add up to the budget of all heads, and leave each head its floor."""
    width = max(sum(each) for each in held) + 1
    numbers = torch.rand(1, len(held), width, generator=torch.Generator().manual_seed(seed))
    ranks = torch.full((1, len(held), width), NEVER_KEPT)
    scores = []
    for head, (always, others) in enumerate(held):
        places = torch.randperm(width, generator=torch.Generator().manual_seed(seed + head))
        ranks[0, head, places[:always]] = ALWAYS_KEPT
        rest = places[always : always + others]
        ranks[0, head, rest] = ranked(numbers, torch.zeros(width, dtype=torch.int32))[0, head, rest]
        scores.append(numbers[0, head, rest].tolist())
    found = Adaptive(floor).counts(ranks, torch.tensor([[budget]]))[0].tolist()
    assert found == adakv(scores, [always for always, _ in held], budget, Fraction(str(floor)))
    assert sum(found) == min(budget * len(held), sum(map(sum, held)))
    assert all(rows >= min(sum(each), math.floor(floor * budget)) for rows, each in zip(found, held, strict=True))


@given(
    tokens=st.integers(5, 600),
    more=st.integers(0, 2000),
    least=st.integers(0, 5),
    layers=st.integers(1, 40),
    beta=st.sampled_from([1, 2.5, 20, 100]),
)
def test_a_pyramid_spends_the_budget_exactly(tokens, more, least, layers, beta):
    """Layers keep fewer with depth, none more than the prompt has, and on average the budget."""
    asked = {"layers": layers, "prompt_tokens": tokens + more, "least": least}
    found = [Pyramid(beta).of_layer(tokens, depth=depth, **asked) for depth in range(layers)]
    assert sum(found) == layers * tokens
    assert found == sorted(found, reverse=True)
    assert min(found) >= least
    assert max(found) <= max(tokens, tokens + more)
    if beta == 1:
        assert set(found) == {tokens}


def test_a_pyramid_is_that_of_the_paper():
    """C = 512, W = 32, 32 layers, beta = 20: from 936 + 32 rows to 24 + 32, in even steps, 15,360 and not 15,568."""
    found = [Pyramid(20).of_layer(512, depth=d, layers=32, prompt_tokens=9999, least=32) for d in range(32)]
    assert found[0] == 936 + 32
    assert found[-1] == 24 + 32
    assert sum(found) == 32 * 512
    assert all(abs(first - second - 912 / 31) < 1 for first, second in pairwise(found))


@pytest.mark.parametrize("normalize", ["sum", "max", "z"])
def test_normalized_scores_are_on_one_scale(normalize):
    """Whatever factor (and, for "z", offset) a head's scores have, what is compared is the same."""
    scores = torch.rand(1, 1, 50, generator=torch.Generator().manual_seed(0)) + 0.1
    candidates = torch.ones(1, 1, 50, dtype=torch.bool)
    candidates[..., 7] = False
    other = 30 * scores + (5 if normalize == "z" else 0)
    share = Adaptive(normalize=normalize)
    first, second = share.normalized(scores, candidates), share.normalized(other, candidates)
    torch.testing.assert_close(first, second)
    among = first[candidates].double()
    told = {"sum": among.sum(), "max": among.max(), "z": among.square().mean()}[normalize]
    assert told.item() == pytest.approx(1)


# -- what a cache keeps ------------------------------------------------------------------------------------------------


@cache
def model() -> PreTrainedModel:
    return build("llama", dtype=torch.float64)


def totals(pruned: PrunedCache, row: int = 0) -> list[int]:
    """Rows of each layer, over its heads."""
    return [sum(map(len, layer)) for layer in kept_everywhere(pruned, row)]


lengths = st.lists(st.integers(12, 40), min_size=1, max_size=2)
shares = st.one_of(
    st.builds(Adaptive, floors, st.sampled_from([None, "sum", "max", "z"])),
    st.builds(Everywhere, floors, st.sampled_from([None, "sum", "z"])),
    st.builds(Pyramid, st.sampled_from([1, 3, 20])),
)


@given(lengths=lengths, share=shares, budget=st.one_of(st.integers(8, 30), st.sampled_from([0.3, 0.6])))
def test_the_budget_is_spent_exactly(lengths, share, budget):
    """However heads and layers share it, a sequence keeps the rows of its budget, at the prompt and ever after."""
    pruned = PrunedCache(model(), H2O(budget, sinks=1, recent=2, share=share))
    batch = left_padded([length + 6 for length in lengths])
    for fed, _ in enumerate(stepwise(model(), batch, pruned, [max(lengths)] + [1] * 6)):
        for row, length in enumerate(lengths):
            capacity = budget if isinstance(budget, int) else max(3, -(-round(budget * 20) * length // 20))
            rows = min(length + fed, capacity)
            found = totals(pruned, row)
            if share.scope == "layer":
                assert found == [2 * rows] * 2
            elif length >= capacity:
                assert sum(found) == 4 * rows
            always = {0, *range(length + fed - 2, length + fed)}
            assert all(always <= set(head) for layer in kept_everywhere(pruned, row) for head in layer)


@given(lengths=lengths, share=shares, budget=st.one_of(st.integers(8, 30), st.sampled_from([0.3, 0.6])))
def test_a_batch_equals_each_sequence_alone(lengths, share, budget):
    """Sequences of a batch compete with nobody but themselves."""
    policy = A2SF(budget, sinks=1, recent=2, epsilon=0, share=share)
    batch = left_padded([length + 4 for length in lengths])
    together = PrunedCache(model(), policy)
    logits = feed(model(), batch, together, [max(lengths)] + [1] * 4)
    for row, length in enumerate(lengths):
        alone = PrunedCache(model(), policy)
        own = left_padded([length + 4 for length in lengths])
        own = {name: tensor[row : row + 1, -length - 4 :] for name, tensor in own.items()}
        expected = feed(model(), own, alone, [length] + [1] * 4)
        torch.testing.assert_close(logits[row, -1], expected[0, -1], atol=1e-5, rtol=1e-4)
        assert kept_everywhere(together, row) == kept_everywhere(alone)


@pytest.mark.parametrize("share", [Adaptive(1), Everywhere(1), Pyramid(1), "uniform"], ids=str)
def test_shares_that_give_all_the_same_are_uniform(share):
    batch = left_padded([40, 31])
    found = []
    for each in (share, Uniform()):
        pruned = PrunedCache(model(), A2SF(0.3, sinks=2, recent=3, share=each))
        logits = feed(model(), batch, pruned, [35, *[1] * 5])
        found.append((kept_everywhere(pruned), kept_everywhere(pruned, 1), logits))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2])


@given(length=st.integers(20, 40), budget=st.integers(6, 15), seed=st.integers(0, 2**16))
def test_heads_that_compete_retain_at_least_the_mass_of_equal_ones(length, budget, seed):
    """Without a floor, no other counts of so many rows retain a larger sum of scores: over a layer, over the model."""
    batch = left_padded([length], seed=seed)
    full = PrunedCache(model(), H2O(10_000))
    feed(model(), batch, full, [length])
    mass = [full.layers[layer].table["score"][0] for layer in full.pruned_layers]
    retained = []
    for share in (Uniform(), Adaptive(0), Everywhere(0)):
        pruned = PrunedCache(model(), H2O(budget, sinks=1, recent=2, share=share))
        feed(model(), batch, pruned, [length])
        heads = zip(mass[0], kept_everywhere(pruned)[0], strict=True)
        first = sum(float(scores[kept].sum()) for scores, kept in heads)
        kept = [head for layer in kept_everywhere(pruned) for head in layer]
        retained.append(
            (first, sum(float(scores[head].sum()) for scores, head in zip(torch.cat(mass), kept, strict=True)))
        )
    assert retained[1][0] >= retained[0][0] - 1e-5
    assert retained[2][1] >= retained[1][1] - 1e-5 >= retained[0][1] - 2e-5


TOGETHER = {
    "snapkv": lambda budget: SnapKV(budget, sinks=1, window=4, share=Everywhere(0.2)),
    "a2sf": lambda budget: A2SF(budget, sinks=1, recent=3, epsilon=0, share=Everywhere()),
    "knorm": lambda budget: Knorm(budget, sinks=1, recent=3, share=Everywhere(normalize="z")),
    "kvzip": lambda budget: KVzip(budget, sinks=1, recent=3, chunk=7),
    "kvzip, by heads of a layer": lambda budget: KVzip(budget, sinks=1, recent=3, share=Adaptive()),
    "h2o | snapkv": lambda budget: H2O(1.0, share=Everywhere()) | SnapKV(budget, sinks=1, window=4, interval=1),
}
in_chunks = {
    "chunks": st.lists(st.integers(2, 15), min_size=1, max_size=4),
    "budget": st.sampled_from([8, 0.5, "0.5b", "0.9b", "12kB"]),
    "seed": st.integers(0, 2**16),
}


@pytest.mark.parametrize("make", TOGETHER.values(), ids=TOGETHER)
@given(**in_chunks)
def test_a_prompt_in_chunks_is_decided_after_the_last(make, chunks, budget, seed):
    """All heads and layers compete once, for a prompt in chunks as for one in a piece; what is generated ends it."""
    batch, policy = left_padded([sum(chunks) + 3], seed=seed), make(budget)
    whole, chunked = PrunedCache(model(), policy), PrunedCache(model(), policy)
    feed(model(), batch, whole, [sum(chunks), 1, 1, 1])
    feed(model(), batch, chunked, chunks)
    assert all(chunked.layers[layer].table.length == sum(chunks) for layer in chunked.pruned_layers)
    feed(model(), batch, chunked, [1, 1, 1], begin=sum(chunks))
    assert kept_everywhere(chunked) == kept_everywhere(whole)


@example(share=Adaptive(0, "sum"), chunks=[2, 3, 15, 15], budget="0.9b", seed=0)  # where heads begin takes bytes too
@given(share=shares, **in_chunks)
def test_no_piece_of_a_prompt_is_too_short_for_its_budget(share, chunks, budget, seed):
    """Of the first one, a fraction of tokens or bytes may be less than what is always kept; of the prompt it is not."""
    pruned = PrunedCache(model(), H2O(budget, sinks=1, recent=3, share=share))
    feed(model(), left_padded([sum(chunks) + 80], seed=seed), pruned, [*chunks, 79, 1])
    tokens = sum(chunks) + 79
    if isinstance(budget, str):
        full = pruned.dense_nbytes * tokens / (tokens + 1) * 2 / 8  # the model computes in 64 bits
        assert pruned.nbytes <= (12_000 if budget == "12kB" else float(budget[:-1]) * full)
    assert pruned.report().notes == ()


def test_to_ask_for_anything_ends_a_prompt():
    batch = left_padded([40])
    for ask in (
        PrunedCache.fork,
        PrunedCache.report,
        lambda cache: cache.nbytes,
        lambda cache: cache.kept_positions(0),
    ):
        pruned = PrunedCache(model(), SnapKV(12, window=4, share=Everywhere()))
        feed(model(), batch, pruned, [40])
        ask(pruned)
        assert sum(totals(pruned)) == 4 * 12


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [Uniform(), Pyramid(7.5), Adaptive(0.3, "sum"), Everywhere(0.1, normalize="z")])
def test_a_share_is_written_and_read(share):
    assert Share.parse(str(share)) == share
    policy = SnapKV(0.25, share=share)
    assert from_description(described(policy)) == policy
    written = str(share).replace("'", "")
    assert parse(f"snapkv:budget=0.25,share={written},window=8 | tova") == SnapKV(0.25, share=share, window=8) | parse(
        "tova"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adaptive(1.5),
        lambda: Adaptive(True),
        lambda: Adaptive(normalize="mean"),
        lambda: Everywhere(-0.1),
        lambda: Pyramid(0.5),
        lambda: Pyramid("20"),
        lambda: A2SF(0.25, share="even"),
        lambda: A2SF(0.25, share="adaptive(flor=0.2)"),
        lambda: A2SF(0.25, share="adaptive(0.2"),
        lambda: A2SF(0.25, share=0.2),
    ],
)
def test_what_is_no_share_is_refused(make):
    with pytest.raises(PolicyError):
        make()


# -- policies that are named after a share -----------------------------------------------------------------------------


def kept_by(policy) -> list[list[list[int]]]:
    """Positions that every layer and head keeps of one prompt."""
    pruned = PrunedCache(model(), policy)
    feed(model(), left_padded([60]), pruned, [60])
    return [
        [[at for at in head if at >= 0] for head in pruned.kept_positions(layer)[0].tolist()]
        for layer in pruned.pruned_layers
    ]


def test_a_sequence_that_may_hold_more_gives_no_row_for_another():
    """Behind a link that left it fewer rows than it was given, with no empty slot to give in its place."""
    first = Keyformer(0.75, sinks=0, recent=3, noise=0, share=Everywhere(floor=0.2))
    model = build("llama")
    cache = PrunedCache(model, first | Random(4, sinks=0, recent=0, interval=2))
    feed(model, left_padded([4, 7]), cache, [6, 1])
    assert all(len(head) == 5 and head[-1] == 6 for layer in kept_everywhere(cache, 1) for head in layer)


def test_adakv_is_snapkv_whose_heads_compete():
    kept = kept_by(AdaKV(20, sinks=1, window=4))
    assert kept == kept_by(SnapKV(20, sinks=1, window=4, share=Adaptive(floor=0.2)))
    assert all(sum(map(len, heads)) == 20 * len(heads) for heads in kept)
    assert any(len({*map(len, heads)}) > 1 for heads in kept)
    assert kept_by(AdaKV(20, sinks=1, window=4, share=Adaptive(floor=1))) == kept_by(SnapKV(20, sinks=1, window=4))


def test_pyramidkv_is_snapkv_whose_layers_fall():
    kept = kept_by(PyramidKV(20, sinks=1))
    rows = [len(heads[0]) for heads in kept]
    assert all(len(head) == count for heads, count in zip(kept, rows, strict=True) for head in heads)
    assert rows == sorted(rows, reverse=True)
    assert sum(rows) == 20 * len(rows)
    assert rows[0] > rows[-1]
    assert kept_by(PyramidKV(20, sinks=1, share=Pyramid(beta=1))) == kept_by(SnapKV(20, sinks=1, window=8))
