"""A model is switched to the kvprune attention, and back; what a pruned cache cannot show is refused."""

import copy
import pickle

import pytest
import torch
import transformers
from families import CONFIGS, build, token_ids

import kvprune
from kvprune import CacheError, Eviction, PolicyError, PrunedCache
from kvprune.attention.mass import attention_mass
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, Full


def attention_of(model) -> str:
    return model.config.get_text_config()._attn_implementation


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_a_model_gets_its_attention_back(base):
    model = build("llama")
    model.set_attn_implementation(base)
    cache = PrunedCache(model, Full())
    assert attention_of(model) == f"kvprune_{base}"
    kvprune.restore(model)
    assert attention_of(model) == base
    with pytest.raises(CacheError, match="did not go through kvprune"):
        model(token_ids(1, 8), **cache_argument(cache))
    with kvprune.attention(model):
        assert attention_of(model) == f"kvprune_{base}"
        with kvprune.attention(model):
            pass
        assert attention_of(model) == f"kvprune_{base}"
    assert attention_of(model) == base
    assert kvprune.attention.mass.attention_mass is attention_mass


def test_a_vision_tower_keeps_its_own_attention():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=30, patch_size=6
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=CONFIGS["llama"](), image_token_index=95)
    choice = {"text_config": "sdpa", "vision_config": "eager"}
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=choice)
    PrunedCache(model, Full())
    assert attention_of(model) == "kvprune_sdpa"
    assert model.config.vision_config._attn_implementation == "eager"
    kvprune.restore(model)
    assert attention_of(model) == "sdpa"


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_attention_maps_are_refused(base):
    model = build("llama")
    model.set_attn_implementation(base)
    with pytest.raises(CacheError, match="output_attentions=True"), torch.no_grad():
        model(token_ids(1, 8), output_attentions=True, **cache_argument(PrunedCache(model, Full())))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda score: score[..., :-1], r"\[1, 2, 29\] of torch.float32"),
        (lambda score: score.to(torch.complex64), r"\[1, 2, 30\] of torch.complex64"),
        (lambda score: score.to("meta"), ".* on meta"),
        (lambda score: score.tolist(), "list"),
        (lambda score: None, "NoneType"),
    ],
)
def test_scores_that_are_none_are_named(change, told):
    class Wrong(A2SF):
        def scores(self, table, step):
            return change(table["score"])

    assert issubclass(Wrong, Eviction)
    model = build("llama")
    told = rf"scores\(\) of Wrong must be .*\[1, 2, 30\].* is {told}"
    with pytest.raises(PolicyError, match=told), torch.no_grad():
        model(token_ids(1, 30), **cache_argument(PrunedCache(model, Wrong(16, sinks=2, recent=4))))


@pytest.mark.skipif(not hasattr(transformers, "ContinuousBatchingConfig"), reason="transformers has no such batching")
def test_continuous_batching_takes_the_attention_of_the_model():
    """It takes attentions by name, and a switched model has one that it does not know."""
    model = build("llama")
    prompts = [token_ids(1, length, seed=length)[0].tolist() for length in (12, 7)]

    def batched() -> list[list[int]]:
        settings = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
        small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
        found = model.generate_batch(
            inputs=prompts, generation_config=settings, continuous_batching_config=small, progress_bar=False
        )
        return [found[request].generated_tokens for request in sorted(found)]

    before = batched()
    assert all(len(each) == 4 for each in before)
    cache = PrunedCache(model, A2SF(8, sinks=2, recent=4))
    model.generate(torch.tensor(prompts[:1]), max_new_tokens=3, **cache_argument(cache))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.init_continuous_batching._model() is copied
    assert batched() == before
    assert attention_of(model) == "sdpa"
    assert "init_continuous_batching" not in vars(model)
    with kvprune.attention(model):  # and the cache goes on
        model.generate(torch.tensor([prompts[0] + [5] * 4]), max_new_tokens=2, **cache_argument(cache))
    assert cache.seen_tokens == 12 + 4 + 1
