"""Replays against stock transformers: what a second reading attends to, and that nothing else of it stays.

The reference runs every chunk over a stock cache, reads the attention probabilities that transformers returns, and
takes maxima: nothing of kvprune is in it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from crossing import crossed
from families import (
    FAMILIES,
    STOCK_ONLY,
    PrunedCache,
    assert_same_rows,
    build,
    feed,
    generate,
    kept,
    kept_everywhere,
    left_padded,
    linear_hybrid,
    sequence,
    shared,
    storage_nbytes,
    token_ids,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from kvprune import (
    CacheError,
    Everywhere,
    HeadScores,
    Policy,
    PolicyError,
    RowWeights,
    Scoring,
    Uniform,
    UnsupportedModelError,
)
from kvprune.attention.mass import row_probabilities
from kvprune.attention.maxima import attention_maxima
from kvprune.cache.models import cache_argument, check_supported
from kvprune.policies import KIVI, TOVA, GemFilter, KVzip, KVzipPlus, ZipCache


def _supported(family: str) -> bool:
    try:
        check_supported(build(family))
    except UnsupportedModelError:  # of some families, in some versions of transformers
        return False
    return family not in STOCK_ONLY


PRUNABLE = tuple(family for family in FAMILIES if _supported(family))
HYBRIDS = tuple(family for family in ("gemma3", "qwen3-hybrid") if family in PRUNABLE)
SOFTMAX = ("cache", "chunk")
seeds = st.integers(0, 2**16)


@dataclass(frozen=True)
class Columned(Policy):
    """Keeps everything, and has a column that nobody writes to."""

    def columns(self):
        return {"score": torch.float32}


def policy(budget=14, **settings):
    return KVzip(budget, **{"sinks": 2, "recent": 3, "chunk": 8, "share": Uniform(), **settings})


# -- the reference -----------------------------------------------------------------------------------------------------


@cache
def telling(family: str):
    """A model whose attention probabilities can be seen."""
    return build(family, _attn_implementation="eager")


@torch.no_grad()
def expected(
    family: str,
    ids: Tensor,
    *,
    chunk: int,
    softmax: str,
    sinks: int = 2,
    said: tuple = ((), (), ()),
    plus: bool = False,
    most: int | None = None,
) -> list[Tensor]:
    """The score of every token in every layer, `[Hkv, n]`, of one sequence `[1, n]`.

    said: ids before the first chunk, before others, and then before all. plus: with the norms of KVzip+ (Llama).
    most: positions that the model has: a chunk stands at the last of them, where there is no room behind the context.
    """
    model = telling(family) if most is None else with_positions(family, most)
    model.set_attn_implementation("eager")
    read = DynamicCache(config=model.config)
    model(ids, **cache_argument(read))
    count = ids.shape[1]
    scores = None
    for start in range(0, count, chunk):
        first, later, answer = said
        before = [*later, *ids[0, start - 8 : start].tolist()] if start and later else [*(later if start else first)]
        part = torch.cat([torch.tensor([[*before, *answer]], dtype=torch.int64), ids[:, start : start + chunk]], dim=1)
        inputs = []
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, found=inputs: found.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            for layer in (model.model.layers if plus else ())
        ]
        last = count + part.shape[1] - 1 if most is None else min(count + part.shape[1] - 1, most - 1)
        places = {} if most is None else {"position_ids": torch.arange(last - part.shape[1] + 1, last + 1)[None]}
        again = model(part, **cache_argument(copy.deepcopy(read)), output_attentions=True, **places).attentions
        for hook in hooks:
            hook.remove()
        found = []
        for number, layer in enumerate(again):
            if layer.shape[3] != count + part.shape[1]:  # a sliding window has moved on
                found.append(torch.zeros(1))
                continue
            chosen = layer[0].double()  # [Hq, L, n + L]
            kv_heads = getattr(model.config, "num_key_value_heads", len(chosen))
            if softmax == "chunk":
                over = torch.zeros(chosen.shape[2], dtype=torch.bool)
                over[:sinks] = over[start : start + chunk] = over[count:] = True
                sunk = 1 - chosen.sum(-1, keepdim=True)  # what attention sinks of the model take
                chosen = chosen * over / ((chosen * over).sum(-1, keepdim=True) + sunk.clamp(min=0))
            if plus:
                values = read.layers[number].values[0].double().repeat_interleave(len(chosen) // kv_heads, 0)
                weight = model.model.layers[number].self_attn.o_proj.weight.double()
                added = [
                    (value @ part.T).norm(dim=-1)
                    for value, part in zip(values, weight.split(values.shape[2], 1), strict=True)
                ]
                sizes = inputs[number][0].double().norm(dim=-1)
                chosen = chosen[..., :count] * torch.stack(added)[:, None] / sizes[None, :, None]
            found.append(chosen.unflatten(0, (kv_heads, -1))[..., :count].amax((1, 2)))
        scores = found if scores is None else [torch.maximum(a, b) for a, b in zip(scores, found, strict=True)]
    return scores


@cache
def with_positions(family: str, most: int):
    return build(family, max_position_embeddings=most, _attn_implementation="eager")


def scores_of(cache: PrunedCache, layer: int, row: int = 0) -> Tensor:
    """`[Hkv, n]` in the order of positions, when the prompt has ended."""
    cache.kept_positions(layer)
    table = cache.layers[layer].table
    order = table.positions[row].argsort(-1)
    return table["score"][row].gather(1, order)[:, int((table.positions[row, 0] < 0).sum()) :]


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("family", PRUNABLE)
def test_scores_are_what_a_second_reading_attends_to(family, softmax):
    ids = token_ids(1, 21, seed=3)
    pruned = PrunedCache(shared(family), policy(1.0, softmax=softmax))
    feed(shared(family), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, pruned, [21])
    reference = expected(family, ids, chunk=8, softmax=softmax)
    for layer in pruned.pruned_layers:
        score = scores_of(pruned, layer).double()
        torch.testing.assert_close(score, reference[layer], atol=2e-5, rtol=2e-3)
        assert score.max() > 0.05


@pytest.mark.parametrize(("most", "chunk"), [(40, 8), (24, 8), (21, 8), (21, 16), (21, 40)])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_tables_of_positions_are_not_overrun(family, most, chunk):
    """Where a model has no positions behind the context, or fewer than a chunk."""
    ids, model = token_ids(1, 21, seed=3), build(family, max_position_embeddings=most)
    pruned = PrunedCache(model, policy(1.0, chunk=chunk))
    feed(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, pruned, [21])
    reference = expected(family, ids, chunk=chunk, softmax="cache", most=most)
    for layer in pruned.pruned_layers:
        torch.testing.assert_close(scores_of(pruned, layer).double(), reference[layer], atol=2e-5, rtol=2e-3)


def test_instructions_that_fill_all_positions_are_refused():
    with pytest.raises(UnsupportedModelError, match="has 24 positions, and the instruction of the replay takes 24"):
        PrunedCache(with_positions("gpt2", 24), policy(0.5, first_ids=(1,) * 20, answer_ids=(2,) * 4))
    PrunedCache(shared("llama"), policy(0.5, first_ids=(1,) * 9999))


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize(("kind", "plus"), [(KVzip, False), (KVzipPlus, True)])
def test_instructions_and_the_weight_of_values(kind, plus, softmax):
    ids = token_ids(1, 21, seed=3)
    said = (5, 6, 7), (8, 9), (10,)
    told = dict(zip(("first_ids", "later_ids", "answer_ids"), said, strict=True))
    pruned = PrunedCache(shared(), kind(1.0, sinks=2, recent=3, chunk=8, softmax=softmax, **told))
    feed(shared(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, pruned, [21])
    for layer, reference in enumerate(expected("llama", ids, chunk=8, softmax=softmax, said=said, plus=plus)):
        torch.testing.assert_close(scores_of(pruned, layer).double(), reference, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("softmax", SOFTMAX)
def test_the_best_rows_stay(softmax):
    ids = token_ids(1, 40, seed=5)
    pruned = PrunedCache(shared(), policy(softmax=softmax))
    feed(shared(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, pruned, [40])
    for layer, scores in enumerate(expected("llama", ids, chunk=8, softmax=softmax)):
        for head, score in enumerate(scores):
            score = score.clone()
            score[:2] = score[-3:] = 2
            assert kept(pruned, layer)[head] == sorted(score.topk(14).indices.tolist())


# -- the same whatever is beside it, and nothing of it stays -----------------------------------------------------------


@crossed(family=["llama", *HYBRIDS], softmax=SOFTMAX)
@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=3), chunk=st.integers(3, 40), seed=seeds)
def test_a_padded_batch_is_each_sequence_alone(family, softmax, lengths, chunk, seed):
    batch = left_padded(lengths, seed=seed)
    one_policy = policy(chunk=chunk, softmax=softmax)
    together = PrunedCache(shared(family), one_policy)
    ids = generate(shared(family), batch, 4, **cache_argument(together))
    for row in range(len(lengths)):
        alone = PrunedCache(shared(family), one_policy)
        own = generate(shared(family), sequence(batch, row), 4, **cache_argument(alone))
        assert own[0, -4:].tolist() == ids[row, -4:].tolist()
        assert kept_everywhere(together, row) == kept_everywhere(alone)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("model", [*("llama", *HYBRIDS), "linear"])
def test_nothing_of_a_replay_stays_but_its_column(model, softmax):
    """Beside a policy with the same column that replays nothing: the same logits, lengths, rows, bytes."""
    model = linear_hybrid() if model == "linear" else shared(model)
    batch = left_padded([20, 13])
    replayed, plain = (PrunedCache(model, each) for each in (policy(1.0, softmax=softmax, chunk=6), Columned()))
    sizes = [20] if model is linear_hybrid() else [12, 8]
    logits = [feed(model, batch, each, sizes) for each in (replayed, plain)]
    torch.testing.assert_close(*logits, atol=0, rtol=0)
    assert replayed.seen_tokens == plain.seen_tokens == 20
    assert replayed.lengths == plain.lengths
    assert replayed.nbytes == plain.nbytes
    assert storage_nbytes(replayed) == storage_nbytes(plain)
    for layer in replayed.pruned_layers:
        mine, other = (each.layers[layer].table for each in (replayed, plain))
        assert bool((mine["score"] > 0).any())
        for name in ("keys", "values", "positions"):
            assert torch.equal(mine.tensors()[name], other.tensors()[name])
    more = token_ids(2, 4, seed=9)
    batch = {
        "input_ids": torch.cat([batch["input_ids"], more], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(more)], 1),
    }
    logits = [feed(model, batch, each, [1, 1, 2], begin=20) for each in (replayed, plain)]
    torch.testing.assert_close(*logits, atol=0, rtol=0)


def test_other_caches_and_policies_are_left_alone():
    model = build("llama")
    before = model(token_ids(1, 9)).logits
    feed(model, left_padded([9]), PrunedCache(model, policy()), [9])
    assert torch.equal(model(token_ids(1, 9)).logits, before)
    plain = PrunedCache(model, "snapkv:budget=1.0")
    feed(model, left_padded([9]), plain, [9])
    assert plain.layers[0].unread is None


# -- more than one prompt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", SOFTMAX)
def test_a_prompt_in_pieces_is_replayed_when_it_has_ended(softmax):
    ids = token_ids(1, 24, seed=2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pieces, whole, generated = (PrunedCache(shared(), policy(softmax=softmax)) for _ in range(3))
    feed(shared(), batch, pieces, [10, 14])
    feed(shared(), batch, whole, [24])
    assert_same_rows(pieces, whole, atol=1e-5, rtol=1e-4)
    assert all(len(head) == 14 for head in kept(whole, 0))
    generate(shared(), batch, 3, **cache_argument(generated), prefill_chunk_size=10)
    assert [head[:14] for head in kept(generated, 0)] == kept(whole, 0)


@given(turn=st.integers(1, 9), generated=st.integers(1, 6), lengths=st.sampled_from([(14,), (14, 9)]))
def test_a_further_turn_replays_what_is_new_with_the_answer_before_it(turn, generated, lengths):
    model, batch = shared(), left_padded(lengths, seed=turn)
    pruned = PrunedCache(model, policy(1.0))
    answered = generate(model, batch, generated, **cache_argument(pruned))
    replayed = [scores_of(pruned, 0, row) for row in range(len(lengths))]
    unread = pruned.layers[0].unread
    assert (0 if unread is None else len(unread)) == generated - 1
    assert all(bool((scores[:, -generated + 1 :] == 0).all()) for scores in replayed if generated > 1)
    ids = torch.cat([answered, token_ids(len(lengths), turn, seed=turn)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(lengths), generated + turn, dtype=torch.int64)], dim=1)
    generate(model, {"input_ids": ids, "attention_mask": mask}, 1, **cache_argument(pruned))
    for row, scores in enumerate(replayed):
        after = scores_of(pruned, 0, row)
        assert pruned.layers[0].unread is None
        assert bool((after[:, : scores.shape[1]] >= scores).all())
        assert bool((after[:, scores.shape[1] - generated + 1 : -1] > 0).all())


def test_saved_and_forked_caches_go_on_alike(tmp_path):
    model, batch = shared(), left_padded([20, 11])
    pruned = PrunedCache(model, policy())
    ids = generate(model, batch, 5, **cache_argument(pruned))
    pruned.save(tmp_path / "cache")
    others = [pruned.fork(), PrunedCache.load(tmp_path / "cache", model)]
    ids = torch.cat([ids, token_ids(2, 6)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 11, dtype=torch.int64)], dim=1)
    turn = {"input_ids": ids, "attention_mask": mask}
    after = generate(model, turn, 4, **cache_argument(pruned))
    for other in others:
        assert torch.equal(generate(model, turn, 4, **cache_argument(other)), after)
        for row in range(2):
            assert_same_rows(pruned, other, row, row)


def test_beams_and_drafts():
    model, batch = shared(), left_padded([20])
    greedy = generate(model, batch, 8, **cache_argument(PrunedCache(model, policy())))
    beams = generate(model, batch, 8, **cache_argument(PrunedCache(model, policy())), num_beams=3)
    assert beams.shape == greedy.shape
    for cut in (1.0, 16):
        pruned = PrunedCache(model, policy(cut))
        drafted = generate(model, batch, 8, **cache_argument(pruned), prompt_lookup_num_tokens=3)
        if cut == 1.0:
            assert torch.equal(drafted, greedy := generate(model, batch, 8))
            assert bool((scores_of(pruned, 0)[:, :20] > 0).all())
        else:
            assert all(len(head) < 16 + 12 for head in kept(pruned, 0))


def test_chains():
    model, batch = shared(), left_padded([24, 15])
    for chain in (policy() | KIVI(group_size=4, residual=4), policy(20) | TOVA(10), TOVA(20) | policy(),
                  GemFilter(20) | policy(10), policy() | ZipCache(buffer=4)):  # fmt: skip
        if isinstance(chain.links[0], GemFilter):
            try:
                together = PrunedCache(model, chain)
            except UnsupportedModelError:
                continue
        together = PrunedCache(model, chain)
        ids = generate(model, batch, 5, **cache_argument(together))
        for row in range(2):
            alone = PrunedCache(model, chain)
            assert torch.equal(generate(model, sequence(batch, row), 5, **cache_argument(alone))[0, -5:], ids[row, -5:])
        turn = {"input_ids": torch.cat([ids, token_ids(2, 5)], 1)}
        turn["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(2, 10, dtype=torch.int64)], 1)
        generate(model, turn, 2, **cache_argument(together))


def test_embeddings_are_replayed_like_ids():
    model, batch = shared(), left_padded([20, 12])
    by_ids, by_embeddings = (PrunedCache(model, policy()) for _ in range(2))
    feed(model, batch, by_ids, [20])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), position_ids=positions,
              attention_mask=batch["attention_mask"], **cache_argument(by_embeddings))  # fmt: skip
    for row in range(2):
        assert_same_rows(by_ids, by_embeddings, row, row)


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupted_replay_leaves_the_cache_as_it_was_and_is_made_up_for(family, layer):
    model, batch = shared(family), left_padded([20, 12])
    more = token_ids(2, 6, seed=4)
    longer = {
        "input_ids": torch.cat([batch["input_ids"], more], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(more)], 1),
    }
    passes = []

    def stop(*_):
        passes.append(1)
        if len(passes) == 3:  # the prompt, the first chunk, the second
            raise KeyboardInterrupt

    pruned, whole = (PrunedCache(model, policy()) for _ in range(2))
    hook = model.model.layers[layer].input_layernorm.register_forward_pre_hook(stop)
    try:
        feed(model, batch, pruned, [20])
        with pytest.raises(KeyboardInterrupt):
            pruned.fork()
    finally:
        hook.remove()
    assert not any(bool(pruned.layers[each].table["score"].any()) for each in pruned.pruned_layers)
    plain = PrunedCache(model, Columned())
    feed(model, batch, plain, [20])
    assert pruned.lengths == plain.lengths == {20}
    for each in pruned.pruned_layers:
        mine, other = (cache.layers[each].table.tensors() for cache in (pruned, plain))
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    # What it missed is replayed with what comes next.
    logits = [feed(model, longer, each, [6], begin=20) for each in (pruned, plain)]
    torch.testing.assert_close(*logits, atol=0, rtol=0)
    feed(model, longer, whole, [20, 6])
    for row in range(2):
        assert_same_rows(pruned, whole, row, row)


def test_a_pass_that_ends_behind_its_last_attention_is_made_up_for():
    model, batch = shared(), left_padded([20])
    pruned, whole = (PrunedCache(model, policy()) for _ in range(2))

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.model.norm.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        feed(model, batch, pruned, [20])
    hook.remove()
    feed(model, batch, whole, [20])
    assert_same_rows(pruned.fork(), whole)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_without_meaning_are_refused():
    for wrong in ({"chunk": 0}, {"softmax": "all"}, {"group": "sum"}):
        with pytest.raises(PolicyError):
            KVzip(**wrong)


# -- the reduction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["max", "mean"])
@given(
    seed=seeds,
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    rows=st.integers(1, 9),
    before=st.integers(0, 6),
    positions=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    known=st.booleans(),
)
def test_maxima_are_those_of_all_probabilities(
    group, seed, batch, heads, rows, before, positions, softcap, sinks, known
):
    torch.manual_seed(seed)
    length = before + rows
    queries, keys = torch.randn(batch, heads * 2, rows, 4) * 2, torch.randn(batch, heads, length, 4)
    weights = torch.rand(batch, rows)
    weights[:, 0] = 0.0
    key_weights = torch.rand(batch, heads, 2, length)
    scoring = Scoring(0.7, softcap, torch.randn(heads * 2) if sinks else None)
    places = torch.arange(length).expand(batch, heads, -1).clone()
    asked = torch.arange(before, length).expand(batch, -1).clone()
    if positions:
        shuffled = torch.randperm(length)
        places, keys = places[:, :, shuffled], keys[:, :, shuffled]
        places[0, :, 0] = asked[-1, -1] = -1
    hidden = (places[:, :, None, None] > asked[:, None, None, :, None]) | (places < 0)[:, :, None, None]
    chances = row_probabilities(queries, keys, scoring, hidden).nan_to_num(0.0) * key_weights.unsqueeze(3)
    chances = chances.amax(2) if group == "max" else chances.mean(2)
    wanted = (chances * (weights * (asked >= 0))[:, None, :, None]).amax(2)
    lse = None
    if known:
        logits = (queries.unflatten(1, (heads, 2)) @ keys.unsqueeze(2).transpose(3, 4)) * 0.7
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        lse = scoring.log_sum_exp(logits.masked_fill(hidden, float("-inf"))).flatten(1, 2)
    for columns in (length, max(1, before)):
        found = attention_maxima(
            queries, keys, RowWeights.explicit(torch.arange(rows).expand(batch, -1), weights), scoring, group=group,
            query_positions=asked if positions else None, key_positions=places if positions else None,
            columns=columns, lse=lse, key_weights=key_weights[..., :columns], block_bytes=16 * batch * heads * length,
        )  # fmt: skip
        torch.testing.assert_close(found, wanted[..., :columns], atol=1e-6, rtol=1e-4)


# -- budgets of heads --------------------------------------------------------------------------------------------------


def test_scores_of_heads_are_those_of_their_best_rows(tmp_path):
    """Measured on one text, and kept in a file, which is of this model alone."""
    ids, model = token_ids(1, 21, seed=3), shared("llama")
    heads = HeadScores.measure(model, ids, policy())
    for found, reference in zip(heads.scores, expected("llama", ids, chunk=8, softmax="cache"), strict=True):
        torch.testing.assert_close(torch.tensor(found).double(), reference[:, 2:].amax(-1), atol=2e-5, rtol=2e-3)
    path = tmp_path / "heads.json"
    heads.save(path)
    assert HeadScores.load(path, model) == heads
    for known in (str(path), torch.tensor(heads.scores, dtype=torch.float64)):
        assert policy(level="head", heads=known) == policy(level="head", heads=heads.scores)
    with pytest.raises(PolicyError, match="scores of at least 0"):
        policy(level="head", heads=torch.ones(3))
    with pytest.raises(CacheError, match="of another model"):
        HeadScores.load(path, build("llama", rms_norm_eps=1e-3, hidden_size=64))
    with pytest.raises(PolicyError, match=r"scores of 2 \+ 2 heads|scores of .* heads, and"):
        PrunedCache(shared("gpt2"), policy(level="head", heads=heads.scores))
    for text in ("", "{", "[]", '{"format": "kvprune.heads", "version": 1, "scores": [[-1]], "model": {}}'):
        path.write_text(text)
        with pytest.raises(CacheError, match="cannot be loaded"):
            HeadScores.load(path, model)
    with pytest.raises(CacheError, match="replays nothing"):
        HeadScores.measure(model, ids, TOVA(8))
    with pytest.raises(CacheError, match="more than 2 tokens"):
        HeadScores.measure(model, ids[:, :2], policy())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("lengths", [[30], [30, 22]])
def test_heads_that_look_back_keep_everything(known, lengths):
    """Rows go to the best heads of all layers, the newest first; with known scores nothing runs twice."""
    model, batch = shared("llama"), left_padded([length + 1 for length in lengths])
    told = tuple((0.1 + 0.05 * layer, 0.12 + 0.04 * layer) for layer in range(len(model.model.layers)))
    settings = {"heads": told} if known else {}
    own = PrunedCache(model, policy(0.5, level="head", share=Everywhere(), **settings))
    with_rows = PrunedCache(model, policy(1.0, share=Everywhere()))
    counts = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: counts.append(1))
    feed(model, batch, own, [30, 1])
    hook.remove()
    assert len(counts) == (2 if known else 2 + 4)
    feed(model, batch, with_rows, [30])
    for row, length in enumerate(lengths):
        scores = told if known else [
            scores_of(with_rows, layer, row)[:, 2:].amax(-1).tolist() for layer in with_rows.pruned_layers
        ]  # fmt: skip
        middle = [
            (score, position, layer, head)
            for layer, heads in enumerate(scores)
            for head, score in enumerate(heads)
            for position in range(2, length - 3)
        ]
        number = sum(map(len, scores))
        best = sorted(middle, reverse=True)[: number * (-(-length // 2) - 5)]
        for layer, heads in enumerate(scores):
            for head in range(len(heads)):
                chosen = {position for _, position, *place in best if place == [layer, head]}
                assert set(kept(own, layer, row)[head]) == {0, 1, *range(length - 3, length + 1), *chosen}


def test_settings_of_levels_without_meaning():
    with pytest.raises(PolicyError, match='level is "row" or "head"'):
        policy(level="layer")
    with pytest.raises(PolicyError, match='are for level="head"'):
        policy(heads=((0.5,),))
    for heads in (3, (3,), ((),), ((-1.0,),), (("a",),), ((float("nan"),),)):
        with pytest.raises(PolicyError, match="heads are scores of at least 0"):
            policy(level="head", heads=heads)
