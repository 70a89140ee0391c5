"""Autocast, inference mode and gradients: a cache outlives the mode that it was filled in."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
from families import assert_same_rows, build, feed, generate, kept_everywhere, left_padded, shared, stock
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvprune import CacheError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, KIVI, TOVA, Bits, Full, GemFilter, Keyformer, KVzip, SnapKV, ZipCache

POLICIES = {
    "full": Full(),
    "a2sf": A2SF(12, sinks=2, recent=3),
    "a2sf-interval": A2SF(12, sinks=2, recent=3, interval=4),
    "keyformer": Keyformer(12, recent=3),
    "snapkv": SnapKV(12, sinks=2, window=4, interval=1),
    "tova-zipcache": TOVA(16) | ZipCache(buffer=4),
    "gemfilter-kivi": GemFilter(14) | KIVI(group_size=4, residual=2),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
every_kernel = pytest.mark.parametrize("kernels", ["auto", "torch"])
STEPS = [30, 1, 1, 4, 1]


def fed(model: PreTrainedModel, cache: Cache, steps: list[int] = STEPS, begin: int = 0) -> Tensor:
    """Logits of one sequence, in whatever mode this is called."""
    ids, logits = left_padded([60])["input_ids"], []
    for count in steps:
        logits.append(model(ids[:, begin : begin + count], **cache_argument(cache)).logits)
        begin += count
    return torch.cat(logits, dim=1)


# -- autocast ----------------------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("attention", ["flash", "sdpa"])
@pytest.mark.parametrize("policy", [Full(), A2SF(40), Keyformer(40), TOVA(40), SnapKV(40, interval=1)], ids=str)
def test_autocast_of_a_float32_model_is_that_of_the_stock_cache(policy, attention, kernels):
    """Keys of float32 and values of bfloat16, as rotary embeddings leave them, become bfloat16, as sdpa makes them."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = fed(stock(), DynamicCache(config=stock().config))
        cache = PrunedCache(shared(), policy, kernels=kernels, attention=attention)
        logits = fed(shared(), cache)
    assert cache.layers[0].table.keys.dtype == cache.layers[0].table.values.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected.float(), atol=0.3, rtol=0.1)
    assert (logits - expected).abs().mean() < 0.02


@every_policy
@every_kernel
def test_every_policy_runs_under_autocast(policy, kernels):
    cache = PrunedCache(shared(), policy, kernels=kernels)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fed(shared(), cache).isfinite().all()
        ids = generate(shared(), left_padded([30, 20]), 5, **cache_argument(PrunedCache(shared(), policy)))
    assert ids.shape == (2, 35)


# -- inference mode ----------------------------------------------------------------------------------------------------


@every_policy
@every_kernel
@pytest.mark.parametrize("modes", ["inference then none", "none then inference"])
def test_modes_may_change_between_steps(policy, kernels, modes):
    """What was filled in inference mode can be written to outside of it, and the other way round."""
    straight = PrunedCache(shared(), policy, kernels=kernels)
    with torch.no_grad():
        expected = fed(shared(), straight)
    first, then = (torch.inference_mode, torch.no_grad)[:: 1 if modes.startswith("inference") else -1]
    cache = PrunedCache(shared(), policy, kernels=kernels)
    for split in (1, 3):
        cache.reset()
        with first():
            before = fed(shared(), cache, STEPS[:split])
        with then():
            after = fed(shared(), cache, STEPS[split:], begin=sum(STEPS[:split]))
        torch.testing.assert_close(torch.cat([before, after], dim=1), expected, atol=0, rtol=0)
        assert_same_rows(cache, straight)


@every_policy
def test_drafts_may_be_judged_in_another_mode(policy):
    """What waits while the past is recorded, and the decision that crop brings."""
    straight, cache = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    for recorded, mode in ((straight, torch.no_grad), (cache, torch.inference_mode)):
        recorded.activate_past_recording()
        with mode():
            fed(shared(), recorded, [30])
        recorded.crop(-2)
        with mode():
            fed(shared(), recorded, [4], begin=28)
        with torch.no_grad():
            fed(shared(), recorded, [1, 1], begin=32)
    assert_same_rows(cache, straight)


@every_policy
def test_what_was_made_of_a_cache_in_inference_mode_goes_on_outside_of_it(policy, tmp_path):
    """Forks, selections of a batch and loaded caches."""
    cache = PrunedCache(shared(), policy)
    feed(shared(), left_padded([30]), cache, [30])
    with torch.inference_mode():
        fork = cache.fork()
        fork.batch_repeat_interleave(2)
        fork.reorder_cache(torch.tensor([1, 0]))
        fork.batch_select_indices(torch.tensor([1]))
        cache.save(tmp_path / "cache.safetensors")
        loaded = PrunedCache.load(tmp_path / "cache.safetensors", shared())
    with torch.no_grad():
        expected = fed(shared(), cache, [1, 1, 4, 1], begin=30)
        for other in (fork, loaded):
            torch.testing.assert_close(fed(shared(), other, [1, 1, 4, 1], begin=30), expected, atol=0, rtol=0)


@pytest.mark.parametrize("policy", [KVzip(14, recent=3), Bits(14, score=KVzip(), recent=3, sinks=1)], ids=str)
def test_a_prompt_that_came_in_inference_mode_ends_outside_of_it(policy):
    """Replays write to columns, which were made there."""
    cache, other = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    for each, mode in ((cache, torch.inference_mode), (other, torch.no_grad)):
        with mode():
            fed(shared(), each, [30])
        each.end_prompt()
    assert kept_everywhere(cache) == kept_everywhere(other)


# -- gradients ---------------------------------------------------------------------------------------------------------


@every_policy
def test_no_graph_is_kept(policy):
    """Where gradients are enabled, as they are by default, nothing that is cached remembers where it came from."""
    cache, straight = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    logits = fed(shared(), cache)
    with torch.no_grad():
        torch.testing.assert_close(logits, fed(shared(), straight), atol=1e-5, rtol=1e-4)
    held = [tensor for index in cache.pruned_layers for tensor in cache.layers[index].tensors()]
    assert not any(tensor.requires_grad for tensor in held)
    assert cache.nbytes == straight.nbytes


def test_what_a_graph_held_is_freed():
    """The keys of a prompt go when rows are evicted, gradients enabled or not."""
    model, seen = build("llama"), []
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: seen.append(weakref.ref(call[2])))
    cache = PrunedCache(model, POLICIES["a2sf"])
    fed(model, cache, [30, 1])
    gc.collect()
    assert seen
    assert not any(reference() is not None for reference in seen)


def test_gradients_through_a_cache_are_refused():
    """They would lack all that went through keys and values, and nobody would notice."""
    logits = fed(shared(), PrunedCache(shared(), Full()), [20])
    with pytest.raises(CacheError, match="use_cache=False"):
        logits.sum().backward()


# -- copies ------------------------------------------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_are_forks(policy, mode, copied):
    """The usual recipe for a shared prefix is deepcopy; it must not copy the model, nor share a tensor."""
    cache = PrunedCache(shared(), policy)
    with mode():
        fed(shared(), cache, [30])
        other = copied(cache)
        assert other._model() is shared()
        before = [tensor.clone() for index in cache.pruned_layers for tensor in cache.layers[index].tensors()]
        fed(shared(), other, [4, 1, 1], begin=30)
    held = [tensor for index in cache.pruned_layers for tensor in cache.layers[index].tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))
    assert cache.seen_tokens == 30


def test_a_cache_is_saved_and_not_pickled():
    with pytest.raises(CacheError, match=r"save\(path\)"):
        pickle.dumps(PrunedCache(shared(), Full()))
