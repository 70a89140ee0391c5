"""Every model family: with room for all tokens a pruned cache changes nothing, with less it stays exact about sizes."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import families
import pytest
import torch
from crossing import mostly
from families import FAMILIES, STOCK_ONLY, UNUSUAL, build, generate, left_padded
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvprune import Policy, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, H2O, KIVI, TOVA, Full, Keyformer, SnapKV, StreamingLLM, ZipCache

ROOM = 10_000
NEW = 12
FULL_BUDGET = {
    "full": Full(),
    "a2sf": A2SF(ROOM),
    "h2o": H2O(ROOM),
    "keyformer": Keyformer(ROOM),
    "snapkv": SnapKV(ROOM, window=8, interval=1),
    "tova": TOVA(ROOM),
    "streaming": StreamingLLM(ROOM),
}
EVICTING = {
    "a2sf": A2SF(24, sinks=2, recent=8),
    "keyformer": Keyformer(24, sinks=2, recent=8),
    "snapkv": SnapKV(24, window=8, interval=1),
    "tova": TOVA(24),
}
PACKING = {
    "zipcache": ZipCache(buffer=5),
    "kivi": KIVI(group_size=4, residual=8),
    "a2sf-zipcache": A2SF(24, sinks=2, recent=8) | ZipCache(buffer=5),
}
OF_UNUSUAL = {"a2sf", "a2sf-zipcache"}
"""The policies that meet the families of `UNUSUAL`: what these have of their own is no matter of the policy."""
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing to prune")


@dataclass(frozen=True)
class Case:
    """A batch, how to generate from it, and what the stock model made of it."""

    batch: dict[str, Tensor]
    settings: dict[str, int]
    expected: Tensor


@dataclass(frozen=True)
class Family:
    """A model that kvprune has touched, and what it did before."""

    name: str
    model: PreTrainedModel
    cases: dict[str, Case]
    logits: Tensor


@functools.cache
def touched(name: str) -> Family:
    """The family that all tests use together."""
    model = build(name)
    single, padded = left_padded([40]), left_padded([20, 50, 37], seed=1)
    asked = {
        "greedy": (single, {}),
        "padded": (padded, {}),
        "beams": (single, {"num_beams": 3}),
        "padded-beams": (padded, {"num_beams": 3}),
    }
    cases = {
        name: Case(batch, settings, generate(model, batch, NEW, **settings))
        for name, (batch, settings) in asked.items()
    }
    with torch.no_grad():
        logits = model(**padded, **cache_argument(DynamicCache(config=model.config))).logits
    PrunedCache(model, Full())  # only now
    return Family(name, model, cases, logits)


@pytest.fixture(params=(*FAMILIES, *UNUSUAL))
def family(request) -> Family:
    return touched(request.param)


CASES = ["greedy", "padded", "beams", "padded-beams"]


def with_each(policies: dict[str, Policy], **more: Sequence[Any]) -> pytest.MarkDecorator:
    """Every family with every one of these policies, the unusual families with few; and with values of one argument.

    Of those, a family and a policy meet one, and the others in a long run alone; but every family meets all, and so
    does every policy.
    """
    cases, values = [], list(product(*more.values()))
    for turn, family in enumerate((*FAMILIES, *UNUSUAL)):
        for place, name in enumerate(policies if family in FAMILIES else OF_UNUSUAL & policies.keys()):
            for index, value in enumerate(values):
                is_long = family in FAMILIES and (turn + place + index) % len(values)
                marks = [pytest.mark.long] if is_long else []
                named = "-".join(map(str, (family, name, *value)))
                cases.append(pytest.param(family, policies[name], *value, id=named, marks=marks))
    return pytest.mark.parametrize(("family", "policy", *more), cases, indirect=["family"])


@with_each(FULL_BUDGET, case=CASES)
def test_full_budget_generates_the_ids_of_the_stock_cache(family, policy, case):
    """With a budget larger than the sequence, generate() gives the token ids of the stock cache."""
    case = family.cases[case]
    cache = PrunedCache(family.model, policy)
    ids = generate(family.model, case.batch, NEW, **cache_argument(cache), **case.settings)
    assert torch.equal(ids, case.expected)


@with_each(FULL_BUDGET)
def test_full_budget_gives_the_logits_of_the_stock_cache(family, policy):
    """With a budget larger than the sequence, a direct call gives the stock logits at every real token."""
    batch = family.cases["padded"].batch
    with torch.no_grad():
        logits = family.model(**batch, **cache_argument(PrunedCache(family.model, policy))).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], family.logits[real], atol=2e-4, rtol=1e-4)


@mostly("case", CASES, "greedy", "padded-beams")
def test_model_behaves_as_before_with_other_caches(family, case):
    """A model that kvprune has touched generates exactly the ids of before, with no cache given and with its own."""
    case = family.cases[case]
    generate(family.model, case.batch, NEW, **cache_argument(PrunedCache(family.model, A2SF(24, sinks=2, recent=8))))
    assert torch.equal(generate(family.model, case.batch, NEW, **case.settings), case.expected)
    dynamic = DynamicCache(config=family.model.config)
    assert torch.equal(
        generate(family.model, case.batch, NEW, **cache_argument(dynamic), **case.settings), case.expected
    )


def test_model_logits_without_a_cache_are_those_of_before(family):
    """A touched model that is called without a cache gives bit for bit the logits of before."""
    with torch.no_grad():
        logits = family.model(**family.cases["padded"].batch, use_cache=False).logits
    torch.testing.assert_close(logits, family.logits, atol=0, rtol=0)


@with_each(EVICTING, num_beams=[1, 3])
def test_evicting_budget_runs_with_exact_sizes_and_finite_logits(family, policy, num_beams):
    """From a padded batch, 20 tokens come with finite logits and every pruned layer holds the budget of each one."""
    batch = left_padded([10, 50, 37], seed=2)
    cache = PrunedCache(family.model, policy)
    out = generate(
        family.model, batch, 20, **cache_argument(cache), num_beams=num_beams, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert all(logits.isfinite().all() for logits in out.logits)
    assert out.sequences.shape == (3, 70)
    assert cache.seen_tokens == 69
    assert (family.name in STOCK_ONLY) == (not cache.pruned_layers)
    for layer in cache.pruned_layers:
        kept = (cache.kept_positions(layer) >= 0).sum(-1)
        # The first prompt and the 19 tokens that were fed back after it are 29: more than the budget, too.
        assert kept.tolist() == [[policy.budget] * kept.shape[1]] * 3 * num_beams


@with_each(PACKING, num_beams=[1, 3])
def test_packed_rows_run_with_exact_sizes_and_finite_logits(family, policy, num_beams):
    """The same with rows that are packed; those of the newest tokens wait in full precision."""
    batch = left_padded([10, 50, 37], seed=2)
    cache = PrunedCache(family.model, policy)
    out = generate(
        family.model, batch, 20, **cache_argument(cache), num_beams=num_beams, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert all(logits.isfinite().all() for logits in out.logits)
    assert cache.seen_tokens == 69
    for layer in cache.pruned_layers:
        table = cache.layers[layer].table
        kept = (cache.kept_positions(layer) >= 0).sum(-1)
        sizes = [24] * 3 if policy is PACKING["a2sf-zipcache"] else [29, 69, 56]
        assert kept.tolist() == [[size] * kept.shape[1] for size in sizes for _ in range(num_beams)]
        assert 0 < table.length - table.packed_length <= policy.buffer
        assert table.kv_nbytes < table.length * table.kv_token_bytes


def test_hybrid_models_are_pruned_where_attention_is_full(family):
    """Layers with full attention are pruned, all others keep the layer that transformers gives them."""
    stock = DynamicCache(config=family.model.config).layers
    cache = PrunedCache(family.model, A2SF(24, sinks=2, recent=8))
    assert cache.pruned_layers == tuple(index for index, layer in enumerate(stock) if type(layer) is DynamicLayer)
    assert all(
        type(mine) is type(theirs)
        for index, (mine, theirs) in enumerate(zip(cache.layers, stock, strict=True))
        if index not in cache.pruned_layers
    )


@pytest.mark.skipif("gemma4" not in FAMILIES, reason="this transformers has no Gemma 4")
@pytest.mark.parametrize("budget", ["12KiB", "20KiB", "40KiB"])
def test_bytes_where_layers_differ_in_their_heads(budget):
    """Heads of a sliding window are priced as what they are, and not like those of the layer that is pruned."""
    model = build("gemma4")
    cache = PrunedCache(model, A2SF(budget, sinks=2, recent=2))
    with torch.no_grad():
        model(**left_padded([200]), **cache_argument(cache))
    least = 0.7 if budget != "40KiB" else 0.5  # of what is given, of which 40 KiB are more than there is to keep
    assert least * int(budget[:-3]) * 1024 <= cache.nbytes <= int(budget[:-3]) * 1024


def test_stock_only_families_warn():
    """A model without a layer to prune says so."""
    with pytest.warns(UserWarning, match="nothing to prune"):
        PrunedCache(families.shared("mistral-sliding"), Full())
