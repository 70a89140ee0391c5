"""Scores pooled over neighbours: the maximum by brute force, and what pooling keeps together while tokens come."""

from __future__ import annotations

import math

import pytest
import torch
from families import build, generate, kept_everywhere, left_padded
from hypothesis import given
from hypothesis import strategies as st

from kvprune import PrunedCache
from kvprune.attention import neighbours
from kvprune.attention.neighbours import over_neighbours
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF


@given(
    rows=st.integers(1, 30),
    empty=st.integers(0, 3),
    before=st.sampled_from([0, 1, 3, 49]),
    after=st.sampled_from([0, 1, 3, 49]),
    gaps=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_neighbours_are_those_by_position(rows, empty, before, after, gaps, seed):
    """Whatever the order of slots and the gaps between positions, a row gets the best of those near it."""
    random = torch.Generator().manual_seed(seed)
    positions = torch.randperm(gaps * rows, generator=random)[: 2 * rows].view(1, -1, rows).expand(2, -1, -1).clone()
    positions[1, :, :empty] = -1
    scores = torch.randn(positions.shape, generator=random).masked_fill(positions < 0, -math.inf)
    pooled = over_neighbours(scores, positions.int(), before, after, lambda lent: lent.amax(-1))
    away = positions[..., None, :] - positions[..., None]
    near = (away >= -before) & (away <= after)
    expected = torch.where(near, scores[..., None, :], -math.inf).amax(-1)
    assert torch.equal(pooled[positions >= 0], expected[positions >= 0])


def test_long_prompts_are_pooled_in_blocks(monkeypatch):
    """Blocks change nothing."""
    positions, scores = torch.randperm(200)[None, None].int(), torch.randn(1, 1, 200)
    whole = over_neighbours(scores, positions, 1, 3, lambda lent: lent.amax(-1))
    sevens = [slice(at, min(at + 7, 200)) for at in range(0, 200, 7)]
    monkeypatch.setattr(neighbours, "row_blocks", lambda *_: sevens)
    assert torch.equal(over_neighbours(scores, positions, 1, 3, lambda lent: lent.amax(-1)), whole)


@pytest.mark.parametrize("interval", [1, 8])
@pytest.mark.parametrize(("ahead", "beside"), [(None, range(36, 45)), (7, range(39, 48)), (0, range(32, 41))])
def test_what_stands_beside_a_peak_stays_with_it(interval, ahead, beside):
    """While tokens are generated, a peak far above all else keeps its neighbours, which score nothing of their own."""

    class Peaked(A2SF):
        def observe(self, table, step):
            table["score"] = torch.where(table.positions == 40, 1.0, table.positions / 1e6)

    model, batch = build("llama"), left_padded([80, 64])
    pruned = PrunedCache(model, Peaked(16, sinks=1, recent=4, kernel_size=9, ahead=ahead, interval=interval))
    generate(model, batch, 33, **cache_argument(pruned))
    for row in range(2):
        for layer in kept_everywhere(pruned, row):
            for head in layer:
                assert len(head) == 16
                assert set(beside) <= set(head)
