"""Keyformer: what its noise and its temperature change, and what they must not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import reference
import torch
from families import assert_same_rows, build, feed, kept_everywhere, left_padded, sequence, shared, stock
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor

from kvprune import PrunedCache, Scoring, Step
from kvprune.attention import mass
from kvprune.cache.layer import PrunedLayer
from kvprune.policies import H2O, Keyformer

ROOM = 10_000

thorough = profile(max_examples=4 * profile.default.max_examples)

seeds = st.integers(0, 2**16)
chunks = st.lists(st.integers(2, 12), min_size=1, max_size=4)
temperatures = st.sampled_from([0.5, 1.0, 2.0, 10.0])
groups = st.sampled_from(["mean", "max"])


def keyformer(budget: int | float = 12, **settings) -> Keyformer:
    return Keyformer(budget, **{"sinks": 2, "recent": 3, "generation_length": 8, **settings})


def cached(policy, batch: dict[str, Tensor], sizes: list[int], model=None) -> PrunedCache:
    model = model or shared()
    cache = PrunedCache(model, policy)
    feed(model, batch, cache, sizes)
    return cache


def score_of(policy, queries: Tensor, keys: Tensor, chunks: list[int] | None = None, index: int = 0) -> Tensor:
    """The scores that a layer has after tokens with these queries `[1, Hq, L, D]` and keys `[1, Hkv, L, D]`."""
    layer = PrunedLayer(policy, index)
    sizes = chunks or [queries.shape[2]]
    for states, new in zip(queries.split(sizes, dim=2), keys.split(sizes, dim=2), strict=True):
        layer.update(new, torch.ones_like(new))
        layer.attend(states, None, Scoring(1.0))
    return layer.table["score"]


def tokens(length: int, seed: int = 0, *, kv_heads: int = 2, group: int = 2, dim: int = 4) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, kv_heads * group, length, dim, generator=random),
        torch.randn(1, kv_heads, length, dim, generator=random),
    )


# -- what the formula reduces to ---------------------------------------------------------------------------------------


@thorough
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=2), budget=st.sampled_from([8, 0.4]), seed=seeds)
def test_without_noise_and_at_temperature_one_it_is_h2o(lengths, budget, seed):
    """Noise 0 and both temperatures 1 score and keep what H2O scores and keeps."""
    batch = left_padded([length + 5 for length in lengths], seed=seed)
    sizes = [max(lengths), 1, 1, 1, 1, 1]
    plain = cached(keyformer(budget, noise=0, tau_init=1, tau_end=1), batch, sizes)
    h2o = cached(H2O(budget, sinks=2, recent=3), batch, sizes)
    for row in range(len(lengths)):
        assert_same_rows(plain, h2o, row, row, atol=1e-5, rtol=1e-4)


@given(length=st.integers(1, 20), generated=st.integers(0, 4), group=groups, seed=seeds)
def test_at_a_high_temperature_all_visible_tokens_are_alike(length, generated, group, seed):
    """Without noise, as tau grows, every row gives 1 / n to each of the n tokens that it sees."""
    queries, keys = tokens(length + generated, seed)
    policy = keyformer(ROOM, noise=0, tau_init=1e8, tau_end=1e8, group=group)
    score = score_of(policy, queries, keys, [length] + [1] * generated)
    share = 1 / torch.arange(1, length + generated + 1)
    expected = share.flip(0).cumsum(0).flip(0)  # the token at position k is seen by all rows from k on
    torch.testing.assert_close(score, expected.expand_as(score), atol=1e-5, rtol=1e-5)


@given(length=st.integers(1, 20), generated=st.integers(0, 4), tau=temperatures, seed=seeds)
def test_every_row_adds_one(length, generated, tau, seed):
    """Whatever the noise and the temperature, each query adds 1 in all to the scores of a KV head."""
    queries, keys = tokens(length + generated, seed)
    score = score_of(keyformer(ROOM, tau_init=tau, seed=seed), queries, keys, [length] + [1] * generated)
    total = torch.full((1, 2), float(length + generated))
    torch.testing.assert_close(score.sum(-1), total, atol=1e-4, rtol=1e-4)


@given(length=st.integers(1, 20), tau=temperatures, noise=st.sampled_from([0, 1]), seed=seeds)
def test_a_constant_in_all_logits_of_a_row_changes_nothing(length, tau, noise, seed):
    """Keys that are all moved by one vector add a constant to every row of logits, and leave the scores."""
    queries, keys = tokens(length, seed)
    policy = keyformer(ROOM, tau_init=tau, noise=noise, seed=seed)
    moved = score_of(policy, queries, keys + torch.randn(4, generator=torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(moved, score_of(policy, queries, keys), atol=1e-4, rtol=1e-4)


def test_the_temperature_stops_rising_at_its_end():
    """tau grows in equal steps from tau_init, is tau_end at generation_length tokens, and stays there."""
    queries, keys = tokens(16)

    def last_row(policy: Keyformer) -> Tensor:
        before = score_of(policy, queries[:, :, :15], keys[:, :, :15], [4] + [1] * 11)
        return score_of(policy, queries, keys, [4] + [1] * 12)[..., :15] - before

    for length, expected in ((6, 3.0), (12, 3.0), (24, 2.0)):
        rising = keyformer(ROOM, noise=0, tau_init=1, tau_end=3, generation_length=length)
        constant = keyformer(ROOM, noise=0, tau_init=expected, tau_end=expected)
        torch.testing.assert_close(last_row(rising), last_row(constant), atol=1e-5, rtol=1e-4)


@given(drafts=st.lists(st.integers(1, 4), min_size=1, max_size=4), end=temperatures, seed=seeds)
def test_tokens_that_are_accepted_together_have_a_temperature_each(drafts, end, seed):
    """A draft that was accepted is generated text: each of its rows has the temperature of its own place."""
    queries, keys = tokens(10 + sum(drafts), seed)
    layer = PrunedLayer(keyformer(ROOM, tau_end=end, seed=seed), 0)
    layer.activate_past_recording()
    settings = {"tau_end": end, "generation_length": 8, "seed": seed}
    alone = reference.Layer(reference.Keyformer(ROOM, sinks=2, recent=3, **settings), scale=1.0)
    for states, new in zip(queries.split([10, *drafts], dim=2), keys.split([10, *drafts], dim=2), strict=True):
        layer.update(new, new)
        layer.attend(states, None, Scoring(1.0))
        layer.crop(0)
        alone.step(states[0], new[0], new[0], prefill=alone.tokens == 0)
    expected = torch.tensor(alone.links[0].score).float()
    torch.testing.assert_close(layer.table["score"][0], expected, atol=1e-5, rtol=1e-4)


def test_temperatures_are_where_the_queries_are():
    """Temperatures of several rows come as a tensor on the device of the step."""

    @dataclass
    class Rows:
        positions: Tensor

    step = Step(0, False, True, 3, 3, 20, (10,), 1, 0, 0, 8, Rows(torch.empty(1, 3, device="meta")))
    assert keyformer().temperature(step).device.type == "meta"


# -- what the noise depends on -----------------------------------------------------------------------------------------


@given(block_bytes=st.integers(1, 2000), seed=seeds)
def test_block_sizes_change_nothing(block_bytes, seed):
    """However small the blocks of attention rows, the noise of each logit, and so the score, is the same."""
    queries, keys = tokens(20, seed)
    policy = keyformer(ROOM, seed=seed)
    whole = score_of(policy, queries, keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mass._BLOCK_BYTES, "cpu", block_bytes)
        torch.testing.assert_close(score_of(policy, queries, keys), whole, atol=1e-5, rtol=1e-5)


@given(chunks=chunks, group=groups, seed=seeds)
def test_chunks_change_nothing(chunks, group, seed):
    """A prompt in chunks of two tokens or more has the scores of the prompt in one piece."""
    queries, keys = tokens(sum(chunks), seed)
    policy = keyformer(ROOM, group=group, seed=seed)
    found = score_of(policy, queries, keys, chunks)
    torch.testing.assert_close(found, score_of(policy, queries, keys), atol=1e-5, rtol=1e-4)


@given(lengths=st.lists(st.integers(1, 25), min_size=2, max_size=3), padding=st.integers(0, 5), seed=seeds)
def test_neither_padding_nor_the_order_of_a_batch_changes_anything(lengths, padding, seed):
    """A sequence keeps, with the same scores, what it keeps alone, wherever in a batch it is."""
    model, policy = build("llama", dtype=torch.float64), keyformer(seed=seed)
    width = max(lengths) + padding
    batch = left_padded([length + 4 for length in lengths], width=width + 4, seed=seed)
    backwards = {name: tensor.flip(0) for name, tensor in batch.items()}
    together = cached(policy, batch, [width, 1, 1, 1, 1], model)
    reversed_ = cached(policy, backwards, [width, 1, 1, 1, 1], model)
    for row, length in enumerate(lengths):
        alone = cached(policy, sequence(batch, row), [length, 1, 1, 1, 1], model)
        assert_same_rows(together, alone, row, 0, atol=1e-5, rtol=1e-4)
        assert_same_rows(together, reversed_, row, len(lengths) - 1 - row, atol=1e-5, rtol=1e-4)


def test_a_seed_decides():
    """The same seed keeps the same tokens, and other seeds keep others; layers have noise of their own."""
    batch = left_padded([60])
    held = [kept_everywhere(cached(keyformer(seed=seed), batch, [60])) for seed in (0, 0, 1, 2)]
    assert held[0] == held[1]
    assert held[0] != held[2] != held[3] != held[0]
    queries, keys = tokens(20)
    first, second = (score_of(keyformer(ROOM), queries, keys, index=index) for index in (0, 1))
    assert not torch.allclose(first, second, atol=1e-2)


# -- attention itself --------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=2), tau=temperatures, seed=seeds)
def test_output_is_that_of_the_model_until_the_first_eviction(lengths, tau, seed):
    """Until a step has evicted, logits are the stock model's, for any seed and temperature."""
    batch = left_padded([length + 3 for length in lengths], seed=seed)
    with torch.no_grad():
        expected = stock()(**batch).logits
    real = batch["attention_mask"].bool()
    cache = PrunedCache(shared(), keyformer(ROOM, tau_init=tau, seed=seed))
    logits = feed(shared(), batch, cache, [max(lengths), 1, 1, 1])
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)
    first = [
        feed(shared(), batch, PrunedCache(shared(), keyformer(8, **settings)), [max(lengths)])
        for settings in ({}, {"tau_init": tau, "seed": seed}, {"noise": 0})
    ]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])


# -- frozen keys -------------------------------------------------------------------------------------------------------


@given(length=st.integers(13, 40), generated=st.integers(1, 15), recent=st.integers(1, 5), seed=seeds)
def test_frozen_keys_are_those_of_the_prompt(length, generated, recent, seed):
    """With frozen keys, every generated token leaves with the window, and key tokens stay those of the prompt."""
    batch = left_padded([length + generated], seed=seed)
    policy = keyformer(recent=recent, frozen_keys=True, seed=seed)
    cache = cached(policy, batch, [length])
    key_tokens = [[[at for at in head if at < length - recent] for head in layer] for layer in kept_everywhere(cache)]
    for step in range(1, generated + 1):
        feed(shared(), batch, cache, [1], begin=length + step - 1)
        newest = list(range(length + step - recent, length + step))
        assert kept_everywhere(cache) == [[head + newest for head in layer] for layer in key_tokens]


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_generated_token_that_is_looked_at_becomes_a_key_token(frozen):
    """A generated token that all later queries look at stays as a key token, unless keys are frozen."""
    queries, keys = torch.ones(1, 2, 30, 4), torch.zeros(1, 1, 30, 4)
    keys[:, :, 22] = 2.0
    layer = PrunedLayer(keyformer(frozen_keys=frozen), 0)
    for step in (slice(0, 20), *(slice(at, at + 1) for at in range(20, 30))):
        layer.update(keys[:, :, step], keys[:, :, step])
        layer.attend(queries[:, :, step], None, Scoring(1.0))
    assert (22 in layer.kept_positions().tolist()[0][0]) != frozen
