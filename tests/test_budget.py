"""Budgets: what may be written, how many tokens it means, and that a cache never exceeds one in bytes."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from crossing import crossed
from families import build, feed, generate, left_padded, shared, stepwise
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from kvprune import Budget, BudgetError, Chain, Everywhere, KVPruneError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, H2O, KIVI, TOVA, GemFilter, Random, SnapKV, Spectral, StreamingLLM

# -- what may be written -----------------------------------------------------------------------------------------------

GOOD = [
    (0.25, "fraction", 0.25),
    (1.0, "fraction", 1.0),
    (1e-9, "fraction", 1e-9),
    (np.float32(0.25), "fraction", 0.25),
    (np.float64(0.1), "fraction", 0.1),
    (Fraction(1, 4), "fraction", 0.25),
    ("0.25", "fraction", 0.25),
    (".5", "fraction", 0.5),
    ("1.0", "fraction", 1.0),
    ("25%", "fraction", 0.25),
    (" 25 % ", "fraction", 0.25),
    ("100%", "fraction", 1.0),
    ("12.5%", "fraction", 0.125),
    (1, "tokens", 1),
    (1024, "tokens", 1024),
    (2**70, "tokens", 2**70),
    (np.int64(7), "tokens", 7),
    (np.uint8(7), "tokens", 7),
    ("1024", "tokens", 1024),
    (" 16 ", "tokens", 16),
    ("512MiB", "bytes", 512 * 2**20),
    ("512 mib", "bytes", 512 * 2**20),
    ("1.5GiB", "bytes", 3 * 2**29),
    ("2GB", "bytes", 2 * 10**9),
    ("10kB", "bytes", 10_000),
    ("1TiB", "bytes", 2**40),
    ("1.9B", "bytes", 1),
    ("4096b", "bytes", 4096),
    ("1B", "bytes", 1),
    ("0.05b", "share", 0.05),
    (" .5 b", "share", 0.5),
    ("1b", "share", 1.0),
]


@pytest.mark.parametrize(("value", "kind", "amount"), GOOD, ids=repr)
def test_what_a_person_may_write(value, kind, amount):
    """Fractions, numbers of tokens and bytes, as Python or numpy numbers or as text."""
    budget = Budget.parse(value)
    assert (budget.kind, budget.amount) == (kind, amount)


BAD = [
    *(0, -1, 0.0, -0.25, 1.5, 2.0, math.nan, math.inf, -math.inf),
    *(True, False, np.True_, None, [], (1,), {}, 1j, b"512MiB", Decimal("0.25"), torch.tensor(5), np.array([5])),
    *(np.float32("nan"), np.float64("inf"), np.int32(0), np.int64(-3), np.float16(1.5)),
    *("", " ", "parsecs", "12 parsecs", "12parsecs", "MiB", "%", "0", "0.0", "-5", "-5%", "1.5", "0%", "101%", "250 %"),
    *("nan", "inf", "1e3", "1,024", "1_024", "0x10", "512 MiB/s", "5 5", "1..5", "0MiB", "0.5B", "0b", "True", "None"),
    "9" * 400 + "GiB",
]


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:20])
def test_what_has_no_meaning_is_refused(value):
    """Anything that is no positive, finite amount raises BudgetError, which shows it and says what to write."""
    with pytest.raises(BudgetError) as error:
        Budget.parse(value)
    assert isinstance(error.value, KVPruneError)
    assert isinstance(error.value, ValueError)
    for advice in ("0.25", "1024", '"512MiB"', '"0.05b"'):
        assert advice in str(error.value)


@pytest.mark.parametrize(("value", "tokens"), [(1.5, 2), (2.0, 2), (100.0, 100), ("1.5", 2)])
def test_floats_above_one_are_told_the_int(value, tokens):
    """Who writes 100.0 probably means 100 tokens."""
    with pytest.raises(BudgetError, match=rf"write the int {tokens}\b"):
        Budget.parse(value)


@given(st.one_of(st.text(max_size=12), st.from_regex(r"\s*[0-9.]{1,4}\s*[a-zA-Z%]{0,4}\s*", fullmatch=True)))
def test_any_text_is_a_budget_or_refused(text):
    """Text is read, or refused with BudgetError; nothing else is raised."""
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return
    assert budget.amount > 0


@given(amount=st.integers(1, 1000))
def test_text_means_what_the_number_means(amount):
    """The text of a budget is that budget."""
    assert Budget.parse(str(amount)) == Budget.parse(amount)
    assert Budget.parse(str(amount / 1000)) == Budget.parse(amount / 1000)
    assert Budget.parse(f"{amount}KiB") == Budget.parse(f"{amount * 1024}B")


# -- how many tokens ---------------------------------------------------------------------------------------------------


@given(hundredths=st.integers(1, 100), prompt=st.integers(1, 5000))
def test_fractions_round_up_exactly(hundredths, prompt):
    """A fraction of the prompt rounds up as the decimal number would, without the dust of binary fractions."""
    exact = -(-hundredths * prompt // 100)
    assert Budget.parse(hundredths / 100).tokens(prompt) == exact
    assert Budget.parse(f"{hundredths}%").tokens(prompt) == exact


@given(fraction=st.floats(1e-6, 1), prompt=st.integers(1, 10**6), floor=st.integers(1, 100))
def test_fractions_are_never_below_the_floor(fraction, prompt, floor):
    """Nor ever more than the prompt, where the floor allows."""
    tokens = Budget.parse(fraction).tokens(prompt, floor=floor)
    assert floor <= tokens <= max(prompt, floor)


@given(tokens=st.integers(1, 10**6), prompt=st.integers(1, 10**6))
def test_tokens_are_tokens(tokens, prompt):
    """A number of tokens does not depend on the prompt."""
    assert Budget.parse(tokens).tokens(prompt) == tokens


@given(
    size=st.integers(1, 10**6),
    token_bytes=st.integers(1, 10**4),
    other_bytes=st.integers(0, 10**5),
    spare=st.integers(0, 20),
    floor=st.integers(1, 40),
)
def test_bytes_hold_as_many_tokens_as_fit(size, token_bytes, other_bytes, spare, floor):
    """As many as fit beside spare slots and other layers; or an error that names the least bytes that work."""
    shape = {"token_bytes": token_bytes, "other_bytes": other_bytes, "spare": spare, "floor": floor}
    least = (floor + spare) * token_bytes + other_bytes
    if size < least:
        with pytest.raises(BudgetError) as error:
            Budget.parse(f"{size}B").tokens(100, **shape)
        assert least_bytes(error) == least
    else:
        tokens = Budget.parse(f"{size}B").tokens(100, **shape)
        assert tokens >= floor
        assert (tokens + spare) * token_bytes + other_bytes <= size < (tokens + 1 + spare) * token_bytes + other_bytes
    assert Budget.parse(f"{least}B").tokens(100, **shape) == floor


@given(
    hundredths=st.integers(1, 100),
    prompt=st.integers(1, 5000),
    token_bytes=st.integers(1, 300),
    half_bytes=st.integers(1, 300),
    other_bytes=st.integers(0, 10**4),
    stock_bytes=st.integers(0, 10**4),
    floor=st.integers(1, 40),
)
def test_shares_are_of_the_full_cache_at_16_bits(
    hundredths, prompt, token_bytes, half_bytes, stock_bytes, other_bytes, floor
):
    """What bytes would hold that are this share of all tokens at 16 bits, other layers left out; at least the floor.

    Of a batch as of each sequence.
    """
    budget = Budget.parse(f"{hundredths / 100}b")
    shape = {"token_bytes": token_bytes, "floor": floor}
    costs = {"half_bytes": half_bytes, "stock_bytes": stock_bytes, "other_bytes": other_bytes + stock_bytes}
    held = (hundredths * prompt * half_bytes // 100 - other_bytes) // token_bytes
    assert budget.tokens(prompt, **shape, **costs) == max(floor, held)
    seven = {name: 7 * each for name, each in {**costs, "token_bytes": token_bytes}.items()}
    assert budget.tokens(prompt, floor=floor, **seven) == max(floor, held)


def least_bytes(error: pytest.ExceptionInfo[BudgetError]) -> int:
    """The number of bytes that the message of an error asks for."""
    match = re.search(r"at least ([\d,]+) bytes", str(error.value))
    assert match is not None, str(error.value)
    return int(match[1].replace(",", ""))


# -- in a cache --------------------------------------------------------------------------------------------------------

POLICIES = {
    "a2sf": lambda budget: A2SF(budget, sinks=2, recent=3),
    "a2sf, interval 4": lambda budget: A2SF(budget, sinks=2, recent=3, interval=4),
    "h2o": lambda budget: H2O(budget, sinks=2, recent=0.25),
    "snapkv": lambda budget: SnapKV(budget, sinks=2, window=4, kernel_size=3, interval=1),
    "tova": lambda budget: TOVA(budget),
    "streaming": lambda budget: StreamingLLM(budget),
    "chain": lambda budget: H2O(budget, sinks=2, recent=3) | StreamingLLM(budget),
    "chain, intervals 1 and 8": lambda budget: A2SF(budget, sinks=2, recent=3) | StreamingLLM(1.0, interval=8),
}
every_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)

batches = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@every_policy
@given(lengths=batches, size=st.integers(14_000, 40_000))
def test_bytes_are_never_exceeded(make, lengths, size):
    """From the prompt on to the last generated token, for any batch, what the cache holds fits the bytes given."""
    cache = PrunedCache(shared(), make(f"{size}B"))
    batch = left_padded([length + 30 for length in lengths])
    for _ in stepwise(shared(), batch, cache, [max(lengths)] + [1] * 30):
        assert cache.nbytes <= size


@pytest.mark.parametrize("edge_layers", [1, 3])
def test_bytes_hold_where_some_layers_pack_nothing(edge_layers):
    """Layers in full precision are paid as such, those that pack as they do, and all together fit."""
    size, model = 80_000, build("llama", num_hidden_layers=5)
    ageing = Spectral(2, sinks=2, residual=4, edge_layers=edge_layers, edge_bits=16)
    cache = PrunedCache(model, A2SF(f"{size}B", sinks=2, recent=3) | ageing)
    for _ in stepwise(model, left_padded([440]), cache, [400] + [1] * 40):
        assert cache.nbytes <= size
    assert cache.nbytes > size // 2
    lengths = [layer.table.length for layer in cache.layers]
    assert max(lengths) < 400
    assert (lengths[2] > lengths[0]) == (edge_layers == 1)


@every_policy
def test_bytes_are_used(make):
    """A cache that could hold more than its bytes allow comes close to them, but for what an interval may add."""
    size = 30_000
    cache = PrunedCache(shared(), make(f"{size}B"))
    generate(shared(), left_padded([200]), 30, **cache_argument(cache))
    token = sum(layer.table.token_bytes for layer in cache.layers)
    assert size - 11 * token < cache.nbytes <= size


@every_policy
@given(turns=st.lists(st.integers(2, 60), min_size=2, max_size=4))
def test_bytes_are_never_exceeded_over_turns(make, turns):
    """The same for prompts in chunks, and for turns with generated tokens between."""
    size = 20_000
    cache = PrunedCache(shared(), make(f"{size}B"))
    steps = [step for turn in turns for step in (turn, *[1] * 5)]
    for _ in stepwise(shared(), left_padded([sum(steps)]), cache, steps):
        assert cache.nbytes <= size


SHARES = {
    **POLICIES,
    "everywhere": lambda budget: H2O(budget, sinks=2, recent=3, share=Everywhere()),
    "a2sf | kivi": lambda budget: A2SF(budget, sinks=2, recent=3) | KIVI(4, group_size=8, residual=8),
    "gemfilter | a2sf": lambda budget: GemFilter(budget, layer=0) | A2SF(budget, sinks=2, recent=3),
}


@pytest.mark.parametrize("make", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("lengths", [[260], [260, 243]], ids=str)
def test_shares_of_the_bytes_are_used_and_never_exceeded(make, lengths):
    """What the cache holds is no more than a share of what all tokens take at 16 bits, and little less."""
    cache = PrunedCache(shared(), make("0.6b"))
    batch = left_padded([length + 6 for length in lengths])
    full = sum(layer_bytes(shared()) * length for length in lengths)
    padded = max(lengths) * len(lengths) / sum(lengths)  # a rectangle has empty slots where a sequence has fewer tokens
    for _ in stepwise(shared(), batch, cache, [max(lengths)] + [1] * 6):
        assert cache.nbytes <= 0.6 * full * padded
    assert cache.nbytes > 0.6 * 0.6 * full


def layer_bytes(model) -> int:
    """Of a token in all layers of the full cache, at 16 bits a number."""
    cache = DynamicCache(config=model.config)
    feed(model, left_padded([1]), cache, [1])
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_share_of_the_bytes_is_of_16_bits_whatever_the_model_computes_in(dtype):
    """Half of the bytes of bfloat16 hold half of the tokens of such a model, and a quarter of those in float32."""
    model = build("llama", dtype=dtype)
    cache = PrunedCache(model, StreamingLLM("0.5b", sinks=2))
    feed(model, left_padded([400]), cache, [400])
    assert cache.nbytes <= 200 * layer_bytes(model)
    few = cache.kept_positions(0).shape[2] * 2 * dtype.itemsize
    assert 0.85 < few / 400 / 2 <= 1


@pytest.mark.parametrize("family", ["qwen3-hybrid", "gemma3"])
def test_shares_leave_layers_with_a_window_out(family):
    """They are neither counted in what there is to share, nor paid from it."""
    cache = PrunedCache(shared(family), A2SF("0.5b", sinks=2, recent=3))
    feed(shared(family), left_padded([100]), cache, [100])
    pruned = [cache.layers[index] for index in cache.pruned_layers]
    full = sum(layer.table.kv_token_bytes * 100 // 2 for layer in pruned)
    assert 0.8 * 0.5 * full < sum(layer.nbytes for layer in pruned) <= 0.5 * full


def test_a_share_of_the_bytes_grows_with_the_next_turn():
    """It is of the tokens that came until the last prompt ended, whatever has been generated since."""
    cache = PrunedCache(shared(), A2SF("0.5b", sinks=2, recent=3))
    batch = left_padded([400])
    token = layer_bytes(shared())
    held = []
    for _, seen in zip(stepwise(shared(), batch, cache, [100, 1, 1, 198, 1]), (100, 100, 100, 300, 300), strict=True):
        held.append(cache.nbytes)
        assert cache.nbytes <= 0.5 * seen * token
    assert held[0] == held[2] < 0.4 * held[4]


HYBRID = ["qwen3-hybrid", "gemma3"]


@crossed(make=POLICIES, family=HYBRID, lengths=[[12], [60], [60, 25]])
def test_bytes_are_never_exceeded_while_a_hybrid_model_generates(make, family, lengths):
    """Layers with a sliding window are paid from the same bytes."""
    size = 8_000 * len(lengths)
    cache = PrunedCache(shared(family), make(f"{size}B"))
    batch = left_padded([length + 30 for length in lengths])
    feed(shared(family), batch, cache, [max(lengths)])
    for _ in stepwise(shared(family), batch, cache, [1] * 30, begin=max(lengths)):
        assert cache.nbytes <= size


@pytest.mark.parametrize("family", HYBRID)
@pytest.mark.parametrize("length", [12, 60])
def test_bytes_are_not_exceeded_after_the_prompt_of_a_hybrid_model(family, length):
    """After the prompt, a layer with a sliding window holds the window and not the storage of the whole prompt."""
    cache = PrunedCache(shared(family), A2SF("6000B", sinks=2, recent=3))
    feed(shared(family), left_padded([length]), cache, [length])
    assert cache.nbytes <= 6_000


@every_policy
@pytest.mark.parametrize("beams", [2, 4])
def test_bytes_are_never_exceeded_with_beams(make, beams):
    """Beams share the bytes too."""
    size = 60_000
    cache = PrunedCache(shared(), make(f"{size}B"))
    generate(shared(), left_padded([80]), 12, **cache_argument(cache), num_beams=beams)
    assert cache.nbytes <= size


def test_a_batch_that_grows_shares_the_bytes():
    """A compressed prompt that is repeated for several samples is cut to the bytes at the next token."""
    size = 30_000
    cache = PrunedCache(shared(), A2SF(f"{size}B", sinks=2, recent=3))
    batch = left_padded([80])
    feed(shared(), batch, cache, [60])
    cache.batch_repeat_interleave(4)
    repeated = {name: tensor.repeat_interleave(4, dim=0) for name, tensor in batch.items()}
    feed(shared(), repeated, cache, [1, 1], begin=60)
    assert cache.nbytes <= size


def test_half_precision_holds_more_tokens():
    """The same bytes hold more tokens of a model in half precision: they are counted, not guessed."""
    rows = []
    for dtype in (torch.float32, torch.float16):
        model = build("llama", dtype=dtype)
        cache = PrunedCache(model, A2SF("20kB", sinks=2, recent=3))
        feed(model, left_padded([200]), cache, [200])
        assert cache.nbytes <= 20_000
        rows.append(cache.kept_positions(0).shape[2])
    assert rows[1] > 1.5 * rows[0]


# -- too few bytes -----------------------------------------------------------------------------------------------------


@crossed(make=POLICIES, family=["llama", "qwen3-hybrid"], lengths=[[40], [40, 25]])
def test_too_few_bytes_are_told_the_least_that_work(make, family, lengths):
    """Bytes that cannot hold sinks and recent window raise BudgetError with a number that works; one less does not."""
    batch = left_padded(lengths)

    def run(size: int) -> None:
        cache = PrunedCache(shared(family), make(f"{size}B"))
        generate(shared(family), batch, 20, **cache_argument(cache))
        assert cache.nbytes <= size

    with pytest.raises(BudgetError) as error:
        run(100)
    least = least_bytes(error)
    run(least)
    with pytest.raises(BudgetError):
        run(least - 1)


def test_bytes_of_a_later_link_are_checked_before_a_decision_waits():
    """Where the first link waits for all layers, too few bytes for the second are told by the step itself."""
    cache = PrunedCache(
        shared("llama"), Chain((H2O(30, sinks=0, recent=4, share=Everywhere()), Random("100B", sinks=0, recent=0)))
    )
    with pytest.raises(BudgetError) as error:
        feed(shared("llama"), left_padded([40]), cache, [40])
    assert cache.seen_tokens == 0
    chain = Chain((H2O(30, sinks=0, recent=4, share=Everywhere()), Random(f"{least_bytes(error)}B", sinks=0, recent=0)))
    cache = PrunedCache(shared("llama"), chain)
    feed(shared("llama"), left_padded([40]), cache, [40])
    assert {len(kept) for kept in cache.kept_positions(0)[0]} == {1}
