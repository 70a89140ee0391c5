"""Saved caches: what comes back is what was there, to the bit, and what cannot be is refused with a CacheError."""

from __future__ import annotations

import copy
import json
import os
import random
import stat
import struct
import sys
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from crossing import crossed
from families import FAMILIES, STOCK_ONLY, build, feed, generate, left_padded, linear_hybrid, shared, token_ids
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvprune import CacheError, Chain, Eviction, KVPruneError, Policy, PolicyError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.cache.transcript import Transcript
from kvprune.policies import A2SF, H2O, KIVI, TOVA, Full, GemFilter, Keyformer, SnapKV, StreamingLLM, ZipCache
from kvprune.policy import registry
from kvprune.saving import files as saving
from kvprune.saving.weights import as_bytes
from kvprune.table.storage import Storage

A = A2SF(16, sinks=2, recent=3)
POLICIES = {
    "full": Full(),
    "a2sf": A,
    "bytes": A2SF("24KiB", sinks=2, recent=3, interval=4),
    "h2o": H2O(0.5, sinks=2, recent=3),
    "keyformer": Keyformer(16, sinks=2, recent=3, generation_length=8),
    "snapkv": SnapKV(16, window=4, kernel_size=3),
    "snapkv-decoding": SnapKV(16, window=4, kernel_size=3, interval=1),
    "tova": TOVA(16),
    "streaming": StreamingLLM(16),
    "zipcache": ZipCache(buffer=4),
    "zipcache-3-bits": ZipCache(buffer=4, high_bits=8, low_bits=3, group_size=8),
    "kivi": KIVI(group_size=4, residual=4),
    "gemfilter": GemFilter(20),
    "a2sf-zipcache": A | ZipCache(buffer=4),
    "keyformer-kivi": Keyformer(16, sinks=2, recent=3) | KIVI(group_size=4, residual=2),
    "gemfilter-a2sf-kivi": GemFilter(20) | A | KIVI(group_size=4, residual=2),
    "snapkv-tova": SnapKV(20, window=4, interval=2) | TOVA(12),
    "a-chain-of-one": Chain((A,)),
}
PRUNABLE = tuple(family for family in FAMILIES if family not in STOCK_ONLY)
policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


def again(cache: PrunedCache, path: Path, model: Any = None, **settings: Any) -> PrunedCache:
    """The cache, from a file."""
    cache.save(path)
    return PrunedCache.load(path, model or shared(), **settings)


def contents(thing: Any) -> Any:
    """Everything that an object holds, to compare: tensors by their bits, spare slots of tables left out."""
    if isinstance(thing, Tensor):
        return str(thing.dtype), tuple(thing.shape), bytes(as_bytes(thing.detach()))
    if isinstance(thing, np.ndarray):
        return thing.tolist()
    if isinstance(thing, dict):
        return {name: contents(each) for name, each in thing.items()}
    if isinstance(thing, list | tuple):
        return [contents(each) for each in thing]
    if isinstance(thing, Policy):  # which may have worked out more of its settings than another
        return registry.described(thing)
    if isinstance(thing, Storage):
        held = {name: each for name, each in vars(thing).items() if name not in ("tensors", "_columns")}
        return contents({**held, **{name: thing.rows(name) for name in thing.tensors}, "capacity": thing.capacity})
    if is_dataclass(thing) or type(thing).__module__.startswith(("kvprune.", "transformers.cache_utils")):
        return type(thing).__name__, contents(vars(thing))
    return thing


def assert_same(cache: PrunedCache, other: PrunedCache) -> None:
    """Every attribute of every layer is the same: whoever adds one has to save it."""
    assert other.policy == cache.policy
    assert other.seen_tokens == cache.seen_tokens
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert contents(theirs) == contents(mine)


def assert_goes_on_alike(
    model: PreTrainedModel, batch: dict[str, Tensor], caches: list[PrunedCache], begin: int
) -> None:
    """Generated tokens, a second turn, and more tokens: the same logits, rows and reports, to the bit."""
    left = batch["input_ids"].shape[1] - begin
    logits, others = (feed(model, batch, each, [1, 1, left - 5, 1, 1, 1], begin=begin) for each in caches)
    assert torch.equal(logits, others)
    for layer in caches[0].pruned_layers:
        assert torch.equal(*(each.kept_positions(layer) for each in caches))
    assert caches[0].report().to_dict() == caches[1].report().to_dict()


# -- what comes back ---------------------------------------------------------------------------------------------------


@policies
@pytest.mark.parametrize("generated", [0, 7])
def test_a_loaded_cache_goes_on_where_the_saved_one_stopped(policy, generated, path):
    """In a padded batch, after the prompt and after generated tokens, under every policy."""
    batch = left_padded([60, 40])
    cache = PrunedCache(shared(), policy)
    feed(shared(), batch, cache, [30] + [1] * generated)
    loaded = again(cache, path)
    assert_same(cache, loaded)
    assert loaded.nbytes == cache.nbytes
    assert loaded.report().to_dict() == cache.report().to_dict()
    assert_goes_on_alike(shared(), batch, [cache, loaded], 30 + generated)


@pytest.mark.parametrize("lengths", [[6, 8, 17], [20, 3], [9, 40, 22]], ids=str)
def test_packed_rows_of_a_padded_batch_come_back(lengths, path):
    """Packed or not, the rows of each head are as many as the longest has: together they may be more than tokens."""
    batch = left_padded([length + 10 for length in lengths])
    cache = PrunedCache(shared(), KIVI(group_size=3, residual=4))
    feed(shared(), batch, cache, [max(lengths)])
    loaded = again(cache, path)
    assert_same(cache, loaded)
    assert_goes_on_alike(shared(), batch, [cache, loaded], max(lengths))


@crossed(family=[*PRUNABLE, "linear"], policy=[A, GemFilter(20) | A2SF(16, recent=4) | KIVI(group_size=4, residual=2)])
def test_every_family_comes_back(family, policy, path):
    """Windows, states of linear layers, sinks: layers that are not pruned come back as well, in no more bytes."""
    model = linear_hybrid() if family == "linear" else shared(family)
    batch = left_padded([60, 40])
    cache = PrunedCache(model, policy)
    feed(model, batch, cache, [30, 1, 1])
    loaded = again(cache, path, model)
    assert_same(cache, loaded)
    assert loaded.nbytes <= cache.nbytes  # a window that generated tokens have moved is a view of more (5.23)
    logits, others = (feed(model, batch, each, [1, 20, 1, 1], begin=32) for each in (cache, loaded))
    assert torch.equal(logits, others)
    assert_same(cache, loaded)


@pytest.mark.filterwarnings("ignore:.*no layer with full attention")
def test_a_cache_that_prunes_nothing_comes_back(path):
    model, batch = shared("mistral-sliding"), left_padded([40, 30])
    cache = PrunedCache(model, A)
    feed(model, batch, cache, [20, 1])
    loaded = again(cache, path, model)
    assert torch.equal(*(feed(model, batch, each, [10, 1], begin=21) for each in (cache, loaded)))


@pytest.mark.parametrize("policy", [A, POLICIES["a2sf-zipcache"], POLICIES["gemfilter"]], ids=str)
def test_beams_go_on(policy, path):
    """Sequences of a loaded cache can be reordered and repeated."""
    batch = left_padded([40, 30])
    cache = PrunedCache(shared(), policy)
    feed(shared(), batch, cache, [30, 1])
    caches = [cache, again(cache, path)]
    logits = []
    for each in caches:
        each.batch_repeat_interleave(2)
        each.reorder_cache(torch.tensor([1, 0, 3, 3]))
        both = {name: tensor.repeat_interleave(2, dim=0)[[1, 0, 3, 3]] for name, tensor in batch.items()}
        logits.append(feed(shared(), both, each, [1, 1, 1], begin=31))
    assert torch.equal(*logits)
    assert_same(*caches)


def test_generate_takes_a_second_turn(path):
    """generate() goes on with a loaded cache as with the saved one, sampling included."""
    first, second = token_ids(1, 50), token_ids(1, 70)
    second[:, :50] = first
    cache = PrunedCache(shared(), A)
    shared()(first, **cache_argument(cache))
    loaded = again(cache, path)
    for settings in ({}, {"do_sample": True}):
        ids = []
        for each in (cache, loaded):
            torch.manual_seed(1)
            ids.append(generate(shared(), {"input_ids": second}, 8, **cache_argument(each.fork()), **settings))
        assert torch.equal(*ids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("policy", [A, A | ZipCache(buffer=4)], ids=str)
def test_dtypes_come_back(dtype, policy, path):
    model, batch = build("llama", dtype=dtype), left_padded([40])
    cache = PrunedCache(model, policy)
    feed(model, batch, cache, [25, 1])
    loaded = again(cache, path, model)
    assert loaded.layers[0].table.keys.dtype == dtype
    assert_goes_on_alike(model, batch, [cache, loaded], 26)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), budget=st.integers(6, 20), more=st.integers(0, 9))
def test_any_batch_comes_back(tmp_path_factory, lengths, budget, more):
    """Whatever the lengths, holes, spare slots and rows that a sequence lacks."""
    batch = left_padded([length + 12 for length in lengths])
    prompt = max(lengths)
    path = tmp_path_factory.mktemp("saved") / "cache"
    for policy in (A2SF(budget, sinks=2, recent=3, interval=3), H2O(0.3, sinks=1, recent=2) | ZipCache(buffer=3)):
        cache = PrunedCache(shared(), policy)
        feed(shared(), batch, cache, [prompt] + [1] * more)
        loaded = again(cache, path)
        assert_same(cache, loaded)
        assert loaded.nbytes == cache.nbytes
        assert torch.equal(*(feed(shared(), batch, each, [1, 1], begin=prompt + more) for each in (cache, loaded)))


def test_an_empty_cache_comes_back(path):
    loaded = again(PrunedCache(shared(), A), path)
    assert loaded.seen_tokens == 0
    feed(shared(), left_padded([40]), loaded, [40])
    assert loaded.kept_positions(0).shape[2] == 16


@torch.no_grad()
def test_compiled_steps_are_caught_up_with(path):
    """What compiled steps have counted on the device is in the file, and the loaded cache is compileable at once."""
    torch._dynamo.reset()
    step = torch.compile(shared().forward, backend="eager", fullgraph=True)
    cache = PrunedCache(shared(), A)
    token = shared()(token_ids(2, 40), **cache_argument(cache)).logits[:, -1:].argmax(-1)
    for _ in range(3):
        token = step(token, **cache_argument(cache)).logits[:, -1:].argmax(-1)
    loaded = again(cache, path)
    assert loaded.seen_tokens == 43
    assert loaded.is_compileable
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(*(step(token, **cache_argument(each)).logits for each in (cache, loaded)))
    assert_same(cache, loaded)
    torch._dynamo.reset()


def test_a_loaded_cache_lives_where_it_is_told(path):
    """device, kernels and attention are settings of the machine that loads."""
    batch = left_padded([40, 30])
    cache = PrunedCache(shared(), A)
    feed(shared(), batch, cache, [30])
    loaded = again(cache, path, device="cpu", kernels="torch", attention="sdpa")
    assert loaded.layers[0].home == torch.device("cpu")
    assert loaded.report().kernels == "torch"
    assert loaded.attention == "sdpa"
    logits = [feed(shared(), batch, each, [1, 1], begin=30) for each in (cache, loaded)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_spare_slots_of_a_cropped_table_stay_behind(path):
    """After a crop a table may have more room than rows: a file brings back a little of it, and the same rows."""
    batch = left_padded([100])
    cache = PrunedCache(shared(), Full())
    feed(shared(), batch, cache, [90])
    cache.crop(-80)
    loaded = again(cache, path)
    assert loaded.nbytes < cache.nbytes
    assert torch.equal(*(feed(shared(), batch, each, [3, 1], begin=10) for each in (cache, loaded)))


def test_saving_changes_nothing(path):
    """The cache is as it was, and the next file says the same."""
    cache = PrunedCache(shared("qwen3-hybrid"), A)
    feed(shared("qwen3-hybrid"), left_padded([40, 20]), cache, [40])
    before = cache.fork()
    headers = []
    for _ in range(2):
        cache.save(path)
        with safe_open(path, "pt") as opened:
            headers.append(opened.metadata())
    assert headers[0] == headers[1]
    assert_same(before, cache)


def test_a_prompt_that_was_read_with_gradients_can_be_saved_and_forked(path):
    """Tensors with a history, in pruned layers and others, are saved without it."""
    model = shared("qwen3-hybrid")
    cache = PrunedCache(model, A)
    model(token_ids(1, 40), **cache_argument(cache))
    loaded, fork = again(cache, path, model), cache.fork()
    token = token_ids(1, 1)
    logits = [model(token, **cache_argument(each)).logits for each in (cache, loaded, fork)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


# -- when there is nothing to save -------------------------------------------------------------------------------------


def test_a_step_that_waits_for_crop_cannot_be_saved(path):
    """While the past is recorded, a step is nothing until it is accepted; then it is saved, and recording goes on."""
    batch = left_padded([40])
    cache = PrunedCache(shared(), A)
    cache.activate_past_recording()
    feed(shared(), batch, cache, [30])
    with pytest.raises(CacheError, match=r"crop\(0\)"):
        cache.save(path)
    assert not path.exists()
    cache.crop(0)
    loaded = again(cache, path)
    assert_same(cache, loaded)
    for each in (cache, loaded):
        feed(shared(), batch, each, [4], begin=30)
        each.crop(-2)
    assert_same(cache, loaded)


@torch.no_grad()
def test_the_middle_of_a_forward_pass_cannot_be_saved(path):
    """Neither between two layers nor within one; the pass goes on, and can be saved when it is over."""
    model, refused = build("llama"), []

    def save(*_: Any) -> None:
        with pytest.raises(CacheError, match="forward pass") as error:
            cache.save(path)
        refused.append(error)

    cache, batch = PrunedCache(model, A), left_padded([40])
    expected = feed(model, batch, PrunedCache(model, A), [30, 1])
    hooks = [model.model.layers[1].register_forward_pre_hook(save)]
    update = cache.update

    def update_and_save(*arguments: Any, **settings: Any) -> Any:
        keys = update(*arguments, **settings)
        save()
        return keys

    cache.update = update_and_save
    logits = feed(model, batch, cache, [30, 1])
    hooks[0].remove()
    del cache.update
    assert len(refused) == 6
    assert torch.equal(logits, expected)
    assert_same(cache, again(cache, path, model))


def test_the_model_must_still_be_there(path):
    model = build("llama")
    cache = PrunedCache(model, A)
    del model
    with pytest.raises(CacheError, match="model of this cache is gone"):
        cache.save(path)


def test_layers_that_are_not_known_cannot_be_saved(path):
    """A stock layer that may hold more than keys and values is refused, not halved."""
    model = shared("qwen3-hybrid")
    cache = PrunedCache(model, A)
    cache.layers[1].__class__ = type("Peculiar", (type(cache.layers[1]),), {})
    with pytest.raises(CacheError, match="Peculiar"):
        cache.save(path)


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept_file(path):
    """A saved cache, and another one to be saved over it."""
    saved, other = (PrunedCache(shared(), A) for _ in range(2))
    feed(shared(), left_padded([40]), saved, [40])
    saved.save(path)
    return SimpleNamespace(path=path, content=path.read_bytes(), other=other)


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", ["save_file", "fsync", "replace"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(kept_file, error, at, monkeypatch):
    """Wherever writing fails, the old file is whole, and nothing else is left in the folder."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(*{"save_file": (saving, "save_file"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[at],
                        fail)  # fmt: skip
    expected = CacheError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        kept_file.other.save(kept_file.path)
    assert kept_file.path.read_bytes() == kept_file.content
    assert os.listdir(kept_file.path.parent) == [kept_file.path.name]


def test_a_file_is_replaced_as_a_whole(kept_file):
    """Whoever has the old file open reads on; the folder has the new one and nothing else; a link stays a link."""
    link = kept_file.path.with_name("link")
    link.symlink_to(kept_file.path.name)
    with kept_file.path.open("rb") as opened:
        kept_file.other.save(link)
        assert opened.read() == kept_file.content
    assert link.is_symlink()
    assert PrunedCache.load(link, shared()).seen_tokens == 0
    assert sorted(os.listdir(link.parent)) == sorted([kept_file.path.name, "link"])


def test_files_are_as_readable_as_others(kept_file):
    other = kept_file.path.with_name("other")
    other.touch()
    assert stat.S_IMODE(kept_file.path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_places_that_hold_no_file(tmp_path):
    """A folder that is missing, a folder in place of the file, a name that is too long, a file that is not there."""
    cache = PrunedCache(shared(), A)
    for place in (tmp_path / "missing" / "cache", tmp_path, tmp_path / ("x" * 400)):
        with pytest.raises(CacheError, match="cannot be saved"):
            cache.save(place)
        with pytest.raises(CacheError, match="cannot be loaded"):
            PrunedCache.load(place, shared())
    assert os.listdir(tmp_path) == []


def test_the_file_is_plain_safetensors(kept_file):
    """Anyone can read it: rows under the names of layers and columns, and a header of JSON that says what it is."""
    with safe_open(kept_file.path, "pt") as opened:
        metadata = opened.metadata()
        assert opened.get_tensor("layers.1.table.keys").shape == (1, 2, 16, 8)
        assert opened.get_tensor("layers.0.table.column.score").dtype == torch.float32
    header = json.loads(metadata["header"])
    assert (metadata["format"], metadata["version"]) == ("kvprune.cache", "1")
    assert header["seen"] == 40
    assert header["policy"] == {"policy": "a2sf", "settings": {
        "budget": 16, "sinks": 2, "recent": 3, "interval": 1, "group": "mean", "kernel_size": 1,
        "ahead": None, "seed": 0, "positions": "original", "value_aware": False, "share": "Uniform()",
        "forgetting_factor": 0.95, "epsilon": 1e-4,
    }}  # fmt: skip


# -- another model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llama", {"num_hidden_layers": 3}, "num_hidden_layers is 2 there and 3 here"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads is 2 there and 4 here"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
        ("llama", {"dtype": torch.float64}, "dtype is 'float32' there and 'float64' here"),
        ("llama", {"seed": 1}, "weights are others"),
        ("mistral", {}, "model_type is 'llama' there and 'mistral' here"),
    ],
    ids=str,
)
def test_other_models_are_refused(kept_file, family, settings, reason):
    with pytest.raises(CacheError, match=reason):
        PrunedCache.load(kept_file.path, build(family, **settings))


@pytest.mark.parametrize("matrix", range(4))
def test_a_fine_tune_of_one_matrix_is_refused(kept_file, matrix):
    """Weights that differ by a little in a single matrix are other weights; without the change it is the model."""
    model = build("llama")
    PrunedCache.load(kept_file.path, model)
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    with torch.no_grad():
        matrices[matrix * len(matrices) // 4].mul_(1 + 1e-4)
    with pytest.raises(CacheError, match="weights are others"):
        PrunedCache.load(kept_file.path, model)


def test_the_same_weights_under_another_attention_are_the_same_model(kept_file):
    """Neither the attention nor what else has met the model says whose keys they are."""
    model = build("llama", seed=0)
    model.set_attn_implementation("eager")
    assert PrunedCache.load(kept_file.path, model).seen_tokens == 40


def test_what_is_no_model_is_refused(kept_file):
    with pytest.raises(KVPruneError, match="transformers"):
        PrunedCache.load(kept_file.path, object())


# -- policies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taste(Eviction):
    """A policy of somebody else."""

    tastes: tuple[float, ...] = (0.5, 1.0)

    def columns(self) -> dict[str, torch.dtype]:
        return {"score": torch.float32}


def saved_with(policy: Any, path: Path) -> Path:
    cache = PrunedCache(shared(), policy)
    feed(shared(), left_padded([40]), cache, [40])
    cache.save(path)
    return path


@policies
def test_a_policy_is_what_its_description_says(policy):
    """All settings, of all links, through JSON."""
    assert registry.from_description(json.loads(json.dumps(registry.described(policy)))) == policy


def test_registered_policies_of_others_come_back(path, monkeypatch):
    """By the name that their package has registered, with settings that are tuples."""
    found = registry._entry_points() | {"taste": EntryPoint("taste", f"{__name__}:Taste", registry.GROUP)}
    monkeypatch.setattr(registry, "_entry_points", lambda: found)
    policy = Taste(16, sinks=1, recent=2, tastes=(0.25,)) | TOVA(12)
    assert registry.described(policy)[0]["policy"] == "taste"
    assert PrunedCache.load(saved_with(policy, path), shared()).policy == policy


def test_a_policy_that_is_not_registered_must_be_given(path):
    """A class of one's own is no name: its owner gives an object of it, with the settings of then."""
    policy = Taste(16, sinks=1, recent=2)
    saved_with(policy, path)
    with pytest.raises(CacheError, match=r"test_saving:Taste.*policy="):
        PrunedCache.load(path, shared())
    assert PrunedCache.load(path, shared(), policy=policy).policy is policy
    for other in (Taste(16, sinks=2, recent=2), A, "a2sf"):
        with pytest.raises(CacheError, match=r"its policy is .*Taste"):
            PrunedCache.load(path, shared(), policy=other)


def test_settings_that_cannot_be_written_down(path):
    """A setting that JSON has no word for is refused when saving, and no file is made."""
    policy = Taste(16, sinks=1, recent=2, tastes=([],))
    with pytest.raises(PolicyError, match="Taste cannot be written down: its setting tastes"):
        PrunedCache(shared(), policy).save(path)
    assert not path.exists()


# -- files that are not what they should be ----------------------------------------------------------------------------


def sealed(path: Path, header: Any, tensors: dict[str, Tensor], **metadata: str) -> None:
    """A file with all its checksums right, whatever is in it."""
    if isinstance(header, dict) and "tensors" not in metadata:
        header["tensors"] = {name: saving._digest(tensor) for name, tensor in tensors.items()}
    text = metadata.pop("text", None) or json.dumps(header)
    told = {
        "format": "kvprune.cache",
        "version": "1",
        "header": text,
        "sha256": saving._digest(text),
        **metadata,
    }
    save_file(tensors, path, told)


@cache
def example(name: str) -> tuple[dict[str, Any], dict[str, Tensor], bytes, PrunedCache]:
    """Header, tensors and bytes of a file, and the cache that it came from."""
    import tempfile

    model = shared("qwen3-hybrid")
    cache = PrunedCache(model, POLICIES[name])
    feed(model, left_padded([40, 25]), cache, [30, 1, 1, 1, 1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        cache.save(path)
        with safe_open(path, "pt") as opened:
            header = json.loads(opened.metadata()["header"])
        return header, load_file(path), path.read_bytes(), cache


EXAMPLES = ("snapkv-decoding", "a2sf-zipcache", "gemfilter-a2sf-kivi")
examples = pytest.mark.parametrize("name", EXAMPLES)


def load_or_refuse(path: Path, name: str) -> PrunedCache | None:
    """The cache, or None where it was refused; any other error is one."""
    try:
        return PrunedCache.load(path, shared("qwen3-hybrid"))
    except KVPruneError:
        return None


@examples
@given(seed=st.integers(0, 2**32))
def test_damaged_bytes_never_load_as_another_cache(tmp_path_factory, name, seed):
    """Bits that flip, ends that are missing, bytes too many: refused, but for blanks that JSON does not mind."""
    content, draw = example(name)[2], random.Random(seed)
    path = tmp_path_factory.mktemp("damaged") / "cache"
    (length,) = struct.unpack("<Q", content[:8])
    refused = 0
    for number in range(30):
        damaged = bytearray(content)
        if number % 3 == 2:
            damaged = damaged[: draw.randrange(len(content))] if draw.random() < 0.8 else damaged + b"\0" * 8
        else:
            at = draw.randrange(8 + length) if number % 3 else draw.randrange(len(content))
            damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        loaded = load_or_refuse(path, name)
        refused += loaded is None
        if loaded is not None:
            assert_same(example(name)[3], loaded)
    assert refused > 25


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-3, 50) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(facts: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree of JSON."""
    inner = facts.items() if isinstance(facts, dict) else enumerate(facts) if isinstance(facts, list) else ()
    return [place, *(each for name, value in inner for each in places(value, (*place, name)))]


def changed(facts: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The tree with another value at a place; None at the end of it removes what is there."""
    if not place:
        return value
    facts = copy.deepcopy(facts)
    parent = facts
    for name in place[:-1]:
        parent = parent[name]
    parent[place[-1]] = value
    return facts


@examples
@given(data=st.data())
def test_headers_that_are_made_up_raise_nothing_else(tmp_path_factory, name, data):
    """With right checksums and anything in place of any fact, a file loads or is refused."""
    header, tensors, _, _ = example(name)
    where = [place for place in places(header) if place[:1] != ("tensors",)]
    path = tmp_path_factory.mktemp("made-up") / "cache"
    for _ in range(30):
        sealed(path, changed(header, data.draw(st.sampled_from(where)), data.draw(json_values)), tensors)
        load_or_refuse(path, name)


@examples
@given(data=st.data())
def test_tensors_that_are_made_up_raise_nothing_else(tmp_path_factory, name, data):
    """With right checksums and another tensor, or none, under any name, a file loads or is refused."""
    header, tensors, _, _ = example(name)
    path = tmp_path_factory.mktemp("made-up") / "cache"
    dtypes = [torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn]
    for _ in range(20):
        chosen = data.draw(st.sampled_from(sorted(tensors)))
        old = tensors[chosen]
        shape = data.draw(st.one_of(
            st.just(tuple(old.shape)), st.permutations(old.shape).map(tuple),
            st.tuples(*[st.integers(0, 4)] * old.ndim), st.lists(st.integers(0, 3), max_size=5).map(tuple),
        ))  # fmt: skip
        new = torch.full(shape, 7, dtype=torch.float32).to(data.draw(st.sampled_from([old.dtype, *dtypes])))
        others = {**tensors, chosen: new}
        if data.draw(st.integers(0, 4)) == 0:
            del others[chosen]
        sealed(path, dict(header), others)
        loaded = load_or_refuse(path, name)
        assert loaded is None or (others[chosen].shape == old.shape if chosen in others else chosen.endswith("columns"))


TABLE = ("layers", 0, "table")
FACTS = {
    "more rows than there are": ((*TABLE, "rows"), 33, "shape"),
    "fewer than none": ((*TABLE, "rows"), -1, "-1 as its rows"),
    "overflowing": ((*TABLE, "rows"), 2**63, "as its rows"),
    "no end of room": ((*TABLE, "spare"), 2**31 - 1, "as its spare"),
    "a lie about holes": ((*TABLE, "dense"), True, "says that it has none"),
    "other bits": ((*TABLE, "packed", 0, "codec", "bits"), 3, "policy does not do"),
    "blocks that are not there": ((*TABLE, "packed", 0, "runs"), [[0, 1, 5, 1]], "runs"),
    "rows beyond the last": ((*TABLE, "packed", 0, "runs"), [[0, 1000, 0, 1]], "runs"),
    "runs of nothing": ((*TABLE, "packed", 0, "runs"), [[0, 0, 0, 0]], "runs"),
    "no packed rows": ((*TABLE, "packed"), [], "shape"),
    "tokens that came from nowhere": (("layers", 0, "tokens"), [34, 35], "tokens"),
    "another batch": (("layers", 0, "tokens"), [34], "prompt_tokens"),
    "true is no number": (("layers", 0, "seen"), True, "seen"),
    "counts that differ": (("layers", 0, "seen"), 50, "layers"),
    "steady without a steady policy": (("layers", 0, "steady"), True, "steady"),
    "no table": (TABLE, None, "no table"),
    "a layer too few": (("layers",), [], "layers"),
    "another kind of layer": (("layers", 1, "kind"), "DynamicLayer", "kind"),
    "a policy of nobody": (("policy",), {"policy": "os:system", "settings": {}}, "os:system"),
    "settings of nobody": (("policy", 0, "settings", "budget"), -4, "budget"),
    "settings it does not have": (("policy", 0, "settings", "taste"), 1, "taste"),
}  # fmt: skip


@pytest.mark.parametrize(("place", "value", "reason"), FACTS.values(), ids=FACTS)
def test_facts_that_cannot_be(path, place, value, reason):
    """Each is refused by its name, before memory is taken for it."""
    header, tensors, _, _ = example("a2sf-zipcache")
    sealed(path, changed(header, place, value), tensors)
    with pytest.raises(CacheError, match=reason):
        PrunedCache.load(path, shared("qwen3-hybrid"))


def with_transcript() -> PrunedCache:
    """A cache of one sequence that knows what it has read."""
    cache, batch = PrunedCache(shared(), A), left_padded([30])
    feed(shared(), batch, cache, [30])
    said = ({"role": "user", "content": "read this"}, {"role": "assistant", "content": "done"})
    cache.transcript = Transcript(batch["input_ids"][0], "a text", "{{ a template }}", said, "a document")
    return cache


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file."""
    with safe_open(path, "pt") as opened:
        return json.loads(opened.metadata()["header"]), load_file(path)


def test_a_transcript_comes_back(path):
    cache = with_transcript()
    loaded = again(cache, path)
    assert contents(loaded.transcript) == contents(cache.transcript)
    assert loaded.fork().transcript is loaded.transcript
    loaded.reset()
    assert loaded.transcript is None
    header, tensors = read(path)
    del header["transcript"]  # as it was before there were any
    sealed(path, header, {name: each for name, each in tensors.items() if name != "transcript.ids"})
    assert PrunedCache.load(path, shared()).transcript is None


@pytest.mark.parametrize(
    ("place", "value"),
    [("text", 3), ("template", []), ("document", 1), ("messages", ["hello"]), ("messages", {}),
     ("messages", [{"role": "user"}]), ("messages", [{"role": "someone", "content": "a"}]),
     ("messages", [{"role": "user", "content": 1}])],
)  # fmt: skip
def test_transcripts_that_cannot_be(path, place, value):
    with_transcript().save(path)
    header, tensors = read(path)
    sealed(path, changed(header, ("transcript", place), value), tensors)
    with pytest.raises(CacheError, match=f"transcript .*{place}"):
        PrunedCache.load(path, shared())
    sealed(path, header, {**tensors, "transcript.ids": torch.zeros(29, dtype=torch.int64)})
    with pytest.raises(CacheError, match="transcript has ids of shape"):
        PrunedCache.load(path, shared())


def test_numbers_that_point_elsewhere_are_refused(path):
    """Blocks of packed rows and positions are what kernels and masks index with."""
    header, tensors, _, _ = example("gemfilter-a2sf-kivi")
    for name in ("layers.0.table.packed.0.block", "layers.0.table.positions"):
        for number in (-2, 100):
            wrong = tensors[name].to(torch.int32)
            wrong.view(-1)[3] = number
            sealed(path, dict(header), {**tensors, name: wrong.to(tensors[name].dtype)})
            with pytest.raises(CacheError, match=r"from .* to "):
                PrunedCache.load(path, shared("qwen3-hybrid"))


def test_a_newer_format_is_refused(path):
    """Whatever a later kvprune writes into it: the message says to upgrade."""
    sealed(path, None, {}, version="2", text="who knows", sha256="what")
    with pytest.raises(CacheError, match="its format is 2, and this kvprune reads up to 1"):
        PrunedCache.load(path, shared())


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1" * 5000, "{", "[]", "null", '{"model": {}}', '"x"'], ids=lambda text: text[:9]
)
def test_headers_that_are_none(path, text):
    sealed(path, None, {}, text=text)
    with pytest.raises(CacheError, match="cannot be loaded"):
        PrunedCache.load(path, shared())


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04" * 10, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"], ids=repr)
def test_files_that_are_no_caches(path, content):
    """Not even safetensors, or safetensors of something else."""
    path.write_bytes(content)
    with pytest.raises(CacheError, match="cannot be loaded"):
        PrunedCache.load(path, shared())


def test_nothing_is_imported_that_is_not_registered(path, monkeypatch):
    """A file that names a module has no way to run it."""
    (path.parent / "mischief.py").write_text("class Policy: pass")
    monkeypatch.syspath_prepend(str(path.parent))
    header, tensors, _, _ = example("snapkv-decoding")
    for name in ("mischief:Policy", "mischief", "kvprune.policies:A2SF", "a2sf:budget=1"):
        sealed(path, changed(header, ("policy",), {"policy": name, "settings": {}}), tensors)
        with pytest.raises(CacheError, match="no policy named"):
            PrunedCache.load(path, shared("qwen3-hybrid"))
    assert "mischief" not in sys.modules


def test_a_device_that_is_not_there(kept_file):
    missing = "cuda:63" if torch.cuda.is_available() else "cuda:0"
    with pytest.raises(CacheError, match="is not a device here"):
        PrunedCache.load(kept_file.path, shared(), device=missing)


def test_a_refused_file_leaves_the_model_as_it_was(kept_file):
    """A model that a file does not belong to is not switched to another attention."""
    model = build("llama", seed=1)
    with pytest.raises(CacheError):
        PrunedCache.load(kept_file.path, model)
    assert not model.config._attn_implementation.startswith("kvprune")
    ids = token_ids(1, 5)
    model(ids, **cache_argument(DynamicCache(config=model.config)))


# -- forks -------------------------------------------------------------------------------------------------------------


def storages(cache: PrunedCache) -> dict[int, str]:
    """Where every tensor of a cache lies."""
    found: dict[int, str] = {}

    def look(thing: Any, name: str) -> None:
        if isinstance(thing, Tensor):
            if thing.untyped_storage().nbytes():
                found[thing.untyped_storage().data_ptr()] = name
        elif isinstance(thing, dict | list | tuple):
            for key, each in thing.items() if isinstance(thing, dict) else enumerate(thing):
                look(each, f"{name}.{key}")
        elif type(thing).__module__.startswith(("kvprune.", "transformers.cache_utils")) and hasattr(thing, "__dict__"):
            look({key: each for key, each in vars(thing).items() if key != "scoring"}, name)

    for index, layer in enumerate(cache.layers):
        look(layer, str(index))
    look(cache._stock_states, "stock")
    return found


@pytest.mark.parametrize("policy", [POLICIES[name] for name in EXAMPLES], ids=str)
@pytest.mark.parametrize(
    ("family", "recording"),
    [("llama", False), ("llama", True), ("qwen3-hybrid", False), ("qwen3-hybrid", True), ("linear", False)],
)
def test_forks_share_no_tensor(family, policy, recording):
    """Not even one that nobody writes to; and what the original does then, the fork does not see."""
    model = linear_hybrid() if family == "linear" else shared(family)
    cache, batch = PrunedCache(model, policy), left_padded([60, 40])
    feed(model, batch, cache, [30, 1, 1])
    if recording:
        cache.activate_past_recording()
        feed(model, batch, cache, [3], begin=32)
    fork = cache.fork()
    shared_by_both = storages(cache).keys() & storages(fork).keys()
    assert not {storages(cache)[each] for each in shared_by_both}
    before = [contents(layer) for layer in fork.layers]
    if recording:
        cache.crop(0)  # transformers 5.17 takes no step before
        feed(model, batch, cache, [4], begin=35)
    else:
        feed(model, batch, cache, [1, 4, 1], begin=32)
    assert [contents(layer) for layer in fork.layers] == before
