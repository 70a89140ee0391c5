"""Rows weighed by what their values add to the output of the layer: the norms of a model, and what they decide."""

from __future__ import annotations

import math

import pytest
import torch
from families import assert_same_rows, build, feed, kept, left_padded, shared, storage_nbytes, token_ids
from torch import Tensor

from kvprune import Adaptive, PolicyError, PrunedCache, UnsupportedModelError
from kvprune.attention.outputs import Outputs
from kvprune.cache.models import cache_argument
from kvprune.cache.turning import attention_of
from kvprune.policies import (
    A2SF,
    AdaKV,
    CriticalAdaKV,
    CriticalKV,
    DropKV,
    KeyDiff,
    Knorm,
    KVzip,
    SnapKV,
    ZipCache,
    parse,
)
from kvprune.policy.ranking import VALUE_SIZE
from kvprune.policy.registry import described, from_description


def sizes_by_hand(projection: torch.nn.Module, values: Tensor, query_heads: int) -> Tensor:
    """|what one head's value alone adds to the output|_1, mean over the query heads of a KV head."""
    batch, heads, rows, dim = values.shape
    group = query_heads // heads
    found = torch.zeros(batch, heads, rows)
    nothing = projection(values.new_zeros(1, query_heads * dim))
    for sequence, head, row in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
        for query_head in range(head * group, (head + 1) * group):
            alone = values.new_zeros(1, query_heads * dim)
            alone[0, query_head * dim : (query_head + 1) * dim] = values[sequence, head, row]
            found[sequence, head, row] += (projection(alone) - nothing).abs().sum() / group
    return found


@pytest.mark.parametrize("length", [3, 5])  # of which the first are few, for heads of 8 numbers
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_sizes_are_those_of_the_output_projection(family, length):
    """Of plain linear layers and of others, whatever their bias, for each query head by itself."""
    model = shared(family)
    attention = attention_of(model, 0)
    projection = attention.o_proj if family == "llama" else attention.c_proj
    heads = 2 if family == "llama" else 4
    values = torch.randn(2, heads, length, 8, generator=torch.Generator().manual_seed(0))
    found = Outputs(attention).sizes(values, 4)
    torch.testing.assert_close(found, sizes_by_hand(projection, values, 4))


@pytest.mark.parametrize("policy", [
    A2SF(9, sinks=1, recent=2, value_aware=True), SnapKV(0.5, window=3, sinks=1, value_aware=True, share=Adaptive(0)),
], ids=["a2sf", "ragged"])  # fmt: skip
def test_every_row_has_the_size_of_its_own_value(policy):
    """After a padded prompt in pieces, and generated tokens that took the slots of others."""
    model = shared("llama")
    pruned = PrunedCache(model, policy)
    batch = left_padded([22, 17])
    feed(model, batch, pruned, [9, 7, 1, 1, 1, 1, 1, 1])
    for layer in pruned.pruned_layers:
        table = pruned.layers[layer].table
        expected = sizes_by_hand(attention_of(model, layer).o_proj, table.values, 4)
        there = table.positions >= 0
        torch.testing.assert_close(table[VALUE_SIZE][there], expected[there])


def test_heads_compete_by_attention_and_then_choose_in_two_stages():
    """CriticalAdaKV gives heads the rows that AdaKV gives them, and keeps the half of AdaKV's best."""
    model = build("llama", dtype=torch.float64)
    settings = {"sinks": 1, "window": 4, "recent": 4, "kernel_size": 3}
    found = {}
    full = PrunedCache(model, SnapKV(1.0, **settings, value_aware=True))
    for name, cache in {
        "ada": PrunedCache(model, AdaKV(20, **settings)),
        "critical": PrunedCache(model, CriticalAdaKV(20, **settings)),
        "uniform": PrunedCache(model, CriticalKV(20, **settings)),
        "full": full,
    }.items():
        feed(model, left_padded([60]), cache, [60])
        found[name] = kept(cache, 0)
    assert list(map(len, found["critical"])) == list(map(len, found["ada"]))
    assert len({*map(len, found["ada"])}) > 1
    assert found["critical"] != found["ada"]
    table = full.layers[0].table
    policy = SnapKV(1.0, **settings)
    pooled = policy.pool(table["score"], table, 56)  # from which on rows lend nothing to their neighbours
    for head, mine in enumerate(found["critical"]):
        always = {0, 56, 57, 58, 59}
        score = {at: float(pooled[0, head, at]) for at in range(60) if at not in always}
        room = len(mine) - len(always)
        first = sorted(score, key=lambda at: (score[at], at))[::-1][: math.floor(0.5 * room)]
        size = table[VALUE_SIZE][0, head]
        rest = {at: (score[at] + 32e-4) * float(size[at]) for at in score if at not in first}
        then = sorted(rest, key=lambda at: (rest[at], at))[::-1][: room - len(first)]
        assert mine == sorted(always | set(first) | set(then))


def test_packed_rows_keep_their_sizes():
    """A chain that packs what is left ranks by the values that were, for the next turn."""
    model = shared("llama")
    pruned = PrunedCache(model, A2SF(12, sinks=1, recent=2, value_aware=True) | ZipCache(buffer=4))
    batch = left_padded([40])
    feed(model, batch, pruned, [20, 1, 1, 1, 1, 1, 12])
    table = pruned.layers[0].table
    assert table.packed
    sizes = table["0." + VALUE_SIZE]
    assert (sizes[table.positions >= 0] > 0).all()


@pytest.mark.parametrize(
    "policy", [DropKV(0.4, window=4, sinks=1), SnapKV(0.4, window=4, sinks=1, interval=1)], ids=str
)
def test_padding_behind_a_prompt_asks_nothing(policy):
    """The newest queries decide, and go on deciding, wherever the padding of a shorter prompt stands."""
    model = shared()
    ids, mask = token_ids(2, 30, seed=3), torch.arange(30) < torch.tensor([[30], [22]])
    together, alone = (PrunedCache(model, policy) for _ in range(2))
    with torch.no_grad():
        model(ids, attention_mask=mask.long(), **cache_argument(together))
        model(ids[1:, :22], **cache_argument(alone))
    assert_same_rows(together, alone, 1, atol=1e-5)
    remembered = [cache.layers[0].remembered for cache in (together, alone)]
    if alone.layers[0].remembered is not None:
        assert torch.equal(remembered[0].positions[1], remembered[1].positions[0])


def test_nothing_of_a_projection_stays():
    """Of a layer that is no plain linear one either: what can be reached from the cache is what it counts."""
    cache = PrunedCache(shared("gpt2"), SnapKV(0.5, window=3, sinks=1, value_aware=True))
    feed(shared("gpt2"), left_padded([22]), cache, [20, 1, 1])
    assert storage_nbytes(cache) == cache.nbytes


@pytest.mark.parametrize(
    "policy", [CriticalKV(0.3), CriticalAdaKV(128, first_stage=0.2), A2SF(9, recent=2, value_aware=True)]
)
def test_settings_are_written_and_read(policy):
    assert from_description(described(policy)) == policy
    assert parse("a2sf:budget=0.5,value_aware=true") == A2SF(0.5, value_aware=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Knorm(0.5, value_aware=True),
        lambda: KeyDiff(0.5, value_aware=True),
        lambda: A2SF(0.5, value_aware=1),
        lambda: CriticalKV(0.5, value_aware=False),
        lambda: CriticalKV(0.5, first_stage=1.5),
        lambda: CriticalKV(0.5, value_epsilon=-1),
    ],
)
def test_what_cannot_be_weighed_is_refused(make):
    with pytest.raises(PolicyError):
        make()
    assert KVzip(0.5, value_aware=True).value_aware


def test_a_model_without_a_known_output_projection_is_refused():
    """When the cache is made, and before the model is switched to another attention."""
    model = build("llama")
    attention = attention_of(model, 1)
    attention.mixed = attention.o_proj
    del attention.o_proj
    with pytest.raises(UnsupportedModelError, match="no output projection"):
        PrunedCache(model, SnapKV(0.5, value_aware=True))
