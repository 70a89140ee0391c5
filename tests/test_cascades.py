"""Tokens that stop between layers, against a model that is run token by token and layer by layer, with dicts."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from families import (
    CONFIGS,
    PrunedCache,
    build,
    feed,
    generate,
    kept,
    kept_everywhere,
    left_padded,
    sequence,
    shared,
    stepwise,
    stock,
    storage_nbytes,
    token_ids,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from kvprune import CacheError, PolicyError, UnsupportedModelError
from kvprune.cache import step as layer_step
from kvprune.cache.models import cache_argument
from kvprune.passes.schedule import share_after
from kvprune.policies import A2SF, FTP, KIVI, GemFilter, KVzip, LazyLLM, PyramidDrop, SpAtten, Spectral, ZipCache
from kvprune.policy.heads import Heads
from kvprune.table.ragged import RaggedTable

LAYERS = 6
SCHEDULE = ((0.34, 0.7), (0.5, 0.5), (0.84, 0.3))
LAZY, GONE = LazyLLM(SCHEDULE), LazyLLM(SCHEDULE, revive=False)
EVERYTHING = LazyLLM(((0.5, 1.0),))
HEADS = SpAtten(SCHEDULE, heads=((0.34, 0.7), (0.67, 0.5)), recent=6)
PYRAMID = PyramidDrop(0.6, stages=3, keep_first=2, keep_last=4)
ROUTED = FTP(((0.3, 0.4), (0.5, 0.7), (0.7, 0.2)))
FAMILIES = (
    "llama", "qwen3", "mistral", "gpt-neox", "opt", "gpt2", "phi3", "mixtral", "qwen2-moe", "qwen2-vl",
    *(["gpt-j"] if "gpt-j" in CONFIGS else []),
)  # fmt: skip


@cache
def deep(seed: int = 0) -> PreTrainedModel:
    return build("llama", seed=seed, num_hidden_layers=LAYERS)


@cache
def wide() -> PreTrainedModel:
    """With 4 KV heads of 2 query heads each."""
    return build("llama", num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=4)


@dataclass
class Brute:
    """LazyLLM in the notation of its paper: every pair of a layer and a token is computed by `compute`, which counts.

    frontier: of token i, how many layers have computed it. states: what the last of them made of it. placed: the
    position that it is turned by. left: of every layer the KV heads that are left, all at first. put: by KV head, the
    size of what it has put out in this step.
    """

    model: PreTrainedModel
    policy: Any
    rows: list[dict[int, tuple[Tensor, Tensor]]] = field(default_factory=lambda: [{} for _ in range(LAYERS)])
    states: dict[int, Tensor] = field(default_factory=dict)
    frontier: dict[int, int] = field(default_factory=dict)
    placed: dict[int, int] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    given: dict[int, float] = field(default_factory=dict)
    left: list[set[int]] = field(default_factory=list)
    put: dict[int, float] = field(default_factory=dict)

    def hide(self, tokens: set[int]) -> None:
        """They are gone, and those behind them move up, turned as they are."""
        left = {old: new for new, old in enumerate(i for i in sorted(self.states) if i not in tokens)}
        self.rows = [{left[i]: row for i, row in rows.items() if i in left} for rows in self.rows]
        for name in ("states", "frontier", "placed"):
            setattr(self, name, {left[i]: each for i, each in getattr(self, name).items() if i in left})

    def turned(self, states: Tensor, position: int) -> Tensor:
        cosines, sines = self.model.model.rotary_emb(states[None], torch.tensor([[position]]))
        return states * cosines[0, 0] + rotate_half(states) * sines[0, 0]

    def compute(self, index: int, todo: list[int], looked_at: set[int]) -> dict[int, Tensor]:
        """Run a layer on some tokens; probabilities of the newest of them by token, `[Hq]`."""
        layer, config = self.model.model.layers[index], self.model.config
        heads, group = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
        dim = config.head_dim
        there = torch.ones(heads, dtype=torch.bool)
        if self.left:
            there = torch.tensor([head // group in self.left[index] for head in range(heads)])
        queries = {}
        for i in todo:
            assert self.frontier[i] == index
            normed = layer.input_layernorm(self.states[i])
            queries[i] = self.turned(layer.self_attn.q_proj(normed).view(heads, dim), self.placed[i])
            key = self.turned(layer.self_attn.k_proj(normed).view(-1, dim), self.placed[i])
            self.rows[index][i] = key, layer.self_attn.v_proj(normed).view(-1, dim)
            self.pairs.append((index, i))
        found = {}
        for i in sorted(todo):
            seen = sorted(j for j in looked_at if j <= i and j in self.rows[index])
            keys, values = (torch.stack([self.rows[index][j][part] for j in seen]) for part in (0, 1))
            keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
            probabilities = (torch.einsum("hd,khd->hk", queries[i], keys) / math.sqrt(dim)).softmax(-1)
            probabilities = probabilities * there[:, None]
            found = {j: probabilities[:, number] for number, j in enumerate(seen)}
            for j, each in found.items():
                self.given[j] = self.given.get(j, 0.0) + each.sum().item()
            output = torch.einsum("hk,khd->hd", probabilities, values)
            for head, size in enumerate(output.abs().sum(-1).tolist()):
                self.put[head // group] = self.put.get(head // group, 0.0) + size
            mixed = self.states[i] + layer.self_attn.o_proj(output.flatten())
            self.states[i] = mixed + layer.mlp(layer.post_attention_layernorm(mixed))
            self.frontier[i] = index + 1
        return found

    def append(self, ids: list[int]) -> tuple[int, int]:
        """How many tokens there were, and are."""
        before = len(self.states)
        for i, token in enumerate(ids, before):
            self.states[i], self.frontier[i] = self.model.model.embed_tokens(torch.tensor(token)), 0
            self.placed[i] = i
        return before, before + len(ids)

    @torch.no_grad()
    def step(self, ids: list[int]) -> Tensor:
        """Logits of the newest token."""
        before, total = self.append(ids)
        asks = self.policy.revive or before == 0 or len(ids) > 1
        looked_at = set(range(total))
        for index in range(LAYERS):
            came = range(total) if self.policy.revive else range(before, total)
            todo = [i for i in came if i in looked_at and self.frontier[i] == index]
            found = self.compute(index, todo, looked_at)
            share = self.policy.share_after(index, LAYERS)
            if share is not None and asks:
                able = found if self.policy.revive else {j for j in found if j >= before or j in self.rows[index + 1]}
                score = {j: found[j].mean().item() for j in able} | {total - 1: math.inf}
                count = math.ceil(total * share - 1e-9)
                looked_at = set(sorted(score, key=lambda j: (score[j], j), reverse=True)[:count])
        return self.model.lm_head(self.model.model.norm(self.states[total - 1]))


class BruteSpAtten(Brute):
    """By `given`, all the attention that tokens were given so far."""

    def hide(self, tokens: set[int]) -> None:
        left = {old: new for new, old in enumerate(i for i in sorted(self.states) if i not in tokens)}
        self.given = {left[i]: each for i, each in self.given.items() if i in left}
        super().hide(tokens)

    @torch.no_grad()
    def step(self, ids: list[int]) -> Tensor:
        before, total = self.append(ids)
        looked_at = set(range(total))
        for index in range(LAYERS):
            self.rows[index] = {j: row for j, row in self.rows[index].items() if j in looked_at}
            self.compute(index, [i for i in range(before, total) if i in looked_at], looked_at)
            self.keep_heads(index, begins=before == 0)
            share = share_after(self.policy.schedule, index, LAYERS)
            if share is not None:
                able = [j for j in self.rows[index] if j >= before or j in self.rows[index + 1]]
                kept = {j for j in able if j >= total - self.policy.recent}
                ranked = sorted(able, key=lambda j: (j in kept, self.given[j], j), reverse=True)
                looked_at = set(ranked[: math.ceil(total * share - 1e-9)]) | kept
        return self.model.lm_head(self.model.model.norm(self.states[total - 1]))

    def keep_heads(self, index: int, *, begins: bool) -> None:
        total = self.model.config.num_key_value_heads
        if begins and not index:
            self.left = [set(range(total)) for _ in range(LAYERS)]
        share = share_after(self.policy.heads, index, LAYERS)
        if begins and share is not None:
            ranked = sorted(self.left[index], key=lambda head: (-self.put[head], head))
            self.left[index + 1 :] = [{*ranked[: math.ceil(total * share - 1e-9)]} for _ in range(index + 1, LAYERS)]


class BrutePyramidDrop(Brute):
    """Stages of two layers."""

    @torch.no_grad()
    def step(self, ids: list[int]) -> Tensor:
        before, total = self.append(ids)
        policy, looked_at = self.policy, set(range(total))
        for index in range(LAYERS):
            found = self.compute(index, [i for i in range(before, total) if i in looked_at], looked_at)
            if index in (1, 3) and (before == 0 or len(ids) > 1):
                able = [j for j in found if j >= before or j in self.rows[index + 1]]
                kept = {j for j in able if j < policy.keep_first or j >= total - policy.keep_last}
                ranked = sorted(able, key=lambda j: (j in kept, found[j].mean().item(), j), reverse=True)
                middle = max(0, total - policy.keep_first - policy.keep_last)
                count = total - middle + math.ceil(middle * policy.share ** (index // 2 + 1) - 1e-9)
                looked_at = set(ranked[:count]) | kept
        return self.model.lm_head(self.model.model.norm(self.states[total - 1]))


class BruteFTP(Brute):
    """Where `states` of a token stay what they are at a layer that it skips."""

    @torch.no_grad()
    def step(self, ids: list[int]) -> Tensor:
        before, total = self.append(ids)
        new = range(before, total)
        go, score = list(new), {}
        for index in range(LAYERS):
            rows = min(len(go), self.policy.window or len(go))
            self.compute(index, go[: len(go) - rows], set(range(total)))
            self.given = {}
            self.compute(index, go[len(go) - rows :], set(range(total)))
            score |= {i: self.given.get(i, 0.0) / rows for i in go}
            self.frontier |= dict.fromkeys(new, index + 1)
            sparsity = self.policy.sparsity(index + 1, LAYERS) if before == 0 or len(ids) > 1 else 0
            kept = {total - 1, *([0] if before == 0 else [])}
            ranked = sorted(new, key=lambda i: (i in kept, score[i], i), reverse=True)
            go = sorted({*ranked[: round((1 - sparsity) * len(ids))], *kept})
        return self.model.lm_head(self.model.model.norm(self.states[total - 1]))


BRUTES = {LazyLLM: Brute, SpAtten: BruteSpAtten, PyramidDrop: BrutePyramidDrop, FTP: BruteFTP}


@pytest.mark.parametrize("policy", [PYRAMID, ROUTED, FTP(((0.0, 0.5),), window=3)], ids=["pyramid", "ftp", "window"])
def test_what_layers_hold_is_that_of_a_model_run_token_by_token(policy):
    model = deep()
    brute, cache = BRUTES[type(policy)](model, policy), PrunedCache(model, policy)
    ids, came_back = token_ids(1, 33), False
    for number in range(8):
        expected = brute.step(ids[0].tolist())
        torch.testing.assert_close(step(model, ids, cache), expected, atol=2e-4, rtol=1e-4)
        for layer in range(LAYERS):
            assert kept(cache, layer) == [sorted(brute.rows[layer])] * 2
            came_back |= layer > 0 and not set(brute.rows[layer]) <= set(brute.rows[layer - 1])
        assert cache.layers[0].ledger is None
        ids = token_ids(1, 12, seed=number) if number == 3 else expected.argmax().view(1, 1)
    assert len(brute.rows[3]) < len(brute.states) * 0.8
    assert came_back == isinstance(policy, FTP)


@pytest.mark.parametrize("policy", [PyramidDrop(1.0), FTP(((0.0, 0.0),)), FTP(((0.3, 1.0), (0.4, 0.0)))])
def test_a_layer_that_nothing_skips_is_stock(policy):
    model, ids = deep(), token_ids(1, 40)
    cache, stopping = PrunedCache(model, policy), isinstance(policy, FTP) and policy.sparsity(2, LAYERS)
    logits, expected = step(model, ids, cache), step(stock_deep(), ids, DynamicCache(config=model.config))
    assert torch.allclose(logits, expected, atol=1e-4) != bool(stopping)
    lengths = [len(kept(cache, layer)[0]) for layer in range(LAYERS)]
    assert lengths == [40, 40, 2 if stopping else 40, 40, 40, 40]


@pytest.mark.parametrize("recent", [1, 6])
def test_spatten_is_that_of_a_model_run_token_by_token(recent):
    model, policy = deep(), SpAtten(SCHEDULE, recent=recent)
    brute, cache = BruteSpAtten(model, policy), PrunedCache(model, policy)
    ids = token_ids(1, 29)
    for number in range(10):
        expected = brute.step(ids[0].tolist())
        torch.testing.assert_close(step(model, ids, cache), expected, atol=2e-4, rtol=1e-4)
        for layer in range(LAYERS):
            assert kept(cache, layer) == [sorted(brute.rows[layer])] * 2
            assert layer == 0 or set(brute.rows[layer]) <= set(brute.rows[layer - 1])
        score = cache.layers[0].ledger.score[0]
        torch.testing.assert_close(
            score.tolist(), [brute.given[i] for i in range(len(brute.states))], atol=1e-3, rtol=1e-3
        )
        ids = token_ids(1, 7, seed=number) if number == 4 else expected.argmax().view(1, 1)
    assert len(brute.rows[-1]) < len(brute.states) * 0.6


@pytest.mark.parametrize("policy", [HEADS, SpAtten((), heads=((0.2, 0.5), (0.5, 0.2)))], ids=["both", "heads"])
def test_heads_that_stop_are_those_of_a_model_run_token_by_token(policy):
    model = wide()
    brute, cache = BruteSpAtten(model, policy), PrunedCache(model, policy)
    ids = token_ids(1, 29)
    for number in range(7):
        expected = brute.step(ids[0].tolist())
        torch.testing.assert_close(step(model, ids, cache), expected, atol=2e-4, rtol=1e-4)
        for layer in range(LAYERS):
            there = sorted(brute.rows[layer])
            assert kept(cache, layer) == [there if head in brute.left[layer] else [] for head in range(4)]
        ids = token_ids(1, 7, seed=number) if number == 3 else expected.argmax().view(1, 1)
    assert [len(left) for left in brute.left] == ([4, 4, 3, 3, 2, 2] if policy is HEADS else [4, 2, 2, 1, 1, 1])
    assert cache.nbytes == storage_nbytes(cache)
    assert cache.dense_nbytes == LAYERS * cache.seen_tokens * 2 * 4 * 8 * 4


def test_heads_that_stop_leave_no_bytes():
    model, ids = wide(), token_ids(1, 200)
    whole, half = (PrunedCache(model, SpAtten((), heads=heads)) for heads in ((), ((0.5, 0.5),)))
    for each in (whole, half):
        step(model, ids, each)
    assert whole.nbytes * 0.75 < half.nbytes < whole.nbytes * 0.76
    assert half.dense_nbytes == whole.dense_nbytes
    assert half.report().layers[-1].fewest_rows == 0
    assert torch.equal(
        step(model, ids, PrunedCache(model, SpAtten((), heads=((0.5, 1.0),)))),
        step(model, ids, PrunedCache(model, SpAtten(()))),
    )


@pytest.mark.parametrize("family", ["wide", "gpt2"])
def test_every_sequence_of_a_batch_keeps_heads_of_its_own(family, tmp_path):
    """One of them begins with padding alone, and its heads are chosen where its tokens come."""
    model = wide() if family == "wide" else shared(family)
    policy = SpAtten(((0.5, 0.6),), heads=((0.5, 0.5),), recent=3)
    batch = left_padded((23, 14, 5, 19), width=32)
    together, sizes = PrunedCache(model, policy), [23, 1, 1, 5, 1, 1]
    logits = list(stepwise(model, batch, together, sizes))
    chosen = set()
    for row in range(4):
        alone, real = PrunedCache(model, policy), batch["attention_mask"][row].bool()
        parts = [int(part.sum()) for part in real.split(sizes) if part.any()]
        expected = list(stepwise(model, sequence(batch, row), alone, parts))
        found = [each[row, -1] for each, part in zip(logits, real.split(sizes), strict=True) if part.any()]
        torch.testing.assert_close(
            torch.stack(found), torch.stack([each[0, -1] for each in expected]), atol=1e-4, rtol=1e-4
        )
        assert kept_everywhere(together, row) == kept_everywhere(alone)
        chosen.add(tuple(alone.layers[-1].kept_heads.numbers[0].tolist()))
    assert family == "gpt2" or len(chosen) > 1
    fork, other = together.fork(), together.fork()
    together.save(tmp_path / "cache.safetensors")
    loaded, ids = PrunedCache.load(tmp_path / "cache.safetensors", model), token_ids(4, 1, seed=8)
    assert storage_nbytes(loaded) == loaded.nbytes == together.nbytes
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)

    def goes_on_with(cache: PrunedCache, rows: list[int]) -> Tensor:
        with torch.no_grad():
            return model(ids[rows], attention_mask=mask[rows], **cache_argument(cache)).logits[:, -1]

    expected = goes_on_with(together, [0, 1, 2, 3])
    for each in (fork, loaded):
        torch.testing.assert_close(goes_on_with(each, [0, 1, 2, 3]), expected, atol=0, rtol=0)
    other.reorder_cache(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(goes_on_with(other, [2, 0, 2]), expected[[2, 0, 2]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "follower", [A2SF(9, sinks=2, recent=4), KIVI(bits=8, residual=8, group_size=8), Spectral(bits=8, residual=8)]
)
def test_what_follows_evicts_and_packs_the_rows_of_the_heads_that_are_left(follower, tmp_path):
    model = wide()
    cache, plain = PrunedCache(model, HEADS | follower), PrunedCache(model, HEADS)
    ids = token_ids(1, 60)
    torch.testing.assert_close(step(model, ids, cache), step(model, ids, plain), atol=1e-4, rtol=1e-4)
    fork = cache.fork()
    for seed in range(4):
        ids = token_ids(1, 1, seed=seed)
        logits = step(model, ids, cache)
        if follower.codecs:
            torch.testing.assert_close(logits, step(model, ids, plain), atol=0.1, rtol=0.1)
        torch.testing.assert_close(logits, step(model, ids, fork), atol=0, rtol=0)
    for layer in range(LAYERS):
        left = cache.layers[layer].kept_heads
        there = range(4) if left is None else left.numbers[0].tolist()
        held = [head for head, rows in enumerate(kept(cache, layer)) if rows]
        assert held == list(there)
    assert len(held) == 2
    assert cache.nbytes == storage_nbytes(cache) < plain.nbytes
    cache.save(tmp_path / "cache.safetensors")
    ids = token_ids(1, 2, seed=9)
    loaded = PrunedCache.load(tmp_path / "cache.safetensors", model)
    torch.testing.assert_close(step(model, ids, loaded), step(model, ids, cache), atol=0, rtol=0)


def test_heads_that_a_process_may_have_alone_do_not_stop(monkeypatch):
    split = Heads(0, 2, 8, 4)
    monkeypatch.setattr("kvprune.cache.pruned_cache.heads_of", lambda model, index: split)
    PrunedCache(wide(), SpAtten())
    with pytest.raises(UnsupportedModelError, match="several processes"):
        PrunedCache(wide(), HEADS)
    monkeypatch.undo()
    model = build("gpt-oss", layer_types=["full_attention"] * 2)
    cache = PrunedCache(model, SpAtten(heads=((0.5, 0.5),)))
    with pytest.raises(UnsupportedModelError, match="attention sink"):
        step(model, token_ids(1, 9), cache)
    assert cache.seen_tokens == 0


def unfinished(cache: PrunedCache, row: int = 0) -> dict[int, tuple[int, Tensor]]:
    """Of one sequence, the tokens that stopped: how many layers have computed them, and their states."""
    ledger = cache.layers[0].ledger
    if ledger is None or ledger.positions is None:
        return {}
    told = zip(ledger.positions[row].tolist(), ledger.frontier[row].tolist(), ledger.states[row], strict=True)
    return {position: (frontier, state) for position, frontier, state in told if position >= 0}


def step(model: PreTrainedModel, ids: Tensor, cache: PrunedCache) -> Tensor:
    with torch.no_grad():
        return model(ids, **cache_argument(cache)).logits[0, -1]


@pytest.mark.parametrize("policy", [LAZY, GONE], ids=["revived", "gone"])
@pytest.mark.parametrize("seed", [0, 1])
def test_sets_frontiers_states_and_pairs_are_those_of_a_model_run_token_by_token(policy, seed):
    model = deep(seed)
    brute, cache = Brute(model, policy), PrunedCache(model, policy)
    ids, revived = token_ids(1, 37, seed=seed), 0
    for number in range(12):
        pairs = len(brute.pairs)
        expected = brute.step(ids[0].tolist())
        revived += len(brute.pairs) - pairs - LAYERS * ids.shape[1] if number else 0
        torch.testing.assert_close(step(model, ids, cache), expected, atol=2e-4, rtol=1e-4)
        for layer in range(LAYERS):
            assert kept(cache, layer) == [sorted(brute.rows[layer])] * 2
        # So many rows as pairs were computed, and nothing evicts: no pair was computed twice.
        assert len(set(brute.pairs)) == len(brute.pairs) == sum(len(rows) for rows in brute.rows)
        if policy.revive:
            held = unfinished(cache)
            assert {i: at for i, (at, _) in held.items()} == {i: f for i, f in brute.frontier.items() if f < LAYERS}
            for i, (_, state) in held.items():
                torch.testing.assert_close(state, brute.states[i], atol=2e-4, rtol=1e-4)
        else:
            assert cache.layers[0].ledger is None
        ids = token_ids(1, 9, seed=number) if number == 5 else expected.argmax().view(1, 1)  # a second turn
    assert (revived > 0) == policy.revive


@pytest.mark.parametrize("family", FAMILIES)
def test_where_all_go_on_ids_and_logits_are_those_of_the_stock_model(family):
    model, reference = shared(family), stock(family)
    batch = left_padded((21, 13))
    cache = PrunedCache(model, EVERYTHING)
    mine = generate(model, batch, 6, **cache_argument(cache))
    assert torch.equal(mine, generate(reference, batch, 6))
    one = sequence(batch, 0)
    logits = feed(model, one, PrunedCache(model, EVERYTHING), [12, 1, 1, 7])
    expected = feed(reference, one, DynamicCache(config=reference.config), [12, 1, 1, 7])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *((family, LazyLLM(((0.5, 0.4),))) for family in FAMILIES),
        ("llama", SpAtten(((0.5, 0.4),), recent=3)),
        ("deep", PYRAMID),
        ("deep", ROUTED),
        ("deep", FTP(((0.0, 0.5),), window=3)),
    ],
    ids=[*FAMILIES, "spatten", "pyramid", "ftp", "window"],
)
def test_a_batch_is_each_of_its_sequences_alone(family, policy):
    """In every family, so that whatever its layers are given for a token travels along."""
    model = deep() if family == "deep" else shared(family)
    batch = left_padded((23, 14, 5), width=32)
    batch["attention_mask"][1, 23] = 0  # padding in the middle
    together = PrunedCache(model, policy)
    sizes = [23, 1, 1, 5, 1, 1]
    logits = list(stepwise(model, batch, together, sizes))
    assert any(unfinished(together, row) for row in range(3)) == policy.revives
    for row in range(3):
        alone = PrunedCache(model, policy)
        one = sequence(batch, row)
        real = batch["attention_mask"][row].bool()
        parts = [int(part.sum()) for part in real.split(sizes)]
        parts = [part for part in parts if part]
        expected = list(stepwise(model, one, alone, parts))
        found = [each[row, -1] for each, part in zip(logits, real.split(sizes), strict=True) if part.any()]
        torch.testing.assert_close(
            torch.stack(found), torch.stack([each[0, -1] for each in expected]), atol=1e-4, rtol=1e-4
        )
        for layer in together.pruned_layers:
            assert kept(together, layer, row) == kept(alone, layer)
        assert unfinished(together, row).keys() == unfinished(alone).keys()


def prompted(policy: Any = LAZY, lengths: tuple[int, ...] = (24, 17), steps: int = 3) -> PrunedCache:
    """A cache that has seen prompts, and a few tokens more."""
    model, batch = deep(), left_padded(lengths)
    more = token_ids(len(lengths), steps, seed=1)
    ids = torch.cat([batch["input_ids"], more], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
    cache = PrunedCache(model, policy)
    feed(model, {"input_ids": ids, "attention_mask": mask}, cache, [max(lengths), *(1,) * steps])
    return cache


def goes_on(cache: PrunedCache, rows: int, seed: int = 5) -> Tensor:
    """Logits of two steps more, the same of every sequence that is the same."""
    model, seen = deep(), cache.seen_tokens
    ids = token_ids(1, 2, seed=seed).expand(rows, -1)
    hidden = (
        [0] * rows
        if cache.layers[0].columns.real is None
        else [int((~row).sum()) for row in cache.layers[0].columns.real]
    )
    mask = torch.ones(rows, seen + 2, dtype=torch.long)
    for row, count in enumerate(hidden):
        mask[row, :count] = 0
    empty = torch.zeros(rows, seen, dtype=torch.long)
    batch = {"input_ids": torch.cat([empty, ids], dim=1), "attention_mask": mask}
    return feed(model, batch, cache, [1, 1], begin=seen)


@pytest.mark.parametrize("policy", [LAZY, SpAtten(SCHEDULE, recent=4)], ids=["revived", "spatten"])
def test_what_stopped_moves_with_beams_selections_and_forks(policy):
    cache = prompted(policy)
    fork, other = cache.fork(), cache.fork()
    assert storage_nbytes(fork) == fork.nbytes
    expected = goes_on(cache, 2)
    torch.testing.assert_close(goes_on(fork, 2), expected, atol=0, rtol=0)  # and is as it was after the other went on
    other.reorder_cache(torch.tensor([1, 0, 1]))
    torch.testing.assert_close(goes_on(other, 3), expected[[1, 0, 1]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", [LAZY, GONE, SpAtten(SCHEDULE, recent=4)], ids=["revived", "gone", "spatten"])
def test_beams_read_what_their_tokens_would_alone(policy):
    model, batch = deep(), left_padded((20, 12))
    beams = generate(model, batch, 6, num_beams=2, num_return_sequences=2, **cache_argument(PrunedCache(model, policy)))
    again = generate(model, batch, 6, num_beams=2, num_return_sequences=2, **cache_argument(PrunedCache(model, policy)))
    assert torch.equal(beams, again)
    # The likelihood of the best one is that of its tokens, fed one by one.
    best = beams[0]
    cache = PrunedCache(model, policy)
    mask = torch.cat([batch["attention_mask"][:1], torch.ones(1, 6, dtype=torch.long)], dim=1)
    logits = feed(model, {"input_ids": best[None], "attention_mask": mask}, cache, [20, 1, 1, 1, 1, 1, 1])
    scored = model.generate(
        **{name: tensor[:1] for name, tensor in batch.items()},
        do_sample=False, max_new_tokens=6, min_new_tokens=6, num_beams=2, return_dict_in_generate=True,
        output_scores=True, length_penalty=0.0, **cache_argument(PrunedCache(model, policy)),
    )  # fmt: skip
    own = logits[0, 19:25].log_softmax(-1).gather(1, best[20:, None]).sum()
    torch.testing.assert_close(scored.sequences_scores[0], own, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("policy", [LAZY, SpAtten(SCHEDULE, recent=4)], ids=["revived", "spatten"])
def test_it_is_saved_when_the_longest_sequence_has_gone(tmp_path, policy):
    cache = prompted(policy, (40, 9), steps=0)
    cache.batch_select_indices(torch.tensor([1]))
    cache.save(tmp_path / "cache.safetensors")
    loaded = PrunedCache.load(tmp_path / "cache.safetensors", deep())
    torch.testing.assert_close(goes_on(loaded, 1), goes_on(cache, 1), atol=0, rtol=0)


@pytest.mark.parametrize("policy", [LAZY, SpAtten(SCHEDULE, recent=4)], ids=["revived", "spatten"])
def test_it_is_saved_and_goes_on_where_it_was(tmp_path, policy):
    cache = prompted(policy)
    assert cache.layers[0].ledger is not None
    cache.save(tmp_path / "cache.safetensors")
    loaded = PrunedCache.load(tmp_path / "cache.safetensors", deep())
    assert storage_nbytes(loaded) == loaded.nbytes
    torch.testing.assert_close(goes_on(loaded, 2), goes_on(cache, 2), atol=0, rtol=0)


def test_what_is_held_is_counted():
    cache = prompted()
    assert storage_nbytes(cache) == cache.nbytes
    alone = prompted(lengths=(24,))
    rows = sum(len(kept(alone, layer)[0]) for layer in range(LAYERS))
    assert alone.nbytes > rows * alone.layers[0].table.token_bytes + alone.layers[0].ledger.states.nbytes
    gone = prompted(GONE, (24,), steps=0)
    assert gone.nbytes < gone.dense_nbytes * 0.8
    cache.reset()
    assert cache.nbytes == 0
    assert cache.layers[0].ledger is None


def test_only_tokens_that_stopped_nowhere_can_be_taken_back():
    model = deep()
    cache = prompted(GONE, (24,), steps=0)
    step(model, token_ids(1, 1, seed=1), cache)
    before = cache.fork()
    step(model, token_ids(1, 1, seed=2), cache)
    cache.crop(-1)
    ids = token_ids(1, 1, seed=3)
    torch.testing.assert_close(step(model, ids, cache), step(model, ids, before), atol=1e-5, rtol=1e-5)
    with pytest.raises(CacheError, match="cannot crop"):
        cache.crop(-4)


@pytest.mark.parametrize("policy", [LAZY, GONE], ids=["revived", "gone"])
def test_while_the_past_is_recorded_nothing_stops(policy):
    model, ids = deep(), token_ids(1, 24)
    cache = PrunedCache(model, policy)
    cache.activate_past_recording()
    logits = step(model, ids, cache)
    torch.testing.assert_close(logits, step(stock_deep(), ids, DynamicCache(config=model.config)), atol=1e-4, rtol=1e-4)
    assert [len(kept(cache, layer)[0]) for layer in range(LAYERS)] == [24] * LAYERS


@cache
def stock_deep() -> PreTrainedModel:
    return build("llama", num_hidden_layers=LAYERS)


def test_hidden_states_are_of_all_columns_and_stay_what_they_were():
    model, ids = deep(), token_ids(1, 24)
    with torch.no_grad():
        model(ids, output_hidden_states=True)  # so that its own hooks are there first
        cache = PrunedCache(model, LAZY)
        found = model(ids, output_hidden_states=True, **cache_argument(cache)).hidden_states
    assert [each.shape[1] for each in found] == [24] * (LAYERS + 1)
    for layer in range(1, LAYERS - 1):
        computed = set(kept(cache, layer)[0])
        for token in range(24):  # one that a layer does not compute leaves it as it came
            assert torch.equal(found[layer][0, token], found[layer + 1][0, token]) == (token not in computed)


def test_a_pass_that_fails_leaves_what_stopped_as_it_was():
    cache = prompted(lengths=(24,))
    held = cache.layers[0].ledger

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = deep().model.layers[4].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            step(deep(), token_ids(1, 1), cache)
    finally:
        hook.remove()
    assert cache.layers[0].ledger is held
    with pytest.raises(CacheError, match="interrupted"):
        step(deep(), token_ids(1, 1), cache)
    cache.reset()
    torch.testing.assert_close(
        step(deep(), token_ids(1, 24), cache), step(deep(), token_ids(1, 24), PrunedCache(deep(), LAZY))
    )


def test_a_pass_that_fails_before_its_first_keys_leaves_the_next_one_as_it_was():
    cache = prompted(GONE, (24,), steps=0)
    other = cache.fork()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = deep().model.layers[0].self_attn.q_proj.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            step(deep(), token_ids(1, 5), cache)
    finally:
        hook.remove()
    torch.testing.assert_close(step(deep(), token_ids(1, 1), cache), step(deep(), token_ids(1, 1), other))
    assert cache.seen_tokens == 25
    assert cache.layers[0].tokens == (25,)


def test_what_was_closed_up_cannot_be_taken_back_by_columns():
    """Two turns padded on opposite sides: the newest rows of a sequence are not in the newest slots any more."""
    ids, mask = token_ids(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[1, :50] = 0
    mask[0, 60:110] = 0
    cache = PrunedCache(deep(), EVERYTHING)
    feed(deep(), {"input_ids": ids, "attention_mask": mask}, cache, [60, 60])
    before = [kept(cache, layer, row) for layer in range(LAYERS) for row in (0, 1)]
    with pytest.raises(CacheError, match="cannot crop"):
        cache.crop(-30)
    assert [kept(cache, layer, row) for layer in range(LAYERS) for row in (0, 1)] == before


@pytest.mark.parametrize("first", [1, 5])
@pytest.mark.parametrize(
    "policy",
    [LAZY, GONE, SpAtten(SCHEDULE, recent=4), HEADS, PYRAMID, ROUTED],
    ids=["revived", "gone", "spatten", "heads", "pyramid", "ftp"],
)
def test_a_mask_may_hide_tokens_later(policy, first):
    """In a step of a generated token, and in one of a turn."""
    model = deep()
    brute = BRUTES[type(policy)](model, policy)
    cache = PrunedCache(model, policy)
    ids, mask = token_ids(1, 40), torch.ones(1, 40, dtype=torch.long)
    mask[:, 5:13] = 0
    feed(model, {"input_ids": ids, "attention_mask": torch.ones(1, 24, dtype=torch.long)}, cache, [24])
    brute.step(ids[0, :24].tolist())
    brute.hide(set(range(5, 13)))
    begin = 24
    for size in (first, 6 - first, 1, 1):
        logits = feed(model, {"input_ids": ids, "attention_mask": mask}, cache, [size], begin=begin)
        expected = brute.step(ids[0, begin : begin + size].tolist())
        torch.testing.assert_close(logits[0, -1], expected, atol=2e-4, rtol=1e-4)
        assert [max(kept(cache, layer), key=len) for layer in range(LAYERS)] == [sorted(rows) for rows in brute.rows]
        begin += size


@pytest.mark.parametrize("policy", [LAZY, SpAtten(SCHEDULE, recent=4)], ids=["revived", "spatten"])
def test_it_is_the_first_of_a_chain_and_what_follows_evicts_what_it_holds(policy, monkeypatch):
    """Heads come to hold different numbers of rows, and it all is as if shorter ones had empty slots instead."""
    model = deep()
    cache, padded = (PrunedCache(model, policy | A2SF(9, sinks=2, recent=4)) for _ in range(2))
    ids, ragged = token_ids(1, 30), 0
    for size in (20, *(1,) * 8, 5, *(1,) * 4):
        logits = step(model, ids[:, :size], cache)
        with monkeypatch.context() as patch:
            patch.setattr(
                layer_step, "keep_rows", lambda table, slots, room, apart: table.compact(slots, room) or table
            )
            torch.testing.assert_close(step(model, ids[:, :size], padded), logits, atol=1e-4, rtol=1e-4)
        assert kept_everywhere(cache) == kept_everywhere(padded)
        ragged += sum(isinstance(layer.table, RaggedTable) for layer in cache.layers)
        for layer in range(LAYERS):
            for head in kept(cache, layer):
                assert len(head) == len({*head}) <= 9
                assert head[-1] == cache.seen_tokens - 1
    assert (ragged > 0) == isinstance(policy, SpAtten)
    assert cache.nbytes == storage_nbytes(cache)


@pytest.mark.parametrize("policy", [GONE, SpAtten(SCHEDULE, recent=4), PYRAMID, ROUTED], ids=str)
@pytest.mark.parametrize(
    "packing",
    [
        pytest.param(KIVI(bits=8, residual=8, group_size=8), id="kivi"),
        pytest.param(ZipCache(high_bits=8, low_bits=8, buffer=8, group_size=8), id="zipcache"),
        pytest.param(Spectral(bits=8, residual=8), id="spectral"),
    ],
)
def test_what_no_layer_has_dropped_is_packed(policy, packing, tmp_path):
    """Every layer packs its own rows: at 8 bits those that it holds without; in a batch, a fork and a file too."""
    model, chain = deep(), policy | packing
    packed, plain = (PrunedCache(model, each) for each in (chain, policy))
    logits, expected = (step(model, token_ids(1, 100), each) for each in (packed, plain))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)  # which are of the prompt, and not packed yet
    assert kept_everywhere(packed) == kept_everywhere(plain)
    assert packed.layers[0].table.packed
    assert {tier.codec.bits for layer in packed.layers for tier in layer.table.packed} == {8}
    fork = packed.fork()
    for seed in range(5):
        ids = token_ids(1, 1, seed=seed)
        logits = step(model, ids, packed)
        torch.testing.assert_close(logits, step(model, ids, plain), atol=0.1, rtol=0.1)
        torch.testing.assert_close(logits, step(model, ids, fork), atol=0, rtol=0)
    assert kept_everywhere(packed) == kept_everywhere(fork)
    assert packed.nbytes == storage_nbytes(packed) < plain.nbytes
    packed.save(tmp_path / "cache.safetensors")
    loaded = PrunedCache.load(tmp_path / "cache.safetensors", model)
    ids = token_ids(1, 3, seed=9)
    torch.testing.assert_close(step(model, ids, loaded), step(model, ids, packed), atol=0, rtol=0)

    batch, together = left_padded((100, 77)), PrunedCache(model, chain)
    tokens = generate(model, batch, 12, **cache_argument(together))
    for row, length in enumerate((100, 77)):
        alone = PrunedCache(model, chain)
        own = {"input_ids": batch["input_ids"][row : row + 1, -length:]}
        assert generate(model, own, 12, **cache_argument(alone))[0, -12:].tolist() == tokens[row, -12:].tolist()
        assert kept_everywhere(together, row) == kept_everywhere(alone)


@pytest.mark.parametrize("policy", [LAZY, GONE, SpAtten(SCHEDULE, recent=4), HEADS, PYRAMID, ROUTED])
def test_in_a_step_of_padding_alone_nothing_stops(policy):
    """Not in the first one either."""
    model, ids, mask = deep(), token_ids(1, 24), torch.ones(1, 24, dtype=torch.long)
    mask[:, :4] = 0
    cache = PrunedCache(model, policy)
    logits = feed(model, {"input_ids": ids, "attention_mask": mask}, cache, [4, 20])
    expected = step(model, ids[:, 4:], PrunedCache(model, policy))
    torch.testing.assert_close(logits[0, -1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: A2SF(8, sinks=1, recent=2) | LAZY, PolicyError, "first link"),
        (lambda: LAZY | GONE, PolicyError, "only"),
        (lambda: GemFilter(8) | LAZY, PolicyError, "Keep one"),
        (lambda: LAZY | GemFilter(8), PolicyError, "Keep one"),
        (lambda: LAZY | KIVI(), PolicyError, "out of order"),
        (lambda: LAZY | KVzip(0.5), PolicyError, "again"),
        (lambda: LAZY | A2SF("4kB"), PolicyError, "budget in bytes"),
        (lambda: LazyLLM(((0.5, 0.5), (0.7, 0.6))), PolicyError, "no more tokens"),
        (lambda: LazyLLM(((0.7, 0.5), (0.5, 0.4))), PolicyError, "ascend"),
        (lambda: LazyLLM(((0.5, 0.0),)), PolicyError, "above 0"),
        (lambda: LazyLLM(((0.5, 1.5),)), PolicyError, "from 0 to 1"),
        (lambda: LazyLLM((0.5, 0.5)), PolicyError, "pairs"),
        (lambda: SpAtten(recent=0), PolicyError, "at least 1"),
        (lambda: SpAtten(heads=((0.5, 0.5), (0.7, 0.6))), PolicyError, "no more heads"),
        (lambda: SpAtten(heads=0.5), PolicyError, "heads cannot be 0.5"),
        (lambda: HEADS | A2SF(9, sinks=2, recent=4, value_aware=True), PolicyError, "some heads stop"),
        (lambda: PyramidDrop(0.0), PolicyError, "above 0"),
        (lambda: PyramidDrop(stages=0), PolicyError, "at least 1"),
        (lambda: FTP(window=0), PolicyError, "at least 1"),
        (lambda: FTP(((0.5, 0.2), (0.5, 0.1))), PolicyError, "ascend"),
        (lambda: LazyLLM(revive=1), PolicyError, "True or False"),
        (lambda: PrunedCache(shared("qwen3-hybrid"), LAZY), UnsupportedModelError, "count on every token"),
    ],
)
def test_what_has_no_meaning_is_refused_with_a_reason(make, error, told):
    with pytest.raises(error, match=told):
        make()


def test_other_caches_are_as_fast_as_before():
    """In calls of Python functions, which do not depend on who else uses the machine."""
    model = build("llama", num_hidden_layers=LAYERS, seed=3)

    def calls() -> int:
        cache = PrunedCache(model, A2SF(12, sinks=2, recent=4))
        feed(model, left_padded((20,)), cache, [20])
        counted = [0]

        def count(frame: Any, event: str, argument: Any) -> None:
            counted[0] += event == "call"

        for ids in token_ids(1, 3, seed=2).split(1, dim=1):
            counted[0] = 0
            sys.setprofile(count)
            try:
                step(model, ids, cache)
            finally:
                sys.setprofile(None)
        return counted[0]

    before = calls()
    PrunedCache(model, LAZY)
    # Two hooks of two calls each in a layer, and what torch makes of a module with hooks.
    assert calls() - before <= 8 * LAYERS
