"""Random numbers by counter: against their description in plain ints, and as a distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvprune.attention.noise import Gumbel, hash_word, hashed, mix, uniform

EULER = 0.5772156649

seeds = st.integers(0, 2**64 - 1)
counters = st.integers(0, 2**31 - 1)
words = st.integers(-(2**31), 2**31 - 1)


def int32(*words: int) -> Tensor:
    return torch.tensor(words, dtype=torch.int32)


def unsigned(bits: Tensor) -> list[int]:
    return [int(word) % 2**32 for word in bits.flatten()]


def gumbel(
    seed: int, layer: int, heads: int, queries: list[int], keys: list[int], *, scale: float = 1.0, first_head: int = 0
) -> Tensor:
    """The noise that is added to logits of zero, `[heads, L, S]`, each head a KV head of its own."""
    logits = torch.zeros(1, heads, 1, len(queries), len(keys))
    noise = Gumbel(seed, layer, scale=scale, first_head=first_head)
    return noise.perturb(logits, torch.tensor([queries]), torch.tensor([[keys]]))[0, :, 0]


# -- hashes ------------------------------------------------------------------------------------------------------------


@given(word=words)
def test_mix_is_the_finalizer_of_murmur3(word):
    """mix() on int32 is the finalizer on unsigned ints of 32 bits."""
    assert unsigned(mix(int32(word))) == [reference.murmur(word % 2**32)]


@given(seed=seeds, numbers=st.lists(counters, max_size=4))
def test_hash_of_ints(seed, numbers):
    """hash_word() is the hash that its description gives, and uses all 64 bits of a seed."""
    assert hash_word(seed, *numbers) == reference.hash_of(seed, *numbers)
    assert hash_word(seed, *numbers) != hash_word(seed ^ 1 << 63, *numbers)


@given(seed=seeds, first=st.lists(counters, max_size=2), second=st.lists(counters, min_size=1, max_size=5))
def test_tensors_hash_like_ints(seed, first, second):
    """hashed() gives every element of a tensor the hash_word() of it; without a tensor, that of the ints."""
    assert unsigned(hashed(seed, *first, torch.tensor(second))) == [hash_word(seed, *first, each) for each in second]
    assert unsigned(hashed(seed, *first)) == [hash_word(seed, *first)]


@given(seed=seeds, rows=st.lists(counters, min_size=1, max_size=3), columns=st.lists(counters, min_size=1, max_size=3))
def test_tensors_broadcast(seed, rows, columns):
    """Several tensors hash by broadcasting against each other."""
    found = hashed(seed, 7, torch.tensor(rows)[:, None], torch.tensor(columns))
    assert found.shape == (len(rows), len(columns))
    assert unsigned(found) == [hash_word(seed, 7, row, column) for row in rows for column in columns]


def test_mix_takes_no_two_words_to_the_same():
    """mix() is a bijection: a million words stay a million."""
    words = torch.arange(-500_000, 500_000, dtype=torch.int32) * 4001
    assert len(mix(words.clone()).unique()) == len(words.unique())


# -- numbers -----------------------------------------------------------------------------------------------------------


@given(word=words)
def test_uniform(word):
    """A word gives the middle of one of 2**23 parts of (0, 1), exactly, and never 0 or 1."""
    found = uniform(int32(word)).item()
    assert found == reference.uniform(word % 2**32)
    assert 0 < found < 1


@pytest.mark.parametrize("word", [-(2**31), 2**31 - 1, 0, -1])
def test_noise_of_the_extreme_words_is_finite(word):
    """The largest and the smallest noise is a number: 16.6 and -2.8."""
    noise = -uniform(int32(word)).log().neg().log()
    assert -2.9 < noise < 16.7


@given(
    seed=seeds,
    layer=st.integers(0, 200),
    queries=st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
    keys=st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
)
def test_gumbel_noise(seed, layer, queries, keys):
    """Noise is -log(-log u) of the hash of seed, layer, query head and both positions."""
    expected = reference.gumbel(seed, layer, 3, queries, keys)
    np.testing.assert_allclose(gumbel(seed, layer, 3, queries, keys), expected, atol=1e-5, rtol=1e-5)


@given(seed=seeds, layer=st.integers(0, 200), first=st.integers(0, 300), heads=st.integers(1, 4))
def test_noise_of_a_share_of_the_heads(seed, layer, first, heads):
    """Heads that are counted from another one have the noise that they have among all heads."""
    queries, keys = [7, 8], [0, 5, 8]
    every = gumbel(seed, layer, first + heads, queries, keys)
    assert torch.equal(gumbel(seed, layer, heads, queries, keys, first_head=first), every[first:])
    word = Gumbel(seed, layer, first_head=first).word  # what kernels go on with, whose heads count from 0
    assert reference.murmur((word * 0x9E3779B9 + 1) % 2**32) == hash_word(seed, layer, first)


@given(scale=st.sampled_from([0, 0.5, 2.0]), temperature=st.sampled_from([0.5, 1.0, 3.0]), seed=seeds)
def test_perturbed_logits(scale, temperature, seed):
    """Logits become (x + scale * noise) / temperature, and what is -inf stays so."""
    logits = torch.randn(2, 2, 3, 4, 5)
    logits[..., 2] = -math.inf
    expected = torch.stack(
        [
            (one.flatten(0, 1) + scale * torch.tensor(reference.gumbel(seed, 1, 6, positions, range(5)))) / temperature
            for one, positions in zip(logits, (range(4), range(7, 11)), strict=True)
        ]
    ).unflatten(1, (2, 3))
    positions = torch.stack([torch.arange(4), torch.arange(7, 11)])
    noise = Gumbel(seed, 1, temperature, scale)
    found = noise.perturb(logits.clone(), positions, torch.arange(5)[None, None])
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-5)
    each = Gumbel(seed, 1, torch.full((4,), temperature), scale)
    assert torch.equal(each.perturb(logits.clone(), positions, torch.arange(5)[None, None]), found)
    part = each.part(slice(1, 3)).perturb(logits[:, :, :, 1:3].clone(), positions[:, 1:3], torch.arange(5)[None, None])
    assert torch.equal(part, found[:, :, :, 1:3])


# -- the distribution --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample() -> Tensor:
    """Noise of four heads, 500 queries and 500 keys."""
    return gumbel(3, 5, 4, list(range(1000, 1500)), list(range(1000, 1500)))


def test_noise_has_the_moments_of_gumbel(sample):
    """A million numbers have mean 0.5772, variance pi^2 / 6, and the quantiles of exp(-exp(-x))."""
    assert abs(sample.mean() - EULER) < 0.006
    assert abs(sample.var() - math.pi**2 / 6) < 0.02
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert abs((sample < -math.log(-math.log(share))).float().mean() - share) < 0.002


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs().item()


@pytest.mark.parametrize("by", [1, 2, 3, 64])
def test_noise_of_neighbours_is_uncorrelated(sample, by):
    """Neither neighbouring keys nor neighbouring queries nor those along a diagonal share noise."""
    assert correlation(sample[:, :, by:], sample[:, :, :-by]) < 0.006
    assert correlation(sample[:, by:], sample[:, :-by]) < 0.006
    assert correlation(sample[:, by:, by:], sample[:, :-by, :-by]) < 0.006
    assert correlation(sample[:, by:, :-by], sample[:, :-by, by:]) < 0.006


def test_noise_of_a_pair_of_positions_is_not_that_of_the_pair_reversed(sample):
    """A query at p and a key at q have other noise than a query at q and a key at p."""
    assert correlation(sample, sample.transpose(1, 2)) < 0.01


def test_noise_of_heads_layers_and_seeds_is_uncorrelated(sample):
    """Every head, layer and seed has noise of its own."""
    for head in range(1, 4):
        assert correlation(sample[0], sample[head]) < 0.01
    positions = list(range(1000, 1500))
    for seed, layer in ((3, 6), (4, 5), (3 + 2**32, 5), (5, 3)):
        assert correlation(sample, gumbel(seed, layer, 4, positions, positions)) < 0.006


def test_rows_and_columns_of_noise_differ_from_each_other(sample):
    """No row or column of noise stands out: their means scatter as those of independent numbers do."""
    deviation = math.pi / math.sqrt(6 * 2000)
    for means in (sample.mean((0, 1)), sample.mean((0, 2))):
        assert ((means - EULER).abs() < 5 * deviation).all()
        assert 0.85 * deviation < means.std() < 1.15 * deviation
