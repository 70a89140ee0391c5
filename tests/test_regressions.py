"""Ten ways in which other KV-cache libraries have failed, each as a test that would have caught it."""

import pytest
import torch
from families import (
    Spy,
    assert_same_rows,
    feed,
    generate,
    kept,
    kept_everywhere,
    left_padded,
    rows,
    sequence,
    shared,
    stock,
    token_ids,
)

from kvprune import BudgetError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, H2O, TOVA, SnapKV, StreamingLLM

BUDGET = 16
POLICIES = {
    "a2sf": A2SF(BUDGET, sinks=2, recent=3),
    "h2o": H2O(BUDGET, sinks=2, recent=3),
    "snapkv": SnapKV(BUDGET, sinks=2, window=4, kernel_size=3, interval=1),
    "tova": TOVA(BUDGET, sinks=2),
    "streaming": StreamingLLM(BUDGET, sinks=2),
}

every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@every_policy
@pytest.mark.parametrize(
    ("lengths", "width"), [([18, 40, 29], 40), ([18, 40, 29], 47), ([29], 40), ([29, 29], 40)], ids=str
)
def test_left_padding_does_not_hide_real_tokens(policy, lengths, width):
    """After eviction, a padding mask of the original length must not be laid over the rows that were kept."""
    batch = left_padded(lengths, width=width, seed=3)
    cache = PrunedCache(shared(), policy)
    logits = feed(shared(), batch, cache, [width - 6] + [1] * 6)[:, -6:]
    for row, length in enumerate(lengths):
        alone = PrunedCache(shared(), policy)
        expected = feed(shared(), sequence(batch, row), alone, [length - 6] + [1] * 6)[:, -6:]
        torch.testing.assert_close(logits[row], expected[0], atol=1e-4, rtol=1e-4)
        assert kept_everywhere(cache, row) == kept_everywhere(alone)


@every_policy
def test_every_chunk_of_a_chunked_prefill_is_compressed(policy):
    """Not only the first chunk of a prompt is compressed, but each one as it comes."""
    spy = Spy()
    cache = PrunedCache(shared(), policy | spy)
    generate(shared(), left_padded([60]), 1, **cache_argument(cache), prefill_chunk_size=20)
    assert spy.queries == [20, 20, 20]
    assert spy.peaks == [20, BUDGET + 20, BUDGET + 20]
    assert [len(head) for layer in kept_everywhere(cache) for head in layer] == [BUDGET] * 4


@every_policy
def test_a_second_turn_feeds_only_new_tokens(policy):
    """The logical length, not the number of rows, says where a second turn begins: no token is fed twice."""
    spy = Spy()
    cache = PrunedCache(shared(), policy | spy)
    ids = generate(shared(), left_padded([40]), 3, **cache_argument(cache))
    ids = torch.cat([ids, token_ids(1, 10)], dim=1)
    generate(shared(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 2, **cache_argument(cache))
    assert spy.queries == [40, 1, 1, 11, 1]
    assert [head[-1] for layer in kept_everywhere(cache) for head in layer] == [53] * 4


@every_policy
def test_positions_are_right_without_position_ids(policy):
    """A call that leaves positions to the model counts every token seen, not the rows that are left."""
    batch = left_padded([45])
    cache, explicit = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    expected = feed(shared(), batch, explicit, [40, 1, 4])
    with torch.no_grad():
        pieces = batch["input_ids"].split([40, 1, 4], dim=1)
        logits = torch.cat([shared()(piece, **cache_argument(cache)).logits for piece in pieces], dim=1)
    torch.testing.assert_close(logits, expected, atol=0, rtol=0)
    assert all(kept(cache, layer)[0][-3:] == [42, 43, 44] for layer in cache.pruned_layers if policy.recent >= 3)


@every_policy
def test_sinks_survive_whatever_order_rows_are_kept_in(policy):
    """Sinks go by their position, not by their place among the kept rows, over many steps."""
    cache = PrunedCache(shared(), policy)
    batch = left_padded([120])
    feed(shared(), batch, cache, [30, 20, 20] + [1] * 50)
    for layer in kept_everywhere(cache):
        for head in layer:
            assert head[:2] == [0, 1]
            assert head == sorted(set(head))


@pytest.mark.parametrize("name", ["a2sf", "h2o", "snapkv", "tova"])
def test_beams_take_their_scores_with_them(name):
    """When beams change places, so do their scores: each goes on evicting by its own."""
    policy = POLICIES[name]
    batch = left_padded([40, 40])
    swapped, straight = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    for cache in (swapped, straight):
        feed(shared(), batch, cache, [30])
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert not torch.equal(rows(swapped, 0, 0)["column.score"], rows(swapped, 0, 1)["column.score"])
    assert_same_rows(swapped, straight, 0, 1)
    feed(shared(), batch, straight, [1] * 10, begin=30)
    feed(shared(), {name: tensor.flip(0) for name, tensor in batch.items()}, swapped, [1] * 10, begin=30)
    assert_same_rows(swapped, straight, 0, 1, atol=1e-5, rtol=1e-4)
    assert_same_rows(swapped, straight, 1, 0, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[40], [40, 27]], ids=str)
def test_decode_windows_have_the_positions_of_their_queries(lengths):
    """A window of queries that spans generated tokens scores as the same window does at the end of a prompt."""
    policy = SnapKV(10_000, window=6, kernel_size=1, interval=1)
    batch = left_padded(lengths)
    for decoded in (1, 3, 9):
        cache, at_once = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
        feed(shared(), batch, cache, [40 - decoded] + [1] * decoded)
        feed(shared(), batch, at_once, [40])
        for row in range(len(lengths)):
            assert_same_rows(cache, at_once, row, row, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "policy", [A2SF(0.25), H2O(0.25), SnapKV(0.25), SnapKV(64, interval=1), TOVA(8), StreamingLLM(8)], ids=repr
)
@pytest.mark.parametrize("lengths", [[1], [2], [5, 3], [6, 1]], ids=str)
def test_prompts_shorter_than_a_window_are_kept_whole(policy, lengths):
    """A prompt of fewer tokens than sinks, window or kernel is not compressed, and nothing crashes."""
    batch = left_padded(lengths)
    cache = PrunedCache(shared(), policy)
    ids = generate(shared(), batch, 3, **cache_argument(cache))
    assert torch.equal(ids, generate(stock(), batch, 3))
    for row, length in enumerate(lengths):
        assert all(head == list(range(length + 2)) for layer in kept_everywhere(cache, row) for head in layer)


@pytest.mark.parametrize("kind", [A2SF, H2O])
def test_budgets_are_never_enlarged_in_silence(kind):
    """A number of tokens below sinks + recent is refused; any other is held to the token."""
    with pytest.raises(BudgetError):
        kind(8)
    with pytest.raises(BudgetError):
        kind(8, sinks=4, recent=5)
    cache = PrunedCache(shared(), kind(8, sinks=4, recent=4))
    generate(shared(), left_padded([40]), 5, **cache_argument(cache))
    assert [len(head) for layer in kept_everywhere(cache) for head in layer] == [8] * 4


@every_policy
def test_nothing_leaks_from_one_generation_into_the_next(policy):
    """One policy object serves generation after generation, and each is as if it were the first."""
    first, other = left_padded([40, 20]), left_padded([33], seed=1)
    caches = [PrunedCache(shared(), policy) for _ in range(3)]
    ids = [
        generate(shared(), batch, 10, **cache_argument(cache))
        for batch, cache in zip([first, other, first], caches, strict=True)
    ]
    assert torch.equal(ids[0], ids[2])
    assert_same_rows(caches[0], caches[2])
    assert_same_rows(caches[0], caches[2], 1, 1)
