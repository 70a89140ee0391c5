"""KVCrush behind other policies: budgets, chains, files and mistakes. Its formula is in `test_reference`."""

from __future__ import annotations

from collections import Counter

import pytest
from families import feed, kept_everywhere, left_padded, shared
from torch.utils._python_dispatch import TorchDispatchMode

from kvprune import Adaptive, Everywhere, PolicyError, PrunedCache
from kvprune.kernels import cpu
from kvprune.policies import A2SF, H2O, KIVI, CriticalKV, Full, GemFilter, KVCrush, SnapKV, parse
from kvprune.policy.registry import described, from_description

SETTINGS = {"sinks": 1, "recent": 2}


@pytest.mark.parametrize("share", [Adaptive(0.2), Everywhere(0.2), "uniform"], ids=str)
@pytest.mark.parametrize("interval", [1, 4])
def test_the_total_is_that_of_the_policy_before(share, interval):
    """With equal heads and unequal ones, after the prompt and at every generated token."""
    base = H2O(12, share=share, interval=interval, **SETTINGS)
    batch = left_padded([40, 33])
    found = {}
    for policy in (base, base | KVCrush(0.5), base | KVCrush(0)):
        pruned = PrunedCache(shared("llama"), policy)
        feed(shared("llama"), batch, pruned, [30, *[1] * 10])
        found[policy] = [kept_everywhere(pruned, row) for row in range(2)]
    alone, crushed, unchanged = found.values()
    count = [[[len(head) for head in layer] for layer in row] for row in alone]
    assert count == [[[len(head) for head in layer] for layer in row] for row in crushed]
    assert unchanged == alone
    assert crushed != alone


def test_representatives_stay_while_rows_go_one_by_one():
    """And are chosen anew with the next prompt."""
    pruned = PrunedCache(shared("llama"), A2SF(12, **SETTINGS) | KVCrush(0.5))
    batch = left_padded([45])
    feed(shared("llama"), batch, pruned, [30])
    first = _representatives(pruned)
    assert all(len(head) == 6 for head in first)
    feed(shared("llama"), batch, pruned, [1] * 10, begin=30)
    assert _representatives(pruned) == first
    feed(shared("llama"), batch, pruned, [5], begin=40)
    assert _representatives(pruned) != first


@pytest.mark.skipif(cpu.library() is None, reason="kvprune was installed without a C compiler")
def test_a_decode_step_computes_what_that_of_the_policy_before_does():
    """And is as steady: which rows stay is seen where the worst one is looked for."""
    base, batch, found = A2SF(12, **SETTINGS), left_padded([45]), {}
    for policy in (base, base | KVCrush(0.5)):
        pruned = PrunedCache(shared("llama"), policy)
        feed(shared("llama"), batch, pruned, [30, 1, 1])
        with _Operations() as found[policy]:
            feed(shared("llama"), batch, pruned, [1], begin=32)
        assert all(layer.steady is not None for layer in pruned.layers)
    alone, crushed = (operations.counts for operations in found.values())
    assert crushed == alone
    assert alone["aten::mul_"]


class _Operations(TorchDispatchMode):
    """How often torch computes what; views are nothing."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += not func.is_view
        return func(*args, **(kwargs or {}))


def _representatives(pruned: PrunedCache) -> list[set[int]]:
    table = pruned.layers[0].table
    marked = table["representative"][0] > 0
    return [set(table.positions[0, head, marked[head]].tolist()) for head in range(table.kv_heads)]


def test_it_is_a_link_like_others():
    """Written, read, and kept in its place in longer chains."""
    chain = GemFilter(30) | (CriticalKV(0.5) | KVCrush(0.3)) | KIVI(bits=4)
    assert from_description(described(chain)) == chain
    assert str(chain).endswith("| KVCrush(share=0.3) | KIVI(bits=4)")
    assert parse("a2sf:budget=0.5 | kvcrush:share=0.1,anchor=random,seed=3") == A2SF(0.5) | KVCrush(
        0.1, anchor="random", seed=3
    )
    assert [type(part) for part in chain.parts()] == [GemFilter, CriticalKV, KIVI]
    assert chain.parts()[1].representatives == KVCrush(0.3)
    assert CriticalKV(0.5).representatives is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: KVCrush(1.5),
        lambda: KVCrush(anchor="zeros"),
        lambda: KVCrush() | A2SF(0.5),
        lambda: Full() | KVCrush(),
        lambda: A2SF(0.5) | KIVI() | KVCrush(),
        lambda: A2SF(0.5) | KVCrush() | KVCrush(),
        lambda: PrunedCache(shared("llama"), KVCrush()),
        lambda: SnapKV(0.5, representatives=KVCrush()),
    ],
)
def test_what_has_nothing_to_stand_for_is_refused(make):
    with pytest.raises(PolicyError):
        make()
