"""GemFilter against its formula, and against a stock model that is given only the chosen tokens.

The reference captures queries and keys of the choosing layer in a stock copy of the model, ranks the tokens one by one,
and hands the chosen ids to a stock model as if they were the whole prompt: nothing of kvprune is in it.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from families import (
    FAMILIES,
    STOCK_ONLY,
    PrunedCache,
    Spy,
    build,
    feed,
    generate,
    kept,
    left_padded,
    sequence,
    shared,
    stepwise,
    stock,
    token_ids,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    DynamicCache,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Qwen3NextConfig,
)
from transformers.masking_utils import eager_mask
from typer.testing import CliRunner

from kvprune import BudgetError, CacheError, Policy, PolicyError, Step, TokenTable, UnsupportedModelError
from kvprune.cache.models import cache_argument
from kvprune.cache.registration import base_attention
from kvprune.cli import app
from kvprune.policies import A2SF, KIVI, GemFilter, SnapKV, get

PRUNABLE = tuple(family for family in FAMILIES if family not in STOCK_ONLY)
HYBRIDS = ("qwen3-hybrid", "gemma2", "gemma3", "gpt-oss")

families = pytest.mark.parametrize("family", PRUNABLE)
seeds = st.integers(0, 2**16)

# -- the reference -----------------------------------------------------------------------------------------------------

captured: dict[int, tuple[Tensor, Tensor]] = {}


def _capturing(module, query, key, value, attention_mask, **settings):
    captured[module.layer_idx] = query, key
    return base_attention("eager", module)(module, query, key, value, attention_mask, **settings)


AttentionInterface.register("capturing", _capturing)
AttentionMaskInterface.register("capturing", eager_mask)


@cache
def capturing(family: str, **overrides):
    model = build(family, **overrides)
    model.set_attn_implementation("capturing")
    return model


@cache
def double():
    """A Llama for kvprune, one that it never touches, and one that captures."""
    settings = {"dtype": torch.float64, "num_hidden_layers": 3}
    return SimpleNamespace(
        pruned=build("llama", **settings), stock=build("llama", **settings), capturing=capturing("llama", **settings)
    )


@torch.no_grad()
def queries_and_keys(model, ids: Tensor, layer: int, past: DynamicCache | None = None) -> tuple[Tensor, Tensor]:
    """Of the new tokens of one sequence: query of the last `[Hq, D]` and keys, a copy for every query head."""
    length = 0 if past is None else past.get_seq_length()
    model(ids, **cache_argument(past or DynamicCache(config=model.config)))
    query, key = captured[layer]
    key = key[0].repeat_interleave(query.shape[1] // key.shape[1], dim=0)
    return query[0, :, -1], key[:, length:] if key.shape[1] > ids.shape[1] else key


def best(query: Tensor, keys: Tensor, budget: int, *, kernel_size=5, keep_first=0, keep_last=0) -> list[int]:
    """The formula, token by token."""
    tokens = keys.shape[1]
    z = [sum(float(q @ k[i]) for q, k in zip(query, keys, strict=True)) for i in range(tokens)]
    half = kernel_size // 2
    smooth = [sum(z[max(0, i - half) : i + half + 1]) / kernel_size for i in range(tokens)]
    forced = {*range(keep_first), *range(tokens - keep_last, tokens)}
    ranked = sorted(range(tokens), key=lambda i: (i in forced, smooth[i], i), reverse=True)
    return sorted(ranked[:budget])


def alone(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# -- what is chosen ----------------------------------------------------------------------------------------------------


@given(
    length=st.integers(2, 50),
    budget=st.integers(5, 30),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    keep_first=st.integers(0, 2),
    keep_last=st.integers(0, 3),
    layer=st.integers(0, 2),
    seed=seeds,
)
@example(length=40, budget=12, kernel_size=5, keep_first=0, keep_last=0, layer=1, seed=0)
def test_chooses_by_the_formula_and_runs_on_nothing_else(
    length, budget, kernel_size, keep_first, keep_last, layer, seed
):
    """The chosen positions are those of the formula; what follows is what a stock model makes of those ids alone."""
    ids, models = token_ids(1, length, seed=seed), double()
    settings = {"kernel_size": kernel_size, "keep_first": keep_first, "keep_last": keep_last}
    pruned = PrunedCache(models.pruned, GemFilter(budget, layer=layer, **settings))
    found = generate(models.pruned, alone(ids), 5, **cache_argument(pruned))
    if length <= budget:
        assert pruned.selected_positions is None
        assert torch.equal(found, generate(models.stock, alone(ids), 5))
        return
    chosen = best(*queries_and_keys(models.capturing, ids, layer), budget, **settings)
    assert [positions.tolist() for positions in pruned.selected_positions] == [chosen]
    expected = generate(models.stock, alone(ids[:, chosen]), 5)
    assert found[0, length:].tolist() == expected[0, budget:].tolist()


@families
def test_every_family_goes_on_as_if_the_chosen_tokens_were_the_prompt(family):
    """Selection, greedy ids and logits, with a prompt beyond any sliding window."""
    model, ids = shared(family), token_ids(1, 48, seed=3)
    pruned = PrunedCache(model, GemFilter(20))
    settings = {"return_dict_in_generate": True, "output_logits": True}
    found = generate(model, alone(ids), 8, **cache_argument(pruned), **settings)
    chosen = best(*queries_and_keys(capturing(family), ids, pruned.filter_layer), 20)
    assert pruned.selected_positions[0].tolist() == chosen
    expected = generate(stock(family), alone(ids[:, chosen]), 8, **settings)
    assert torch.equal(found.sequences[:, 48:], expected.sequences[:, 20:])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


@families
def test_a_prompt_within_the_budget_is_left_alone(family):
    """Ids and logits are those of the stock cache, in a padded batch."""
    batch = left_padded([30, 21], seed=2)
    settings = {"return_dict_in_generate": True, "output_logits": True}
    pruned = PrunedCache(shared(family), GemFilter(30))
    found = generate(shared(family), batch, 6, **cache_argument(pruned), **settings)
    expected = generate(stock(family), batch, 6, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert pruned.selected_positions is None
    assert pruned.report().selected is None


@given(tokens=st.integers(2, 60), count=st.integers(1, 59), kernel_size=st.sampled_from([1, 3, 5]), seed=seeds)
def test_what_a_selection_promises(tokens, count, kernel_size, seed):
    """Ascending, unique, of the size asked for; the scale of queries and the order of heads do not matter."""
    count = min(count, tokens - 1)
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(6, 8, generator=random, dtype=torch.float64)
    keys = torch.randn(3, tokens, 8, generator=random, dtype=torch.float64)
    policy = GemFilter(kernel_size=kernel_size)
    chosen = policy.choose(query, keys, count).tolist()
    assert len(chosen) == count
    assert chosen == sorted({*chosen})
    assert chosen[0] >= 0
    assert chosen[-1] < tokens
    assert policy.choose(7.5 * query, keys, count).tolist() == chosen
    assert policy.choose(query.unflatten(0, (3, 2)).flip(0, 1).flatten(0, 1), keys.flip(0), count).tolist() == chosen
    if count + 1 < tokens:
        assert {*chosen} <= {*policy.choose(query, keys, count + 1).tolist()}


def test_ties_go_to_the_more_recent_token():
    assert GemFilter(kernel_size=1).choose(torch.ones(2, 4), torch.ones(1, 9, 4), 3).tolist() == [6, 7, 8]


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -float("inf")])
def test_the_ends_stay_whatever_the_scores(wild):
    keys = torch.randn(2, 30, 8)
    keys[:, 3:20] = wild
    chosen = GemFilter(8, keep_first=2, keep_last=3).choose(torch.randn(4, 8), keys, 8).tolist()
    assert {0, 1, 27, 28, 29} <= {*chosen}
    assert len({*chosen}) == 8


# -- batches -----------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=3),
    padding=st.integers(0, 5),
    budget=st.one_of(st.integers(1, 20), st.integers(1, 20).map(lambda n: n / 20)),
    seed=seeds,
)
@example(lengths=[30, 3], padding=2, budget=12, seed=1)  # one is filtered, one keeps all
def test_a_padded_batch_equals_each_sequence_alone(lengths, padding, budget, seed):
    batch, model = left_padded(lengths, width=max(lengths) + padding, seed=seed), double().pruned
    policy = GemFilter(budget, layer=1)
    together = PrunedCache(model, policy)
    found = generate(model, batch, 6, **cache_argument(together))
    for row, length in enumerate(lengths):
        one = PrunedCache(model, policy)
        expected = generate(model, sequence(batch, row), 6, **cache_argument(one))
        assert found[row, -6:].tolist() == expected[0, -6:].tolist()
        assert [kept(together, layer, row) for layer in range(3)] == [kept(one, layer) for layer in range(3)]
        if together.selected_positions is not None:
            chosen = [*range(length)] if one.selected_positions is None else one.selected_positions[0].tolist()
            assert together.selected_positions[row].tolist() == chosen


@pytest.mark.parametrize("family", HYBRIDS)
def test_sliding_windows_count_what_they_have_seen(family):
    """In a padded batch of a hybrid model, each sequence goes on like a stock model on its chosen tokens."""
    batch, model = left_padded([60, 12, 35], seed=4), shared(family)
    pruned = PrunedCache(model, GemFilter(22))
    found = generate(model, batch, 25, **cache_argument(pruned))
    assert pruned.seen_tokens == 84
    for row, chosen in enumerate(pruned.selected_positions):
        ids = sequence(batch, row)["input_ids"][:, chosen]
        assert found[row, 60:].tolist() == generate(stock(family), alone(ids), 25)[0, ids.shape[1] :].tolist()


def test_beams_are_those_of_the_chosen_tokens():
    ids, settings = token_ids(1, 40, seed=5), {"num_beams": 3, "num_return_sequences": 3}
    pruned = PrunedCache(double().pruned, GemFilter(14))
    found = generate(double().pruned, alone(ids), 8, **cache_argument(pruned), **settings)
    chosen = pruned.selected_positions[0]
    assert torch.equal(found[:, 40:], generate(double().stock, alone(ids[:, chosen]), 8, **settings)[:, 14:])
    assert len(pruned.selected_positions) == 3


def test_reordering_moves_what_was_chosen():
    """After `reorder_cache`, `batch_select_indices` and `batch_repeat_interleave` every sequence goes on as it was."""
    batch, model = left_padded([40, 9], seed=6), shared("gemma3")
    pruned = PrunedCache(model, GemFilter(12))
    generate(model, batch, 3, **cache_argument(pruned))
    before = [positions.tolist() for positions in pruned.selected_positions]
    expected = continued(model, pruned.fork())
    pruned.reorder_cache(torch.tensor([1, 0]))
    assert [positions.tolist() for positions in pruned.selected_positions] == before[::-1]
    torch.testing.assert_close(continued(model, pruned.fork(), columns=[1, 0]), expected[[1, 0]])
    pruned.batch_repeat_interleave(2)
    pruned.batch_select_indices(torch.tensor([3, 0]))
    assert [positions.tolist() for positions in pruned.selected_positions] == before
    torch.testing.assert_close(continued(model, pruned), expected)


@torch.no_grad()
def continued(model, pruned: PrunedCache, columns=(0, 1)) -> Tensor:
    """Logits of one more token, with and without being told positions, which must agree."""
    mask = left_padded([40, 9])["attention_mask"][list(columns)]
    mask = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], dim=1)
    ids, positions = token_ids(2, 1, seed=9)[:1].expand(2, -1), (mask.sum(1, keepdim=True) - 1)
    unsaid = model(ids, attention_mask=mask, **cache_argument(pruned.fork())).logits
    told = model(ids, attention_mask=mask, position_ids=positions, **cache_argument(pruned)).logits
    torch.testing.assert_close(unsaid, told)
    return told


def test_a_fork_goes_its_own_way_and_a_reset_starts_over():
    ids, model = token_ids(1, 40, seed=7), shared()
    pruned = PrunedCache(model, GemFilter(10))
    first = generate(model, alone(ids), 4, **cache_argument(pruned))
    other = pruned.fork()
    longer = torch.cat([first, token_ids(1, 30, seed=8)], dim=1)
    assert torch.equal(
        generate(model, alone(longer), 4, **cache_argument(pruned)),
        generate(model, alone(longer), 4, **cache_argument(other)),
    )
    assert other.selected_positions[0].tolist() == pruned.selected_positions[0].tolist()
    other.reset()
    assert other.selected_positions is None
    assert other.seen_tokens == 0
    assert torch.equal(generate(model, alone(ids), 4, **cache_argument(other)), first)


# -- positions, turns, chunks ------------------------------------------------------------------------------------------


def test_positions_are_those_of_the_whole_prompt():
    """The cache holds the chosen positions of the prompt, and the k-th generated token has position n + k."""
    batch, model = left_padded([40, 28], seed=9), shared()
    pruned = PrunedCache(model, GemFilter(11))
    generate(model, batch, 6, **cache_argument(pruned))
    assert pruned.get_seq_length() == pruned.seen_tokens == 45
    for row, length in enumerate([40, 28]):
        expected = pruned.selected_positions[row].tolist() + [*range(length, length + 5)]
        assert [head for layer in (0, 1) for head in kept(pruned, layer, row)] == [expected] * 4


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-hybrid"])
def test_a_second_turn_filters_what_is_new(family):
    """By its own last token, over what the cache holds; the model has then seen both selections and the answer."""
    model, ids = shared(family), token_ids(1, 40, seed=10)
    layer = model.config.num_hidden_layers - 1
    pruned = PrunedCache(model, GemFilter(16, layer=layer))
    answer = generate(model, alone(ids), 5, **cache_argument(pruned))
    first = ids[:, pruned.selected_positions[0]]
    question = token_ids(1, 30, seed=11)
    longer = torch.cat([answer, question], dim=1)

    held = torch.cat([first, answer[:, 40:]], dim=1)
    past = DynamicCache(config=stock(family).config)
    with torch.no_grad():
        stock(family)(held[:, :-1], **cache_argument(past))
    # The last token of the answer is new to the cache, too: generate() never fed it.
    new = torch.cat([answer[:, -1:], question], dim=1)
    chosen = best(*queries_and_keys(capturing(family), new, layer, past), 16)

    found = generate(model, alone(longer), 6, **cache_argument(pruned))
    assert pruned.selected_positions[0].tolist()[16:] == [44 + place for place in chosen]
    whole = torch.cat([held[:, :-1], new[:, chosen]], dim=1)
    assert found[0, -6:].tolist() == generate(stock(family), alone(whole), 6)[0, -6:].tolist()


@given(
    turns=st.lists(st.lists(st.integers(1, 25), min_size=2, max_size=2), min_size=2, max_size=3),
    budget=st.integers(1, 15),
    seed=seeds,
)
@example(turns=[[20, 20], [1, 12], [9, 2]], budget=1, seed=0)
def test_turns_that_are_padded_equal_each_sequence_alone(turns, budget, seed):
    """Turns that are each padded to the longest give every sequence the logits and tokens of its own turns."""
    assert_turns_equal_alone(double().pruned, turns, budget, seed)


@given(
    turns=st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=2), min_size=2, max_size=3),
    budget=st.integers(1, 4),
    seed=seeds,
)
@example(turns=[[1, 2], [1, 3]], budget=2, seed=0)  # padding that came before anything was filtered
def test_so_they_do_in_a_hybrid_model(turns, budget, seed):
    """Within a window, that is: a sliding window of transformers spans columns, padding between turns included."""
    assert_turns_equal_alone(hybrid_double(), turns, budget, seed)


def assert_turns_equal_alone(model, turns: list[list[int]], budget: int, seed: int) -> None:
    policy = GemFilter(budget, layer=1)
    pieces = [left_padded(turn, seed=seed + index) for index, turn in enumerate(turns)]
    batch = {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]}
    together = PrunedCache(model, policy)
    *_, logits = stepwise(model, batch, together, [max(turn) for turn in turns])
    for row in range(2):
        one = PrunedCache(model, policy)
        *_, expected = stepwise(model, sequence(batch, row), one, [turn[row] for turn in turns])
        torch.testing.assert_close(logits[row, -1], expected[0, -1], atol=1e-4, rtol=1e-4)
        assert [kept(together, layer, row) for layer in together.pruned_layers] == [
            kept(one, layer) for layer in one.pruned_layers
        ]


@cache
def hybrid_double():
    return build("gemma3", dtype=torch.float64)


@torch.no_grad()
def test_a_turn_of_one_chosen_token_is_still_a_prompt():
    @dataclass(frozen=True)
    class Prompts(Policy):
        said: list[bool] = field(default_factory=list, compare=False)

        def observe(self, table: TokenTable, step: Step) -> None:
            self.said.append(step.prefill)

    noted = Prompts()
    pruned = PrunedCache(shared(), GemFilter(1) | noted)
    for tokens in (20, 1, 10):
        shared()(token_ids(1, tokens), **cache_argument(pruned))
    assert noted.said == [True] * 2 + [False] * 2 + [True] * 2


def test_a_short_second_turn_is_read_in_full():
    model, ids = shared("gemma3"), token_ids(1, 40, seed=12)
    pruned = PrunedCache(model, GemFilter(16))
    answer = generate(model, alone(ids), 5, **cache_argument(pruned))
    longer = torch.cat([answer, token_ids(1, 9, seed=13)], dim=1)
    found = generate(model, alone(longer), 6, **cache_argument(pruned))
    whole = torch.cat([ids[:, pruned.selected_positions[0]], longer[:, 40:]], dim=1)
    assert found[0, -6:].tolist() == generate(stock("gemma3"), alone(whole), 6)[0, -6:].tolist()


def test_chunks_are_filtered_one_by_one():
    model = shared()
    pruned = PrunedCache(model, GemFilter(8))
    generate(model, alone(token_ids(1, 60, seed=14)), 3, **cache_argument(pruned), prefill_chunk_size=20)
    chosen = pruned.selected_positions[0].tolist()
    assert [sum(start <= position < start + 20 for position in chosen) for start in (0, 20, 40)] == [8, 8, 8]


@torch.no_grad()
def test_a_bare_forward_needs_neither_mask_nor_positions():
    ids, model = token_ids(2, 30, seed=15), shared("gpt2")
    pruned = PrunedCache(model, GemFilter(10))
    output = model(ids, **cache_argument(pruned), output_hidden_states=True)
    assert output.logits.shape[1] == output.hidden_states[0].shape[1] == 10
    chosen = torch.stack(pruned.selected_positions)
    past = DynamicCache(config=model.config)
    expected = stock("gpt2")(ids.gather(1, chosen), **cache_argument(past)).logits
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    more = token_ids(2, 1, seed=16)
    expected = stock("gpt2")(more, **cache_argument(past)).logits
    torch.testing.assert_close(model(more, **cache_argument(pruned)).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_arguments_may_come_by_place():
    ids, model = token_ids(1, 30, seed=15), shared()
    named, placed = PrunedCache(model, GemFilter(10)), PrunedCache(model, GemFilter(10))
    expected = model.model(input_ids=ids, **cache_argument(named))[0]
    assert torch.equal(model.model(ids, None, None, placed)[0], expected)
    assert named.selected_positions[0].tolist() == placed.selected_positions[0].tolist()


@torch.no_grad()
def test_types_are_chosen_with_their_tokens():
    ids, kinds, model = token_ids(1, 30, seed=16), token_ids(1, 30, seed=17), shared("gpt2")
    pruned = PrunedCache(model, GemFilter(10))
    found = model(ids, token_type_ids=kinds, **cache_argument(pruned)).logits
    chosen = pruned.selected_positions[0]
    expected = stock("gpt2")(ids[:, chosen], token_type_ids=kinds[:, chosen]).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_linear_layers_of_a_hybrid_start_over():
    """Their state is written to in place, so the filter pass works on a copy."""
    shape = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    config = Qwen3NextConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        linear_num_value_heads=4, **shape, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"] * 2, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = left_padded([40, 22], seed=30)
    pruned = PrunedCache(model, GemFilter(12, layer=3))
    found = generate(model, batch, 5, **cache_argument(pruned))
    for row, chosen in enumerate(pruned.selected_positions):
        ids = sequence(batch, row)["input_ids"][:, chosen]
        assert found[row, 40:].tolist() == generate(model, alone(ids), 5)[0, 12:].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_embeddings_are_chosen_like_ids(family):
    ids, model = token_ids(1, 40, seed=17), shared(family)
    expected = generate(model, alone(ids), 5, **cache_argument(PrunedCache(model, GemFilter(12))))
    batch = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": torch.ones_like(ids)}
    found = generate(model, batch, 5, **cache_argument(PrunedCache(model, GemFilter(12))))
    assert found[0, -5:].tolist() == expected[0, 40:].tolist()


# -- the filter pass ---------------------------------------------------------------------------------------------------


def test_nothing_above_the_choosing_layer_sees_the_prompt_and_nothing_is_kept():
    """Layers below r run twice, r stops before its output projection, those above run on the chosen tokens alone."""
    model, ids = build("llama", num_hidden_layers=4), token_ids(1, 50, seed=18)
    pruned, seen = PrunedCache(model, GemFilter(10, layer=2)), []

    def note(name):
        return lambda module, args, kwargs: seen.append((name, (args or (kwargs["hidden_states"],))[0].shape[1]))

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(note(f"layer {index}"), with_kwargs=True)
        layer.mlp.register_forward_pre_hook(note(f"mlp {index}"), with_kwargs=True)
    model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(note("output 2"), with_kwargs=True)
    model.model.layers[2].register_forward_pre_hook(
        lambda *_: seen.append(("bytes", pruned.nbytes)) if ("layer 2", 10) not in seen else None
    )
    with torch.no_grad():
        model(ids, **cache_argument(pruned))
    through = [(f"{part} {index}", 50) for index in (0, 1) for part in ("layer", "mlp")]
    assert seen[:6] == [*through, ("layer 2", 50), ("bytes", 0)]
    again = [(f"{part} {index}", 10) for index in range(4) for part in ("layer", "output", "mlp")]
    assert seen[6:] == [step for step in again if step[0] not in ("output 0", "output 1", "output 3")]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CacheError])
@pytest.mark.parametrize("turn", [1, 2])
def test_an_error_inside_the_pass_leaves_cache_and_model_as_they_were(family, error, turn):
    model, ids = build(family), token_ids(1, 40, seed=19)
    reference, pruned = (PrunedCache(model, GemFilter(20)) for _ in range(2))
    if turn == 2:
        answers = [generate(model, alone(ids), 4, **cache_argument(each)) for each in (reference, pruned)]
        ids = torch.cat([answers[0], token_ids(1, 40, seed=20)], dim=1)
    held = pruned.nbytes, pruned.seen_tokens, pruned.report().to_dict()

    def fail(*_):
        raise error("inside")

    handle = model.get_decoder().layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error, match="inside"):
        generate(model, alone(ids), 4, **cache_argument(pruned), output_hidden_states=True)
    handle.remove()
    assert (pruned.nbytes, pruned.seen_tokens, pruned.report().to_dict()) == held
    assert torch.equal(
        generate(model, alone(ids), 4, **cache_argument(pruned)),
        generate(model, alone(ids), 4, **cache_argument(reference)),
    )
    assert_stock(model, family)


@families
def test_a_model_that_has_filtered_is_as_it_was(family):
    model = shared(family)
    generate(model, alone(token_ids(1, 40, seed=21)), 3, **cache_argument(PrunedCache(model, GemFilter(9))))
    assert_stock(model, family)


@torch.no_grad()
def assert_stock(model, family: str) -> None:
    """With any other cache the model computes what it always did, to the last bit, hidden states too."""
    batch = left_padded([30, 17], seed=22)
    for settings in ({}, {"output_hidden_states": True}):
        found, expected = model(**batch, **settings), stock(family)(**batch, **settings)
        assert torch.equal(found.logits, expected.logits)
        for mine, theirs in zip(found.hidden_states or (), expected.hidden_states or (), strict=True):
            assert torch.equal(mine, theirs)


@torch.no_grad()
def test_attentions_of_other_caches_are_those_of_the_model():
    model, untouched = (build("llama", attn_implementation="eager") for _ in range(2))
    for each in (model, untouched):
        each.set_attn_implementation("eager")
    ids = token_ids(1, 30, seed=23)
    with pytest.raises(CacheError, match="output_attentions=True"):
        model(ids, **cache_argument(PrunedCache(model, GemFilter(10))), output_attentions=True)
    model(ids, **cache_argument(PrunedCache(model, GemFilter(10))))
    found, expected = (each(ids, output_attentions=True).attentions for each in (model, untouched))
    assert len(found) == len(expected) == 2
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_threads_that_share_a_model_share_nothing_else():
    model, prompts = build("llama"), [alone(token_ids(1, 40, seed=seed)) for seed in range(6)]

    def answer(batch):
        return generate(model, batch, 5, **cache_argument(PrunedCache(model, GemFilter(12)))).tolist()

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(answer, prompts))
    assert found == [answer(batch) for batch in prompts]
    assert len(model.get_decoder()._forward_pre_hooks) == 1


def test_nothing_is_filtered_while_the_past_is_recorded():
    """Prompt-lookup decoding needs the logits of every token, so it gives the ids of the stock cache."""
    batch, model = alone(token_ids(1, 12, seed=24).repeat(1, 3)), shared()
    pruned = PrunedCache(model, GemFilter(10))
    found = generate(model, batch, 8, **cache_argument(pruned), prompt_lookup_num_tokens=3)
    assert torch.equal(found, generate(stock(), batch, 8))
    assert pruned.selected_positions is None


@torch.no_grad()
def test_crop_goes_back_to_the_filter_and_no_further():
    model = shared("gemma3")
    pruned, batch = PrunedCache(model, GemFilter(6)), left_padded([26, 9], seed=25)
    mask = batch["attention_mask"][:, :20]
    model(batch["input_ids"][:, :20], attention_mask=mask, **cache_argument(pruned))
    reference = pruned.fork()
    model(token_ids(2, 3, seed=26), attention_mask=F.pad(mask, (0, 3), value=1), **cache_argument(pruned))
    pruned.crop(-3)
    assert pruned.seen_tokens == 20
    more, mask = token_ids(2, 4, seed=27), torch.cat([mask, torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])], dim=1)
    expected = model(more, attention_mask=mask, **cache_argument(reference)).logits[:, -1]
    torch.testing.assert_close(model(more, attention_mask=mask, **cache_argument(pruned)).logits[:, -1], expected)
    pruned.crop(-4)
    with pytest.raises(CacheError, match="cannot crop to 19 tokens"):
        pruned.crop(-1)


# -- chains and settings -----------------------------------------------------------------------------------------------


def test_a_chain_evicts_what_the_filter_left():
    """Fractions of a later link are of the whole prompt, its steps count chosen tokens, and decode stays bounded."""
    spy, model = Spy(), shared()
    pruned = PrunedCache(model, GemFilter(20) | A2SF(0.2, sinks=1, recent=2) | spy)
    generate(model, alone(token_ids(1, 50, seed=28)), 9, **cache_argument(pruned))
    assert spy.queries == [20] + [1] * 8
    chosen = pruned.selected_positions[0].tolist()
    for head in (head for layer in (0, 1) for head in kept(pruned, layer)):
        assert len(head) == 10
        assert {position for position in head if position < 50} <= {*chosen}
        assert all(a < b for a, b in pairwise(head))


def test_a_second_turn_looks_at_packed_rows_too():
    """At 8 bits, where codes stand for what they replace, it chooses as over the rows in full precision."""
    model, ids = double().pruned, token_ids(1, 40, seed=31)
    plain = PrunedCache(model, GemFilter(16, layer=2))
    packed = PrunedCache(model, GemFilter(16, layer=2) | KIVI(bits=8, group_size=4, residual=4))
    for pruned in (plain, packed):
        feed(model, alone(torch.cat([ids, token_ids(1, 30, seed=32)], dim=1)), pruned, [40, 30])
    assert packed.layers[0].table.packed
    assert packed.selected_positions[0].tolist() == plain.selected_positions[0].tolist()
    assert kept(packed, 0) == kept(plain, 0)


def test_a_filter_comes_first_and_alone():
    assert (GemFilter(8) | A2SF(0.5)).filters_prompt
    assert not (A2SF(0.5) | SnapKV(0.25)).filters_prompt
    model = double().pruned
    assert PrunedCache(model, GemFilter(8) | A2SF(0.5)).prompt_filter == GemFilter(8)
    assert PrunedCache(model, A2SF(0.5) | SnapKV(0.25)).prompt_filter is None
    for chain in (lambda: A2SF(0.5) | GemFilter(8), lambda: GemFilter(16) | GemFilter(8)):
        with pytest.raises(PolicyError, match="must be the first link of a chain and its only filter"):
            chain()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": 0}, BudgetError, "keeps nothing"),
        ({"budget": 4, "keep_first": 2, "keep_last": 3}, BudgetError, "at least 5"),
        ({"kernel_size": 4}, PolicyError, "write 5, not 4"),
        ({"kernel_size": 0}, PolicyError, "kernel_size"),
        ({"keep_first": -1}, PolicyError, "keep_first"),
        ({"keep_last": 1.5}, PolicyError, "keep_last"),
        ({"layer": -1}, PolicyError, "layer"),
        ({"layer": True}, PolicyError, "layer"),
    ],
)
def test_settings_without_meaning(settings, error, message):
    with pytest.raises(error, match=message):
        get("gemfilter", **settings)


@pytest.mark.parametrize(("tokens", "kept_tokens"), [(100, 25), (99, 25), (10, 6), (6, 6), (1, 6)])
def test_fractions_round_up_and_hold_both_ends(tokens, kept_tokens):
    assert GemFilter(0.25, keep_first=4, keep_last=2).capacity(tokens) == kept_tokens


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@given(size=st.integers(6_000, 14_000), lengths=st.lists(st.integers(20, 60), min_size=1, max_size=2))
def test_a_budget_in_bytes_is_that_of_the_whole_cache(family, size, lengths):
    """When the prompt ends, the cache holds no more, and as many tokens as that allows; a prompt that fits stays."""
    model = shared(family)
    pruned = PrunedCache(model, GemFilter(f"{size}B"))
    with torch.no_grad():
        model(**left_padded(lengths), **cache_argument(pruned))
    assert pruned.nbytes <= size + 64 * (family == "gemma3")  # the padding mask of sliding layers
    if pruned.selected_positions is not None and family == "llama" and len(lengths) == 1:
        table = pruned.layers[0].table
        assert pruned.nbytes + 2 * table.token_bytes > size


def test_bytes_that_hold_nothing_change_nothing():
    pruned = PrunedCache(shared(), GemFilter("100B"))
    with pytest.raises(BudgetError, match="100 bytes"):
        generate(shared(), alone(token_ids(1, 30)), 2, **cache_argument(pruned))
    assert pruned.seen_tokens == pruned.nbytes == 0


@pytest.mark.parametrize(
    ("kind", "layers", "hidden", "layer"),
    [("llama", 32, 4096, 13), ("mistral", 40, 5120, 19), ("phi3", 32, 3072, 19), ("qwen3", 36, 4096, 15)],
)
def test_layers_of_the_paper(kind, layers, hidden, layer):
    config = SimpleNamespace(model_type=kind, num_hidden_layers=layers, hidden_size=hidden)
    assert GemFilter().filter_layer(config, tuple(range(layers))) == layer


def test_the_layer_must_be_one_that_is_pruned():
    model = shared("qwen3-hybrid")
    assert PrunedCache(model, GemFilter()).filter_layer == 0  # 1 would be a sliding window
    for layer in (1, 7):
        with pytest.raises(PolicyError, match=rf"layer {layer}.*\[0, 2\]"):
            PrunedCache(model, GemFilter(layer=layer))
    with pytest.warns(UserWarning, match="nothing to prune"):
        pruned = PrunedCache(shared("mistral-sliding"), GemFilter(4))
    batch = alone(token_ids(1, 20))
    assert torch.equal(
        generate(shared("mistral-sliding"), batch, 4, **cache_argument(pruned)),
        generate(stock("mistral-sliding"), batch, 4),
    )


def test_a_decoder_without_positions_is_refused():
    model = BartForCausalLM(BartConfig(vocab_size=9, d_model=8, decoder_layers=1, decoder_attention_heads=1))
    with pytest.raises(UnsupportedModelError, match="takes no position_ids"):
        PrunedCache(model, GemFilter())


@torch.no_grad()
def test_only_a_padding_mask_can_be_filtered():
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(CacheError, match="not a padding mask"):
        shared()(token_ids(1, 20), attention_mask=mask, **cache_argument(PrunedCache(shared(), GemFilter(4))))


@torch.no_grad()
def test_another_batch_is_refused_as_ever():
    pruned = PrunedCache(shared(), GemFilter(4))
    shared()(token_ids(2, 20), **cache_argument(pruned))
    with pytest.raises(CacheError, match="holds a batch of 2"):
        shared()(token_ids(3, 20), **cache_argument(pruned))


# -- what a prompt filter cannot choose from ---------------------------------------------------------------------------


class Deep(torch.nn.Module):
    """A decoder that takes more than a stock one does, as those of multimodal models do; it counts its calls."""

    def __init__(self, model) -> None:
        super().__init__()
        self.inner, self.config, self.calls = model.model, model.config, 0

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, extra=None, **given):
        self.calls += 1
        return self.inner(input_ids, attention_mask, position_ids, use_cache=use_cache, **given)


UNKNOWN = {
    "a mask": lambda: torch.ones(2, 30, dtype=torch.bool),
    "of all sequences": lambda: torch.ones(30),
    "states": lambda: torch.zeros(1, 30, 32),
    "of all heads": lambda: torch.zeros(2, 1, 30, 30),
    "nested": lambda: {"each": [torch.zeros(3, 2, 30)]},
}


def deep():
    model = build("llama")
    model.model = Deep(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_arguments_of_every_token_are_refused(kind):
    model, ids = deep(), token_ids(2, 30)
    cache = PrunedCache(model, GemFilter(10))
    with pytest.raises(UnsupportedModelError, match="extra, which holds something for every token"):
        model(ids, extra=UNKNOWN[kind](), **cache_argument(cache))
    assert (model.model.calls, cache.lengths) == (0, {0})
    model(ids, extra=UNKNOWN[kind](), **cache_argument(PrunedCache(model, GemFilter(64))))  # which filters nothing
    unrelated = torch.zeros(4, 17)
    found = model(ids, extra=unrelated, **cache_argument(cache)).logits
    expected = shared()(ids, **cache_argument(PrunedCache(shared(), GemFilter(10)))).logits
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 2, 30), (4, 2, 30)])
def test_positions_of_several_dimensions_are_refused_before_anything_runs(shape):
    model = deep()
    cache = PrunedCache(model, GemFilter(10))
    with pytest.raises(UnsupportedModelError, match="position_ids have the shape"):
        model(token_ids(2, 30), position_ids=torch.zeros(shape, dtype=torch.int64), **cache_argument(cache))
    assert (model.model.calls, cache.lengths) == (0, {0})


@torch.no_grad()
def test_what_a_head_makes_of_every_token_is_refused():
    model, ids = build("llama"), token_ids(2, 30)
    for asked in ({"labels": ids}, {"logits_to_keep": torch.tensor([3, 29])}):
        cache = PrunedCache(model, GemFilter(10))
        with pytest.raises(CacheError, match=f"{next(iter(asked))}= refers to every token"):
            model(ids, **asked, **cache_argument(cache))
        assert cache.lengths == {0}
    short = model(ids, labels=ids, **cache_argument(PrunedCache(model, GemFilter(64))))
    torch.testing.assert_close(short.loss, stock()(ids, labels=ids).loss)
    assert model(ids, logits_to_keep=1, **cache_argument(PrunedCache(model, GemFilter(10)))).logits.shape[1] == 1


@pytest.mark.parametrize(
    "kind", [LlamaForSequenceClassification, LlamaForTokenClassification, LlamaForQuestionAnswering]
)
def test_heads_that_read_every_token_are_refused(kind):
    with pytest.raises(UnsupportedModelError, match="reads every token"):
        PrunedCache(kind(build("llama").config), GemFilter(10))


# -- report and command line -------------------------------------------------------------------------------------------


def test_the_report_shows_what_was_chosen(tmp_path):
    pruned = PrunedCache(shared(), GemFilter(12))
    generate(shared(), left_padded([40, 8], seed=29), 3, **cache_argument(pruned))
    report = pruned.report()
    assert [len(positions) for positions in report.selected] == [12, 8]
    assert "the model ran on 12, 8 prompt tokens, chosen by layer 1" in str(report)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["selected"] == [positions.tolist() for positions in pruned.selected_positions]
    assert plain["filter_layer"] == 1
    assert report.nbytes == pruned.nbytes
    assert report.plot(tmp_path / "kept.png").exists()


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4)
    return path


@pytest.mark.parametrize(
    ("policy", "budget", "shown"),
    [("gemfilter", "20", " … "), ("gemfilter", "4096", "fits into the budget")],
)
def test_the_command_line_shows_the_chosen_text(prompt, policy, budget, shown):
    arguments = ["generate", "--model", "demo", "--prompt-file", str(prompt), "--policy", policy, "--budget", budget]
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "2", "--show-selected"], catch_exceptions=False)
    assert shown in result.output
    with pytest.raises(PolicyError, match="filters no prompt"):
        CliRunner().invoke(
            app, [*arguments, "--policy", "snapkv", "--budget", "64", "--show-selected"], catch_exceptions=False
        )


def test_the_command_line_gives_the_chosen_text_to_machines(prompt):
    arguments = ["--model", "demo", "--prompt-file", str(prompt), "--policy", "gemfilter", "--budget", "20"]
    result = CliRunner().invoke(
        app, ["generate", *arguments, "--max-new-tokens", "2", "--show-selected", "--json"], catch_exceptions=False
    )
    summary = json.loads(result.stdout)
    assert len(summary["cache"]["selected"][0]) == 20
    assert " … " in summary["selected_text"]
