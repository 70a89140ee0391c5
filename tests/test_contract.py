"""The contract of a transformers cache, kept by `PrunedCache`: on a tiny Llama, method by method."""

import json
from dataclasses import dataclass

import pytest
import torch
from crossing import crossed
from families import (
    PAD,
    Spy,
    assert_same_rows,
    build,
    decoded,
    feed,
    generate,
    kept,
    kept_everywhere,
    left_padded,
    rows,
    shared,
    stepwise,
    stock,
    storage_nbytes,
    token_ids,
    windows_are_recorded,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from kvprune import CacheError, CacheReport, Chain, Policy, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.cache.report import LayerReport, human_bytes
from kvprune.policies import A2SF, H2O, KIVI, TOVA, Bits, Full, GemFilter, Keyformer, SnapKV, StreamingLLM, ZipCache

ROOM = 10_000
BUDGET = 16
FULL_BUDGET = {
    "full": Full(),
    "a2sf": A2SF(ROOM),
    "snapkv": SnapKV(ROOM, window=4, interval=1),
    "bits": Bits("1GB", score=H2O()),  # which waits for the end of a prompt
    "bits-interval": Bits("1GB", score=H2O(), interval=2),
}
EVICTING = {
    "a2sf": A2SF(BUDGET, sinks=2, recent=3),
    "keyformer": Keyformer(BUDGET, sinks=2, recent=3, generation_length=8),
    "snapkv": SnapKV(BUDGET, window=4, kernel_size=3, interval=1),
    "tova": TOVA(BUDGET),
    "streaming": StreamingLLM(BUDGET),
    "chain": H2O(2 * BUDGET, sinks=2, recent=3) | A2SF(BUDGET, sinks=2, recent=3),
}
# Where caches are compared that the same tokens reached by other ways, keys differ by rounding, and so, once in a long
# while, a code: these take part where bits agree, or where sizes and positions are counted.
PACKING = {
    "a2sf-zipcache": A2SF(BUDGET, sinks=2, recent=3) | ZipCache(buffer=4),
    "keyformer-kivi": Keyformer(BUDGET, sinks=2, recent=3) | KIVI(group_size=4, residual=2),
}

full_budget = pytest.mark.parametrize("policy", FULL_BUDGET.values(), ids=FULL_BUDGET)
evicting = pytest.mark.parametrize("policy", EVICTING.values(), ids=EVICTING)
ALL = {**{f"all of it, {name}": policy for name, policy in FULL_BUDGET.items()}, **EVICTING}
all_policies = pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
evicting_and_packing = pytest.mark.parametrize(
    "policy", [*EVICTING.values(), *PACKING.values()], ids=[*EVICTING, *PACKING]
)
all_and_packing = pytest.mark.parametrize("policy", [*ALL.values(), *PACKING.values()], ids=[*ALL, *PACKING])

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=3)
seeds = st.integers(0, 2**16)


def follow_up(batch: dict[str, Tensor], ids: Tensor, count: int, *, seed: int) -> dict[str, Tensor]:
    """The next turn of a chat: everything so far and `count` new tokens, with the mask of all of it."""
    ids = torch.cat([ids, token_ids(ids.shape[0], count, seed=seed)], dim=1)
    grown = torch.ones_like(ids)
    grown[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    return {"input_ids": ids, "attention_mask": grown}


def as_batch(ids: Tensor) -> dict[str, Tensor]:
    """A batch without padding."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def masked_ids(mask: Tensor, *, seed: int) -> dict[str, Tensor]:
    """Random ids where a mask says so, column by column the same for any width."""
    ids = torch.stack([token_ids(len(mask), seed=seed + column) for column in range(mask.shape[1])], dim=1)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def copied_rows(cache: PrunedCache) -> dict[tuple[int, str], Tensor]:
    """Everything the tables hold, packed rows decoded, to compare with later."""
    return {
        (layer, name): tensor[:, :, : table.length].clone()
        for layer, table in ((layer, cache.layers[layer].table) for layer in cache.pruned_layers)
        for name, tensor in (decoded(table) if table.packed else table.tensors()).items()
    }


def assert_unchanged(cache: PrunedCache, before: dict[tuple[int, str], Tensor], seen_tokens: int) -> None:
    assert cache.seen_tokens == seen_tokens
    torch.testing.assert_close(copied_rows(cache), before, atol=0, rtol=0)


# -- chunked prefill -----------------------------------------------------------------------------------------------


@full_budget
@given(chunk=st.integers(1, 45), lengths=lengths, seed=seeds)
def test_prefill_chunk_size_changes_nothing_at_full_budget(policy, chunk, lengths, seed):
    """A prompt that generate() feeds in chunks of any size gives the ids of the stock cache."""
    batch = left_padded(lengths, seed=seed)
    ids = generate(shared(), batch, 6, **cache_argument(PrunedCache(shared(), policy)), prefill_chunk_size=chunk)
    assert torch.equal(ids, generate(stock(), batch, 6))


@evicting_and_packing
@given(chunk=st.integers(2, 20), length=st.integers(20, 60))
def test_prefill_chunk_size_bounds_the_cache(policy, chunk, length):
    """Between two chunks the cache holds no more than its budget, and after the prompt and a few tokens just that."""
    spy = Spy()
    cache = PrunedCache(shared(), policy | spy)
    generate(shared(), left_padded([length]), 5, **cache_argument(cache), prefill_chunk_size=chunk)
    assert sum(spy.queries) == cache.seen_tokens == length + 4
    assert max(spy.peaks) <= BUDGET + chunk
    assert all(len(head) == BUDGET for layer in kept_everywhere(cache) for head in layer)


# -- several turns -------------------------------------------------------------------------------------------------


@full_budget
@given(lengths=lengths, new=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=seeds)
def test_turns_at_full_budget_equal_one_stock_run(policy, lengths, new, seed):
    """Every turn of a chat on one cache answers as the stock model does when it is given the whole chat at once."""
    cache = PrunedCache(shared(), policy)
    batch = left_padded(lengths, seed=seed)
    ids = generate(shared(), batch, 5, **cache_argument(cache))
    for count in new:
        batch = follow_up(batch, ids, count, seed=seed + count)
        ids = generate(shared(), batch, 5, **cache_argument(cache))
        assert torch.equal(ids, generate(stock(), batch, 5))


@evicting_and_packing
@given(length=st.integers(20, 40), new=st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_turns_compress_again_at_the_right_positions(policy, length, new):
    """A later turn feeds only its new tokens, ends at the budget again, and keeps counting positions."""
    spy = Spy()
    cache = PrunedCache(shared(), policy | spy)
    batch = left_padded([length])
    ids = generate(shared(), batch, 5, **cache_argument(cache))
    for count in new:
        batch = follow_up(batch, ids, count, seed=count)
        spy.queries.clear()
        ids = generate(shared(), batch, 5, **cache_argument(cache))
        assert spy.queries == [count + 1, 1, 1, 1, 1]  # the last id of a turn is only fed in the next one
        assert cache.seen_tokens == ids.shape[1] - 1
        for layer in kept_everywhere(cache):
            assert all(len(head) == BUDGET and head[-1] == cache.seen_tokens - 1 for head in layer)


@evicting_and_packing
def test_generate_feeds_what_a_manual_loop_feeds(policy):
    """Two turns of generate() leave the rows that direct calls with the same tokens leave."""
    cache, manual = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    batch = left_padded([30, 12])
    first = follow_up(batch, generate(shared(), batch, 5, **cache_argument(cache)), 10, seed=1)
    ids = generate(shared(), first, 5, **cache_argument(cache))
    everything = follow_up(first, ids, 0, seed=0)
    feed(shared(), everything, manual, [30, 1, 1, 1, 1, 11, 1, 1, 1, 1])
    assert_same_rows(cache, manual)
    assert_same_rows(cache, manual, 1, 1)


# -- direct calls --------------------------------------------------------------------------------------------------


def call_directly(cache: PrunedCache, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of calls that leave positions and masks to the model."""
    with torch.no_grad():
        pieces = ids[:, : sum(sizes)].split(sizes, dim=1)
        return torch.cat([shared()(piece, **cache_argument(cache)).logits for piece in pieces], dim=1)


sizes = st.lists(st.integers(1, 15), min_size=1, max_size=6)


@full_budget
@given(sizes=sizes, batch=st.integers(1, 3))
def test_direct_calls_without_position_ids_equal_the_stock_model(policy, sizes, batch):
    """Calls of any sizes without positions or mask give the logits of one stock call."""
    ids = token_ids(batch, sum(sizes))
    with torch.no_grad():
        expected = stock()(ids).logits
    logits = call_directly(PrunedCache(shared(), policy), ids, sizes)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@evicting_and_packing
@given(sizes=sizes)
def test_direct_calls_without_position_ids_use_logical_positions(policy, sizes):
    """After evictions too, a call without positions is the call with the positions of the whole sequence."""
    batch = left_padded([40 + sum(sizes)])
    implicit, explicit = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    logits = call_directly(implicit, batch["input_ids"], [40, *sizes])
    torch.testing.assert_close(logits, feed(shared(), batch, explicit, [40, *sizes]), atol=0, rtol=0)


# -- drafts that may be taken back -----------------------------------------------------------------------------------


def repetitive(length: int) -> dict[str, Tensor]:
    """A prompt in which every pair of tokens has come before, so that a lookup always finds a draft."""
    return as_batch(token_ids(1, 7).repeat(1, length)[:, :length])


@full_budget
@given(length=st.integers(10, 40), draft=st.integers(1, 6))
def test_prompt_lookup_at_full_budget_equals_greedy(policy, length, draft):
    """Prompt-lookup decoding gives the greedy ids of the stock cache."""
    batch = repetitive(length)
    cache = PrunedCache(shared(), policy)
    ids = generate(shared(), batch, 15, **cache_argument(cache), prompt_lookup_num_tokens=draft)
    assert torch.equal(ids, generate(stock(), batch, 15))
    assert cache.seen_tokens == length + 14


@evicting_and_packing
@given(length=st.integers(20, 40), draft=st.integers(1, 6))
def test_prompt_lookup_with_evictions_is_bounded_and_ends_at_the_budget(policy, length, draft):
    """Prompt-lookup decoding never holds more than budget and draft, and leaves exactly the budget."""
    spy = Spy()
    cache = PrunedCache(shared(), policy | spy)
    generate(shared(), repetitive(length), 15, **cache_argument(cache), prompt_lookup_num_tokens=draft)
    # What is observed is what crop() accepted; the first step brings the prompt.
    assert max(spy.peaks[1:]) <= BUDGET + 1 + draft
    assert cache.seen_tokens == length + 14 == sum(spy.queries)
    for layer in kept_everywhere(cache):
        assert all(len(head) == BUDGET and head[-1] == cache.seen_tokens - 1 for head in layer)


def test_a_turn_after_prompt_lookup_is_a_prompt_again():
    """A turn that follows one with prompt lookup is compressed as a prompt, not kept as a draft of generated text."""
    cache = PrunedCache(shared(), SnapKV(0.5, sinks=1, window=4))
    ids = generate(shared(), repetitive(30), 5, **cache_argument(cache), prompt_lookup_num_tokens=3)
    ids = torch.cat([ids, token_ids(1, 30)], dim=1)
    generate(shared(), as_batch(ids), 2, **cache_argument(cache))
    assert cache.seen_tokens == 66
    # Half of the 65 tokens of the chat, and the one that was generated since.
    assert all(len(head) == 33 + 1 for layer in kept_everywhere(cache) for head in layer)


@crossed(policy=ALL | PACKING, assistant_seed={"assistant that is right": 0, "assistant that is wrong": 1})
def test_assisted_decoding(policy, assistant_seed):
    """An assistant model, whether its drafts are accepted or not, leaves the ids or at least the sizes in order."""
    batch = left_padded([30])
    assistant = build("llama", seed=assistant_seed)
    assistant.generation_config.num_assistant_tokens = 4
    cache = PrunedCache(shared(), policy)
    ids = generate(shared(), batch, 15, **cache_argument(cache), assistant_model=assistant)
    assert cache.seen_tokens == ids.shape[1] - 1 == 44
    if policy in FULL_BUDGET.values():
        assert torch.equal(ids, generate(stock(), batch, 15))
    else:
        assert all(len(head) == BUDGET for layer in kept_everywhere(cache) for head in layer)


@full_budget
@given(accepted=st.integers(0, 12), rejected=st.integers(0, 8))
def test_crop_forgets_exactly_the_newest_tokens(policy, accepted, rejected):
    """After crop(-k) the model goes on as if the newest k tokens had never come."""
    batch, taken_back = left_padded([45, 30]), left_padded([45, 45], seed=1)
    begin = 22 + accepted
    mixed = {name: torch.cat([batch[name][:, :begin], taken_back[name][:, begin:]], dim=1) for name in batch}
    cache, straight = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    feed(shared(), mixed, cache, [22, accepted + rejected] if accepted + rejected else [22])
    cache.crop(-rejected)
    assert cache.seen_tokens == begin
    feed(shared(), batch, straight, [begin])
    logits = feed(shared(), batch, cache, [1], begin=begin)
    torch.testing.assert_close(logits, feed(shared(), batch, straight, [1], begin=begin), atol=1e-4, rtol=1e-4)
    assert kept_everywhere(cache) == kept_everywhere(straight)
    assert kept_everywhere(cache, 1) == kept_everywhere(straight, 1)


@all_policies
@given(accepted=st.integers(1, 6), rejected=st.integers(0, 6), lengths=st.sampled_from([[30], [30, 9], [25, 30, 30]]))
def test_rejected_drafts_leave_no_trace_while_the_past_is_recorded(policy, accepted, rejected, lengths):
    """While the past is recorded, a step cropped to its accepted tokens leaves what a step of just those leaves."""
    batch = left_padded([length + 12 for length in lengths])
    drafting, straight = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    prompt = batch["input_ids"].shape[1] - 12
    for cache, extra in ((drafting, rejected), (straight, 0)):
        cache.activate_past_recording()
        for begin, count in ((0, prompt), (prompt, accepted), (prompt + accepted, 1)):
            draft = extra if begin == prompt else 0
            feed(shared(), batch, cache, [count + draft], begin=begin)
            cache.crop(-draft)
    assert drafting.seen_tokens == straight.seen_tokens == prompt + accepted + 1
    for row in range(len(lengths)):
        assert_same_rows(drafting, straight, row, row, atol=1e-5, rtol=1e-4)


def test_policies_are_told_of_the_tokens_so_far_while_the_past_is_recorded():
    """Of a long step, the newest 128 tokens wait for crop; what is observed before them counts none of them."""
    told = []

    @dataclass(frozen=True)
    class Listener(Policy):
        def observe(self, table, step):
            told.append((step.layer, step.queries, step.tokens, int(step.query_positions.max()) + 1))

    cache = PrunedCache(shared(), Listener())
    cache.activate_past_recording()
    batch = left_padded([300])
    feed(shared(), batch, cache, [290])
    cache.crop(-20)
    layers = range(shared().config.num_hidden_layers)
    assert told == [(layer, 162, 162, 162) for layer in layers] + [(layer, 108, 270, 270) for layer in layers]


@evicting_and_packing
def test_decisions_wait_for_crop_while_the_past_is_recorded(policy):
    """While the past is recorded, nothing is evicted in a step; crop(0), or else the next step, ends it."""
    batch = left_padded([40])
    cache = PrunedCache(shared(), policy)
    cache.activate_past_recording()
    feed(shared(), batch, cache, [30])
    assert kept(cache, 0) == [list(range(30))] * 2
    cache.crop(0)
    assert [len(head) for head in kept(cache, 0)] == [BUDGET] * 2
    feed(shared(), batch, cache, [4], begin=30)
    assert [len(head) for head in kept(cache, 0)] == [BUDGET + 4] * 2
    feed(shared(), batch, cache, [2], begin=34)
    assert [len(head) for head in kept(cache, 0)] == [BUDGET + 2] * 2


@given(accepted=st.lists(st.integers(1, 5), min_size=1, max_size=8), interval=st.integers(2, 6))
def test_every_accepted_token_counts_towards_the_interval(accepted, interval):
    """Evictions come when another interval of generated tokens is full, however many of them a step accepts."""
    cache = PrunedCache(shared(), A2SF(BUDGET, sinks=2, recent=3, interval=interval))
    cache.activate_past_recording()
    batch = left_padded([30 + sum(accepted) + 2])
    feed(shared(), batch, cache, [30])
    cache.crop(0)
    generated, size = 0, BUDGET
    for count in accepted:
        feed(shared(), batch, cache, [count + 2], begin=30 + generated)
        cache.crop(-2)
        due = (generated + count) // interval > generated // interval
        generated, size = generated + count, BUDGET if due else size + count
        assert [len(head) for head in kept(cache, 0)] == [size] * 2


@evicting_and_packing
@given(remove=st.integers(1, 45))
def test_crop_refuses_what_was_evicted(policy, remove):
    """Rows that are gone cannot come back: crop raises CacheError, and the cache is as it was."""
    batch = left_padded([50, 40])
    cache = PrunedCache(shared(), policy)
    feed(shared(), batch, cache, [40, 1, 1])
    before = copied_rows(cache)
    with pytest.raises(CacheError):
        cache.crop(-remove)
    assert_unchanged(cache, before, 42)
    untouched = PrunedCache(shared(), policy)
    feed(shared(), batch, untouched, [40, 1, 1])
    logits = feed(shared(), batch, cache, [1, 3], begin=42)
    torch.testing.assert_close(logits, feed(shared(), batch, untouched, [1, 3], begin=42), atol=0, rtol=0)


wide_turns = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(2, 4))


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@given(turns=st.lists(wide_turns, min_size=1, max_size=3), left=st.integers(0, 30), recording=st.booleans())
@example(turns=[(1, 1, 0)], left=0, recording=False)  # a table of one slot, whose strides mean nothing
@example(turns=[(4, 4, 0)], left=0, recording=True)  # rows that are still where the model has put them
def test_crop_goes_by_columns_whatever_the_padding(kernels, turns, left, recording):
    """Turns of two sequences, padded wider than either needs, can be taken back to any column, the first included."""
    widths = [max(first, second) + padding for first, second, padding in turns]
    masks = [left_padded([first, second], width=width)["attention_mask"]
             for (first, second, _), width in zip(turns, widths, strict=True)]  # fmt: skip
    left = min(left, sum(widths))
    fed = masked_ids(torch.cat(masks, dim=1), seed=0)
    batch = masked_ids(torch.cat([fed["attention_mask"][:, :left], torch.ones(2, 3, dtype=torch.long)], dim=1), seed=0)
    cropped, straight = (PrunedCache(shared(), Full(), kernels=kernels) for _ in range(2))
    if recording:
        cropped.activate_past_recording()
    feed(shared(), fed, cropped, widths)
    cropped.crop(left - sum(widths))
    assert cropped.seen_tokens == left
    logits = feed(shared(), batch, cropped, [1, 1, 1], begin=left)
    expected = feed(shared(), batch, straight, [left, 1, 1, 1] if left else [1, 1, 1])
    torch.testing.assert_close(logits, expected[:, left:], atol=1e-5, rtol=1e-4)
    for row in range(2):
        assert_same_rows(cropped, straight, row, row, atol=1e-5, rtol=1e-4)


def test_recording_that_began_too_late_for_a_window_takes_nothing_back():
    """Where a sliding window had moved on before the past was recorded, crop raises, and changes nothing."""
    windows_are_recorded("qwen3-hybrid")
    model, batch = shared("qwen3-hybrid"), left_padded([33])
    cache, untouched = PrunedCache(model, Full()), PrunedCache(model, Full())
    for one in (cache, untouched):
        feed(model, batch, one, [30])
        one.activate_past_recording()
        feed(model, batch, one, [2], begin=30)
    with pytest.raises(CacheError):
        cache.crop(-3)
    cache.crop(-2)
    untouched.crop(-2)
    logits = [feed(model, batch, one, [2, 1], begin=30) for one in (cache, untouched)]
    torch.testing.assert_close(*logits, atol=0, rtol=0)


@pytest.mark.parametrize("remove", [1, -21, 5, -1000])
def test_crop_refuses_numbers_without_meaning(remove):
    """A positive number, or more tokens than there are, raises CacheError and changes nothing."""
    cache = PrunedCache(shared(), Full())
    feed(shared(), left_padded([20]), cache, [20])
    before = copied_rows(cache)
    with pytest.raises(CacheError):
        cache.crop(remove)
    assert_unchanged(cache, before, 20)


def test_crop_that_a_sliding_layer_refuses_changes_no_layer():
    """Where a sliding-window layer cannot be cropped, crop raises and the pruned layers are as they were, too."""
    model = shared("qwen3-hybrid")
    cache = PrunedCache(model, Full())
    feed(model, left_padded([30]), cache, [30])
    before = copied_rows(cache)
    with pytest.raises((CacheError, RuntimeError)):
        cache.crop(-2)
    assert {layer.get_seq_length() for layer in cache.layers} == {30}
    assert_unchanged(cache, before, 30)


def test_crop_of_an_empty_cache_by_zero_is_nothing():
    """crop(0) before the first token does nothing."""
    cache = PrunedCache(shared(), Full())
    cache.crop(0)
    assert cache.seen_tokens == 0


# -- reset -----------------------------------------------------------------------------------------------------------


@all_and_packing
@given(first=lengths, second=lengths)
def test_reset_makes_a_new_cache_of_it(policy, first, second):
    """After reset() a cache does with any other batch what a new one does."""
    cache, new = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    generate(shared(), left_padded(first), 6, **cache_argument(cache))
    cache.reset()
    assert cache.seen_tokens == 0
    assert cache.nbytes == 0
    batch = left_padded(second, seed=1)
    ids = generate(shared(), batch, 6, **cache_argument(cache))
    assert torch.equal(ids, generate(shared(), batch, 6, **cache_argument(new)))
    for row in range(len(second)):
        assert_same_rows(cache, new, row, row)


@crossed(policy=EVICTING | PACKING, family=["llama", "qwen3-hybrid"])
def test_reset_ends_the_recording_of_the_past(policy, family):
    """After reset() of a cache that recorded the past, evictions wait for nothing, and windows move on."""
    model = shared(family)
    cache, new = PrunedCache(model, policy), PrunedCache(model, policy)
    generate(model, repetitive(30), 6, **cache_argument(cache), prompt_lookup_num_tokens=3)
    cache.reset()
    for one in (cache, new):
        feed(model, left_padded([30]), one, [25, 1, 1])
    assert_same_rows(cache, new)
    assert cache.nbytes == new.nbytes


@pytest.mark.parametrize("policy", [TOVA(8, interval=6), TOVA(9, interval=6) | TOVA(8, interval=6)], ids=str)
def test_a_chunk_that_is_padding_to_a_sequence_evicts_by_the_scores_it_had(policy):
    """Where a chunk of a turn brings tokens to other sequences alone, no query has said anything new of this one."""
    batch = left_padded([28, 28], seed=5)
    batch["attention_mask"][1, 24:] = 0
    cache = PrunedCache(shared(), policy)
    feed(shared(), batch, cache, [20, 1, 1, 1, 1])
    before = rows(cache, 0, 1)
    feed(shared(), batch, cache, [4], begin=24)
    score = next(column for name, column in before.items() if name.endswith("score"))
    assert score.shape[1] == 12
    for head in range(2):
        best = score[head, :-1].topk(7).indices.sort().values
        assert kept(cache, 0, 1)[head] == before["positions"][head, [*best, -1]].tolist()


@pytest.mark.parametrize("policy", [*EVICTING.values(), *PACKING.values(), ZipCache(buffer=4, kernel_size=3)], ids=str)
def test_a_step_of_nothing_but_padding(policy):
    """A chunk in which no sequence has begun leaves no rows, and no trace in what comes after."""
    batch = left_padded([20, 12], width=26)
    cache, straight = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    feed(shared(), batch, cache, [4])
    assert cache.kept_positions(0).shape == (2, 2, 0)
    feed(shared(), batch, cache, [22], begin=4)
    feed(shared(), batch, straight, [26])
    for row in range(2):
        assert_same_rows(cache, straight, row, row, atol=1e-5, rtol=1e-4)


def test_another_batch_size_is_refused():
    """Tokens of another batch size raise CacheError, and the cache goes on with its own."""
    batch = left_padded([30, 20])
    cache, untouched = (PrunedCache(shared(), EVICTING["a2sf"]) for _ in range(2))
    for one in (cache, untouched):
        feed(shared(), batch, one, [20])
    with pytest.raises(CacheError):
        feed(shared(), left_padded([30, 30, 30]), cache, [1], begin=20)
    for one in (cache, untouched):
        feed(shared(), batch, one, [5], begin=20)
    assert_same_rows(cache, untouched)


# -- the batch changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [*EVICTING.values(), A2SF(0.4, sinks=2, recent=3)], ids=[*EVICTING, "a fraction of each prompt"]
)
@given(indices=st.lists(st.integers(0, 2), min_size=1, max_size=5), by=st.sampled_from(["select", "reorder"]))
def test_selecting_sequences_moves_every_column(policy, indices, by):
    """batch_select_indices and reorder_cache move keys, values, positions and policy columns alike, also later on."""
    batch = left_padded([48, 31, 20])
    cache, before = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    for one in (cache, before):
        feed(shared(), batch, one, [40, 1, 1])
    (cache.batch_select_indices if by == "select" else cache.reorder_cache)(torch.tensor(indices))
    for row, source in enumerate(indices):
        assert_same_rows(cache, before, row, source)
    moved = {name: tensor[indices] for name, tensor in batch.items()}
    logits = feed(shared(), moved, cache, [1, 1, 4], begin=42)
    expected = feed(shared(), batch, before, [1, 1, 4], begin=42)
    torch.testing.assert_close(logits, expected[indices], atol=1e-4, rtol=1e-4)
    for row, source in enumerate(indices):
        assert_same_rows(cache, before, row, source, atol=1e-4, rtol=1e-4)


@crossed(policy=EVICTING | PACKING, mask=[[True, False, True], [False, True, False], [True, True, True]])
def test_selecting_sequences_by_a_boolean_mask(policy, mask):
    """batch_select_indices takes a boolean mask as well as indices."""
    batch = left_padded([40, 31, 20])
    cache, before = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    for one in (cache, before):
        feed(shared(), batch, one, [38, 1, 1])
    cache.batch_select_indices(torch.tensor(mask))
    assert cache.kept_positions(0).shape[0] == sum(mask)
    for row, source in enumerate(index for index, stays in enumerate(mask) if stays):
        assert_same_rows(cache, before, row, source)


@evicting_and_packing
@given(repeats=st.integers(1, 4))
def test_batch_repeat_interleave_repeats_every_column(policy, repeats):
    """batch_repeat_interleave puts every sequence, with all its columns, so many times side by side."""
    batch = left_padded([40, 25])
    cache, before = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    for one in (cache, before):
        feed(shared(), batch, one, [35, 1])
    cache.batch_repeat_interleave(repeats)
    assert cache.kept_positions(0).shape[0] == 2 * repeats
    for row in range(2 * repeats):
        assert_same_rows(cache, before, row, row // repeats)


@evicting
@given(data=st.data(), length=st.integers(10, 30))
def test_beams_keep_what_each_of_them_would_keep_alone(policy, data, length):
    """However beams are reordered, each keeps the rows of its own history decoded without beams."""
    beams, prompt = 3, token_ids(1, length)
    cache = PrunedCache(shared(), policy)
    feed(shared(), as_batch(prompt), cache, [length])
    cache.batch_repeat_interleave(beams)
    history = prompt.repeat(beams, 1)
    for _ in range(6):
        order = torch.tensor(data.draw(st.lists(st.integers(0, beams - 1), min_size=beams, max_size=beams)))
        chosen = torch.tensor(data.draw(st.lists(st.integers(1, 96), min_size=beams, max_size=beams)))
        cache.reorder_cache(order)
        history = torch.cat([history[order], chosen[:, None]], dim=1)
        feed(shared(), as_batch(history), cache, [1], begin=history.shape[1] - 1)
    for beam in range(beams):
        alone = PrunedCache(shared(), policy)
        feed(shared(), as_batch(history[beam : beam + 1]), alone, [length] + [1] * 6)
        assert_same_rows(cache, alone, beam, 0, atol=1e-4, rtol=1e-4)


@crossed(policy=EVICTING, lengths=[[40], [40, 25], [12, 40]])
def test_returning_a_sequence_twice_equals_returning_it_once(policy, lengths):
    """Identical samples of a prompt get the ids and keep the rows of a single greedy run."""
    batch = left_padded(lengths)
    cache, single = PrunedCache(shared(), policy), PrunedCache(shared(), policy)
    same = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    ids = generate(shared(), batch, 10, **cache_argument(cache), **same)
    assert torch.equal(ids, generate(shared(), batch, 10, **cache_argument(single)).repeat_interleave(2, dim=0))
    for row in range(2 * len(lengths)):
        assert_same_rows(cache, single, row, row // 2, atol=1e-4, rtol=1e-4)


# -- fork --------------------------------------------------------------------------------------------------------------


@crossed(policy=ALL | PACKING, family=["llama", "qwen3-hybrid"], recording={"": False, "recording": True})
def test_forks_are_independent(policy, family, recording):
    """What happens to a fork leaves the original alone, and each goes on as a cache that was never forked."""
    if recording:
        windows_are_recorded(family)
    model, question, other = shared(family), left_padded([40, 25]), left_padded([40, 40], seed=1)
    document = 30
    caches = [PrunedCache(model, policy) for _ in range(3)]
    original, straight, straight_other = caches
    for one in caches:
        if recording:
            one.activate_past_recording()
        feed(model, question, one, [document])
    fork = original.fork()
    before = copied_rows(original)
    other = {name: torch.cat([question[name][:, :document], other[name][:, document:]], dim=1) for name in other}
    logits = feed(model, other, fork, [5, 1, 1], begin=document)
    assert_unchanged(original, before, document)
    expected = feed(model, other, straight_other, [5, 1, 1], begin=document)
    torch.testing.assert_close(logits, expected, atol=0, rtol=0)
    logits = feed(model, question, original, [1, 1, 4], begin=document)
    torch.testing.assert_close(logits, feed(model, question, straight, [1, 1, 4], begin=document), atol=0, rtol=0)
    for row in range(2):
        assert_same_rows(original, straight, row, row)
        assert_same_rows(fork, straight_other, row, row)


# -- what it holds -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["empty", "llama", "qwen3-hybrid"])
def reported(request) -> PrunedCache:
    """A cache to report on: one without tokens, and padded batches of a pruned and of a hybrid model."""
    family = "llama" if request.param == "empty" else request.param
    cache = PrunedCache(shared(family), EVICTING["a2sf"])
    if request.param != "empty":
        generate(shared(family), left_padded([40, 10]), 5, **cache_argument(cache))
    return cache


def test_report_counts_what_the_cache_holds(reported):
    """A report has the cache's bytes and tokens, in all and layer by layer."""
    report = reported.report()
    assert report.seen_tokens == reported.seen_tokens
    assert report.nbytes == reported.nbytes
    assert report.dense_nbytes == reported.dense_nbytes
    assert [layer.index for layer in report.layers] == list(range(len(reported.layers)))
    for layer in report.layers:
        if layer.positions is not None:
            assert torch.equal(layer.positions, reported.kept_positions(layer.index))
            assert layer.rows == BUDGET
    assert report.ratio == (reported.nbytes / reported.dense_nbytes if reported.seen_tokens else 1)


def test_report_says_where_a_fraction_was_raised():
    """Of a short prompt, sinks and recent tokens are kept, however small the fraction."""
    for policy, length, told in (
        (A2SF(0.25), 10, ("A2SF: 0.25 of 10 prompt tokens is 3: raised to 36 (sinks and recent)",)),
        (A2SF(0.25), 144, ()),
        (A2SF(40), 10, ()),
        (A2SF("0.25b"), 10,
         ("A2SF: 0.25b of 10 prompt tokens, 320 bytes, is 1: raised to 36 (sinks and recent)",)),
        (GemFilter(0.1, keep_last=5) | A2SF(0.5, recent=2), 30,
         ("GemFilter: 0.1 of 30 prompt tokens is 3: raised to 5 (keep_first and keep_last)",)),
    ):  # fmt: skip
        cache = PrunedCache(shared(), policy)
        feed(shared(), left_padded([length, length + 5]), cache, [length + 5])
        assert cache.report().notes == told
        assert all(note in " ".join(str(cache.report()).split()) for note in told)


@pytest.mark.parametrize("path", ["missing/kept.png", "kept.nothing"])
def test_pictures_that_cannot_be_written(reported, path, tmp_path):
    with pytest.raises(CacheError, match="no picture"):
        reported.report().plot(tmp_path / path)


def test_report_is_plain_data(reported):
    """to_dict() goes through JSON unchanged."""
    data = reported.report().to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["nbytes"] == reported.nbytes == sum(layer["nbytes"] for layer in data["layers"])


def test_report_is_a_table(reported):
    """str(report) names the policy, and layers that are alike share a line; repr(cache) is one line."""
    report = reported.report()
    text = str(report)
    assert "A2SF" in text
    assert "A2SF" in repr(reported)
    assert ("no tokens yet" in text) == (reported.seen_tokens == 0)
    assert "A2SF" in report._repr_html_()
    if reported.seen_tokens:
        assert {layer.kind for layer in report.layers} >= {"pruned"}
        assert all(f" {layer.kind} " in text for layer in report.layers)


def lines_of(report) -> list[tuple[str, ...]]:
    """The cells of the lines of a report's table."""
    columns = [list(column.cells) for column in report.__rich__().columns]
    return list(zip(*columns, strict=True))


def layer_report(index: int, rows: int, kind: str = "pruned") -> LayerReport:
    return LayerReport(index, kind, 100 * rows, 90 * rows, 90_000, torch.arange(rows).expand(1, 2, rows))


def test_report_is_one_screen():
    """Layers that are alike share a line with the bytes of all of them; of many that differ, neighbours do."""
    alike = CacheReport("Some", 1000, tuple(layer_report(index, 10) for index in range(40)))
    ((layers, kind, rows, _, total, _, ratio),) = lines_of(alike)
    assert (layers, kind, rows, ratio) == ("0-39", "pruned", "10", f"{alike.ratio:.1%}")
    assert total == human_bytes(alike.nbytes)
    mixed = CacheReport("Some", 1000, tuple(layer_report(i, 10, "pruned" if i % 2 else "window") for i in range(4)))
    assert [line[0] for line in lines_of(mixed)] == ["0", "1", "2", "3"]
    pyramid = CacheReport("Some", 1000, tuple(layer_report(index, 100 - index) for index in range(40)))
    lines = lines_of(pyramid)
    assert len(lines) <= 16
    assert lines[0][:3] == ("0-2", "pruned", "98-100")
    assert lines[-1][0] == "39"


def test_report_says_what_a_policy_does():
    kinds = {Full(): "full", KIVI(): "packed", A2SF(40) | KIVI(): "pruned, packed", GemFilter(40): "filtered"}
    for policy, kind in kinds.items():
        cache = PrunedCache(shared(), policy)
        feed(shared(), left_padded([20]), cache, [20])
        report = cache.report()
        assert {layer.kind for layer in report.layers} == {kind}
        assert ("more than a dense cache" in " ".join(str(report).split())) == (report.nbytes > report.dense_nbytes)


def test_report_is_a_picture(reported, tmp_path):
    """plot() writes a picture where it was asked to."""
    path = tmp_path / "kept.png"
    assert reported.report().plot(path) == path
    assert path.read_bytes().startswith(b"\x89PNG")


@all_and_packing
@pytest.mark.parametrize("family", ["llama", "qwen3-hybrid"])
@pytest.mark.parametrize("recording", [False, True], ids=["", "recording"])
@given(lengths=lengths, decoded=st.integers(0, 5))
def test_nbytes_is_the_sum_of_the_storages(policy, family, recording, lengths, decoded):
    """nbytes counts the storage of every tensor the cache holds: rows, spare slots, remembered queries, windows."""
    if recording:
        windows_are_recorded(family)
    cache = PrunedCache(shared(family), policy)
    if recording:
        cache.activate_past_recording()
    batch = left_padded([length + decoded for length in lengths])
    for _ in stepwise(shared(family), batch, cache, [max(lengths)] + [1] * decoded):
        assert cache.nbytes == storage_nbytes(cache)


@pytest.mark.parametrize("family", ["llama", "qwen3-hybrid", "gpt2"])
@given(lengths=lengths, decoded=st.integers(0, 5))
def test_dense_nbytes_is_what_the_stock_cache_holds(family, lengths, decoded):
    """dense_nbytes is the bytes of keys and values that a DynamicCache holds for the same tokens, padding included."""
    model, batch = shared(family), left_padded([length + decoded for length in lengths])
    dense, cache = DynamicCache(config=model.config), PrunedCache(model, EVICTING["a2sf"])
    for one in (dense, cache):
        feed(model, batch, one, [max(lengths)] + [1] * decoded)
    held = [tensor.nbytes for layer in dense.layers for tensor in (layer.keys, layer.values)]
    assert cache.dense_nbytes == sum(held)


def test_rows_are_freed():
    """A cache that evicts holds far fewer bytes than the dense one."""
    cache = PrunedCache(shared(), EVICTING["a2sf"])
    feed(shared(), left_padded([400]), cache, [400])
    assert cache.nbytes < cache.dense_nbytes / 10


@evicting
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=repr)
def test_device_argument(policy, device):
    """A cache on a device that was named does what a cache on the model's device does."""
    batch = left_padded([40, 20])
    named, default = PrunedCache(shared(), policy, device=device), PrunedCache(shared(), policy)
    ids = generate(shared(), batch, 6, **cache_argument(named))
    assert torch.equal(ids, generate(shared(), batch, 6, **cache_argument(default)))
    assert_same_rows(named, default)
    assert rows(named, 0)["keys"].device == torch.device("cpu")


@all_policies
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_finite(policy, dtype):
    """Models in half precision give finite logits, and keep their scores in float32."""
    model = build("llama", dtype=dtype)
    cache = PrunedCache(model, policy)
    batch = left_padded([40, 20])
    out = generate(
        model, batch, 8, **cache_argument(cache), output_logits=True, return_dict_in_generate=True
    )  # fmt: skip
    assert all(logits.isfinite().all() for logits in out.logits)
    held = rows(cache, 0)
    assert {held["keys"].dtype, held["values"].dtype} == {dtype}
    assert all(held[name].dtype == torch.float32 for name in held if name.startswith("column."))
    assert all(tensor.isfinite().all() for tensor in held.values())


# -- chains --------------------------------------------------------------------------------------------------------


def test_a_chain_of_chains_is_one_chain():
    """However links were put together, each of them runs."""
    first, second, third = H2O(24, sinks=2, recent=3), A2SF(20, sinks=2, recent=3), TOVA(BUDGET)
    nested = Chain((Chain((first, second)), third))
    assert nested == first | second | third == first | (second | third)
    cache = PrunedCache(shared(), nested)
    generate(shared(), left_padded([40]), 5, **cache_argument(cache))
    assert all(len(head) == BUDGET for layer in kept_everywhere(cache) for head in layer)
