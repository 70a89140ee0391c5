"""Keys that are read in two halves, against the formula head by head, and what was read."""

from __future__ import annotations

import json

import pytest
import torch
from families import PrunedCache, feed, generate, kept_everywhere, left_padded, shared, storage_nbytes, token_ids
from torch import Tensor

from kvprune import PolicyError, Scoring
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import cache_argument
from kvprune.policies import H2O, KIVI, SpAtten
from kvprune.table.quantize import unpack
from kvprune.table.ragged import RaggedTable

DIM, GROUP = 16, 2
SCALE = 0.7


def random_tokens(length: int, seed: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, length, DIM, generator=random) for heads in (2 * GROUP, 2, 2))


def attend(layer: PrunedLayer, tokens: tuple[Tensor, ...]) -> Tensor:
    queries, keys, values = tokens
    layer.update(keys, values)
    return layer.attend(queries, None, Scoring(SCALE))


def expected(plain: PrunedLayer, queries: Tensor, bits: int, theta: float) -> tuple[Tensor, int]:
    """Output of one query a sequence, `[B, Hq, Dv]`, over the rows of a layer with whole codes, and bytes read."""
    table, half = plain.table, bits // 2
    (tier,) = table.packed
    codes = unpack(tier.tensors["key_codes"], bits, DIM).long()
    output, read = torch.zeros(*queries.shape[:2], DIM), 0
    keys, values = table.all_keys(), table.all_values()
    for row in range(len(queries)):
        for head in range(2):
            asked = False
            block = tier.tensors["block"][row, head].long()
            scale, zero = (tier.tensors[f"key_{name}"][row, head, block].float() for name in ("scale", "zero_point"))
            high = (codes[row, head] >> half << half) + (2**half - 1) / 2
            rough = torch.cat([high * scale + zero, table.keys[row, head]])
            for member in range(head * GROUP, (head + 1) * GROUP):
                found = (rough @ queries[row, member, 0] * SCALE).softmax(0)
                if found.max() < theta:
                    asked = True
                    found = (keys[row, head] @ queries[row, member, 0] * SCALE).softmax(0)
                output[row, member] = found @ values[row, head]
            read += len(tier) * (DIM * half // 8) * (1 + asked)
    return output, read


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("bits", [4, 8])
def test_low_bits_are_read_where_no_key_stands_out(bits, kernels):
    """Exactly there, and nowhere else; more of them for a larger theta."""
    prompt, tokens = random_tokens(70, seed=bits), [random_tokens(1, seed=seed) for seed in range(12)]
    settings = {"bits": bits, "group_size": 16, "residual": 5}
    plain = PrunedLayer(KIVI(**settings), 0, kernels=kernels)
    layers = {theta: PrunedLayer(KIVI(**settings, theta=theta), 0, kernels=kernels) for theta in (0, 0.2, 0.5, 1)}
    total = dict.fromkeys(layers, 0)
    for layer in (plain, *layers.values()):
        attend(layer, prompt)
    for each in tokens:
        rows = len(plain.table.packed[0])
        outputs = {theta: attend(layer, each) for theta, layer in layers.items()}
        whole = attend(plain, each)
        if len(plain.table.packed[0]) > rows:
            continue  # the table that was attended to is not there any more
        for theta, output in outputs.items():
            wanted, read = expected(plain, each[0], bits, theta)
            total[theta] += read
            torch.testing.assert_close(output[:, 0], wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outputs[1], whole, atol=1e-5, rtol=1e-4)
    assert total[0] < total[0.2] < total[0.5] < total[1]
    assert total[1] == 2 * total[0]
    for theta, layer in layers.items():
        (tier,) = layer.table.packed
        assert tier.bytes_read >= total[theta]
        assert tier.bytes_held >= total[1]
        if theta in (0, 1):
            assert tier.bytes_read * (2 - theta) == tier.bytes_held


@pytest.mark.parametrize("bits", [4, 8])
def test_halves_are_the_codes_that_were_split(bits):
    """After rows were added, evicted and selected, too; and steps of several tokens read all of it."""
    settings = {"bits": bits, "group_size": 8, "residual": 4}
    chains = [H2O(40, recent=4) | KIVI(**settings, **theta) for theta in ({}, {"theta": 0})]
    whole, split = (PrunedLayer(chain, 0) for chain in chains)
    for seed, length in enumerate((60, 20, 9)):
        prompt = random_tokens(length, seed)
        torch.testing.assert_close(attend(whole, prompt), attend(split, prompt), atol=1e-5, rtol=1e-4)
        for tier, other in zip(whole.table.packed, split.table.packed, strict=True):
            for own, its in zip(tier.decoded(), other.decoded(), strict=True):
                torch.testing.assert_close(own, its, atol=0, rtol=0)
            assert other.code_nbytes == tier.code_nbytes
        assert split.nbytes == whole.nbytes
        for layer in (whole, split):
            layer.batch_select_indices(torch.tensor([1, 0]))
        split = split.fork()


def test_what_was_read_is_reported_saved_and_counted_on(tmp_path):
    model, batch = shared("llama"), left_padded((90, 61))
    policy = KIVI(bits=8, group_size=8, residual=8, theta=0.05)
    cache = PrunedCache(model, policy)
    tokens = generate(model, batch, 10, **cache_argument(cache))
    report = cache.report()
    read, held = report.key_reads
    assert held / 2 <= read <= held
    assert "generated tokens have read" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["key_reads"] == [read, held]
    assert cache.nbytes == storage_nbytes(cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = PrunedCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.report().key_reads == (read, held)
    for row, length in enumerate((90, 61)):
        alone = PrunedCache(model, policy)
        own = {"input_ids": batch["input_ids"][row : row + 1, -length:]}
        assert generate(model, own, 10, **cache_argument(alone))[0, -10:].tolist() == tokens[row, -10:].tolist()
        assert kept_everywhere(cache, row) == kept_everywhere(alone)
    whole = PrunedCache(model, KIVI(bits=8, group_size=8, residual=8))
    generate(model, batch, 2, **cache_argument(whole))
    assert whole.report().key_reads is None


def test_heads_that_part_have_read_what_they_had_together():
    layer = PrunedLayer(KIVI(8, group_size=8, residual=4, theta=0.5), 0)
    for seed, length in enumerate((60, 1, 1, 1)):
        attend(layer, random_tokens(length, seed))
    (tier,) = layer.table.packed
    slots = torch.arange(layer.table.length).expand(2, 2, -1).clone()
    slots[1, 0, :20] = -1
    apart = RaggedTable.of(layer.table, slots, 0).packed
    assert len(apart) == 4
    assert sum(each.bytes_read for each in apart) == tier.bytes_read > 0
    assert sum(each.bytes_held for each in apart) == tier.bytes_held > tier.bytes_read


def test_behind_a_policy_that_stops_tokens_and_heads():
    model, ids = shared("gpt2"), token_ids(1, 60)
    cache = PrunedCache(model, SpAtten(((0.5, 0.6),), heads=((0.5, 0.5),)) | KIVI(8, group_size=8, residual=8, theta=1))
    plain = PrunedCache(model, SpAtten(((0.5, 0.6),), heads=((0.5, 0.5),)) | KIVI(8, group_size=8, residual=8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sizes = [50, *(1,) * 10]
    torch.testing.assert_close(feed(model, batch, cache, sizes), feed(model, batch, plain, sizes), atol=1e-4, rtol=1e-4)
    assert cache.report().key_reads[0] == cache.report().key_reads[1] > 0


@pytest.mark.parametrize("settings", [{"bits": 2}, {"bits": 3}, {"bits": 8, "rotate": True}])
def test_what_has_no_halves_is_refused(settings):
    with pytest.raises(PolicyError, match="halves of 4 or 8 bits"):
        KIVI(**settings, theta=0.05)
    for theta in (-0.1, 1.5, "0.05"):
        with pytest.raises(PolicyError, match="theta must be a number"):
            KIVI(8, theta=theta)
