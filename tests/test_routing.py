"""Routers that are trained, against plain Python: what gates are told, whom they let through, and what fitting does."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import PrunedCache, build, feed, kept, kept_everywhere, left_padded, sequence, shared, stepwise, token_ids
from test_cascades import LAYERS, ROUTED, BruteFTP, deep, step, stock_deep
from torch import Tensor

from kvprune import CacheError, PolicyError, Router, demo
from kvprune.cache.models import cache_argument
from kvprune.demo.task import RecallGenerator
from kvprune.policies import FTP, H2O


def random_router(layers: int = LAYERS, units: int = 3, seed: int = 0) -> Router:
    draw = random.Random(seed)
    return Router([[draw.gauss(0, 1) for _ in range(6 * units)] for _ in range(layers)])


class BruteRouted(BruteFTP):
    """What a gate is told and says, with floats."""

    def opening(self, layer: int, told: list[float]) -> float:
        numbers = self.policy.router[layer]
        units = len(numbers) // 6
        inner, bias, outer = numbers[: 4 * units], numbers[4 * units : 5 * units], numbers[5 * units :]
        hidden = [
            sum(a * b for a, b in zip(inner[4 * u : 4 * u + 4], told, strict=True)) + bias[u] for u in range(units)
        ]
        return sum(max(0.0, each) * weight for each, weight in zip(hidden, outer, strict=True))

    @torch.no_grad()
    def step(self, ids: list[int]) -> Tensor:
        before, total = self.append(ids)
        new, heads = range(before, total), self.model.config.num_attention_heads
        go, score = list(new), {}
        for index in range(LAYERS):
            rows = min(len(go), self.policy.window or len(go))
            self.compute(index, go[: len(go) - rows], set(range(total)))
            self.given = {}
            self.compute(index, go[len(go) - rows :], set(range(total)))
            score |= {i: self.given.get(i, 0.0) / rows / heads for i in go}
            self.frontier |= dict.fromkeys(new, index + 1)
            sparsity = self.policy.sparsity(index + 1, LAYERS) if before == 0 or len(ids) > 1 else 0
            count, go = round((1 - sparsity) * len(ids)), list(new)
            if sparsity:
                told = {
                    i: [
                        (i + 1) / total,
                        math.log(1 + len(ids) * score[i]),
                        sum((score[j], j) <= (score[i], i) for j in new) / len(ids),
                        sparsity,
                    ]
                    for i in new
                }
                opening = {i: self.opening(index + 1, told[i]) for i in new}
                always = {total - 1, *([0] if before == 0 else [])}
                ranked = sorted(new, key=lambda i: (i in always, opening[i], i), reverse=True)
                go = sorted({*ranked[:count], *always})
        return self.model.lm_head(self.model.model.norm(self.states[total - 1]))


@pytest.mark.parametrize("window", [None, 5])
def test_gates_let_through_whom_plain_python_does(window):
    model, policy = deep(), replace(ROUTED, router=random_router(), window=window)
    brute, cache, static = BruteRouted(model, policy), PrunedCache(model, policy), PrunedCache(model, ROUTED)
    ids = token_ids(1, 33)
    step(model, ids, static)
    for number in range(5):
        expected = brute.step(ids[0].tolist())
        torch.testing.assert_close(step(model, ids, cache), expected, atol=2e-4, rtol=1e-4)
        for layer in range(LAYERS):
            assert kept(cache, layer) == [sorted(brute.rows[layer])] * 2
        if not number:
            lengths = [[len(heads[0]) for heads in kept_everywhere(each)] for each in (cache, static)]
            assert lengths[0] == lengths[1]
            assert kept_everywhere(cache) != kept_everywhere(static)
        ids = token_ids(1, 12, seed=number) if number == 2 else expected.argmax().view(1, 1)


def test_a_routed_batch_is_each_of_its_sequences_alone():
    model, policy = deep(), replace(ROUTED, router=random_router(seed=1))
    batch, sizes = left_padded((23, 14, 5), width=32), [23, 1, 5, 3]
    together = PrunedCache(model, policy)
    logits = list(stepwise(model, batch, together, sizes))
    for row in range(3):
        alone, real = PrunedCache(model, policy), batch["attention_mask"][row].bool()
        parts = [int(part.sum()) for part in real.split(sizes) if part.any()]
        expected = list(stepwise(model, sequence(batch, row), alone, parts))
        torch.testing.assert_close(logits[-1][row, -1], expected[-1][0, -1], atol=1e-4, rtol=1e-4)
        assert kept_everywhere(together, row) == kept_everywhere(alone)


def divergence(model: torch.nn.Module, stock: torch.nn.Module, ids: Tensor, policy: FTP) -> float:
    """By a cache, of every token's logits."""
    with torch.no_grad():
        found = model(ids, **cache_argument(PrunedCache(model, policy))).logits[0].log_softmax(-1)
        wanted = stock(ids).logits[0].log_softmax(-1)
    return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("router", [None, random_router()], ids=["static", "gates"])
def test_what_is_trained_on_is_what_a_cache_does(router):
    model, ids = deep(), token_ids(1, 40)
    for policy in (replace(ROUTED, router=router), replace(ROUTED, router=router, window=7)):
        expected = divergence(model, stock_deep(), ids, policy)
        assert expected > 1e-3
        assert Router.divergence(model, ids, policy) == pytest.approx(expected, rel=1e-3)


def recall_text(seed: int) -> Tensor:
    """Documents and questions about them."""
    generator, parts = RecallGenerator(seed), []
    for _ in range(8):
        recall = generator.document(100, 4)
        parts += [recall.document, *(np.concatenate([recall.question(note), recall.values[note]]) for note in range(4))]
    return torch.tensor(np.concatenate(parts))[None]


def test_fitting_brings_the_routed_model_closer(tmp_path):
    """On a text that it was not fitted to, too; and the model is what it was."""
    model, _ = demo.load()
    policy, text, other = FTP(((0.3, 0.5),)), recall_text(1), recall_text(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"steps": 40, "length": 124, "rate": 0.03}
    router = Router.fit(model, text, policy, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(router.losses) == 40
    assert all(map(math.isfinite, router.losses))
    assert [len(gate) for gate in router] == [0, 48, 0]
    assert sum(router.losses[-10:]) < 0.8 * sum(router.losses[:10])
    for ids in (text, other):
        pieces = ids[:, : 4 * 124].split(124, dim=1)
        static, learned = (
            sum(Router.divergence(model, piece, each) for piece in pieces)
            for each in (policy, replace(policy, router=router))
        )
        assert learned < 0.9 * static

    path = tmp_path / "router.safetensors"
    router.save(path)
    loaded = Router.load(path, model)
    assert loaded == router
    assert loaded.model == router.model
    routed = FTP(((0.3, 0.5),), router=str(path))
    assert routed == replace(policy, router=router)
    assert str(routed) == "FTP(schedule=((0.3, 0.5),), router=Router(3 layers))"
    with pytest.raises(CacheError, match="another model"):
        Router.load(path, shared("llama"))
    changed = demo.load()[0]
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(CacheError, match="weights are others"):
        Router.load(path, changed)
    with pytest.raises(CacheError, match="weights are others"):
        PrunedCache(changed, routed)
    PrunedCache(changed, FTP(((0.3, 0.5),), router=Router.load(path, changed, trust_model=True)))

    cache = PrunedCache(model, routed)
    feed(model, {"input_ids": text[:, :60], "attention_mask": torch.ones(1, 60, dtype=torch.long)}, cache, [50, 1])
    cache.save(tmp_path / "cache.safetensors")
    again = PrunedCache.load(tmp_path / "cache.safetensors", model)
    assert again.policy == routed
    torch.testing.assert_close(step(model, text[:, 51:58], again), step(model, text[:, 51:58], cache), atol=0, rtol=0)


def test_the_same_seed_fits_the_same_router():
    fitted = [Router.fit(deep(), token_ids(1, 60), ROUTED, steps=2, length=20, seed=seed) for seed in (0, 0, 1)]
    assert fitted[0] == fitted[1] != fitted[2]
    assert [bool(gate) for gate in fitted[0]] == [bool(ROUTED.sparsity(layer, LAYERS)) for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: FTP(router=3), PolicyError, "a router is what"),
        (lambda: FTP(router=((1.0,) * 5,)), PolicyError, "6 for each"),
        (lambda: FTP(router=((math.nan,) * 6,)), PolicyError, "finite"),
        (lambda: FTP(router="no such file"), CacheError, "cannot be loaded"),
        (lambda: PrunedCache(deep(), FTP(router=random_router(3))), PolicyError, "of 3 layers"),
        (lambda: PrunedCache(deep(), FTP(router=Router([()] * LAYERS))), PolicyError, "gates for 0 of"),
        (lambda: Router.fit(deep(), token_ids(1, 60), H2O(0.5), length=20), PolicyError, "give an FTP"),
        (lambda: Router.fit(deep(), token_ids(1, 60), ROUTED), PolicyError, "at least 256 tokens"),
        (lambda: Router.fit(deep(), token_ids(2, 60), ROUTED, length=20), PolicyError, "one text"),
        (lambda: Router.fit(deep(), token_ids(1, 60), ROUTED, length=20, steps=0), PolicyError, "at least 1"),
        (lambda: Router.fit(deep(), token_ids(1, 60), FTP(()), length=20), PolicyError, "nothing to fit"),
        (lambda: random_router().save("anywhere"), CacheError, "has not been said"),
    ],
)
def test_what_has_no_meaning_is_refused_with_a_reason(make, error, told):
    with pytest.raises(error, match=told):
        make()


@pytest.mark.parametrize("damage", ["text", "format", "layers", "numbers"])
def test_a_file_that_is_no_router_is_refused(damage, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "router.safetensors"
    metadata = {"format": "kvprune.router", "version": "1", "layers": "2", "model": "{}"}
    tensors = {"layers.1": torch.ones(6)}
    if damage == "format":
        metadata["format"] = "kvprune.cache"
    if damage == "layers":
        metadata["layers"] = "1"
    if damage == "numbers":
        tensors = {"layers.1": torch.ones(7)}
    if damage == "text":
        path.write_text("{}")
    else:
        save_file(tensors, path, metadata)
    with pytest.raises(CacheError, match="cannot be loaded"):
        Router.load(path)


def test_models_of_other_families_are_fitted():
    for family, layers in (("gpt2", {"n_layer": 4}), ("phi3", {"num_hidden_layers": 4})):
        model = build(family, **layers)
        router = Router.fit(model, token_ids(1, 40), FTP(((0.3, 0.5),)), steps=2, length=20)
        assert [len(gate) for gate in router] == [0, 48, 48, 0]
        assert divergence(model, model, token_ids(1, 20), FTP(((0.3, 0.5),), router=router)) > 0
