"""Models wrapped by PEFT: a pruned cache serves adapters of weights and of embeddings, and refuses others."""

import pytest
import torch
from families import build, token_ids

from kvprune import PrunedCache, UnsupportedModelError
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, Full, GemFilter

peft = pytest.importorskip("peft")

NEW = 6
VIRTUAL = 4
CAUSAL = peft.TaskType.CAUSAL_LM


def adapted(kind: str):
    torch.manual_seed(0)
    tokens = {"task_type": CAUSAL, "num_virtual_tokens": VIRTUAL}
    config = {
        "lora": lambda: peft.LoraConfig(task_type=CAUSAL, r=4, target_modules=["q_proj", "v_proj"]),
        "ia3": lambda: peft.IA3Config(task_type=CAUSAL, target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
        "prompt": lambda: peft.PromptTuningConfig(**tokens),
        "p-tuning": lambda: peft.PromptEncoderConfig(**tokens, encoder_hidden_size=16),
        "prefix": lambda: peft.PrefixTuningConfig(**tokens),
        "cartridge": lambda: peft.CartridgeConfig(**tokens, num_frozen_tokens=0),
    }[kind]()
    model = peft.get_peft_model(build("llama"), config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(padding: int = 0) -> dict:
    ids = token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, cache=None, **given):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(**given, **settings, **(cache_argument(cache) if cache is not None else {}))[:, -NEW:]


@torch.no_grad()
def without_cache(model, ids):
    for _ in range(NEW):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, -NEW:]


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapters_of_weights_are_part_of_the_model(kind):
    model = adapted(kind)
    caches = PrunedCache(model, Full()), PrunedCache(model.get_base_model(), Full())
    expected = generate(model, **inputs(padding=5))
    assert all(torch.equal(generate(model, cache, **inputs(padding=5)), expected) for cache in caches)
    with model.disable_adapter():
        plain = generate(model, PrunedCache(model, Full()), **inputs())
    assert torch.equal(plain, generate(build("llama"), **inputs()))
    assert not torch.equal(plain, generate(model, **inputs()))


@pytest.mark.parametrize("policy", [A2SF(12, sinks=2, recent=4), GemFilter(12, layer=1)])
def test_a_merged_adapter_is_the_adapter(policy):
    model = adapted("lora")
    apart = generate(model, PrunedCache(model, policy), **inputs())
    merged = model.merge_and_unload()
    assert torch.equal(generate(merged, PrunedCache(merged, policy), **inputs()), apart)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_virtual_tokens_come_once_or_are_refused(kind, wrapped):
    """Where generate() of PEFT makes what no cache makes, a pruned cache makes it too; else it says so."""
    model = adapted(kind)
    cache = PrunedCache(model if wrapped else model.get_base_model(), Full())
    expected = without_cache(model, inputs()["input_ids"])
    if torch.equal(generate(model, **inputs()), expected):
        assert torch.equal(generate(model, cache, **inputs()), expected)
        assert cache.seen_tokens == VIRTUAL + 20 + NEW - 1
    else:
        with pytest.raises(UnsupportedModelError, match=r"virtual tokens of .* into every step"):
            generate(model, cache, **inputs())
        assert cache.lengths == {0}


def test_virtual_tokens_given_by_hand_work():
    """As the error says it."""
    model, given = adapted("prompt"), inputs()
    base, ids = model.get_base_model(), given["input_ids"]
    with torch.no_grad():
        embeds = torch.cat([model.get_prompt(2), base.get_input_embeddings()(ids)], dim=1)
    mask = torch.cat([torch.ones(2, VIRTUAL, dtype=torch.int64), given["attention_mask"]], dim=1)
    cache = PrunedCache(base, Full())
    answer = generate(base, cache, inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(answer, without_cache(model, ids))
    assert cache.seen_tokens == VIRTUAL + 20 + NEW - 1
    for policy in (A2SF(12, sinks=2, recent=4), GemFilter(12, layer=1)):
        small = PrunedCache(base, policy)
        generate(base, small, inputs_embeds=embeds, attention_mask=mask)
        assert small.seen_tokens == VIRTUAL + 20 + NEW - 1


@pytest.mark.parametrize("kind", ["prefix", "cartridge"])
def test_keys_of_an_adapter_are_refused(kind):
    model = adapted(kind)
    base = model.get_base_model()
    with pytest.raises(UnsupportedModelError, match="keys and values of its own"):
        PrunedCache(model, Full())
    assert base.config._attn_implementation == "sdpa"
    cache = PrunedCache(base, Full())  # which nobody can know to be used through the adapter
    with pytest.raises(UnsupportedModelError, match="keys and values of its own"):
        generate(model, cache, **inputs())
    assert cache.lengths == {0}
    with model.disable_adapter():
        answer = generate(model, PrunedCache(model, Full()), **inputs())
    assert torch.equal(answer, generate(build("llama"), **inputs()))
    assert torch.equal(generate(base, cache, **inputs()), answer)
