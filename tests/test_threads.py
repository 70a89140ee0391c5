"""Several threads, one model, a cache each: what they do at the same time is what they do one after the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import pytest
import torch
from families import assert_same_rows, build, feed, generate, left_padded
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvprune import Policy, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.kernels import cpu
from kvprune.passes.prompt_filter import shorten
from kvprune.policies import A2SF, H2O, KIVI, TOVA, GemFilter, Keyformer, SnapKV, StreamingLLM, ZipCache
from kvprune.policy import registry

T = TypeVar("T")

A = A2SF(12, sinks=2, recent=3)
POLICIES: dict[str, tuple[Policy, Policy, Policy, Policy]] = {
    "evicting": (A, H2O(16, sinks=2, recent=3), TOVA(12), StreamingLLM(20)),
    "noise-and-windows": (
        Keyformer(12, sinks=2, recent=3),
        Keyformer(12, sinks=2, recent=3, seed=1),
        SnapKV(12, sinks=2, window=4, interval=1),
        SnapKV(16, window=8),
    ),
    "packing": (ZipCache(buffer=4), KIVI(group_size=4, residual=2), A | ZipCache(buffer=4), A | KIVI(group_size=4)),
    "filtering": (GemFilter(14), GemFilter(20) | A, GemFilter(0.5, layer=1), A),
    "one for all": (A, A, A, A),
}


@pytest.fixture(autouse=True)
def impatient_threads():
    """Threads take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def at_once(runs: list[Callable[[], T]]) -> list[T]:
    """What all of them return, or raise; they begin together."""
    barrier = Barrier(len(runs))

    def begin(run: Callable[[], T]) -> T:
        barrier.wait()
        return run()

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(begin, runs))


def conversation(model: PreTrainedModel, policy: Policy | str, number: int) -> tuple[Tensor, PrunedCache]:
    """Two turns of a padded batch, other ones for every number."""
    pruned = PrunedCache(model, policy)
    batch = left_padded([30 + number, 20], seed=number)
    ids = generate(model, batch, 6, **cache_argument(pruned))
    batch = {name: torch.cat([tensor, tensor[:, -9:]], dim=1) for name, tensor in batch.items()}
    batch["input_ids"][:, -9:-3] = ids[:, -6:]
    return generate(model, batch, 6, **cache_argument(pruned)), pruned


def assert_alike(found: list[tuple[Tensor, PrunedCache]], expected: list[tuple[Tensor, PrunedCache]]) -> None:
    for (ids, pruned), (other_ids, other) in zip(found, expected, strict=True):
        assert torch.equal(ids, other_ids)
        assert_same_rows(pruned, other)
        assert pruned.nbytes == other.nbytes


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("policies", POLICIES.values(), ids=POLICIES)
def test_four_threads_equal_four_runs(policies, family):
    """Ids, rows, scores and bytes, to the bit; the model has never met kvprune before."""
    alone, together = build(family), build(family)
    expected = [conversation(alone, policy, number) for number, policy in enumerate(policies)]
    found = at_once([lambda n=n, p=p: conversation(together, p, n) for n, p in enumerate(policies)])
    assert_alike(found, expected)


def test_a_stock_cache_beside_three_pruned_ones():
    """Threads that prune leave one that does not what the untouched model computes."""
    model, batch = build("llama"), left_padded([40, 30])
    PrunedCache(model, A)
    expected = generate(build("llama"), batch, 15)
    found = at_once(
        [lambda: generate(model, batch, 15, **cache_argument(DynamicCache(config=model.config)))]
        + [
            lambda p=p: generate(model, batch, 15, **cache_argument(PrunedCache(model, p)))
            for p in (A, TOVA(12), H2O(0.5))
        ]
    )
    assert torch.equal(found[0], expected)


def test_forks_of_one_cache_in_four_threads():
    """Every thread asks another question about one document."""
    model, document = build("llama"), left_padded([30])
    pruned = PrunedCache(model, A | KIVI(group_size=4, residual=2))
    feed(model, document, pruned, [30])

    def ask(number: int) -> Tensor:
        question = left_padded([10], seed=number)
        batch = {name: torch.cat([document[name], question[name]], dim=1) for name in document}
        return feed(model, batch, pruned.fork(), [8, 1, 1], begin=30)

    expected = [ask(number) for number in range(4)]
    for found, alone in zip(at_once([lambda n=n: ask(n) for n in range(4)]), expected, strict=True):
        assert torch.equal(found, alone)


# -- the first time --------------------------------------------------------------------------------------------------


@pytest.fixture
def forgotten(monkeypatch):
    """kvprune as it is before anyone has used it: nothing is registered, looked up or loaded."""

    def forget() -> None:
        for attentions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            attentions._global_mapping.pop("kvprune_sdpa", None)
        registry._entry_points.cache_clear()
        cpu.library.cache_clear()

    forget()
    yield forget
    PrunedCache(build("llama"), A)  # for whoever has switched a model before


NAMES = [
    "a2sf:budget=12,sinks=2,recent=3",
    "zipcache:buffer=4",
    "gemfilter:budget=14",
    "gemfilter:budget=20|tova:budget=12",
]


def test_first_caches_made_at_once(forgotten):
    """The switch of the attention, the hook of the prompt filter, names, kernels: each once, whoever is first."""
    expected = [conversation(build("llama"), name, number) for number, name in enumerate(NAMES)]
    for _ in range(5):
        forgotten()
        model = build("llama")
        found = at_once([lambda n=n, p=p, m=model: conversation(m, p, n) for n, p in enumerate(NAMES)])
        assert_alike(found, expected)
        assert list(model.model._forward_pre_hooks.values()).count(shorten) == 1
        assert model.config._attn_implementation == "kvprune_sdpa"


def test_no_thread_sees_half_a_registration(forgotten, monkeypatch):
    """A thread that comes while another registers the attention waits until its mask is registered as well."""
    original = AttentionMaskInterface.register

    def slowly(name: str, function: Callable[..., object]) -> None:
        time.sleep(0.2)
        original(name, function)

    monkeypatch.setattr(AttentionMaskInterface, "register", slowly)
    model = build("llama")
    found = at_once([lambda n=n: conversation(model, A, n) for n in range(4)])
    assert_alike(found, [conversation(model, A, number) for number in range(4)])
