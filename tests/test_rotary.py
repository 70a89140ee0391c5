"""Rotary positions: what `rotary_of` finds is what the model does, whatever its layout."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from families import CONFIGS, STOCK_ONLY, VOCAB, PrunedCache, build, left_padded
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvprune import CacheError, PolicyError, UnsupportedModelError
from kvprune.cache.models import cache_argument
from kvprune.cache.turning import attention_of, rotary_of
from kvprune.policies import H2O, ExpectedAttention, TriAttention

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
OTHERS = {
    "interleaved": lambda: transformers.CohereConfig(**GROUPED),
    "interleaved in part": lambda: transformers.GlmConfig(**GROUPED, head_dim=8),
    "a quarter": lambda: transformers.StableLmConfig(**GROUPED),
    "a half": lambda: transformers.PhiConfig(**SHAPE),
    "scaled": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=YARN, max_position_embeddings=256),
    "none in full layers": lambda: transformers.Cohere2Config(**GROUPED),
    "none in every fourth": lambda: transformers.SmolLM3Config(**GROUPED),
}
LENGTH = 9


def last_pruned(model: PreTrainedModel) -> int:
    layers = DynamicCache(config=model.config).layers
    return max(index for index, layer in enumerate(layers) if type(layer) is DynamicLayer)


def turned_by_model(
    model: PreTrainedModel, layer: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor] | None:
    """What a layer hands to its rotary function, and what comes back, `[1, H, LENGTH, D]`; None if it calls none."""
    attention, calls, inside = attention_of(model, layer), [], []
    module = sys.modules[type(attention).__module__]
    function = getattr(module, "apply_rotary_pos_emb", None)
    if function is None:
        return None

    def noting(states, *others, **settings):
        result = function(states, *others, **settings)
        if inside:
            calls.append((states, result[0] if isinstance(result, tuple) else result))
        return result

    monkeypatch.setattr(module, "apply_rotary_pos_emb", noting)
    hooks = (
        attention.register_forward_pre_hook(lambda *_: inside.append(1)),
        attention.register_forward_hook(lambda *_: inside.clear()),
    )
    with torch.no_grad():
        model(torch.randint(1, VOCAB, (1, LENGTH)))
    for hook in hooks:
        hook.remove()
    monkeypatch.undo()
    if not calls:
        return None
    before, after = calls[0]
    return (before, after) if before.shape[2] == LENGTH else (before.transpose(1, 2), after.transpose(1, 2))


@pytest.mark.parametrize("name", [name for name in (*CONFIGS, *OTHERS) if name not in STOCK_ONLY])
def test_positions_turn_states_as_the_model_does(name, monkeypatch):
    """Turned forward as the model does, but for a factor; turned back to what they were; means and norms agree."""
    model = transformers.AutoModelForCausalLM.from_config(OTHERS[name]()) if name in OTHERS else build(name)
    layer = last_pruned(model)
    if name == "gpt-j":
        with pytest.raises(UnsupportedModelError, match="in a way of its own"):
            rotary_of(model, layer)
        return
    rotary, expected = rotary_of(model, layer), turned_by_model(model, layer, monkeypatch)
    if expected is None:
        assert rotary.angles is None
        return
    before, after = expected
    attention = attention_of(model, layer)
    states = torch.randn(1, before.shape[1], LENGTH, getattr(attention, "head_dim", None) or attention.head_size)
    width = before.shape[3]  # of what the attention hands over, which may be the first channels alone
    states[..., :width] = before
    positions = torch.arange(LENGTH)[None]
    turned = rotary.turn(states, positions)
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(turned[..., :width], after * (before.norm() / after.norm()), **close)
    torch.testing.assert_close(turned[..., width:], states[..., width:], **close)
    torch.testing.assert_close(rotary.turn(turned, positions, back=True), states, **close)
    torch.testing.assert_close(rotary.pair_norms(turned), rotary.pair_norms(states), **close)
    apart = [rotary.turn(states[:, :, :2], positions[:, [at, at]]) for at in range(LENGTH)]
    torch.testing.assert_close(rotary.mean_turn(states[:, :, :2], positions), torch.stack(apart).mean(0), **close)


def test_frequencies_of_the_model_stay_as_they_are():
    """An embedding whose frequencies change with the positions asked for is asked in a copy."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SHAPE, rope_parameters=dynamic, max_position_embeddings=32)
    )
    before = model.model.rotary_emb.inv_freq.clone()
    pruned = PrunedCache(model, TriAttention(20, sinks=2, recent=3))
    with torch.no_grad():
        model(**left_padded([25]), **cache_argument(pruned))
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_a_model_that_turns_in_its_own_way_is_refused(monkeypatch):
    """A policy that needs queries turned back says so before anything is computed."""
    model = build("llama")
    monkeypatch.delattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb")
    with pytest.raises(UnsupportedModelError, match="in a way of its own"):
        PrunedCache(model, ExpectedAttention(20, recent=3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: TriAttention(20, recent=3, positions="cache"),
        lambda: H2O(20, recent=3, positions="cache") | ExpectedAttention(20, recent=3),
    ],
    ids=["alone", "in a chain"],
)
def test_rows_that_are_shown_elsewhere_cannot_be_turned_back(make):
    """positions="cache" and a policy that turns queries back from the text exclude each other."""
    with pytest.raises(PolicyError, match='positions="original"'):
        make()


# -- tallies -----------------------------------------------------------------------------------------------------------


def filled(policy) -> tuple[PreTrainedModel, PrunedCache]:
    model = build("llama")
    pruned = PrunedCache(model, policy)
    with torch.no_grad():
        model(**left_padded([12, 9, 15]), **cache_argument(pruned))
    return model, pruned


@pytest.mark.parametrize("policy", [ExpectedAttention(20, recent=3), TriAttention(20, recent=3)], ids=str)
def test_tallies_move_with_the_batch(policy, tmp_path):
    """Selected, forked, saved and reset with their sequences; they count as bytes."""
    model, pruned = filled(policy)
    layer = pruned.layers[0]
    before = {name: each.clone() for name, each in layer.tallies.items()}
    assert before.keys() == policy.tallies(4, 2, 8).keys()
    assert layer.nbytes == layer.table.nbytes + sum(each.nbytes for each in before.values())
    pruned.save(tmp_path / "cache.safetensors")
    loaded = PrunedCache.load(tmp_path / "cache.safetensors", model)
    fork = pruned.fork()
    pruned.reorder_cache(torch.tensor([2, 2, 0]))
    layer.tallies["count"].add_(1)
    for name, each in before.items():
        assert torch.equal(loaded.layers[0].tallies[name], each)
        assert torch.equal(fork.layers[0].tallies[name], each)
        assert torch.equal(layer.tallies[name] - int(name == "count"), each[[2, 2, 0]])
    pruned.reset()
    assert not layer.tallies


def test_tallies_of_the_links_of_a_chain_are_apart():
    """Each link sees its own, under plain names."""
    _, pruned = filled(ExpectedAttention(20, sinks=1, recent=3) | TriAttention(18, sinks=5, recent=3))
    tallies = pruned.layers[0].tallies
    assert tallies["0.count"].flatten().tolist() == [11, 8, 14]
    assert tallies["1.count"].flatten().tolist() == [7, 4, 10]


def test_a_file_without_tallies_is_refused(tmp_path):
    """A cache that was saved under another layout of statistics is no cache of this policy."""
    model, pruned = filled(ExpectedAttention(20, recent=3))
    pruned.layers[0].tallies.clear()
    pruned.save(tmp_path / "cache.safetensors")
    with pytest.raises(CacheError, match="tallies"):
        PrunedCache.load(tmp_path / "cache.safetensors", model)
