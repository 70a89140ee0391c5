"""KIVI: which tokens are packed and when, in which groups, by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build, decoded, feed, generate, left_padded, rows, shared, stock
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor

from kvprune import PrunedCache, Scoring
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import cache_argument
from kvprune.policies import KIVI, Full

KEY_DIM, VALUE_DIM = 6, 5

thorough = profile(max_examples=4 * profile.default.max_examples)

seeds = st.integers(0, 2**16)
policies = st.builds(KIVI, bits=st.sampled_from([2, 3, 4, 8]), group_size=st.integers(1, 6), residual=st.integers(0, 7))


def random_tokens(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of two KV heads and four query heads."""
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, length, KEY_DIM, generator=random),
        torch.randn(batch, 2, length, KEY_DIM, generator=random),
        torch.randn(batch, 2, length, VALUE_DIM, generator=random),
    )


def step(layer: PrunedLayer, tokens: tuple[Tensor, ...], valid: Tensor | None = None) -> Tensor:
    queries, keys, values = tokens
    layer.update(keys, values)
    return layer.attend(queries, valid, Scoring(0.5))


def held_rows(layer: PrunedLayer, row: int = 0) -> list[dict[int, tuple]]:
    """For each KV head, the bits, the decoded key and the decoded value of every position."""
    held = {name: tensor[row].tolist() for name, tensor in decoded(layer.table).items()}
    return [
        {at: (bits, tuple(key), tuple(value)) for at, bits, key, value in zip(*head, strict=True) if at >= 0}
        for head in zip(*(held[name] for name in ("positions", "bits", "keys", "values")), strict=True)
    ]


def quantized(numbers: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """What numbers come back as that share parameters along the first axis, in float64, and the size of a step."""
    lowest = numbers.min(0)
    scale = (numbers.max(0) - lowest) / (2**bits - 1)
    return np.rint((numbers - lowest) / np.where(scale > 0, scale, 1)) * scale + lowest, scale


# -- groups ------------------------------------------------------------------------------------------------------------


@thorough
@given(policy=policies, prompt=st.integers(1, 30), generated=st.integers(0, 15), seed=seeds)
def test_the_newest_stay_exact_and_full_groups_are_packed(policy, prompt, generated, seed):
    """The last `residual` tokens, and what fills no group yet, stay exact; the groups of all others are packed."""
    tokens = random_tokens(1, prompt + generated, seed)
    layer, before = PrunedLayer(policy, 0), [{}, {}]
    held = 0
    for part in zip(*(tensor.split([prompt] + [1] * generated, dim=2) for tensor in tokens), strict=True):
        step(layer, part)
        held += part[0].shape[2]
        groups = max(0, held - policy.residual) // policy.group_size
        after = held_rows(layer)
        for head, (then, now) in enumerate(zip(before, after, strict=True)):
            assert sorted(now) == list(range(held))
            for at, (bits, key, value) in now.items():
                assert bits == (policy.bits if at < groups * policy.group_size else 0)
                if not bits:
                    assert torch.equal(torch.tensor(key), tokens[1][0, head, at])
                    assert torch.equal(torch.tensor(value), tokens[2][0, head, at])
            packed_before = {at: row for at, row in then.items() if row[0]}
            assert {at: now[at] for at in packed_before} == packed_before
        before = after


@thorough
@given(policy=policies, prompt=st.integers(1, 30), generated=st.integers(0, 10), seed=seeds)
def test_keys_by_channel_and_values_by_token(policy, prompt, generated, seed):
    """Each group of tokens has keys quantized per channel; each token its values, per group of channels."""
    tokens = random_tokens(1, prompt + generated, seed)
    layer = PrunedLayer(policy, 0)
    for part in zip(*(tensor.split([prompt] + [1] * generated, dim=2) for tensor in tokens), strict=True):
        step(layer, part)
    size, bits = policy.group_size, policy.bits
    groups = max(0, prompt + generated - policy.residual) // size
    for head, held in enumerate(held_rows(layer)):
        keys, values = (tensor[0, head].double().numpy() for tensor in tokens[1:])
        for group in range(groups):
            positions = range(group * size, (group + 1) * size)
            expected, scale = quantized(keys[positions], bits)
            found = np.array([held[at][1] for at in positions])
            # Parameters in float16 move a number by a little, and one that lies between two codes by a step.
            assert (np.abs(found - keys[positions]) <= scale / 2 * 1.01 + 4e-3).all()
            assert (np.abs(found - expected) <= scale * 1.01 + 4e-3).all()
            assert np.mean(np.abs(found - expected) <= 8e-3) >= (0.9 if bits < 8 and size > 2 else 0)
        for at in range(groups * size):
            for first in range(0, VALUE_DIM, size):
                some = slice(first, min(VALUE_DIM, first + size))
                expected, scale = quantized(values[at, some], bits)
                found = np.array(held[at][2][some])
                assert (np.abs(found - values[at, some]) <= scale / 2 * 1.01 + 4e-3).all()
                assert (np.abs(found - expected) <= scale * 1.01 + 4e-3).all()


@given(group=st.integers(2, 6), seed=seeds, data=st.data())
def test_other_groups_do_not_matter(group, seed, data):
    """What a group decodes to depends on its own tokens alone, and of a token's value on that token alone."""
    length, change = 4 * group, data.draw(st.integers(0, 3))
    queries, keys, values = random_tokens(1, length, seed)
    other = slice(change * group, (change + 1) * group)
    changed_keys, changed_values = keys.clone(), values.clone()
    changed_keys[:, :, other] *= 50
    changed_values[:, :, other] *= 50
    held = []
    for tokens in ((queries, keys, values), (queries, changed_keys, changed_values)):
        layer = PrunedLayer(KIVI(group_size=group, residual=0), 0)
        step(layer, tokens)
        held.append(held_rows(layer))
    for mine, theirs in zip(*held, strict=True):
        for at in set(range(length)) - set(range(length)[other]):
            assert mine[at] == theirs[at]


# -- batches, turns, beams ---------------------------------------------------------------------------------------------


@thorough
@given(
    policy=policies, several=st.lists(st.integers(1, 25), min_size=2, max_size=3), padding=st.integers(0, 4), seed=seeds
)
def test_a_padded_batch_holds_what_each_sequence_holds_alone(policy, several, padding, seed):
    """Whatever the padding, each sequence has groups of its own, with bit for bit the codes that they have alone."""
    width, more = max(several) + padding, 8
    tokens = random_tokens(len(several), width + more, seed)
    valid = torch.arange(width) >= width - torch.tensor(several)[:, None]
    together = PrunedLayer(policy, 0)
    step(together, tuple(tensor[:, :, :width] for tensor in tokens), None if valid.all() else valid)
    alone = [PrunedLayer(policy, 0) for _ in several]
    for row, length in enumerate(several):
        step(alone[row], tuple(tensor[row : row + 1, :, width - length : width] for tensor in tokens))
        assert held_rows(together, row) == held_rows(alone[row])
    for at in range(width, width + more):
        output = step(together, tuple(tensor[:, :, at : at + 1] for tensor in tokens))
        for row, layer in enumerate(alone):
            expected = step(layer, tuple(tensor[row : row + 1, :, at : at + 1] for tensor in tokens))
            torch.testing.assert_close(output[row], expected[0], atol=1e-5, rtol=1e-4)
            assert held_rows(together, row) == held_rows(layer)


@given(policy=policies, sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=seeds)
def test_how_tokens_come_does_not_matter(policy, sizes, seed):
    """In one piece, in chunks or one by one, the same groups are packed in the end, with the same codes."""
    tokens = random_tokens(1, sum(sizes), seed)
    held = []
    for steps in ([sum(sizes)], sizes, [1] * sum(sizes)):
        layer = PrunedLayer(policy, 0)
        for part in zip(*(tensor.split(steps, dim=2) for tensor in tokens), strict=True):
            step(layer, part)
        held.append(held_rows(layer))
    assert held[0] == held[1] == held[2]


@given(index=st.lists(st.integers(0, 1), min_size=1, max_size=4), seed=seeds)
def test_beams_and_forks_keep_codes(index, seed):
    """Sequences that are reordered or repeated, and forks, hold what they held, and go on by themselves."""
    policy, tokens = KIVI(group_size=4, residual=2), random_tokens(2, 25, seed)
    layer = PrunedLayer(policy, 0)
    step(layer, tuple(tensor[:, :, :20] for tensor in tokens))
    before = [held_rows(layer, row) for row in range(2)]
    fork = layer.fork()
    layer.reorder_cache(torch.tensor(index))
    assert [held_rows(layer, row) for row in range(len(index))] == [before[source] for source in index]
    for at in range(20, 25):
        step(layer, tuple(tensor[index][:, :, at : at + 1] for tensor in tokens))
    assert [held_rows(fork, row) for row in range(2)] == before
    for at in range(20, 25):
        step(fork, tuple(tensor[:, :, at : at + 1] for tensor in tokens))
    for row, source in enumerate(index):
        assert held_rows(layer, row) == held_rows(fork, source)


# -- the model's answers -----------------------------------------------------------------------------------------------


def test_a_prompt_is_packed_after_it_was_attended_to():
    """Logits of a prompt are those of a cache that keeps everything, bit for bit."""
    batch = left_padded([60, 33])
    logits, full = (
        feed(shared(), batch, PrunedCache(shared(), policy), [60])
        for policy in (KIVI(group_size=8, residual=8), Full())
    )
    assert torch.equal(logits, full)


def test_a_large_residual_is_a_full_cache():
    """Nothing is packed of a sequence that the residual holds, so generate() gives the ids of the stock cache."""
    batch = left_padded([40, 25])
    ids = generate(shared(), batch, 12, **cache_argument(PrunedCache(shared(), KIVI(residual=60))))
    assert torch.equal(ids, generate(stock(), batch, 12))


def test_more_bits_are_nearer_to_the_stock_model():
    """Logits after a packed prompt come nearer to the stock model's with every bit, and are close at eight."""
    batch = left_padded([60, 45])
    with torch.no_grad():
        expected = stock()(**batch).logits[:, 40:]
    error = {}
    for bits in (2, 4, 8):
        cache = PrunedCache(shared(), KIVI(bits, group_size=4, residual=4))
        logits = feed(shared(), batch, cache, [40] + [1] * 20)[:, 40:]
        error[bits] = float((logits - expected).abs().mean() / expected.abs().mean())
    assert error[2] > 2 * error[4] > 8 * error[8]
    assert error[8] < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_finite(dtype):
    """Models in half precision generate with finite logits from packed rows."""
    model = build("llama", dtype=dtype)
    cache = PrunedCache(model, KIVI(group_size=4, residual=4))
    out = generate(
        model, left_padded([40, 20]), 12, **cache_argument(cache), output_logits=True, return_dict_in_generate=True
    )
    assert all(logits.isfinite().all() for logits in out.logits)
    held = rows(cache, 0)
    assert held["bits"].gt(0).any()
    assert all(tensor.isfinite().all() for tensor in held.values())


def test_bytes_of_a_long_prompt():
    """4,096 tokens of head dim 128 at 2 bits with groups of 32 take what the parameters add: three bits a number."""
    length, heads, dim = 4096, 2, 128
    layer = PrunedLayer(KIVI(), 0)
    keys, values = (torch.randn(1, heads, length, dim).half() for _ in range(2))
    layer.update(keys, values)
    layer.attend(torch.randn(1, heads, length, dim).half(), None, Scoring(dim**-0.5))
    packed = length - 128
    numbers = packed * heads * dim
    exact = 2 * 2 * 128 * heads * dim
    # Two times: 2-bit codes, and for every 32 numbers a scale and a zero point of 16 bits; a block number, a position.
    assert layer.nbytes == exact + 2 * numbers * 3 // 8 + packed * heads + length * heads * 4
