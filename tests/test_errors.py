"""Every mistake raises the right error, which says what to write instead, and leaves cache and model as they were."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any

import pytest
import torch
import transformers
from families import assert_same_rows, build, feed, generate, left_padded, shared, token_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import kvprune
from kvprune import (
    BudgetError,
    CacheError,
    Chain,
    Decision,
    KVPruneError,
    Policy,
    PolicyError,
    PrunedCache,
    RowWeights,
    Step,
    TokenTable,
    UnsupportedModelError,
)
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, H2O, KIVI, TOVA, Full, Keyformer, SnapKV, StreamingLLM, ZipCache, parse
from kvprune.table.quantize import Codec
from kvprune.table.rotated_rows import RotatedCodec

EVICTING = [A2SF, H2O, Keyformer, SnapKV, TOVA, StreamingLLM]
POLICY = A2SF(12, sinks=2, recent=3)

evicting = pytest.mark.parametrize("policy", EVICTING, ids=lambda policy: policy.__name__)


# -- settings ----------------------------------------------------------------------------------------------------------


@evicting
@pytest.mark.parametrize("budget", [0, -1, 1.5, 0.0, math.nan, math.inf, None, True, "12 parsecs", "", "-1MiB", [64]])
def test_budgets_without_meaning(policy, budget):
    """A policy refuses a budget that is no positive amount, and names all three ways to write one."""
    with pytest.raises(BudgetError, match=r"0\.25.*1024.*512MiB"):
        policy(budget)


@evicting
@given(sinks=st.integers(0, 6), recent=st.one_of(st.integers(0, 20), st.floats(0, 0.9)))
def test_budgets_that_hold_less_than_is_always_kept(policy, sinks, recent):
    """A number of tokens below sinks + recent is refused with the least that works; that one is taken."""

    def needed(budget: int) -> int:
        return sinks + (math.ceil(recent * budget - 1e-9) if isinstance(recent, float) else recent)

    least = next(budget for budget in range(1, 200) if needed(budget) <= budget)
    for budget in range(1, least):
        with pytest.raises(BudgetError, match=rf"at least {least}\b"):
            policy(budget, sinks=sinks, recent=recent)
    assert policy(least, sinks=sinks, recent=recent).budget == least


@pytest.mark.parametrize(
    ("policy", "least"), [(A2SF, 36), (H2O, 36), (Keyformer, 1), (SnapKV, 36), (TOVA, 1), (StreamingLLM, 5)]
)
def test_the_least_budget_of_the_defaults(policy, least):
    """With default settings, sinks and recent window set the least number of tokens."""
    assert policy(least).budget == least
    if least > 1:
        with pytest.raises(BudgetError, match=rf"at least {least}\b"):
            policy(least - 1)


@evicting
@pytest.mark.parametrize("recent", [-0.1, 1.5, math.nan, math.inf, 1.0])
def test_shares_that_are_none(policy, recent):
    """A recent window that is a float is a share of the budget, and leaves room for the sinks."""
    with pytest.raises(PolicyError, match="float from 0 to 1, or an int"):
        policy(0.5, sinks=4, recent=recent)


def test_a_recent_window_may_be_the_whole_budget():
    """Without sinks, all of the budget may be recent tokens."""
    assert A2SF(10, sinks=0, recent=1.0).recent_tokens(10) == 10


WRONG_COUNTS = [-1, True, "4", 1.5, None, math.nan]
EVERY_POLICY = [
    *[("sinks", value) for value in WRONG_COUNTS],
    *[("recent", value) for value in (-1, True, "4", [4])],
    *[("kernel_size", value) for value in (0, *WRONG_COUNTS)],
    *[("interval", value) for value in (0, -1, True, "4", 1.5)],
]


@evicting
@pytest.mark.parametrize(("name", "value"), EVERY_POLICY)
def test_counts_that_are_none(policy, name, value):
    """Settings that count tokens take ints; the message names the setting and shows the value."""
    with pytest.raises(PolicyError, match=rf"{name}.*{re.escape(repr(value))}"):
        policy(0.5, **{name: value})


@evicting
@pytest.mark.parametrize("kernel_size", [2, 4, 10])
def test_even_kernels(policy, kernel_size):
    """A kernel without a middle is refused, and the next odd size is offered."""
    with pytest.raises(PolicyError, match=f"write {kernel_size + 1}"):
        policy(0.5, kernel_size=kernel_size)


@evicting
@pytest.mark.parametrize(("ahead", "words"), [(5, "kernel_size=6 or more"), (-1, "ahead must"), (1.5, "ahead must")])
def test_kernels_that_reach_too_far(policy, ahead, words):
    """A kernel holds what is ahead and the row itself."""
    with pytest.raises(PolicyError, match=words):
        policy(0.5, kernel_size=5, ahead=ahead)


@evicting
@pytest.mark.parametrize("group", ["sum", "Mean", "", None, 1])
def test_groups_that_are_none(policy, group):
    """Query heads of a KV head are reduced by mean or max."""
    with pytest.raises(PolicyError, match='"mean" or "max"'):
        policy(0.5, group=group)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        *[(lambda value=value: A2SF(0.5, forgetting_factor=value), "forgetting_factor") for value in (-0.1, 1.01)],
        *[(lambda value=value: A2SF(0.5, forgetting_factor=value), "forgetting_factor") for value in (math.nan, "0.9")],
        *[(lambda value=value: A2SF(0.5, epsilon=value), "epsilon") for value in (-1e-4, 2, None, True)],
        *[(lambda value=value: SnapKV(0.5, window=value), "window") for value in (0, -1, 1.5, True, None)],
        *[(lambda value=value: SnapKV(0.5, pooling=value), "pooling") for value in ("sum", None)],
        *[(lambda value=value: Keyformer(0.5, tau_init=value), "tau_init") for value in (0, -1.0, math.nan, "1", True)],
        *[(lambda value=value: Keyformer(0.5, tau_end=value), "tau_end") for value in (0, math.inf, None)],
        *[(lambda value=value: Keyformer(0.5, noise=value), "noise") for value in (-0.1, math.nan, "1", False)],
        *[
            (lambda value=value: Keyformer(generation_length=value), "generation_length")
            for value in (0, -1, 1.5, None)
        ],
        *[
            (lambda value=value: Keyformer(0.5, frozen_keys=value), "frozen_keys")
            for value in ("yes", "false", 1, None)
        ],
    ],
)
def test_settings_of_one_policy(make, named):
    """Each policy checks its own settings, and names the one that is wrong."""
    with pytest.raises(PolicyError, match=named):
        make()


@pytest.mark.parametrize("make", [ZipCache, KIVI], ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("bits", [0, 1, 5, 16, -4, 4.0, True, None, "4", [4]], ids=repr)
def test_bits_that_are_none(make, bits):
    """Codes have 2, 3, 4 or 8 bits; the message shows what was given instead."""
    for name in ("high_bits", "low_bits") if make is ZipCache else ("bits",):
        with pytest.raises(PolicyError, match=rf"{name}={re.escape(repr(bits))}.*choose 2, 3, 4 or 8"):
            make(**{name: bits})


WRONG_SHARES = [-0.1, 1.5, math.nan, math.inf, "0.5", True, None]
PACKING = [
    *[(ZipCache, name, value, "from 0 to 1") for name in ("salient", "probe_recent", "probe_random")
      for value in WRONG_SHARES],
    *[(ZipCache, name, value, "at least 1") for name in ("buffer", "group_size") for value in (0, -1, 1.5, "8", True)],
    *[(ZipCache, "kernel_size", value, "at least 1") for value in (0, -1, 1.5, None)],
    *[(ZipCache, "kernel_size", value, f"write {value + 1}") for value in (2, 4)],
    *[(ZipCache, "normalizer", value, '"probes" or "official"') for value in ("sum", "", None, 1)],
    *[(ZipCache, "group", value, '"mean" or "max"') for value in ("sum", "", None, 1)],
    *[(ZipCache, "seed", value, "at least 0") for value in (-1, 1.5, None)],
    *[(KIVI, "group_size", value, "at least 1") for value in (0, -1, 1.5, "8", None)],
    *[(KIVI, "residual", value, "at least 0") for value in (-1, 1.5, "8", None)],
]  # fmt: skip


@pytest.mark.parametrize(("policy", "name", "value", "instead"), PACKING)
def test_settings_of_policies_that_pack(policy, name, value, instead):
    """Every setting is checked when a policy is made; the message names it, shows the value and says what it takes."""
    with pytest.raises(PolicyError, match=rf"{name}.*{instead}") as error:
        policy(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("high", "low"), [(2, 4), (3, 8), (4, 8), (2, 3)])
def test_low_bits_above_the_high_ones(high, low):
    """Salient tokens get the high bits: the other way round is refused, and as many for all is fine."""
    with pytest.raises(PolicyError, match=f"high_bits={high} is below low_bits={low}.*exchange them"):
        ZipCache(high_bits=high, low_bits=low)
    assert ZipCache(high_bits=low, low_bits=low).low_bits == low


@evicting
def test_settings_cannot_be_changed_afterwards(policy):
    """A policy is a value: what was checked when it was made stays so."""
    made = policy(0.5)
    with pytest.raises(FrozenInstanceError):
        made.budget = 0.1
    assert made == policy(0.5)
    assert hash(made) == hash(policy(0.5))


@pytest.mark.parametrize(
    "decision",
    [
        {},
        {"keep": torch.zeros(1, 1, 1), "evict": torch.zeros(1, 1, 1)},
        {"keep": torch.zeros(1, 1, 1), "evict": torch.zeros(1, 1, 1), "quantize": ()},
        {"evict": torch.zeros(1, 1, 1), "quantize": ()},
    ],
)
def test_a_decision_is_one_of_three(decision):
    """A decision names the slots to keep, those to evict, or those to quantize; to evict none beside others."""
    with pytest.raises(PolicyError, match="one of"):
        Decision(**decision)


@dataclass(frozen=True)
class Says(Policy):
    """Decides, or weighs, whatever it was told to."""

    decision: Callable[[TokenTable], Any] = lambda table: None
    weights: Any = None

    def row_weights(self, step: Step) -> Any:
        return self.weights

    def decide(self, table: TokenTable, step: Step) -> Any:
        return self.decision(table)


@pytest.mark.parametrize(
    ("decision", "told"),
    [
        (lambda table: Decision(keep=table.positions % 2 == 0), "torch.bool"),
        (lambda table: Decision(keep=table.positions), "torch.int32"),
        (lambda table: Decision(keep=torch.arange(3)), r"\[3\]"),
        (lambda table: Decision(evict=[0, 1]), r"\[0, 1\]"),
        (lambda table: Decision(keep=torch.zeros(1, 1, 2).long()), r"\[1, 2\] sequences and KV heads"),
        (lambda table: Decision(keep=torch.zeros(1, 2, 2).long()), "at most once"),
        (lambda table: Decision(evict=torch.zeros(1, 2, 2).long()), "at most once"),
        (lambda table: Decision(keep=torch.full((1, 2, 1), 20)), "from 0 to 19"),
        (lambda table: Decision(keep=torch.full((1, 2, 1), -2)), "from 0 to 19"),
        (lambda table: table.positions, "return a Decision"),
        (lambda table: table["score"], "declare it in columns"),
    ],
)
def test_decisions_that_name_no_slots(decision, told):
    """A mask for slots, slots twice or out of range, or of another shape: nothing is kept by accident."""
    cache = PrunedCache(shared(), Says(decision))
    with pytest.raises(PolicyError, match=told):
        feed(shared(), left_padded([20]), cache, [20])


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (RotatedCodec(4), RotatedCodec(4), "gains none"),
        (RotatedCodec(2), RotatedCodec(3), "gains none"),
        (RotatedCodec(4, value_bits=2), RotatedCodec(2, value_bits=3), "gains none"),
        (Codec(4), RotatedCodec(2), "share nothing"),
        (RotatedCodec(4), Codec(2), "share nothing"),
        (RotatedCodec(4, value_bits=2), RotatedCodec(2), ""),
        (RotatedCodec(8), RotatedCodec(3), ""),
    ],
    ids=str,
)
def test_packed_rows_can_but_lose_bits(before, after, told):
    """And only where no other row depends on what they are packed with."""
    keys, values = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    table = TokenTable(keys, values, torch.arange(10).expand(1, 2, -1), {})
    table.quantize([(before, torch.arange(2, 6).expand(1, 2, -1))])
    decision = Decision(quantize=((after, torch.tensor([[[1, 6], [-1, 7]]])),))  # slots 0 to 3 are packed
    if not told:
        decision.check(table)
        table.quantize(decision.quantize)
        assert sorted(tier.codec.bits for tier in table.packed) == [after.bits, before.bits]
        return
    with pytest.raises(PolicyError, match=told):
        decision.check(table)


@pytest.mark.parametrize(
    "decision",
    [
        Decision(quantize=((Codec(2), torch.tensor([[[0]]])), (Codec(4), torch.tensor([[[0]]])))),
        Decision(keep=torch.tensor([[[0, 2]]]), quantize=((Codec(2), torch.tensor([[[1]]])),)),
    ],
)
def test_a_row_is_packed_once_and_stays(decision):
    """By one codec, and none is packed that goes."""
    table = TokenTable(torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), torch.arange(4).expand(1, 1, -1), {})
    with pytest.raises(PolicyError, match="by one codec, and those alone that it keeps"):
        decision.check(table)


def test_slots_that_are_empty_or_in_any_order_are_slots():
    keep = torch.tensor([[[3, 1, -1, -1], [19, 0, 2, -1]]])
    cache = PrunedCache(shared(), Says(lambda table: Decision(keep=keep)))
    feed(shared(), left_padded([20]), cache, [20])
    assert cache.kept_positions(0).tolist() == [[[-1, 1, 3], [0, 2, 19]]]


@pytest.mark.parametrize(
    ("decision", "told"),
    [
        (Decision(keep=torch.full((1, 2, 1), 1000)), "from 0 to 20"),
        (Decision(evict=torch.full((1, 2, 1), 21)), "from 0 to 20"),
        (Decision(keep=torch.zeros(1, 2, 2).long()), "at most once"),
        (Decision(evict=torch.zeros(1, 2, 2).long()), "at most once"),
        (Decision(evict=torch.zeros(1, 3, 1).long()), r"\[1, 3\]"),
        (Decision(quantize=((4, torch.zeros(1, 2, 1).long()),)), r"Codec\(bits=4\)"),
        ([0], "return a Decision"),
    ],
)
def test_decisions_about_a_generated_token_that_name_no_slots(decision, told):
    """No other row goes in the place of one that is not there, and none goes twice."""
    cache = PrunedCache(shared(), Says(lambda table: None if table.length == 20 else decision))
    with pytest.raises(PolicyError, match=told):
        feed(shared(), left_padded([21]), cache, [20, 1])


@pytest.mark.parametrize(
    "weights",
    [
        1.0,
        torch.ones(20),
        RowWeights(1.5),
        RowWeights(-1),
        RowWeights(torch.ones(20)),
        RowWeights(2, rows=torch.ones(2)),
    ],
)
def test_weights_that_are_none(weights):
    with pytest.raises(PolicyError, match="return RowWeights"):
        feed(shared(), left_padded([20]), PrunedCache(shared(), Says(weights=weights)), [20])


@pytest.mark.parametrize("columns", [None, ["score"], {"score": "float32"}, {1: torch.float32}], ids=str)
def test_columns_that_are_none(columns):
    """What a policy wants to remember is looked at where a cache is made of it."""
    declared = dataclass(frozen=True)(type("Declares", (Policy,), {"columns": lambda self: columns}))
    with pytest.raises(PolicyError, match=r"columns\(\) of Declares.* returned"):
        PrunedCache(shared(), declared())


@pytest.mark.parametrize("content", [torch.zeros(3), torch.zeros(2, 2, 20), "a"], ids=str)
def test_what_fits_no_column(content):
    @dataclass(frozen=True)
    class Writes(Policy):
        def columns(self):
            return {"score": torch.float32}

        def observe(self, table, step):
            table["score"] = content

    for policy in (Writes(), Full() | Writes()):
        with pytest.raises(PolicyError, match=r"'.*score' takes a tensor .*\[1, 2, 20\]"):
            feed(shared(), left_padded([20]), PrunedCache(shared(), policy), [20])


@dataclass(frozen=True)
class Forgetful(Policy):
    """Uses attention mass without having asked for rows."""

    def observe(self, table, step: Step) -> None:
        step.mass.sum()


def test_mass_that_was_not_asked_for():
    """A policy that uses the mass of no rows is told where to ask for them."""
    with pytest.raises(PolicyError, match=r"row_weights\(\)"):
        feed(shared(), left_padded([10]), PrunedCache(shared(), Forgetful()), [10])


# -- what is no policy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, 0.25, A2SF, ["a2sf"], {"budget": 0.5}, ...], ids=repr)
def test_what_is_no_policy(policy):
    """A cache takes a policy, a chain or a name, and leaves a model alone that it was made for in vain."""
    model = build("llama")
    attention = model.config._attn_implementation
    with pytest.raises(PolicyError, match="A2SF"):
        PrunedCache(model, policy)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("links", [(), ("a2sf",), (None, A2SF(0.5))], ids=repr)
def test_a_chain_is_made_of_policies(links):
    with pytest.raises(PolicyError, match="chain"):
        Chain(links)


TWO_PACK = "{} and {} cannot both quantize the cache.*Keep one of them"
LATE = r"{0} \| {1} would quantize tokens that {1} is about to drop.*write {1}\(\.\.\.\) \| {0}\(\.\.\.\)"
REFUSED = [
    (lambda: ZipCache() | KIVI(), TWO_PACK.format("ZipCache", "KIVI")),
    (lambda: KIVI() | ZipCache(), TWO_PACK.format("KIVI", "ZipCache")),
    (lambda: A2SF(0.5) | (ZipCache() | Full() | ZipCache(0.4)), TWO_PACK.format("ZipCache", "ZipCache")),
    (lambda: ZipCache() | A2SF(0.5), LATE.format("ZipCache", "A2SF")),
    (lambda: KIVI() | Full() | H2O(0.5), LATE.format("KIVI", "H2O")),
    (lambda: (A2SF(0.5) | KIVI()) | (Full() | TOVA(0.2)), LATE.format("KIVI", "TOVA")),
    (lambda: Chain((ZipCache(), Keyformer(0.5))), LATE.format("ZipCache", "Keyformer")),
    (lambda: parse("zipcache | kivi"), TWO_PACK.format("ZipCache", "KIVI")),
    (lambda: parse("zipcache:salient=0.4 | a2sf:budget=0.5"), LATE.format("ZipCache", "A2SF")),
    (lambda: parse("h2o:budget=0.5 | kivi:bits=4 | snapkv:budget=0.2"), LATE.format("KIVI", "SnapKV")),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_orders_without_meaning(make, reason):
    """Tokens are dropped before others are packed, and packed once: any other order is refused, and says why."""
    with pytest.raises(PolicyError, match=reason):
        make()


@pytest.mark.parametrize(
    "chain",
    [
        A2SF(0.5) | ZipCache(),
        Keyformer(0.5) | KIVI(4),
        A2SF(0.5) | SnapKV(0.3, window=8) | ZipCache(),
        KIVI() | Full(),
        Full() | ZipCache() | Full(),
    ],
    ids=str,
)
def test_orders_with_a_meaning(chain):
    """Links that drop come first; those that keep everything may stand anywhere."""
    assert chain.codecs
    assert chain.evicts == any(link.evicts for link in chain.links)
    assert chain.buffer == sum(link.buffer for link in chain.links)


@pytest.mark.parametrize(
    ("name", "meant"), [("a2fs", "a2sf"), ("snap_kv", "snapkv"), ("streamingllm", "streaming_llm"), ("h20", "h2o")]
)
def test_names_that_are_almost_right(name, meant):
    """A name that is not known is answered with the nearest one and with all of them."""
    model = build("llama")
    attention = model.config._attn_implementation
    with pytest.raises(PolicyError, match=f"Did you mean '{meant}'.*tova"):
        PrunedCache(model, name)
    assert model.config._attn_implementation == attention


# -- what is no model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", [None, "gpt2", ..., transformers.LlamaConfig(), torch.nn.Linear(2, 2), PrunedCache], ids=repr
)
def test_what_is_no_model(model):
    """A cache is made for a transformers language model, and only such a one has an attention to get back."""
    for use in (lambda: PrunedCache(model, POLICY), lambda: kvprune.restore(model)):
        with pytest.raises(UnsupportedModelError, match="transformers causal language model"):
            use()


TINY = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
LATENT = {
    **TINY,
    **{"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 2, "num_experts_per_tok": 1},
    **{"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
SHARED = {
    **TINY,
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"] * 2},
    **{"sliding_window": 8, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 97},
}
UNSUPPORTED = {
    "T5ForConditionalGeneration": (
        "encoder-decoder",
        lambda: transformers.T5Config(
            **{**TINY, "eos_token_id": 1, "decoder_start_token_id": 0},
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
        ),
    ),
    "BloomForCausalLM": ("registry", lambda: transformers.BloomConfig(**TINY, hidden_size=16, n_layer=1, n_head=2)),
    "MptForCausalLM": ("registry", lambda: transformers.MptConfig(**TINY, d_model=16, n_layers=1, n_heads=2)),
    "FalconForCausalLM": (
        "registry",
        lambda: transformers.FalconConfig(**TINY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
    ),
    "DeepseekV2ForCausalLM": ("latent attention", lambda: transformers.DeepseekV2Config(**LATENT)),
    "DeepseekV3ForCausalLM": ("latent attention", lambda: transformers.DeepseekV3Config(**LATENT)),
    "Gemma3nForCausalLM": (
        "cache of other layers",
        lambda: transformers.Gemma3nTextConfig(**SHARED, laurel_rank=2, activation_sparsity_pattern=[0.0] * 4),
    ),
    "Gemma4ForCausalLM": (
        "cache of other layers",
        lambda: transformers.Gemma4TextConfig(**SHARED, global_head_dim=8),
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_that_cannot_be_pruned(name):
    """Models that kvprune cannot serve are named, with the reason, and generate afterwards what they did before."""
    reason, config = UNSUPPORTED[name]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = getattr(transformers, name)(config()).eval()
    attention = model.config._attn_implementation
    prompt = {"input_ids": token_ids(1, 8), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    before = generate(model, prompt, 4)
    with pytest.raises(UnsupportedModelError, match=rf"(?=.*{name})(?=.*{reason})"):
        PrunedCache(model, POLICY)
    assert model.config._attn_implementation == attention
    assert torch.equal(generate(model, prompt, 4), before)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_encoders(kind):
    """Their attention looks ahead, which a cache cannot; as a decoder, the same model is served."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = getattr(transformers, kind)(transformers.BertConfig(**TINY, **shape)).eval()
    with pytest.raises(UnsupportedModelError, match="not causal"):
        encoder(token_ids(1, 8), **cache_argument(PrunedCache(encoder, POLICY)), use_cache=True)
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**TINY, **shape, is_decoder=True)).eval()
    with torch.no_grad():
        expected = decoder(token_ids(1, 8)).logits
        logits = decoder(token_ids(1, 8), **cache_argument(PrunedCache(decoder, POLICY)), use_cache=True).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_models_that_attend_twice():
    """DiffLlama attends twice to the same keys, with other values."""
    model = transformers.DiffLlamaForCausalLM(
        transformers.DiffLlamaConfig(
            **TINY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    ).eval()
    with pytest.raises(UnsupportedModelError, match="more than once"), torch.no_grad():
        model(token_ids(1, 8), **cache_argument(PrunedCache(model, POLICY)))


def test_models_without_attention():
    """A state-space model has no cache of keys and values to prune, and is refused like the others."""
    config = transformers.MambaConfig(**TINY, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        PrunedCache(transformers.MambaForCausalLM(config), POLICY)


# -- a cache in the wrong place ----------------------------------------------------------------------------------------


class Twin:
    """Two caches with the same tokens, of which one is about to be misused."""

    def __init__(self, family: str, *, lengths: tuple[int, ...] = (40,), policy: Policy = POLICY) -> None:
        self.model, self.begin = build(family), max(lengths) - 10
        self.batch = left_padded(lengths)
        self.misused, self.untouched = (PrunedCache(self.model, policy) for _ in range(2))
        self.expected = generate(self.model, self.batch, 5)
        for cache in (self.misused, self.untouched):
            feed(self.model, self.batch, cache, [self.begin])

    def assert_goes_on(self) -> None:
        """The misused cache does what the other does, and the model generates without a cache what it did before."""
        after = [
            feed(self.model, self.batch, cache, [1, 1, 4, 1], begin=self.begin)
            for cache in (self.misused, self.untouched)
        ]
        torch.testing.assert_close(*after, atol=0, rtol=0)
        assert self.misused.seen_tokens == self.untouched.seen_tokens
        for row in range(len(self.expected)):
            assert_same_rows(self.misused, self.untouched, row, row)
        assert torch.equal(generate(self.model, self.batch, 5), self.expected)


FAMILIES = ["llama", "qwen3-hybrid", "gemma3"]
each_family = pytest.mark.parametrize("family", FAMILIES)


def another(family: str, *, met: bool, **overrides: Any) -> PreTrainedModel:
    """A model of the same shape with other weights, which kvprune knows or has never met."""
    model = build(family, seed=1, **overrides)
    if met:
        PrunedCache(model, Full())
    return model


@each_family
@pytest.mark.parametrize("met", [False, True], ids=["never met", "met"])
def test_a_cache_given_to_another_model(family, met):
    """A model with as many layers and heads cannot use the cache of another, whether kvprune knows it or not."""
    twin = Twin(family)
    other = another(family, met=met)
    expected = generate(other, twin.batch, 5)
    with pytest.raises(CacheError, match=r"made for .*ForCausalLM.*Make a new PrunedCache"):
        feed(other, twin.batch, twin.misused, [1], begin=twin.begin)
    twin.assert_goes_on()
    assert torch.equal(generate(other, twin.batch, 5), expected)


@pytest.mark.parametrize("met", [False, True], ids=["never met", "met"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_cache_given_to_another_model_generates_nothing(met, layers):
    """generate() ends in CacheError too, however many layers the other model has."""
    twin = Twin("llama")
    other = another("llama", met=met, num_hidden_layers=layers)
    with pytest.raises(CacheError, match="Make a new PrunedCache"):
        generate(other, twin.batch, 5, **cache_argument(twin.misused))
    twin.assert_goes_on()


@pytest.mark.parametrize("met", [False, True], ids=["never met", "met"])
def test_an_empty_cache_given_to_another_model(met):
    """A cache that has seen nothing is refused to another model as well, and then serves its own."""
    model, other = build("llama"), another("llama", met=met)
    cache, batch = PrunedCache(model, POLICY), left_padded([30, 20])
    with pytest.raises(CacheError, match="Make a new PrunedCache"):
        generate(other, batch, 5, **cache_argument(cache))
    assert cache.seen_tokens == 0
    assert cache.nbytes == 0
    expected = generate(model, batch, 5, **cache_argument(PrunedCache(model, POLICY)))
    assert torch.equal(generate(model, batch, 5, **cache_argument(cache)), expected)


@each_family
@pytest.mark.parametrize("tokens", [1, 4])
def test_another_batch_size(family, tokens):
    """Tokens of another batch size are refused, with both sizes."""
    twin = Twin(family)
    three = {name: tensor.expand(3, -1) for name, tensor in twin.batch.items()}
    with pytest.raises(CacheError, match=r"batch of 1.*batch of 3.*reset\(\)"):
        feed(twin.model, three, twin.misused, [tokens], begin=twin.begin)
    twin.assert_goes_on()


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("mask", ["float", "bool"])
def test_masks_of_four_dimensions(tokens, mask):
    """A mask of one's own, over the logical length, cannot be laid over rows that were kept."""
    twin = Twin("llama", lengths=(40, 30))
    length = twin.begin + tokens
    full = torch.zeros(2, 1, tokens, length) if mask == "float" else torch.ones(2, 1, tokens, length, dtype=torch.bool)
    with pytest.raises(CacheError, match=r"\(2, 1, .*padding mask"), torch.no_grad():
        twin.model(token_ids(2, tokens), attention_mask=full, **cache_argument(twin.misused))
    twin.assert_goes_on()


@pytest.mark.parametrize("columns", [1, 3])
def test_masks_that_are_too_short(columns):
    """A padding mask covers at least the new tokens."""
    twin = Twin("llama")
    with pytest.raises(CacheError, match="covers the 4 new tokens"), torch.no_grad():
        twin.model(token_ids(1, 4), attention_mask=torch.ones(1, columns), **cache_argument(twin.misused))
    twin.assert_goes_on()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1)])
def test_masks_of_other_sequences(family, shape):
    """A mask that hides anything has a row for every sequence, at a first step as at later ones, and two dimensions."""
    model = shared(family)
    batch, cache = left_padded([20, 16]), PrunedCache(model, Full())
    wrong = torch.zeros(*shape, 20)
    with pytest.raises(CacheError, match="attention mask has"), torch.no_grad():
        model(batch["input_ids"], attention_mask=wrong, **cache_argument(cache))
    expected = feed(model, batch, PrunedCache(model, Full()), [20])
    torch.testing.assert_close(feed(model, batch, cache, [20]), expected)
    with pytest.raises(CacheError, match="attention mask has"), torch.no_grad():
        model(token_ids(2, 3), attention_mask=torch.zeros(*shape, 23), **cache_argument(cache))
    assert cache.seen_tokens == 20


@each_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_attention_that_was_set_after_the_cache_was_made(family, implementation):
    """A model that was switched to another attention says so; a new cache switches it back, and the old one goes on."""
    twin = Twin(family)
    twin.model.set_attn_implementation(implementation)
    assert torch.equal(generate(twin.model, twin.batch, 5), twin.expected)
    with pytest.raises(CacheError, match=r"set_attn_implementation\(\)"):
        feed(twin.model, twin.batch, twin.misused, [1], begin=twin.begin)
    PrunedCache(twin.model, POLICY)
    if implementation == "sdpa":
        twin.assert_goes_on()


@pytest.mark.parametrize("layer", [-1, 2, 99])
def test_layers_that_are_not_there(layer):
    """kept_positions names the layers that are pruned."""
    cache = PrunedCache(shared(), POLICY)
    with pytest.raises(CacheError, match=r"\[0, 1\]"):
        cache.kept_positions(layer)


def test_layers_that_are_not_pruned():
    """A layer with a sliding window keeps what transformers keeps, and has no kept positions to show."""
    cache = PrunedCache(shared("qwen3-hybrid"), POLICY)
    feed(shared("qwen3-hybrid"), left_padded([30]), cache, [30])
    assert cache.kept_positions(2).shape[2] == 12
    with pytest.raises(CacheError, match=r"\[0, 2\]"):
        cache.kept_positions(1)


def test_masks_that_are_not_causal():
    """A forward pass that wants a bidirectional mask is refused: a pruned cache can only attend causally."""
    from transformers.masking_utils import create_causal_mask

    model = shared()
    cache = PrunedCache(model, POLICY)
    with pytest.raises(UnsupportedModelError, match="DynamicCache"):
        create_causal_mask(
            config=model.config,
            inputs_embeds=torch.zeros(1, 4, 32),
            attention_mask=None,
            **cache_argument(cache),
            or_mask_function=lambda batch, head, query, key: key >= 0,
        )


# -- a forward pass that ends early ------------------------------------------------------------------------------------


class InterruptionError(Exception):
    """Out of memory, Ctrl-C, a hook of somebody's."""


def interrupt(model: PreTrainedModel, layer: int, run: Callable[[], Tensor]) -> None:
    """Run until the attention of a layer has run, and no further."""

    def stop(*_: Any) -> None:
        raise InterruptionError

    handle = model.model.layers[layer].mlp.register_forward_hook(stop)
    try:
        with pytest.raises(InterruptionError):
            run()
    finally:
        handle.remove()


@each_family
@pytest.mark.parametrize("tokens", [1, 4])
def test_an_interrupted_forward_pass_is_not_forgotten(family, tokens):
    """After a pass that reached only some layers, a cache refuses to go on, or does so as if it had not been."""
    twin = Twin(family)
    interrupt(twin.model, 0, lambda: feed(twin.model, twin.batch, twin.misused, [tokens], begin=twin.begin))
    for _ in range(2):
        fork = twin.untouched.fork()
        try:
            logits = feed(twin.model, twin.batch, twin.misused, [1], begin=twin.begin)
        except CacheError as error:
            assert "reset()" in str(error) or "new PrunedCache" in str(error)  # noqa: PT017  either will do
        else:
            torch.testing.assert_close(logits, feed(twin.model, twin.batch, fork, [1], begin=twin.begin))
            break


def test_after_an_interrupted_prompt_the_cache_can_be_reset():
    """reset() makes a new cache of one that was left in the middle of a forward pass."""
    model, batch = build("llama"), left_padded([30, 20])
    expected = generate(model, batch, 5, **cache_argument(PrunedCache(model, POLICY)))
    cache = PrunedCache(model, POLICY)
    interrupt(model, 0, lambda: generate(model, batch, 5, **cache_argument(cache)))
    cache.reset()
    assert cache.nbytes == 0
    assert torch.equal(generate(model, batch, 5, **cache_argument(cache)), expected)


def test_a_prompt_that_the_bytes_cannot_hold_leaves_the_cache_empty():
    """A budget in bytes is found too small at the prompt; the cache has then seen nothing, and says so again."""
    batch = left_padded([30])
    cache = PrunedCache(shared(), A2SF("100B", sinks=2, recent=3))
    for _ in range(3):
        with pytest.raises(BudgetError, match=r"at least [\d,]+ bytes"):
            generate(shared(), batch, 5, **cache_argument(cache))
        assert cache.seen_tokens == 0
        assert cache.nbytes == 0


# -- all of them -------------------------------------------------------------------------------------------------------


def test_every_error_is_a_value_error_of_kvprune():
    """Who catches KVPruneError, or ValueError, catches them all."""
    for error in (BudgetError, CacheError, PolicyError, UnsupportedModelError):
        assert issubclass(error, KVPruneError)
    assert issubclass(KVPruneError, ValueError)


@evicting
@given(data=st.data())
def test_nonsense_in_any_setting_raises_an_error_of_kvprune(policy, data):
    """Whatever a setting is given, a policy is made, or a KVPruneError raised."""
    junk = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 50),
        st.floats(-2, 2, width=16),
        st.sampled_from([math.nan, math.inf, "mean", "max", "64", "1KiB", "", (), {}]),
    )
    names = [field.name for field in fields(policy) if field.name != "seed"]
    settings = data.draw(st.dictionaries(st.sampled_from(names), junk, min_size=1, max_size=3))
    try:
        made = policy(**settings)
    except KVPruneError as error:
        assert str(error)  # noqa: PT017  either is fine
    else:
        assert isinstance(made, policy)
