"""Padding masks, over new tokens and over what is cached, mean what they mean to the stock cache, or are refused."""

from __future__ import annotations

import pytest
import torch
from families import assert_same_rows, build, generate, kept, kept_everywhere, left_padded, shared, token_ids
from torch import Tensor
from transformers import BioGptConfig, BioGptForCausalLM, DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from kvprune import CacheError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, TOVA, Full, GemFilter, ZipCache

ROOM = 10_000
POLICIES = {"full": Full(), "a2sf": A2SF(ROOM)}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
each_model = pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])


@torch.no_grad()
def fed(model, cache, ids: Tensor, mask: Tensor, masks: list[Tensor], sizes: list[int]) -> Tensor:
    """Logits of a prompt and of steps after it; masks: of all columns so far, one for each step."""
    logits, begin = [], 0
    for size, now in zip(sizes, [mask, *masks], strict=True):
        places = (now.cumsum(1) - 1).clamp(min=0)[:, begin : begin + size]
        new = ids[:, begin : begin + size]
        logits.append(model(new, attention_mask=now, position_ids=places, **cache_argument(cache)).logits)
        begin += size
    return torch.cat(logits, 1)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.long)


def histories() -> dict[str, tuple[list[Tensor], list[int]]]:
    """Masks after each step, and the sizes of steps, for a batch of two; columns are hidden in different ways."""
    padded = ones(2, 12)
    padded[1, :3] = 0
    finished, hidden, middle, right = (torch.cat([padded, ones(2, n)], 1) for n in (1, 4, 5, 5))
    finished[1, 12] = 0
    after = torch.cat([finished, ones(2, 3)], 1)
    hidden[0, 4:9] = hidden[1, 8:12] = 0
    middle[0, 14] = 0
    right[1, 15:] = 0
    one = torch.cat([hidden[:, :12], ones(2, 1)], 1)
    return {
        "a finished sequence": ([padded, finished, after], [12, 1, 3]),
        "hidden before a turn": ([padded, hidden, torch.cat([hidden, ones(2, 1)], 1)], [12, 4, 1]),
        "hidden before a token": ([padded, one, torch.cat([one, ones(2, 2)], 1)], [12, 1, 2]),
        "a gap in a turn": ([padded, middle, torch.cat([middle, ones(2, 1)], 1)], [12, 5, 1]),
        "padding behind a turn": ([padded, right, torch.cat([right, ones(2, 1)], 1)], [12, 5, 1]),
    }


@each_policy
@each_model
@pytest.mark.parametrize("history", histories())
def test_masks_mean_what_they_mean_to_the_stock_cache(family, policy, history):
    """Logits of every column, those of masked tokens that see anything included, are the stock cache's."""
    model, (masks, sizes) = shared(family), histories()[history]
    ids = token_ids(2, sum(sizes))
    expected = fed(model, DynamicCache(config=model.config), ids, masks[0], masks[1:], sizes)
    cache = PrunedCache(model, policy)
    logits = fed(model, cache, ids, masks[0], masks[1:], sizes)
    sees = masks[-1][:, : sum(sizes)].bool()
    first = sees.int().argmax(1)
    seen = torch.arange(sum(sizes)) >= first[:, None]  # before the first token there is nothing to see
    torch.testing.assert_close(logits[seen], expected[seen], atol=2e-4, rtol=2e-4)
    for layer in cache.pruned_layers:
        for row in range(2):
            assert (
                kept(cache, layer, row) == [list(range(int(masks[-1][row].sum())))] * cache.layers[layer].table.kv_heads
            )


@each_model
def test_a_mask_over_the_past_leaves_what_a_mask_from_the_start_leaves(family):
    """Rows of hidden tokens are gone, the others have moved up: as if the hidden ones had been padding all along."""
    model, (masks, sizes) = shared(family), histories()["a gap in a turn"]
    late, early = PrunedCache(model, Full()), PrunedCache(model, Full())
    ids, steps = token_ids(2, sum(sizes)), [12, 5, 1]
    seen_at_first = torch.cat([masks[0], ones(2, 5)], 1)
    fed(model, late, ids, masks[0], [seen_at_first, masks[2]], steps)
    fed(model, early, ids, masks[0], masks[1:], steps)
    assert [late.layers[i].tokens for i in late.pruned_layers] == [early.layers[i].tokens for i in early.pruned_layers]
    first = late.pruned_layers[0]
    assert kept(late, first) == kept(early, first)


def test_two_chats_of_which_one_ends_early():
    """Padding that generate() put behind a short answer takes no part in the next turn."""
    model, batch = build("llama"), left_padded([9, 14])
    answer = generate(model, batch, 6)
    answer[0, -4:] = 0  # what generate() does behind the end of a sequence
    turn = torch.cat([answer, token_ids(2, 5, seed=4)], 1)
    mask = torch.cat([batch["attention_mask"], ones(2, 11)], 1)
    mask[0, 16:20] = 0
    cache = PrunedCache(model, A2SF(ROOM))
    full = {"input_ids": turn[:, :20], "attention_mask": torch.cat([batch["attention_mask"], ones(2, 6)], 1)}
    with torch.no_grad():
        model(**full, position_ids=(full["attention_mask"].cumsum(1) - 1).clamp(min=0), **cache_argument(cache))
    both = {"input_ids": turn, "attention_mask": mask}
    assert torch.equal(generate(model, both, 6, **cache_argument(cache)), generate(model, both, 6))
    assert kept(cache, 0, 0) == [list(range(9 + 2 + 5 + 5))] * 2


@pytest.mark.parametrize("policy", [A2SF(20, recent=4), TOVA(20)], ids=str)
def test_a_model_that_makes_a_mask_where_it_is_given_none(policy):
    """generate() gives none where the cache is at its budget, and that mask shows the padding of the prompt."""
    torch.manual_seed(0)
    config = BioGptConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=256, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    model, batch = BioGptForCausalLM(config).eval(), left_padded([40, 31], seed=3)
    cache = PrunedCache(model, policy)
    ids = generate(model, batch, 10, **cache_argument(cache))
    for row, length in enumerate((40, 31)):
        own = {"input_ids": batch["input_ids"][row : row + 1, -length:]}
        alone = PrunedCache(model, policy)
        assert generate(model, own, 10, **cache_argument(alone))[0, -10:].tolist() == ids[row, -10:].tolist()
        assert kept_everywhere(cache, row) == kept_everywhere(alone)
    assert not cache.is_compileable
    assert alone.is_compileable
    # In another turn generate() gives it masks.
    more = torch.nn.functional.pad(ids, (0, 3), value=5)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 13), value=1)
    again = generate(model, {"input_ids": more, "attention_mask": mask}, 5, **cache_argument(cache))
    own = {"input_ids": more[1:, -44:]}  # behind nine of padding
    assert generate(model, own, 5, **cache_argument(alone))[0, -5:].tolist() == again[1, -5:].tolist()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3", "linear"])
def test_what_was_hidden_cannot_be_shown_again(family, steps):
    """Its rows are gone: refused before any layer has changed, and the cache goes on with the mask of before."""
    from families import linear_hybrid

    model = linear_hybrid() if family == "linear" else shared(family)
    mask, ids = ones(1, 12), token_ids(1, 20)
    hidden = torch.cat([mask, ones(1, 2)], 1)
    hidden[0, 3:6] = 0
    cache = PrunedCache(model, Full())
    fed(model, cache, ids, mask, [hidden], [12, 2])
    twin = cache.fork()
    with torch.no_grad():
        with pytest.raises(CacheError, match=r"shows column 3.*fork\(\)"):
            model(ids[:, 14 : 14 + steps], attention_mask=ones(1, 14 + steps), **cache_argument(cache))
        now = torch.cat([hidden, ones(1, steps)], 1)
        logits = [
            model(ids[:, 14 : 14 + steps], attention_mask=now, **cache_argument(each)).logits for each in (cache, twin)
        ]
    assert torch.equal(*logits)
    assert_same_rows(cache, twin)


@pytest.mark.parametrize("policy", [A2SF(10, sinks=1, recent=3), A2SF(10, recent=3) | ZipCache(buffer=3)])
def test_masks_over_a_cache_at_its_budget(policy):
    """Where rows were evicted or packed, hidden ones go as well; what stays is counted anew, and decoding goes on."""
    model, mask = shared(), ones(2, 24)
    cache = PrunedCache(model, policy)
    hidden = torch.cat([mask, ones(2, 1)], 1)
    hidden[0, 2:22] = 0
    masks = [hidden, *(torch.cat([hidden, ones(2, more)], 1) for more in (1, 2, 3))]
    fed(model, cache, token_ids(2, 28), mask, masks, [24, 1, 1, 1, 1])
    for layer in cache.pruned_layers:
        for head in kept(cache, layer, 0):
            assert head == sorted(set(head))
            assert head[-1] == 7  # 24 + 4 tokens, 20 hidden
        assert all(len(head) == 10 for head in kept(cache, layer, 1))


def test_masks_survive_forks_files_crops_and_beams(tmp_path):
    """What is hidden stays hidden in a copy, in a file, behind a crop, and where sequences change their places."""
    model, ids = shared(), token_ids(2, 20)
    mask = ones(2, 12)
    mask[1, 4:7] = 0
    cache = PrunedCache(model, Full())
    fed(model, cache, ids, mask, [torch.cat([mask, ones(2, 3)], 1)], [12, 3])
    cache.save(tmp_path / "cache")
    now = torch.cat([mask, ones(2, 4)], 1)
    more = {"attention_mask": now, "position_ids": now.cumsum(1)[:, -1:] - 1}
    with torch.no_grad():
        expected = model(ids[:, 15:16], **more, **cache_argument(cache.fork())).logits
        loaded = PrunedCache.load(tmp_path / "cache", model)
        assert torch.equal(model(ids[:, 15:16], **more, **cache_argument(loaded)).logits, expected)
        loaded.crop(-1)
        assert torch.equal(model(ids[:, 15:16], **more, **cache_argument(loaded)).logits, expected)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = {name: tensor.flip(0) for name, tensor in more.items()}
        logits = model(ids[:, 15:16].flip(0), **swapped, **cache_argument(cache)).logits
        torch.testing.assert_close(logits.flip(0), expected, atol=1e-4, rtol=1e-4)


def test_prompts_that_do_not_go_on_from_what_was_seen():
    """generate() slices ids by the cache's length; what is left of a shorter prompt is noticed, whole or in part."""
    model, batch = shared(), left_padded([12])
    for length in (12, 8):
        cache = PrunedCache(model, Full())
        fed(model, cache, batch["input_ids"], batch["attention_mask"], [], [12])
        shorter = {name: tensor[:, :length] for name, tensor in batch.items()}
        with pytest.raises(CacheError, match="whole conversation"):
            generate(model, shorter, 2, **cache_argument(cache))
        assert cache.seen_tokens == 12
    with torch.no_grad(), pytest.raises(CacheError, match="covers them all"):
        model(token_ids(1, 3), attention_mask=ones(1, 9), **cache_argument(cache))
    for family in ("llama", "gemma3", "opt"):  # layers of some are not told of use_cache
        model = shared(family)
        cache = PrunedCache(model, Full())
        with pytest.raises(CacheError, match=r"use_cache=False|covers them all"):  # 5.17 gives a mask
            generate(model, {"input_ids": batch["input_ids"]}, 2, use_cache=False, **cache_argument(cache))


def test_a_prompt_filter_refuses_what_it_cannot_follow():
    """Where a prompt was filtered, a mask that hides what was seen is refused, and a finished sequence takes no row."""
    model, ids = shared(), token_ids(2, 40)
    cache = PrunedCache(model, GemFilter(10, layer=1))
    mask = ones(2, 30)
    fed(model, cache, ids, mask, [], [30])
    finished = torch.cat([mask, torch.tensor([[0], [1]])], 1)
    fed_after = {"position_ids": torch.tensor([[30], [30]]), **cache_argument(cache)}
    with torch.no_grad():
        model(ids[:, 30:31], attention_mask=finished, **fed_after)
        assert [len(kept(cache, 0, row)[0]) for row in range(2)] == [10, 11]
        hidden = torch.cat([finished, ones(2, 1)], 1)
        hidden[0, 5] = 0
        with pytest.raises(CacheError, match="prompt was filtered"):
            model(ids[:, 31:32], attention_mask=hidden, **fed_after)


def test_a_model_that_does_not_say_use_cache_to_its_layers():
    """Layers of Qwen3-VL have use_cache=False always (transformers 5.24), though their cache is used."""
    text = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "eos_token_id": None}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32}
    vision |= {"intermediate_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=95, video_token_id=94)
    model = Qwen3VLForConditionalGeneration(config).eval()
    turns = [left_padded([12, 9])]
    stock, pruned = DynamicCache(config=model.config), PrunedCache(model, Full())
    for _ in range(2):
        expected = generate(model, turns[-1], 4, **cache_argument(stock))
        assert torch.equal(generate(model, turns[-1], 4, **cache_argument(pruned)), expected)
        ids = torch.cat([turns[-1]["input_ids"], expected[:, -4:], token_ids(2, 5)], dim=1)
        mask = torch.cat([turns[-1]["attention_mask"], ones(2, 9)], dim=1)
        turns.append({"input_ids": ids, "attention_mask": mask})
    with pytest.raises(CacheError, match="use_cache=False"):
        generate(model, turns[0], 3, use_cache=False, **cache_argument(PrunedCache(model, Full())))
