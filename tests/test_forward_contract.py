"""What a forward pass may ask of a cache: masks that no layer uses, layers without a length, batches that change.

The stock cache is the reference wherever it has an answer; where a pruned cache can give none, it says what to do.
"""

from __future__ import annotations

import families
import pytest
import torch
import transformers
from families import build, feed, generate, kept_everywhere, left_padded, shared, token_ids
from transformers import DynamicCache
from transformers.masking_utils import create_sliding_window_causal_mask

from kvprune import CacheError, PrunedCache, UnsupportedModelError
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, Full

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_d_conv": 4, "mamba_chunk_size": 8,
}  # fmt: skip


# -- layers that are not pruned ----------------------------------------------------------------------------------------

LINEAR_LAST = {
    "Lfm2": lambda: transformers.Lfm2Config(**GROUPED, layer_types=["full_attention", "conv"]),
    "Bamba": lambda: transformers.BambaConfig(**GROUPED, attn_layer_indices=[0], **MAMBA),
}


def linear_last(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(LINEAR_LAST[family]()).eval()


@pytest.mark.parametrize("family", LINEAR_LAST)
def test_models_whose_last_layer_calls_nothing_while_decoding(family):
    """Whether a pass is complete does not hang on the calls of layers that update a state in place."""
    model, batch = linear_last(family), left_padded([9])
    expected = generate(model, batch, 6)
    cache = PrunedCache(model, Full())
    assert torch.equal(generate(model, batch, 6, **cache_argument(cache)), expected)
    cache.fork()  # which asks whether all layers have seen the same


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("steps", [[9], [9, 1]], ids=["prompt", "decode"])
def test_passes_interrupted_around_such_a_layer(layer, steps):
    """A pass that stopped before or in the last layer is noticed by the next, and by fork(); reset() starts over."""
    model, batch = linear_last("Lfm2"), left_padded([12])
    cache = PrunedCache(model, Full())
    if steps[:-1]:
        feed(model, batch, cache, steps[:-1])

    def stop(*_):
        raise KeyboardInterrupt

    inner = model.model.layers[layer]
    hook = (inner.self_attn.out_proj if layer == 0 else inner.conv.out_proj).register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        feed(model, batch, cache, steps[-1:], begin=sum(steps[:-1]))
    hook.remove()
    with pytest.raises(CacheError, match=r"reset\(\)"):
        cache.fork()
    with pytest.raises(CacheError, match=r"reset\(\)"):
        feed(model, batch, cache, [1], begin=sum(steps))
    cache.reset()
    expected = feed(model, batch, DynamicCache(config=model.config), [9, 1])
    torch.testing.assert_close(feed(model, batch, cache, [9, 1]), expected)


def test_a_sliding_mask_that_no_layer_uses():
    """Models that build a mask for sliding windows, and have none, are served: only a layer's own mask counts."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        **GROUPED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    full = {"sliding_window": 8, "layer_types": ["full_attention"] * 2}
    for model in (transformers.Qwen2MoeForCausalLM(config).eval(), build("gemma3", **full), build("gpt-oss", **full)):
        batch = left_padded([30, 21])
        expected = generate(model, batch, 6)
        assert torch.equal(generate(model, batch, 6, **cache_argument(PrunedCache(model, Full()))), expected)


def test_a_sliding_mask_that_a_pruned_layer_is_given():
    """A layer that its config calls full, and that is given a sliding mask, is refused before anything has changed."""
    model, ids = build("gemma3", sliding_window=8, layer_types=["full_attention"] * 2), token_ids(1, 30)
    cache = PrunedCache(model, Full())
    mask = create_sliding_window_causal_mask(
        config=model.config, inputs_embeds=torch.zeros(1, 30, 32), attention_mask=None, **cache_argument(cache)
    )
    with pytest.raises(UnsupportedModelError, match="DynamicCache"), torch.no_grad():
        model(ids, attention_mask={"full_attention": mask}, **cache_argument(cache))
    assert cache.seen_tokens == 0


# -- models that do something of their own -----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_models_that_make_a_mask_of_their_own(masked):
    """Doge combines the mask it is given with one that it computes: refused, whether or not there is one."""
    torch.manual_seed(0)
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**GROUPED)).eval()
    batch = {"input_ids": token_ids(2, 9)} | ({"attention_mask": torch.ones(2, 9, dtype=torch.long)} if masked else {})
    with pytest.raises(UnsupportedModelError, match="mask of its own"), torch.no_grad():
        model(**batch, **cache_argument(PrunedCache(model, Full())))


def test_models_that_change_their_keys_after_caching_them():
    """JetMoE repeats its keys for its experts: the error says that, and not that another model was called."""
    torch.manual_seed(0)
    config = transformers.JetMoeConfig(
        **{**SHAPE, "num_hidden_layers": 1}, num_key_value_heads=2, kv_channels=8, num_local_experts=2,
        num_experts_per_tok=2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = transformers.JetMoeForCausalLM(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"after they had been cached.*repeat"), torch.no_grad():
        model(token_ids(1, 9), **cache_argument(PrunedCache(model, Full())))


# -- calls that a cache cannot serve -----------------------------------------------------------------------------------


def test_a_call_without_new_tokens():
    """A conversation that the cache has seen to its end leaves no tokens for the model."""
    model, batch = shared(), left_padded([12])
    cache = PrunedCache(model, Full())
    feed(model, batch, cache, [12])
    before = kept_everywhere(cache)
    with pytest.raises(CacheError, match=r"no new tokens.*crop\(-1\)"), torch.no_grad():
        model(batch["input_ids"][:, :0], **cache_argument(cache))
    assert kept_everywhere(cache) == before
    cache.crop(-1)
    expected = generate(model, batch, 4)
    assert torch.equal(generate(model, batch, 4, **cache_argument(cache)), expected)


def test_gradient_checkpointing_in_training():
    """It takes the cache from the layers: the cache would stay empty, and every step begin anew."""
    model = build("llama")
    model.gradient_checkpointing_enable()
    model.train()
    cache = PrunedCache(model, A2SF(100))
    with pytest.raises(CacheError, match=r"gradient checkpointing.*model\.eval\(\)"):
        model(**left_padded([12]), **cache_argument(cache), use_cache=True)
    model.eval()
    batch = left_padded([12])
    expected = feed(model, batch, DynamicCache(config=model.config), [12])
    torch.testing.assert_close(feed(model, batch, cache, [12]), expected)


# -- the batch changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "linear"])
@pytest.mark.parametrize(
    "indices", [(0, 2), [2, 0, 0], torch.tensor([-1, 0]), [True, False, True], torch.tensor([False, True, True])]
)
def test_sequences_chosen_by_what_indexes_a_tensor(family, indices):
    """Tuples, lists, negative numbers and bools choose sequences, in pruned and in other layers alike."""
    model = families.linear_hybrid() if family == "linear" else shared(family)
    batch = left_padded([20, 17, 20])
    cache, step = PrunedCache(model, Full()), token_ids(3, 1, seed=5)
    feed(model, batch, cache, [20])
    rows = torch.arange(3)[torch.as_tensor(indices)]
    chosen = {name: tensor[rows] for name, tensor in batch.items()}
    cache.batch_select_indices(indices)
    expected = PrunedCache(model, Full())
    feed(model, chosen, expected, [20])
    more = {
        "input_ids": torch.cat([chosen["input_ids"], step[rows]], 1),
        "attention_mask": torch.cat([chosen["attention_mask"], torch.ones(len(rows), 1, dtype=torch.long)], 1),
    }
    torch.testing.assert_close(
        feed(model, more, cache, [1], begin=20), feed(model, more, expected, [1], begin=20), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("indices", [[3], [-4], [], [True], 1, None, "a", [0.5], [[0], [1]], torch.tensor(1)])
def test_indices_that_name_no_sequences(indices):
    """What is no choice of sequences is refused, and no layer has changed."""
    model = shared("gemma2")
    cache, batch = PrunedCache(model, Full()), left_padded([20, 20, 20])
    feed(model, batch, cache, [20])
    with pytest.raises(CacheError, match="batch_select_indices takes"):
        cache.batch_select_indices(indices)
    feed(model, batch | {"attention_mask": torch.ones(3, 21), "input_ids": token_ids(3, 21)}, cache, [1], begin=20)
    with pytest.raises(CacheError, match="reorder_cache takes"):
        cache.reorder_cache(indices)
    for repeats in (0, -1, 2.0, "2", None, torch.tensor(2.0), torch.tensor([1, 2]), torch.zeros(3).long()):
        with pytest.raises(CacheError, match="batch_repeat_interleave takes"):
            cache.batch_repeat_interleave(repeats)
    feed(model, batch | {"attention_mask": torch.ones(3, 22), "input_ids": token_ids(3, 22)}, cache, [1], begin=21)


@pytest.mark.parametrize(
    ("method", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([-1, 0]), [2, 0]),
        ("reorder_cache", torch.tensor([True, False, True]), [0, 2]),
        ("reorder_cache", [2, 0, 0], [2, 0, 0]),
        ("batch_repeat_interleave", torch.tensor([1, 0, 2]), [0, 2, 2]),
        ("batch_repeat_interleave", torch.tensor(2), [0, 0, 1, 1, 2, 2]),
    ],
)
def test_a_batch_changes_as_an_index_says(method, argument, rows):
    """Beams are taken like other choices of sequences, and sequences may be repeated unequally."""
    model = shared("gemma2")
    batch, step = left_padded([20, 17, 20]), token_ids(3, 1, seed=5)
    cache, expected = PrunedCache(model, Full()), DynamicCache(config=model.config)
    for each in (cache, expected):
        feed(model, batch, each, [20])
    getattr(cache, method)(argument)
    expected.batch_select_indices(torch.tensor(rows))
    more = {
        "input_ids": torch.cat([batch["input_ids"], step], 1)[rows],
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)[rows],
    }
    torch.testing.assert_close(
        feed(model, more, cache, [1], begin=20), feed(model, more, expected, [1], begin=20), atol=1e-4, rtol=1e-4
    )
