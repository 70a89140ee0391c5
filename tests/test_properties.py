"""What "correct" means for every policy, as properties over prompts, paddings, budgets and chunks.

Models here compute in float64, so that the same sequence in another batch or another chunk has the same scores but for
a rounding far below the distance between two of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache

import pytest
import torch
from crossing import mostly
from families import (
    PrunedCache,
    build,
    feed,
    generate,
    kept,
    kept_everywhere,
    left_padded,
    positions_of,
    rows,
    sequence,
    stepwise,
)
from held import EXACT, held_by
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvprune import Adaptive, Everywhere, Eviction, Policy, Step, TokenTable, Uniform
from kvprune.cache.models import cache_argument
from kvprune.policies import (
    A2SF,
    H2O,
    KIVI,
    TOVA,
    Bits,
    ExpectedAttention,
    KeyDiff,
    Keyformer,
    Knorm,
    Leverage,
    Random,
    SnapKV,
    StreamingLLM,
    TriAttention,
    ZipCache,
)

ROOM = 10_000


@dataclass(frozen=True)
class Setup:
    """A policy under a budget still to be given, and what it promises whatever that is."""

    make: Callable[[int | float], Policy]
    sinks: int
    recent: Callable[[int], int] = lambda capacity: 1
    interval: int = 1
    evicts: bool = True
    holes: int = 0
    """Slots that packed rows, which cannot be overwritten, may leave empty, and room for the next tokens."""

    @property
    def atol(self) -> float:
        """By how much logits of two equal computations may differ: a packed number at a border may round both ways."""
        return 5e-3 if self.make(0.5).codecs else 1e-4

    @property
    def least(self) -> int:
        """The smallest budget that holds sinks and recent window."""
        return next(n for n in range(1, 100) if self.sinks + self.recent(n) <= n)

    def capacity(self, budget: int | float, tokens: int) -> int:
        """Rows that a prompt of so many tokens leaves at most. Fractions are of twentieths, and round up."""
        if not self.evicts:
            return ROOM
        return budget if isinstance(budget, int) else max(self.least, -(-round(budget * 20) * tokens // 20))


SETUPS = {
    "a2sf": Setup(lambda b: A2SF(b, sinks=2, recent=3, forgetting_factor=0.9), 2, lambda capacity: 3),
    "h2o": Setup(lambda b: H2O(b, sinks=2, recent=3), 2, lambda capacity: 3),
    "keyformer": Setup(lambda b: Keyformer(b, sinks=2, recent=3, generation_length=8), 2, lambda capacity: 3),
    "snapkv": Setup(lambda b: SnapKV(b, sinks=2, window=4, kernel_size=3, interval=1), 2, lambda capacity: 4),
    "tova": Setup(lambda b: TOVA(b), 0),
    "streaming": Setup(lambda b: StreamingLLM(b, sinks=3), 3),
    "pooled": Setup(
        lambda b: A2SF(b, sinks=1, recent=0.25, kernel_size=5, interval=4),
        1,
        lambda capacity: math.ceil(capacity / 4),
        interval=4,
    ),
    "chain": Setup(
        lambda b: (
            H2O(b + 5 if isinstance(b, int) else 1.0, sinks=2, recent=4)
            | SnapKV(b, sinks=2, window=4, kernel_size=3, interval=1)
        ),
        2,
        lambda capacity: 4,
    ),
}
# Tests of what is particular to a score: all else these share with the policies above.
SCORES = {
    "knorm": Setup(lambda b: Knorm(b, sinks=2, recent=3), 2, lambda capacity: 3),
    "random": Setup(lambda b: Random(b, sinks=2, recent=3), 2, lambda capacity: 3),
    "keydiff": Setup(lambda b: KeyDiff(b, sinks=2, recent=3, interval=3), 2, lambda capacity: 3, interval=3),
    "expected": Setup(
        lambda b: ExpectedAttention(b, sinks=2, recent=3, interval=3, value_norm=False),
        2,
        lambda capacity: 3,
        interval=3,
    ),
    "tri": Setup(lambda b: TriAttention(b, sinks=2, recent=3, interval=3), 2, lambda capacity: 3, interval=3),
    "leverage": Setup(
        lambda b: Leverage(b, sinks=2, recent=3, interval=3, ridge=1.0), 2, lambda capacity: 3, interval=3
    ),
}
# These change what rows hold, so what is said about exact keys, values and logits is not said of them.
PACKING = {
    "zipcache": Setup(lambda b: ZipCache(buffer=4), ROOM, evicts=False),
    "kivi": Setup(lambda b: KIVI(group_size=4, residual=4), ROOM, evicts=False),
    "a2sf-zipcache": Setup(lambda b: A2SF(b, sinks=2, recent=3) | ZipCache(buffer=4), 2, lambda capacity: 3, holes=40),
    "keyformer-kivi": Setup(
        lambda b: Keyformer(b, sinks=2, recent=3) | KIVI(group_size=4, residual=2), 2, lambda capacity: 3, holes=40
    ),
}


def each(*names: str) -> pytest.MarkDecorator:
    """Run a test with each of these setups."""
    return pytest.mark.parametrize("setup", [{**SETUPS, **SCORES, **PACKING}[name] for name in names], ids=names)


exact_setups = each(*SETUPS)
setups = each(*SETUPS, *PACKING)
all_setups = each(*SETUPS, *SCORES, *PACKING)
evicting_setups = each(*SETUPS, "a2sf-zipcache", "keyformer-kivi")

prompt_lengths = st.integers(1, 40)
batches = st.lists(prompt_lengths, min_size=1, max_size=3)
extra_padding = st.integers(0, 6)
token_budgets = st.integers(8, 24)
fractions = st.integers(1, 20).map(lambda twentieths: twentieths / 20)
budgets = st.one_of(token_budgets, fractions)
seeds = st.integers(0, 2**16)


@cache
def model() -> PreTrainedModel:
    return build("llama", dtype=torch.float64)


@cache
def one_layer() -> PreTrainedModel:
    return build("llama", dtype=torch.float64, num_hidden_layers=1)


@cache
def with_other_values() -> PreTrainedModel:
    other = build("llama", dtype=torch.float64)
    torch.nn.init.normal_(other.model.layers[-1].self_attn.v_proj.weight)
    return other


def prompt_and_more(lengths: list[int], more: int, *, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Left-padded prompts, each followed by `more` tokens that are then fed one by one."""
    return left_padded([length + more for length in lengths], width=max(lengths) + more + padding, seed=seed)


def history(batch: dict[str, Tensor], prompt: int, more: int, pruned: PrunedCache) -> Iterator[int]:
    """Feed a prompt of so many columns, then token by token; yields the number of tokens fed after the prompt."""
    for fed, _ in enumerate(stepwise(model(), batch, pruned, [prompt] + [1] * more)):
        yield fed


# -- padding -------------------------------------------------------------------------------------------------------


@all_setups
@given(lengths=batches, padding=extra_padding, budget=budgets, seed=seeds)
def test_a_padded_batch_equals_each_sequence_alone(setup, lengths, padding, budget, seed):
    """Whatever the padding, each sequence of a batch keeps the positions and gets the logits it has alone."""
    more = 5
    batch, together = (
        prompt_and_more(lengths, more, padding=padding, seed=seed),
        PrunedCache(model(), setup.make(budget)),
    )
    alone = [PrunedCache(model(), setup.make(budget)) for _ in lengths]
    apart = [
        stepwise(model(), sequence(batch, row), alone[row], [length] + [1] * more) for row, length in enumerate(lengths)
    ]
    for logits in stepwise(model(), batch, together, [max(lengths) + padding] + [1] * more):
        for row, steps in enumerate(apart):
            torch.testing.assert_close(logits[row, -1], next(steps)[0, -1], atol=setup.atol, rtol=1e-4)
            assert kept_everywhere(together, row) == kept_everywhere(alone[row])


@setups
@given(
    turns=st.lists(st.lists(st.integers(2, 20), min_size=2, max_size=2), min_size=2, max_size=3),
    budget=budgets,
    seed=seeds,
)
@example(turns=[[12, 9], [8, 2]], budget=8, seed=1)  # a window of queries that reaches back into the turn before
def test_padding_between_turns_changes_nothing(setup, turns, budget, seed):
    """Turns that are each padded to the longest leave every sequence what its own turns leave alone."""
    widths = [max(turn) for turn in turns]
    pieces = [left_padded(turn, seed=seed + index) for index, turn in enumerate(turns)]
    batch = {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]}
    together = PrunedCache(model(), setup.make(budget))
    logits = feed(model(), batch, together, widths)
    for row in range(2):
        alone = PrunedCache(model(), setup.make(budget))
        expected = feed(model(), sequence(batch, row), alone, [turn[row] for turn in turns])
        torch.testing.assert_close(logits[row, -1], expected[0, -1], atol=setup.atol, rtol=1e-4)
        assert kept_everywhere(together, row) == kept_everywhere(alone)


# -- chunks --------------------------------------------------------------------------------------------------------


@each("a2sf", "h2o", "snapkv", "tova", "knorm", "random", "pooled", "chain")
@given(chunks=st.lists(st.integers(1, 15), min_size=1, max_size=5), shorter=st.integers(0, 30), seed=seeds)
def test_chunks_give_the_scores_of_one_piece(setup, chunks, shorter, seed):
    """As long as nothing was evicted, a prompt in chunks ends with the scores of the prompt in one piece."""
    assert_chunks_do_not_matter(setup.make(ROOM), chunks, shorter, seed)


@each("keyformer", "keydiff", "expected", "tri", "leverage")
@given(chunks=st.lists(st.integers(2, 15), min_size=1, max_size=5), shorter=st.integers(0, 30), seed=seeds)
def test_chunks_of_several_tokens_give_the_scores_of_one_piece(setup, chunks, shorter, seed):
    """The same, where a chunk of a single token would pass for a generated one: of another temperature, or not due."""
    assert_chunks_do_not_matter(setup.make(ROOM), chunks, shorter, seed)


@pytest.mark.parametrize("policy", [A2SF(ROOM, group="max"), H2O(ROOM, group="max")], ids=["a2sf", "h2o"])
@given(chunks=st.lists(st.integers(1, 15), min_size=1, max_size=5), seed=seeds)
def test_chunks_give_the_scores_of_one_piece_by_the_most_attentive_head(policy, chunks, seed):
    """The same holds where a KV head takes the score of the query head of its group that scores highest."""
    assert_chunks_do_not_matter(policy, chunks, 0, seed)


def assert_chunks_do_not_matter(policy: Policy, chunks: list[int], shorter: int, seed: int) -> None:
    length = sum(chunks)
    batch = left_padded([length, max(1, length - shorter)], seed=seed)
    whole, chunked = (PrunedCache(model(), policy) for _ in range(2))
    feed(model(), batch, whole, [length])
    feed(model(), batch, chunked, chunks)
    for layer in whole.pruned_layers:
        for row in range(2):
            expected, found = rows(whole, layer, row), rows(chunked, layer, row)
            assert [name for name in expected if name.startswith("column.")]
            # A2SF leaves out rows that weigh less than its epsilon, 1e-4.
            torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)


# -- sizes and positions -------------------------------------------------------------------------------------------


@all_setups
@given(lengths=batches, padding=extra_padding, budget=budgets, seed=seeds)
def test_sizes_are_exact(setup, lengths, padding, budget, seed):
    """A head keeps all of a sequence within the budget, else the budget; between two intervals what came since."""
    pruned = PrunedCache(model(), setup.make(budget))
    batch = prompt_and_more(lengths, 9, padding=padding, seed=seed)
    for fed in history(batch, max(lengths) + padding, 9, pruned):
        for row, length in enumerate(lengths):
            waiting = fed % setup.interval
            size = min(length + fed - waiting, setup.capacity(budget, length)) + waiting
            assert [len(head) for layer in kept_everywhere(pruned, row) for head in layer] == [size] * 4


@setups
@given(lengths=batches, budget=budgets, seed=seeds)
def test_kept_positions_are_unique_in_range_and_ascending(setup, lengths, budget, seed):
    """A kept position is one of the sequence's own, and comes once; empty rows come first."""
    pruned = PrunedCache(model(), setup.make(budget))
    for fed in history(prompt_and_more(lengths, 6, seed=seed), max(lengths), 6, pruned):
        for layer in pruned.pruned_layers:
            positions = pruned.kept_positions(layer)
            assert positions.dtype == torch.int64
            assert positions.shape[:2] == (len(lengths), 2)
            for row, length in enumerate(lengths):
                for head, listed in zip(kept(pruned, layer, row), positions[row].tolist(), strict=True):
                    assert listed == [-1] * (len(listed) - len(head)) + head
                    assert head == sorted(set(head))
                    assert head[-1] < length + fed


@setups
@given(lengths=batches, budget=budgets, seed=seeds)
def test_sinks_and_recent_window_are_always_kept(setup, lengths, budget, seed):
    """At every step each head holds the first tokens of its sequence and the newest ones."""
    pruned = PrunedCache(model(), setup.make(budget))
    for fed in history(prompt_and_more(lengths, 8, seed=seed), max(lengths), 8, pruned):
        for row, length in enumerate(lengths):
            assert_sinks_and_recent(setup, pruned, row, length + fed, setup.capacity(budget, length))


def assert_sinks_and_recent(setup: Setup, pruned: PrunedCache, row: int, tokens: int, capacity: int) -> None:
    always = {*range(min(setup.sinks, tokens)), *range(max(0, tokens - setup.recent(capacity)), tokens)}
    assert all(always <= set(head) for layer in kept_everywhere(pruned, row) for head in layer)


@evicting_setups
@given(length=prompt_lengths, budget=token_budgets)
def test_size_is_bounded_for_any_length(setup, length, budget):
    """However long a model generates, the table has beside the budget room for two intervals and a few holes."""
    pruned, more = PrunedCache(one_layer(), setup.make(budget)), 50
    feed(one_layer(), prompt_and_more([length], more), pruned, [length] + [1] * more)
    for layer in pruned.pruned_layers:
        assert pruned.layers[layer].table.capacity < max(budget, length) + 2 * setup.interval + setup.holes
        if length + more - setup.interval >= budget:
            assert budget <= pruned.kept_positions(layer).shape[2] < budget + setup.interval


BYTES = {
    "a2sf": lambda b: A2SF(b, sinks=2, recent=3),
    "interval": lambda b: A2SF(b, sinks=2, recent=3, interval=4),
    "keyformer": lambda b: Keyformer(b, sinks=2, recent=3),
    "snapkv": lambda b: SnapKV(b, sinks=2, window=4, interval=1),
    "tova": lambda b: TOVA(b),
    "chain": lambda b: H2O(b, sinks=2, recent=3) | StreamingLLM(b),
}


@pytest.mark.parametrize("make", BYTES.values(), ids=BYTES)
@given(lengths=batches, size=st.integers(20_000, 50_000), seed=seeds)
def test_a_budget_in_bytes_is_never_exceeded(make, lengths, size, seed):
    """Under a budget in bytes, what the cache holds after any step is within it, spare slots and queries included."""
    pruned = PrunedCache(model(), make(f"{size}B"))
    for _ in history(prompt_and_more(lengths, 25, seed=seed), max(lengths), 25, pruned):
        assert pruned.nbytes <= size


@setups
@given(lengths=batches, budget=budgets)
def test_generated_tokens_have_the_positions_that_follow(setup, lengths, budget):
    """The k-th generated token has logical position n + k, n being the sequence's own tokens."""
    pruned = PrunedCache(model(), setup.make(budget))
    batch = left_padded(lengths)
    ids = generate(model(), batch, 7, **cache_argument(pruned))
    assert pruned.seen_tokens == ids.shape[1] - 1
    for row, length in enumerate(lengths):
        assert {head[-1] for layer in kept_everywhere(pruned, row) for head in layer} == {length + 5}


# -- attention -----------------------------------------------------------------------------------------------------


@exact_setups
@given(length=st.integers(10, 40), budget=budgets, new=st.integers(1, 4), seed=seeds)
def test_attention_is_exact_over_the_kept_rows(setup, length, budget, new, seed):
    """After an eviction, logits are those of a stock model whose mask hides just the evicted keys of each head."""
    batch = left_padded([length + new], seed=seed)
    pruned = PrunedCache(one_layer(), setup.make(budget))
    feed(one_layer(), batch, pruned, [length])
    visible = torch.ones(1, 4, length + new, length + new, dtype=torch.bool).tril()
    for head, positions in enumerate(kept(pruned, 0)):
        evicted = sorted(set(range(length)) - set(positions))
        visible[:, 2 * head : 2 * head + 2, length:, evicted] = False
    with torch.no_grad():
        expected = one_layer()(
            batch["input_ids"], attention_mask=visible, position_ids=positions_of(batch["attention_mask"])
        ).logits[:, length:]
    logits = feed(one_layer(), batch, pruned, [new], begin=length)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@exact_setups
@given(length=prompt_lengths, budget=budgets, seed=seeds)
def test_rows_hold_the_keys_and_values_of_their_positions(setup, length, budget, seed):
    """However rows were moved and overwritten, each has the key and the value that the stock cache has there."""
    batch = prompt_and_more([length], 12, seed=seed)
    dense, pruned = DynamicCache(config=one_layer().config), PrunedCache(one_layer(), setup.make(budget))
    for one in (dense, pruned):
        feed(one_layer(), batch, one, [length] + [1] * 12)
    found = rows(pruned, 0)
    index = found["positions"].long()[..., None]
    for name, stored in (("keys", dense.layers[0].keys), ("values", dense.layers[0].values)):
        torch.testing.assert_close(found[name], stored[0].take_along_dim(index, dim=1), atol=1e-6, rtol=1e-6)


# -- scores that are no numbers ------------------------------------------------------------------------------------


def poisoned(policy: Eviction, value: float, positions: list[int]) -> Eviction:
    """The policy, with a value planted in its scores at these positions, at every step."""
    kind = type(policy)

    def plant(scores: Tensor, table: TokenTable) -> Tensor:
        return scores.masked_fill(torch.isin(table.positions, torch.tensor(positions)), value)

    class Poisoned(kind):  # type: ignore[misc, valid-type]
        def observe(self, table: TokenTable, step: Step) -> None:
            super().observe(table, step)
            for column in self.columns():
                table[column] = plant(table[column], table)

        def scores(self, table: TokenTable, step: Step) -> Tensor:
            return plant(super().scores(table, step).expand_as(table.positions), table)

    return Poisoned(**{field.name: getattr(policy, field.name) for field in fields(policy)})


@each("a2sf", "h2o", "keyformer", "snapkv", "tova", "streaming", "keydiff", "expected", "pooled")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@given(lengths=batches, budget=budgets, positions=st.lists(st.integers(0, 45), max_size=45), seed=seeds)
def test_no_number_in_a_score_evicts_what_is_always_kept(setup, value, lengths, budget, positions, seed):
    """NaN and infinite scores, anywhere, cost no sink and no recent token, change no size, and reach no logit."""
    pruned = PrunedCache(model(), poisoned(setup.make(budget), value, positions))
    batch = prompt_and_more(lengths, 5, seed=seed)
    for fed, logits in enumerate(stepwise(model(), batch, pruned, [max(lengths)] + [1] * 5)):
        for row, length in enumerate(lengths):
            capacity, waiting = setup.capacity(budget, length), fed % setup.interval
            assert_sinks_and_recent(setup, pruned, row, length + fed, capacity)
            size = min(length + fed - waiting, capacity) + waiting
            assert [len(head) for layer in kept_everywhere(pruned, row) for head in layer] == [size] * 4
        assert logits[:, -1].isfinite().all()


@pytest.mark.parametrize("share", [Uniform(), Adaptive(0.3, normalize="z"), Everywhere()], ids=str)
@given(
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    lengths=batches,
    positions=st.lists(st.integers(0, 45), max_size=45),
    seed=seeds,
)
def test_no_number_in_a_score_packs_what_is_always_exact(share, value, lengths, positions, seed):
    """Nor drops it: sinks and what was recent when it was decided have their 16 bits, and logits are numbers."""
    policy = Bits(0.7, score=poisoned(H2O(), value, positions), share=share, sinks=2, recent=3, interval=2)
    pruned, sizes = PrunedCache(model(), policy), [max(lengths), *[1] * 5]
    for step, logits in enumerate(stepwise(model(), prompt_and_more(lengths, 5, seed=seed), pruned, sizes)):
        for held in held_by(pruned):
            for row, length in enumerate(lengths):
                tokens = length + step // 2 * 2
                always = [*range(min(2, tokens)), *range(max(0, tokens - 3), length + step)]
                assert bool((held.bits[row, :, always] == EXACT).all())
        assert logits[:, -1].isfinite().all()


# -- independence --------------------------------------------------------------------------------------------------


@mostly("setup", SETUPS | PACKING, "a2sf", "keyformer", "snapkv", "pooled", "chain", "zipcache", "keyformer-kivi")
@given(lengths=st.lists(prompt_lengths, min_size=2, max_size=3), budget=budgets, seed=seeds)
def test_threads_share_nothing(setup, lengths, budget, seed):
    """Caches that fill on one model at the same time hold bit for bit what they hold one after the other."""
    policy, more = setup.make(budget), 6

    def run(length: int) -> tuple[Tensor, PrunedCache]:
        pruned = PrunedCache(model(), policy)
        batch = prompt_and_more([length], more, seed=seed + length)
        return feed(model(), batch, pruned, [length] + [1] * more), pruned

    one_by_one = [run(length) for length in lengths]
    with ThreadPoolExecutor(len(lengths)) as pool:
        at_once = list(pool.map(run, lengths))
    for (logits, pruned), (expected, other) in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(logits, expected, atol=0, rtol=0)
        assert kept_everywhere(pruned) == kept_everywhere(other)


@all_setups
@given(length=prompt_lengths, budget=budgets, seed=seeds)
def test_values_never_influence_selection(setup, length, budget, seed):
    """Other values in the last layer change its output, and nothing about what any layer keeps."""
    batch = prompt_and_more([length], 5, seed=seed)
    kept_by = []
    for one in (model(), with_other_values()):
        pruned = PrunedCache(one, setup.make(budget))
        feed(one, batch, pruned, [length] + [1] * 5)
        kept_by.append(kept_everywhere(pruned))
    assert kept_by[0] == kept_by[1]


def with_permuted_query_heads(original: PreTrainedModel, order: list[int]) -> PreTrainedModel:
    """The same function: the query heads of each KV head change places, in the queries and in the output."""
    permuted = build("llama", dtype=torch.float64, num_attention_heads=8)
    permuted.load_state_dict(original.state_dict())
    heads = torch.tensor(order + [4 + head for head in order])
    for layer in permuted.model.layers:
        queries, output = layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight
        with torch.no_grad():
            queries.copy_(queries.unflatten(0, (8, -1))[heads].flatten(0, 1))
            output.copy_(output.unflatten(1, (8, -1))[:, heads].flatten(1))
    return permuted


@each("a2sf", "h2o", "pooled")
@given(order=st.permutations(range(4)), length=prompt_lengths, budget=budgets, seed=seeds)
def test_the_order_of_query_heads_in_a_group_does_not_matter(setup, order, length, budget, seed):
    """Query heads that change places within their group leave the kept tokens of the KV head as they were."""
    original = build("llama", dtype=torch.float64, num_attention_heads=8)
    batch = prompt_and_more([length], 5, seed=seed)
    kept_by, logits = [], []
    for one in (original, with_permuted_query_heads(original, order)):
        pruned = PrunedCache(one, setup.make(budget))
        logits.append(feed(one, batch, pruned, [length] + [1] * 5))
        kept_by.append(kept_everywhere(pruned))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)
    assert kept_by[0] == kept_by[1]
