"""A saved cache is taken by a model that computes with the same weights, wherever they are, and by no other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import build, feed, left_padded
from torch.testing._internal.two_tensor import TwoTensor

from kvprune import CacheError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF

BATCH = left_padded((20,))
POLICY = A2SF(16, sinks=2, recent=4)


def filled(model) -> PrunedCache:
    cache = PrunedCache(model, POLICY)
    with torch.no_grad():
        model(BATCH["input_ids"], **cache_argument(cache))
    return cache


def taken(path: Path, model, **settings) -> bool:
    try:
        PrunedCache.load(path, model, **settings)
    except CacheError:
        return False
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


# -- offloaded ---------------------------------------------------------------------------------------------------------


def offloaded(where: str, folder: Path, seed: int = 0, **overrides):
    accelerate = pytest.importorskip("accelerate")
    model, device = build("llama", seed=seed, **overrides), torch.device("cpu")
    if where == "disk":
        accelerate.disk_offload(model, str(folder), execution_device=device)
    else:
        accelerate.cpu_offload(model, execution_device=device)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_offloaded_weights_are_the_same_weights(where, tied, tmp_path, path):
    """Both ways; another fine-tune is refused both ways; and a loaded cache goes on."""
    settings = {"tie_word_embeddings": tied}
    away, here = offloaded(where, tmp_path / "a", **settings), build("llama", **settings)
    other = offloaded(where, tmp_path / "b", seed=1, **settings)
    filled(away).save(path)
    assert taken(path, here)
    assert not taken(path, other)
    assert not taken(path, build("llama", seed=1, **settings))
    filled(here).save(path)
    loaded, kept = PrunedCache.load(path, away), PrunedCache.load(path, here)
    assert not taken(path, other)
    step = left_padded((24,))
    torch.testing.assert_close(
        feed(away, step, loaded, [2, 1, 1], begin=20), feed(here, step, kept, [2, 1, 1], begin=20)
    )


def test_weights_that_are_nowhere_are_refused(path):
    """A model on meta has none: nothing is saved or loaded, but on the caller's word."""
    full, empty = build("llama"), build("llama").to("meta")
    cache = filled(full)
    with pytest.raises(CacheError, match=r"(?s)on the device meta.*trust_model=True"):
        PrunedCache(empty, POLICY).save(path)
    assert not path.exists()
    cache.save(path)
    with pytest.raises(CacheError, match=r"(?s)this model computes with cannot be told.*trust_model=True"):
        PrunedCache.load(path, empty)
    PrunedCache(empty, POLICY).save(path, trust_model=True)
    with pytest.raises(CacheError, match=r"(?s)saved from computes with cannot be told.*trust_model=True"):
        PrunedCache.load(path, build("llama"))
    assert taken(path, build("llama", seed=1), trust_model=True)
    assert not taken(path, build("gpt2"), trust_model=True)  # its config says that it is another


# -- adapters ----------------------------------------------------------------------------------------------------------


def with_adapters(*names: str):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(**settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**settings))
    for seed, adapter in enumerate(("first", "second")):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_adapters_are_told_apart(path):
    """A cache is of the adapter that was at work; adapters that are not change nothing."""
    model = with_adapters("first", "second")
    filled(model).save(path)
    assert taken(path, model)
    assert taken(path, with_adapters("first"))
    model.set_adapter("second")
    assert not taken(path, model)
    model.set_adapter("first")
    with model.disable_adapter():
        assert not taken(path, model)
    assert taken(path, model)
    assert not taken(path, build("llama"))
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["first"] *= 2
    assert not taken(path, model)


def test_adapters_that_are_off_are_the_base_model(path):
    model = with_adapters("first")
    base = build("llama")
    filled(base).save(path)
    assert not taken(path, model)
    with model.disable_adapter():
        assert taken(path, model)
        filled(model).save(path)
    assert taken(path, build("llama"))


def test_merged_adapters_are_weights(path):
    """Merged in place or for good is one; what is merged and switched off cannot be told."""
    model = with_adapters("first")
    model.merge_adapter()
    filled(model).save(path)
    with model.disable_adapter(), pytest.raises(CacheError, match="merged and switched off"):
        PrunedCache.load(path, model)
    model = with_adapters("first")
    assert not taken(path, model)
    assert taken(path, model.merge_and_unload())


# -- tensors that are made of others -----------------------------------------------------------------------------------


def wrapped(model):
    """Every matrix is a pair of tensors under one surface, as torchao's are."""
    for parameter in list(model.named_parameters()):
        name, value = parameter
        if value.ndim == 2:
            holder = model.get_submodule(name.rpartition(".")[0])
            pair = torch.nn.Parameter(TwoTensor(value.detach(), value.detach().clone()), requires_grad=False)
            setattr(holder, name.rpartition(".")[2], pair)
    return model


def test_wrapper_tensors_are_looked_into(path):
    model = wrapped(build("llama"))
    PrunedCache(model, POLICY).save(path)
    assert taken(path, model)
    assert taken(path, wrapped(build("llama")))
    assert not taken(path, wrapped(build("llama", seed=1)))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.b.mul_(2)
    assert not taken(path, model)


@pytest.mark.filterwarnings("ignore")
def test_packed_parameters_of_torch(path):
    """Dynamic quantization leaves no tensors in the state dict, but tuples that hold them."""
    quantize = torch.ao.quantization.quantize_dynamic
    model, other = (quantize(build("llama", seed=seed), {torch.nn.Linear}, torch.qint8) for seed in (0, 1))
    filled(model).save(path)
    assert taken(path, copy.deepcopy(model))
    assert not taken(path, other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(config, path):
    torchao = pytest.importorskip("torchao.quantization")
    models = [build("llama", seed=seed) for seed in (0, 0, 1)]
    for model in models:
        torchao.quantize_(model, getattr(torchao, config)())
    filled(models[0]).save(path)
    assert taken(path, models[1])
    assert not taken(path, models[2])
    assert not taken(path, build("llama"))


def test_what_cannot_be_read_is_not_guessed(path, monkeypatch):
    """A module with a state of its own kind."""
    model = build("llama")
    monkeypatch.setattr(type(model.model.norm), "get_extra_state", lambda self: object(), raising=False)
    with pytest.raises(CacheError, match=r"norm\._extra_state is a object, whose numbers cannot be read"):
        filled(model).save(path)
    filled(model).save(path, trust_model=True)
    assert taken(path, model, trust_model=True)
    assert not taken(path, model)
