"""ZipVL: the fewest tokens that hold a share of a layer's attention, by brute force, and what becomes of the rest."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from families import feed, kept_everywhere, left_padded, shared
from hypothesis import assume, given
from hypothesis import strategies as st

from kvprune import PolicyError, PrunedCache, Scoring
from kvprune.cache.layer import PrunedLayer
from kvprune.policies import KIVI, ZipVL
from kvprune.policy.registry import described, from_description


def by_hand(seen: np.ndarray, coverage: float, sinks: int, recent: int) -> list[int]:
    """Tokens that stay. seen: probabilities `[Hq, L, S]` of queries that all probe, one a token."""
    length = seen.shape[2]
    others = [at for at in range(length) if sinks <= at < length - recent]
    attention = {at: seen[:, :, at].sum() for at in others}
    held, number = 0.0, 0
    for each in sorted(attention.values(), reverse=True):
        assume(abs(held - coverage * sum(attention.values())) > 1e-5)
        if held >= coverage * sum(attention.values()):
            break
        held, number = held + each, number + 1
    mean = {at: attention[at] / (length - at) for at in others}  # a token is seen by itself and what follows
    best = sorted(others, key=lambda at: (mean[at], at), reverse=True)
    if number < len(best) and number:
        assume(mean[best[number - 1]] - mean[best[number]] > 1e-6)
    return sorted({*range(min(sinks, length)), *range(max(0, length - recent), length), *best[:number]})


@given(
    length=st.integers(2, 30), coverage=st.sampled_from([0.3, 0.6, 0.9, 0.99]), group=st.integers(1, 3),
    sinks=st.integers(0, 3), recent=st.integers(0, 4), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_tokens_are_those_of_the_formula(length, coverage, group, sinks, recent, seed):
    """Of a prompt of which every query probes; all heads keep the same ones."""
    draw = torch.Generator().manual_seed(seed)
    queries, keys, values = (torch.randn(1, heads, length, 4, generator=draw) for heads in (2 * group, 2, 2))
    layer = PrunedLayer(ZipVL(coverage, sinks=sinks, recent=recent, probe_recent=1.0), 0)
    layer.update(keys, values)
    layer.attend(queries, None, Scoring(1.0))
    seen = reference.probabilities(queries[0], keys[0], reference.causal(length, length, 2), 1.0)
    expected = by_hand(seen, coverage, sinks, recent)
    assert layer.kept_positions()[0].tolist() == [expected] * 2


def test_a_batch_equals_each_sequence_alone_and_layers_differ():
    """Over a second prompt after generated tokens, which are all there; layers keep as many as they need."""
    policy = ZipVL(0.7, sinks=1, recent=2)
    batch = left_padded([40, 31])
    together = PrunedCache(shared("llama"), policy)
    feed(shared("llama"), batch, together, [30, 1, 1, 1])
    after = [kept_everywhere(together, row) for row in range(2)]
    for row, length in enumerate([40, 31]):
        alone = PrunedCache(shared("llama"), policy)
        own = {name: tensor[row : row + 1, -length:] for name, tensor in batch.items()}
        feed(shared("llama"), own, alone, [length - 10, 1, 1, 1])
        assert kept_everywhere(alone) == after[row]
        assert {length - 10, length - 9, length - 8} <= set(after[row][0][0])
    assert len({len(layer[0]) for layer in after[0]}) == 2
    feed(shared("llama"), batch, together, [7], begin=33)
    assert all(len(layer[0]) < 40 for layer in kept_everywhere(together))


def test_more_coverage_keeps_more_and_all_of_it_everything():
    kept = []
    for coverage in (0, 0.2, 0.5, 0.9, 1):
        pruned = PrunedCache(shared("llama"), ZipVL(coverage, sinks=1, recent=2))
        feed(shared("llama"), left_padded([40]), pruned, [40])
        kept.append(len(kept_everywhere(pruned)[0][0]))
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (3, 40)


def test_the_rest_at_few_bits():
    """The same tokens at 4 bits that would stay, the others at 2, and none goes."""
    batch = left_padded([40])
    settings = {"sinks": 1, "recent": 2}
    evicted, packed = (
        PrunedCache(shared("llama"), ZipVL(0.6, rest=rest, buffer=5, **settings)) for rest in ("evict", "pack")
    )
    for pruned in (evicted, packed):
        feed(shared("llama"), batch, pruned, [30])
    table = packed.layers[0].table
    assert [tier.codec.bits for tier in table.packed] == [4, 2]
    high = len(table.packed[0])
    assert sorted(table.positions[0, 0, :high].tolist()) == kept_everywhere(evicted)[0][0]
    assert sorted(table.positions[0, 0].tolist()) == list(range(30))
    feed(shared("llama"), batch, packed, [1] * 7, begin=30)
    assert table.packed_length == 35


def test_it_may_be_packed_by_another():
    """Rows that are packed behind it stay or go as they are, with the next prompt."""
    pruned = PrunedCache(shared("llama"), ZipVL(0.6, sinks=1, recent=2) | KIVI(bits=4, group_size=4, residual=4))
    logits = feed(shared("llama"), left_padded([40]), pruned, [20, 1, 1, 1, 15, 1, 1])
    assert pruned.layers[0].table.packed
    assert logits.isfinite().all()
    assert from_description(described(ZipVL(0.5, rest="pack"))) == ZipVL(0.5, rest="pack")


@pytest.mark.parametrize("settings", [{"coverage": 1.1}, {"rest": "drop"}, {"sinks": -1}, {"low_bits": 5}])
def test_mistakes(settings):
    with pytest.raises(PolicyError):
        ZipVL(**settings)
