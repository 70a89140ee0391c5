"""Positions in the cache: what is left of a text is attended to as if it stood side by side."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import PrunedCache, build, feed, generate, kept, kept_everywhere, left_padded, sequence, stepwise
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, CohereConfig, GlmConfig, LlamaConfig

from kvprune import PolicyError, Scoring, UnsupportedModelError
from kvprune.attention.rotation import Rotation, missing_after
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, H2O, KIVI, GemFilter, SnapKV, StreamingLLM

TIGHT = {"atol": 2e-4, "rtol": 1e-3}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10_000.0,
}  # fmt: skip
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def one_layer(name: str):
    """A model of one layer, whose keys and values depend on the token and its position alone."""
    if name in ("llama", "phi3", "qwen3", "mixtral", "gpt-neox"):
        kinds = {"layer_types": ["full_attention"]} if name == "qwen3" else {}  # transformers 5.17 goes by these
        return build(name, num_hidden_layers=1, **kinds)
    config = {
        "yarn": lambda: LlamaConfig(**SHAPE, num_hidden_layers=1, rope_parameters=YARN, max_position_embeddings=512),
        "llama3": lambda: LlamaConfig(**SHAPE, num_hidden_layers=1, rope_parameters=LLAMA3),
        "interleaved": lambda: CohereConfig(**SHAPE, num_hidden_layers=1, logit_scale=1.0),
        "partial": lambda: GlmConfig(**SHAPE, num_hidden_layers=1, head_dim=8, partial_rotary_factor=0.5),
    }[name]()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "name", ["llama", "phi3", "qwen3", "mixtral", "gpt-neox", "yarn", "llama3", "interleaved", "partial"]
)
def test_as_if_the_kept_tokens_were_the_whole_text(name):
    """After evictions, logits are those of the stock model on the kept tokens alone; in a padded batch, of each row."""
    model, lengths, more = one_layer(name), [40, 29], 8
    batch = left_padded([length + more for length in lengths], width=max(lengths) + more)
    pruned = PrunedCache(model, StreamingLLM(10, sinks=2, positions="cache"))
    before: list[list[int]] = []
    for fed, logits in enumerate(stepwise(model, batch, pruned, [max(lengths)] + [1] * more)):
        for row, length in enumerate(lengths if fed else []):
            tokens = sequence(batch, row)["input_ids"]
            placed = tokens[:, [*before[row], length + fed - 1]]
            with torch.no_grad():
                torch.testing.assert_close(logits[row, -1], model(placed).logits[0, -1], **TIGHT)
        before = [kept(pruned, 0, row)[0] for row in range(2)]


@given(
    steps=st.lists(st.sampled_from([1, 1, 1, 2, 5]), min_size=1, max_size=10),
    interleaved=st.booleans(),
    shorter=st.integers(0, 8),
    seed=st.integers(0, 2**16),
)
def test_attention_by_places_in_the_cache(steps, interleaved, shorter, seed):
    """Whatever each head keeps, every step attends to keys placed at 0, 1, 2, ... and queries behind them."""
    random = torch.Generator().manual_seed(seed)
    rotation = Rotation(torch.tensor([1.0, 0.3]), interleaved)
    policy = A2SF(9, sinks=1, recent=3, kernel_size=3, positions="cache")
    layer, scoring = PrunedLayer(policy, 0, rotation=rotation), Scoring(0.5)
    tokens, keys, values = [0, 0], torch.empty(2, 2, 0, 6), torch.empty(2, 2, 0, 6)
    for number, length in enumerate([20, *steps]):
        queries, new_keys, new_values = (torch.randn(2, heads, length, 6, generator=random) for heads in (4, 2, 2))
        valid = torch.ones(2, length, dtype=torch.bool)
        if number == 0:
            valid[1, :shorter] = False
        held = [layer.table.positions[row].clone() for row in range(2)] if number else []
        places = valid.cumsum(1) - 1 + torch.tensor(tokens)[:, None]
        by = places[:, None].expand(-1, 4, -1)
        layer.update(rotation.turned(new_keys, by[:, :2]), new_values)
        output = layer.attend(rotation.turned(queries, by), None if valid.all() else valid, scoring).transpose(1, 2)
        first = 0 if number else shorter
        for row, skipped in ((0, 0), (1, first)):
            keys_of, values_of = ([*part[row]] if number else [torch.empty(0, 6)] * 2 for part in (keys, values))
            for head in range(2):
                whole_keys = torch.cat([keys_of[head], new_keys[row, head, skipped:]])
                whole_values = torch.cat([values_of[head], new_values[row, head, skipped:]])
                old = sorted(p for p in held[row][head].tolist() if p >= 0) if number else []
                index = [*old, *range(tokens[row], tokens[row] + length - skipped)]
                for query in range(length - skipped):
                    seen = index[: len(old) + query + 1]
                    placed = rotation.turned(whole_keys[seen], torch.arange(len(seen)))
                    for of_group in (2 * head, 2 * head + 1):
                        at = rotation.turned(queries[row, of_group, skipped + query], torch.tensor(len(seen) - 1))
                        expected = (placed @ at * 0.5).softmax(0) @ whole_values[seen]
                        torch.testing.assert_close(output[row, of_group, skipped + query], expected, **TIGHT)
        if number == 0:
            padded = [(new_keys[row, :, skip:], new_values[row, :, skip:]) for row, skip in ((0, 0), (1, first))]
            keys, values = [pair[0] for pair in padded], [pair[1] for pair in padded]
        else:
            keys = [torch.cat([keys[row], new_keys[row]], 1) for row in range(2)]
            values = [torch.cat([values[row], new_values[row]], 1) for row in range(2)]
        tokens = [tokens[0] + length, tokens[1] + length - first]


@given(kept=st.lists(st.booleans(), min_size=1, max_size=20), seed=st.integers(0, 2**16))
def test_what_is_missing_after_a_row(kept, seed):
    held = [position for position, stays in enumerate(kept) if stays]
    slots = torch.tensor([*held, -1, -1])[torch.randperm(len(held) + 2, generator=torch.manual_seed(seed))]
    expected = [
        0 if position < 0 else max(held) - position - sum(other > position for other in held)
        for position in slots.tolist()
    ]
    assert missing_after(slots.int()[None, None]).flatten().tolist() == expected


def test_nothing_is_turned_that_need_not_be():
    """Rows without a gap behind them are bit for bit those of the table, and so is a whole cache within its budget."""
    model, batch = build("llama"), left_padded([30])
    logits = [
        feed(model, batch, PrunedCache(model, StreamingLLM(30, positions=positions)), [20] + [1] * 10)
        for positions in ("original", "cache")
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("policy", [StreamingLLM(12, positions="cache"), H2O(12, recent=4, positions="cache")], ids=str)
def test_beams_files_and_forks(policy, tmp_path):
    model, batch = build("llama"), left_padded([30, 21])
    generate(model, batch, 6, num_beams=3, **cache_argument(PrunedCache(model, policy)))
    pruned = PrunedCache(model, policy)
    feed(model, batch, pruned, [20] + [1] * 5)
    pruned.save(tmp_path / "cache")
    rest = {"input_ids": batch["input_ids"][:, 25:], "attention_mask": batch["attention_mask"]}
    caches = [PrunedCache.load(tmp_path / "cache", model), pruned.fork(), pruned]
    with torch.no_grad():
        logits = [model(**rest, **cache_argument(each)).logits for each in caches]
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[2])
    assert kept_everywhere(caches[0]) == kept_everywhere(pruned)


def test_a_model_that_is_not_turned_by_its_positions_is_refused():
    for family in ("gpt2", "opt"):
        with pytest.raises(UnsupportedModelError, match="not turned by their position"):
            PrunedCache(build(family), StreamingLLM(12, positions="cache"))
        PrunedCache(build(family), StreamingLLM(12))
    moving = LlamaConfig(**SHAPE, num_hidden_layers=1, rope_parameters={**YARN, "rope_type": "dynamic"})
    with pytest.raises(UnsupportedModelError, match='rope type "dynamic"'):
        PrunedCache(transformers.LlamaForCausalLM(moving), SnapKV(40, interval=1, positions="cache"))


def test_what_cannot_be_turned_or_is_placed_already_is_refused():
    for chain in (
        lambda: H2O(0.5, positions="cache") | KIVI(),
        lambda: GemFilter(100) | H2O(0.5, positions="cache"),
    ):
        with pytest.raises(PolicyError, match='positions="original"'):
            chain()
    with pytest.raises(PolicyError, match='"original" or "cache", not "slots"'.replace('"slots"', "'slots'")):
        H2O(positions="slots")
