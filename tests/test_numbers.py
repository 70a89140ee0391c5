"""Numbers at their limits: half precision, logits of 1e4, ties, nothing to attend to, prompts of almost nothing.

Whatever comes in, under every policy: logits are finite, and every head keeps exactly what its budget says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from crossing import mostly
from families import PAD, build, feed, generate, kept, left_padded, sequence, shared, stepwise, token_ids
from torch import Tensor
from transformers import PreTrainedModel

from kvprune import CacheError, Policy, PrunedCache, RowWeights, Scoring, Step, TokenTable, attention_mass
from kvprune.attention.mass import row_logits
from kvprune.cache.models import CACHE_ARGUMENT, cache_argument
from kvprune.kernels import choose
from kvprune.policies import A2SF, H2O, KIVI, TOVA, Full, GemFilter, Keyformer, SnapKV, StreamingLLM, ZipCache

BUDGET = 12
ALL = 10_000
"""In place of a budget where nothing is evicted."""

A = A2SF(BUDGET, sinks=2, recent=3)
# A policy, and how many tokens it keeps of a longer prompt.
POLICIES: dict[str, tuple[Policy, int]] = {
    "full": (Full(), ALL),
    "a2sf": (A, BUDGET),
    "h2o": (H2O(BUDGET, sinks=2, recent=3), BUDGET),
    "keyformer": (Keyformer(BUDGET, sinks=2, recent=3, generation_length=8), BUDGET),
    "snapkv": (SnapKV(BUDGET, sinks=2, window=4, interval=1), BUDGET),
    "pooled-snapkv": (SnapKV(BUDGET, sinks=2, window=4, pooling="avg", interval=1), BUDGET),
    "tova": (TOVA(BUDGET), BUDGET),
    "streaming": (StreamingLLM(BUDGET), BUDGET),
    "max": (A2SF(BUDGET, sinks=2, recent=3, group="max", kernel_size=5), BUDGET),
    "zipcache": (ZipCache(buffer=4), ALL),
    "official-zipcache": (ZipCache(buffer=4, normalizer="official"), ALL),
    "kivi": (KIVI(group_size=4, residual=4), ALL),
    "a2sf-zipcache": (A | ZipCache(buffer=4), BUDGET),
    "keyformer-kivi": (Keyformer(BUDGET, sinks=2, recent=3) | KIVI(group_size=4, residual=2), BUDGET),
    "snapkv-tova": (SnapKV(20, window=4, interval=1) | TOVA(BUDGET), BUDGET),
    "gemfilter-a2sf": (GemFilter(20) | A, BUDGET),
    "gemfilter-kivi": (GemFilter(BUDGET) | KIVI(group_size=4, residual=2), ALL),
}
policies = pytest.mark.parametrize(("policy", "budget"), POLICIES.values(), ids=POLICIES)
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


@dataclass(frozen=True)
class LogitSpy(Policy):
    """Keeps everything, and notes the largest logit of the model's attention."""

    seen: list[float] = field(default_factory=list, compare=False)

    def observe(self, table: TokenTable, step: Step) -> None:
        assert step.source is not None
        scoring = Scoring(table.keys.shape[3] ** -0.5)
        self.seen.append(float(row_logits(step.source.states, table.keys, scoring).abs().max()))


@cache
def double() -> PreTrainedModel:
    return build("llama", dtype=torch.float64)


def largest_logit(model: PreTrainedModel) -> float:
    spy = LogitSpy()
    feed(model, left_padded([40]), PrunedCache(model, spy), [40])
    return max(spy.seen)


@cache
def steep(dtype: torch.dtype, head_dim: int = 8, logit: float = 1e4) -> PreTrainedModel:
    """A model whose largest logit is about this, where an ordinary one has some tens; 0 makes all logits equal."""
    model = build("llama", dtype=dtype, head_dim=head_dim)
    for _ in range(3):  # what the layers above see changes with each
        with torch.no_grad():
            factor = math.sqrt(logit / max(largest_logit(model), 1e-3))
            for layer in model.model.layers:
                for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                    projection.weight.mul_(factor)
    return model


def assert_kept(cache: PrunedCache, prompts: list[int], fed: int, budget: int) -> None:
    """Of prompts of so many tokens, and as many more, every head keeps what the budget allows, and no token twice."""
    chosen = cache.selected_positions
    for row, prompt in enumerate(prompts):
        tokens = (prompt if chosen is None else len(chosen[row])) + fed
        for layer in cache.pruned_layers:
            for head in kept(cache, layer, row):
                assert len(set(head)) == len(head) == min(tokens, budget)


def read_and_generate(model: PreTrainedModel, lengths: list[int], policy: Policy, budget: int, more: int = 6) -> None:
    """Feed padded prompts, then tokens one by one, and assert what holds after every step."""
    pruned = PrunedCache(model, policy)
    batch = left_padded([length + more for length in lengths], width=max(lengths) + more)
    for fed, logits in enumerate(stepwise(model, batch, pruned, [max(lengths)] + [1] * more)):
        assert logits.isfinite().all()
        assert_kept(pruned, lengths, fed, budget)


# -- half precision, and logits of any size --------------------------------------------------------------------------


@halves
@pytest.mark.parametrize("head_dim", [8, 256])
def test_steep_models_are_steep(dtype, head_dim):
    assert 5e3 < largest_logit(steep(dtype, head_dim)) < 2e4


@halves
@policies
def test_logits_of_ten_thousand(policy, budget, dtype):
    """A softmax of 0 and 1 alone, in half precision, with a batch that is padded."""
    read_and_generate(steep(dtype), [40, 17], policy, budget)


@halves
@pytest.mark.parametrize("tau", [1e-3, 1e9])
def test_temperatures_at_their_limits(tau, dtype):
    """Logits of 1e4 divided by a thousandth, or by a billion, are still the logits of a softmax."""
    policy = Keyformer(BUDGET, sinks=2, recent=3, tau_init=tau, tau_end=tau)
    read_and_generate(steep(dtype), [40, 17], policy, BUDGET)


@dataclass(frozen=True)
class Witness(Policy):
    """Keeps everything, and notes how much attention the newest query gives in all, per KV head."""

    totals: list[Tensor] = field(default_factory=list, compare=False)

    def row_weights(self, step: Step) -> RowWeights:
        return RowWeights.last_window(1)

    def observe(self, table: TokenTable, step: Step) -> None:
        self.totals.append(step.mass.sum(-1))


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["a2sf", "keyformer", "zipcache", "keyformer-kivi"])
def test_the_attention_that_policies_see_adds_up_to_one(name, dtype, kernels):
    """With logits of 1e4, whose float32 neighbours are 1e-3 apart, over rows in full precision and packed ones."""
    witness = Witness()
    pruned = PrunedCache(steep(dtype), witness | POLICIES[name][0], kernels=kernels)
    feed(steep(dtype), left_padded([40]), pruned, [30] + [1] * 10)
    totals = torch.stack(witness.totals)
    torch.testing.assert_close(totals, torch.ones_like(totals), atol=2e-3, rtol=0)


@halves
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_head_dims(head_dim, dtype):
    """All policies, whatever the size of a head, with logits as large as half precision has them."""
    for name in ("a2sf", "keyformer", "zipcache", "gemfilter-a2sf", "keyformer-kivi"):
        policy, budget = POLICIES[name]
        read_and_generate(steep(dtype, head_dim), [30, 9], policy, budget, more=3)


@policies
def test_keys_beyond_float16_are_packed_as_what_fits(policy, budget):
    """Keys of 1e6 in bfloat16, beyond what parameters in float16 reach: nothing overflows to infinity."""
    read_and_generate(steep(torch.bfloat16, logit=1e11), [40, 17], policy, budget)


# -- scores that tell nothing ------------------------------------------------------------------------------------------


@policies
def test_equal_logits(policy, budget):
    """A model whose queries are all zero attends to everything alike."""
    read_and_generate(steep(torch.float32, logit=0.0), [40, 17], policy, budget)


RECENT = [TOVA(BUDGET), TOVA(BUDGET, sinks=3), SnapKV(BUDGET, window=4, sinks=3), StreamingLLM(BUDGET)]


@pytest.mark.parametrize("policy", RECENT, ids=str)
def test_of_equal_scores_the_most_recent_win(policy):
    """What TOVA and SnapKV make of a model that attends to everything alike is StreamingLLM."""
    model = steep(torch.float32, logit=0.0)
    pruned = PrunedCache(model, policy)
    feed(model, left_padded([40]), pruned, [40])
    expected = [*range(policy.sinks), *range(40 - BUDGET + policy.sinks, 40)]
    assert [kept(pruned, layer) for layer in pruned.pruned_layers] == [[expected] * 2] * 2


@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize("name", ["torch", "auto"])
def test_a_row_of_logits_that_are_all_minus_infinity_weighs_nothing(name, group):
    """A query to which every key is hidden leaves the mass as it is without that query."""
    queries, keys = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    placed = torch.arange(6)[None]
    settings = {"group": group, "key_positions": placed.expand(1, 2, 6), "kernels": choose(name, keys.device)}
    nothing = placed.masked_fill(placed == 3, -1)
    mass = attention_mass(queries, keys, RowWeights.uniform(6), Scoring(1.0), query_positions=nothing, **settings)
    others = RowWeights.explicit(torch.tensor([0, 1, 2, 4, 5]), torch.ones(5))
    expected = attention_mass(queries, keys, others, Scoring(1.0), query_positions=placed, **settings)
    torch.testing.assert_close(mass, expected)


@policies
def test_a_model_whose_numbers_are_none_loses_no_count(policy, budget):
    """Where weights are NaN, as in a broken checkpoint, nothing raises, and sizes are what they would be."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.fill_(math.nan)
    pruned = PrunedCache(model, policy)
    for fed, _ in enumerate(stepwise(model, left_padded([46, 26]), pruned, [40] + [1] * 6)):
        assert_kept(pruned, [40, 20], fed, budget)


# -- almost nothing ----------------------------------------------------------------------------------------------------


@policies
@mostly("lengths", [[1], [1, 1], [1, 30], [30, 1]], "[1]", "[1, 30]")
def test_prompts_of_one_token(policy, budget, lengths):
    read_and_generate(shared(), lengths, policy, budget, more=16)


@policies
def test_a_sequence_without_any_token(policy, budget):
    """An empty prompt in a batch, all padding: it begins with the first generated token, and disturbs nobody."""
    model, more = double(), 14
    batch = left_padded([20 + more, more], width=20 + more)
    together, alone = PrunedCache(model, policy), PrunedCache(model, policy)
    apart = stepwise(model, sequence(batch, 0), alone, [20] + [1] * more)
    for fed, logits in enumerate(stepwise(model, batch, together, [20] + [1] * more)):
        assert logits.isfinite().all()
        assert_kept(together, [20, 0], fed, budget)
        torch.testing.assert_close(logits[0, -1], next(apart)[0, -1], atol=1e-4, rtol=1e-4)


@policies
def test_a_turn_that_brings_nothing_new(policy, budget):
    """generate() with a cache that has seen all of its input would read it once more: refused, and nothing changes."""
    model, batch = shared(), left_padded([30])
    pruned = PrunedCache(model, policy)
    feed(model, batch, pruned, [30])
    if pruned.prompt_filter is None or CACHE_ARGUMENT != "cache":  # transformers 5.17 gives a mask that is refused
        with pytest.raises(CacheError, match="begin with what the cache has seen"):
            generate(model, batch, 5, **cache_argument(pruned))
        assert pruned.seen_tokens == 30
        return
    ids = generate(model, batch, 5, **cache_argument(pruned))
    assert ids.shape == (1, 35)
    assert pruned.seen_tokens == 64
    assert_kept(pruned, [30], 4, budget)  # a filter has chosen from the second reading as well


@policies
def test_steps_of_no_tokens_change_nothing(policy, budget):
    """No new tokens are refused, in generate() and in a forward pass; the cache goes on as if nobody asked."""
    model, batch = shared(), left_padded([36, 26])
    caches = [PrunedCache(model, policy) for _ in range(2)]
    for pruned in caches:
        feed(model, batch, pruned, [30])
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, {"input_ids": batch["input_ids"][:, :30]}, 0, **cache_argument(caches[0]))
    with pytest.raises(CacheError, match="no new tokens"):
        model(token_ids(2, 0), **cache_argument(caches[0]))
    logits, expected = (feed(model, batch, pruned, [1] * 6, begin=30) for pruned in caches)
    assert torch.equal(logits, expected)
    assert_kept(caches[0], [30, 20], 6, budget)


@policies
def test_sequences_that_finish_early(policy, budget):
    """What follows the end of a sequence is padding: until there, each is what it is alone, and the rest goes on."""
    model, new = double(), 14
    batch = left_padded([25, 14, 9], seed=2)
    endless = generate(model, batch, new, **cache_argument(PrunedCache(model, policy)))[:, 25:]
    ends = [int(endless[0, 4]), int(endless[1, 12])]
    settings = {"eos_token_id": ends, "pad_token_id": PAD, "min_new_tokens": 0}
    pruned = PrunedCache(model, policy)
    together = generate(model, batch, new, **cache_argument(pruned), **settings)[:, 25:]
    lengths = []
    for row in range(3):
        one = sequence(batch, row)
        ids = generate(model, one, new, **cache_argument(PrunedCache(model, policy)), **settings)
        alone = ids[0, one["input_ids"].shape[1] :]
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == PAD).all()
        lengths.append(len(alone))
    assert len(set(lengths)) > 1
    assert_kept(pruned, [25, 14, 9], together.shape[1] - 1, budget)
