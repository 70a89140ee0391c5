"""ZipCache: its probes and saliency by brute force, what is packed when, and what that leaves of the answers."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from families import build, decoded, feed, generate, left_padded, rows, sequence, shared, stock
from hypothesis import assume, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor

from kvprune import CacheError, Policy, PrunedCache, Scoring, Step, TokenTable
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import cache_argument
from kvprune.policies import Full, ZipCache

SCALE = 0.5
ROUNDING = {"atol": 1e-5, "rtol": 1e-4}

thorough = profile(max_examples=4 * profile.default.max_examples)

seeds = st.integers(0, 2**16)
lengths = st.integers(1, 60)
shares = st.sampled_from([0.05, 0.1, 0.3, 0.5])
groups = st.sampled_from(["mean", "max"])


def watched(policy: ZipCache) -> tuple[Policy, list[SimpleNamespace]]:
    """The policy, and what its table holds whenever it has observed a step, sequence by sequence and head by head."""
    seen: list[SimpleNamespace] = []

    class Watched(ZipCache):
        def observe(self, table: TokenTable, step: Step) -> None:
            super().observe(table, step)
            columns = {name: tensor.clone() for name, tensor in decoded(table).items()}
            loose = torch.arange(table.length) >= table.packed_length
            seen.append(
                SimpleNamespace(**{name.removeprefix("buffer."): t for name, t in columns.items()}, loose=loose)
            )

    return Watched(**{name: getattr(policy, name) for name in policy.__dataclass_fields__}), seen


def saliency(snapshot: SimpleNamespace, row: int = 0) -> list[dict[int, float]]:
    """For each KV head, the saliency of the positions that wait in full precision."""
    return [
        {
            int(at): float(total / max(1, count))
            for at, total, count, loose in zip(*head, snapshot.loose, strict=True)
            if at >= 0 and loose
        }
        for head in zip(
            *(tensor[row] for tensor in (snapshot.positions, snapshot.saliency, snapshot.probes)), strict=True
        )
    ]


def random_tokens(
    batch: int, length: int, *, seed: int = 0, heads: int = 2, group: int = 2, dim: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, h, length, dim, generator=random) for h in (heads * group, heads, heads))


def step(layer: PrunedLayer, tokens: tuple[Tensor, Tensor, Tensor], valid: Tensor | None = None) -> Tensor:
    queries, keys, values = tokens
    layer.update(keys, values)
    return layer.attend(queries, valid, Scoring(SCALE))


def fed(policy: Policy, tokens: tuple[Tensor, Tensor, Tensor], sizes: list[int], index: int = 0) -> PrunedLayer:
    """A layer that was given these tokens in steps."""
    layer = PrunedLayer(policy, index)
    for part in zip(*(tensor.split(sizes, dim=2) for tensor in tokens), strict=True):
        step(layer, part)
    return layer


def share(part: float, whole: int) -> int:
    return math.ceil(Fraction(str(part)) * whole)


def prompt_probes(policy: ZipCache, length: int, layer: int = 0, first: int = 0) -> list[int]:
    """Positions of a prompt that probe: the newest, and of the others those of the highest hashes."""
    positions = range(first, first + length)
    newest = max(1, share(policy.probe_recent, length))
    others = sorted(
        positions[: length - newest], key=lambda at: reference.hash_of(policy.seed, layer, at), reverse=True
    )
    return [*positions[length - newest :], *others[: share(policy.probe_random, length)]]


def mean_attention(queries: Tensor, keys: Tensor, probes: list[int], group: str) -> np.ndarray:
    """`[Hkv, n]`: for each token of a prompt, the mean attention of the probes that could see it. No batch."""
    length = keys.shape[1]
    probabilities = reference.probabilities(queries, keys, reference.causal(length, length, len(keys)), SCALE)
    seen = reference.by_kv_head(probabilities, len(keys), group)
    return np.stack(
        [seen[:, [q for q in probes if q >= at], at].mean(1) for at in range(length)],
        axis=1,
    )


def packed_as(layer: PrunedLayer, bits: int, row: int = 0) -> list[list[int]]:
    """For each KV head, the positions that have so many bits; 0 for full precision."""
    held = decoded(layer.table)
    return [
        sorted(positions[(of == bits) & (positions >= 0)].tolist())
        for positions, of in zip(held["positions"][row], held["bits"][row], strict=True)
    ]


def what_is_packed(layer: PrunedLayer, row: int = 0) -> list[dict[int, tuple]]:
    """For each KV head, what every packed position decodes to, and from how many bits."""
    held = {name: tensor[row] for name, tensor in decoded(layer.table).items()}
    return [
        {
            int(at): (int(bits), tuple(key.tolist()), tuple(value.tolist()))
            for at, bits, key, value in zip(*head, strict=True)
            if at >= 0 and bits
        }
        for head in zip(*(held[name] for name in ("positions", "bits", "keys", "values")), strict=True)
    ]


# -- probes and saliency -----------------------------------------------------------------------------------------------


@thorough
@given(length=lengths, recent=shares, random=shares, group=groups, index=st.integers(0, 40), seed=seeds)
def test_saliency_of_a_prompt(length, recent, random, group, index, seed):
    """It is the mean attention of the probes that could see a token: the newest queries and some by hash."""
    policy = ZipCache(probe_recent=recent, probe_random=random, group=group, seed=seed)
    one, seen = watched(policy)
    tokens = random_tokens(1, length, seed=seed)
    fed(one, tokens, [length], index)
    probes = prompt_probes(policy, length, index)
    assert len(set(probes)) == len(probes)
    expected = mean_attention(tokens[0][0], tokens[1][0], probes, group)
    for head, found in enumerate(saliency(seen[0])):
        np.testing.assert_allclose([found[at] for at in range(length)], expected[head], atol=1e-5, rtol=1e-4)
        assert all(-1e-6 <= value <= 1 + 1e-6 for value in found.values())


@thorough
@given(several=st.lists(lengths, min_size=2, max_size=3), padding=st.integers(0, 4), group=groups, seed=seeds)
def test_saliency_in_a_padded_batch(several, padding, group, seed):
    """Each sequence of a batch has probes of its own, as many as it has alone."""
    policy, width = ZipCache(group=group, seed=seed), max(several) + padding
    one, seen = watched(policy)
    tokens = random_tokens(len(several), width, seed=seed)
    valid = torch.arange(width) >= width - torch.tensor(several)[:, None]
    step(PrunedLayer(one, 0), tokens, None if valid.all() else valid)
    for row, length in enumerate(several):
        queries, keys = (tensor[row, :, width - length :] for tensor in tokens[:2])
        expected = mean_attention(queries, keys, prompt_probes(policy, length), group)
        for head, found in enumerate(saliency(seen[0], row)):
            np.testing.assert_allclose([found[at] for at in range(length)], expected[head], atol=1e-5, rtol=1e-4)


@given(length=lengths, group=groups, seed=seeds)
def test_where_all_queries_probe_saliency_is_exact(length, group, seed):
    """With every query a probe, it is the accumulated attention over the number of queries that could see a token."""
    one, seen = watched(ZipCache(probe_recent=1.0, group=group))
    tokens = random_tokens(1, length, seed=seed)
    fed(one, tokens, [length])
    probabilities = reference.probabilities(tokens[0][0], tokens[1][0], reference.causal(length, length, 2), SCALE)
    summed = reference.by_kv_head(probabilities, 2, group).sum(1) / np.arange(length, 0, -1)
    for head, found in enumerate(saliency(seen[0])):
        np.testing.assert_allclose([found[at] for at in range(length)], summed[head], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("normalizer", ["probes", "official"])
@pytest.mark.parametrize("length", [100, 128, 129, 200])
def test_a_long_prompt_while_the_past_is_recorded(normalizer, length):
    """A prompt whose newest queries wait for crop() is counted once: all queries probing, saliency is exact."""
    one, seen = watched(ZipCache(probe_recent=1.0, normalizer=normalizer))
    tokens = random_tokens(1, length)
    layer = PrunedLayer(one, 0)
    layer.activate_past_recording()
    step(layer, tokens)
    layer.crop(0)
    expected = mean_attention(tokens[0][0], tokens[1][0], list(range(length)), "mean")
    for head, found in enumerate(saliency(seen[-1])):
        np.testing.assert_allclose([found[at] for at in range(length)], expected[head], atol=1e-5, rtol=1e-4)


@given(several=st.lists(lengths, min_size=1, max_size=2), seed=seeds)
def test_the_official_normalizer(several, seed):
    """As in the published code, a prompt's sum over the probes is divided by all queries that could see a token."""
    policy, width = ZipCache(normalizer="official", seed=seed), max(several)
    one, seen = watched(policy)
    tokens = random_tokens(len(several), width, seed=seed)
    valid = torch.arange(width) >= width - torch.tensor(several)[:, None]
    step(PrunedLayer(one, 0), tokens, None if valid.all() else valid)
    for row, length in enumerate(several):
        probes = prompt_probes(policy, length)
        able = np.array([sum(q >= at for q in probes) for at in range(length)])
        queries, keys = (tensor[row, :, width - length :] for tensor in tokens[:2])
        expected = mean_attention(queries, keys, probes, "mean") * able / np.arange(length, 0, -1)
        for head, found in enumerate(saliency(seen[0], row)):
            np.testing.assert_allclose([found[at] for at in range(length)], expected[head], atol=1e-5, rtol=1e-4)


@given(
    prompt=st.integers(1, 10),
    buffer=st.integers(1, 12),
    recent=shares,
    random=shares,
    normalizer=st.sampled_from(["probes", "official"]),
    seed=seeds,
)
def test_saliency_of_generated_tokens(prompt, buffer, recent, random, normalizer, seed):
    """Among each block of generated tokens the newest probe and some by hash; the official code asks the last alone."""
    policy = ZipCache(buffer=buffer, probe_recent=recent, probe_random=random, normalizer=normalizer, seed=seed)
    one, seen = watched(policy)
    generated = 2 * buffer + 1
    queries, keys, values = random_tokens(1, prompt + generated, seed=seed)
    fed(one, (queries, keys, values), [prompt] + [1] * generated)
    newest = 1 if normalizer == "official" else max(1, share(recent, buffer))
    given_: dict[int, list[np.ndarray]] = {}
    for number, snapshot in enumerate(seen[1:]):
        at = prompt + number
        if number % buffer == 0:
            given_ = {}
        given_[at] = []
        drawn = normalizer == "probes" and reference.hash_of(seed, 0, number) < random * 2**32
        if drawn or number % buffer >= buffer - newest:
            visible = np.broadcast_to(snapshot.positions[0, :, None] >= 0, (2, 1, snapshot.keys.shape[2]))
            row = reference.probabilities(queries[0, :, at : at + 1], snapshot.keys[0], visible, SCALE)
            attention = reference.by_kv_head(row, 2)[:, 0]
            for position, list_ in given_.items():
                slot = [head.index(position) for head in snapshot.positions[0].tolist()]
                list_.append(attention[[0, 1], slot])
        for head, found in enumerate(saliency(snapshot)):
            assert sorted(found) == sorted(given_)
            for position, list_ in given_.items():
                expected = sum(each[head] for each in list_) / max(1, len(list_))
                assert abs(found[position] - expected) < 1e-5


@given(prompt=st.integers(1, 10), drafts=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=seeds)
def test_saliency_of_tokens_that_are_accepted_together(prompt, drafts, seed):
    """Of several tokens in one step, a probe counts for those that it could see, and not for later ones."""
    one, seen = watched(ZipCache(buffer=50, probe_random=1.0, seed=seed))
    queries, keys, values = random_tokens(1, prompt + sum(drafts), seed=seed)
    layer = PrunedLayer(one, 0)
    layer.activate_past_recording()
    for part in zip(*(tensor.split([prompt, *drafts], dim=2) for tensor in (queries, keys, values)), strict=True):
        step(layer, part)
        layer.crop(0)
    last = seen[-1]
    for head, found in enumerate(saliency(last)):
        slot = {at: index for index, at in enumerate(last.positions[0, head].tolist())}
        total = dict.fromkeys(found, 0.0)
        for at in found:  # every query probes
            visible = np.broadcast_to(last.positions[0, :, None].numpy() <= at, (2, 1, last.keys.shape[2]))
            row = reference.probabilities(queries[0, :, at : at + 1], last.keys[0], visible, SCALE)
            for key in found:
                total[key] += reference.by_kv_head(row, 2)[head, 0, slot[key]]
        for key, value in found.items():
            assert abs(value - total[key] / (prompt + sum(drafts) - key)) < 1e-5


# -- which tokens get how many bits ------------------------------------------------------------------------------------


@thorough
@given(length=lengths, salient=st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.85, 1.0]), kernel=st.sampled_from([1, 3, 5]),
       seed=seeds)  # fmt: skip
def test_the_most_salient_tokens_get_the_high_bits(length, salient, kernel, seed):
    """Per KV head, the ceil(salient n) most salient tokens of a prompt get the high bits, and all others the low."""
    policy = ZipCache(salient=salient, kernel_size=kernel, seed=seed)
    tokens = random_tokens(1, length, seed=seed)
    layer = fed(policy, tokens, [length])
    expected = mean_attention(tokens[0][0], tokens[1][0], prompt_probes(policy, length), "mean")
    reach = kernel // 2
    for head in range(2):
        value = [expected[head, max(0, at - reach) : at + reach + 1].max() for at in range(length)]
        best = sorted(range(length), key=lambda at: (value[at], at), reverse=True)
        count = share(salient, length)
        if 0 < count < length and value[best[count - 1]] != value[best[count]]:
            assume(value[best[count - 1]] - value[best[count]] > 1e-5)
        assert packed_as(layer, 4)[head] == sorted(best[:count])
        assert packed_as(layer, 2)[head] == sorted(best[count:])
    assert packed_as(layer, 0) == [[], []]


@given(several=st.lists(st.integers(1, 120), min_size=1, max_size=4), seed=seeds)
def test_sizes_in_a_padded_batch(several, seed):
    """Each sequence has its own number of salient tokens, and keeps all of its own."""
    width = max(several)
    tokens = random_tokens(len(several), width, seed=seed)
    valid = torch.arange(width) >= width - torch.tensor(several)[:, None]
    layer = PrunedLayer(ZipCache(), 0)
    step(layer, tokens, None if valid.all() else valid)
    for row, length in enumerate(several):
        for high, low in zip(packed_as(layer, 4, row), packed_as(layer, 2, row), strict=True):
            assert len(high) == share(0.6, length)
            assert sorted(high + low) == list(range(length))


@pytest.mark.parametrize("length", [85, 90, 170])
def test_shares_round_alike_in_a_batch_and_alone(length):
    """0.6 of 85 tokens are 51, whether other sequences of the batch are shorter or not."""
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, :3] = False
    layer = PrunedLayer(ZipCache(), 0)
    step(layer, random_tokens(2, length), valid)
    assert [len(head) for head in packed_as(layer, 4, 1)] == [share(0.6, length)] * 2


@given(length=lengths, seed=seeds)
def test_at_equal_bits_saliency_does_not_matter(length, seed):
    """With as many bits for all tokens there is one codec, and any share of salient tokens gives the same codes."""
    tokens = random_tokens(1, length, seed=seed)
    few, many = (fed(ZipCache(salient=share, high_bits=4, low_bits=4), tokens, [length]) for share in (0.1, 0.9))
    assert what_is_packed(few) == what_is_packed(many)
    assert len(few.table.packed) == 1


# -- when --------------------------------------------------------------------------------------------------------------


@thorough
@given(prompt=st.integers(1, 30), buffer=st.integers(1, 7), generated=st.integers(0, 20), seed=seeds)
def test_a_full_buffer_is_packed_and_nothing_else(prompt, buffer, generated, seed):
    """Generated tokens wait, exact, until there are `buffer` of them; these are packed and all others left alone."""
    tokens = random_tokens(1, prompt + generated, seed=seed)
    layer = PrunedLayer(ZipCache(buffer=buffer), 0)
    before: list[dict] = [{}, {}]
    for number, part in enumerate(zip(*(t.split([prompt] + [1] * generated, dim=2) for t in tokens), strict=True)):
        step(layer, part)
        waiting = number % buffer
        newest = list(range(prompt + number - waiting, prompt + number))
        assert packed_as(layer, 0) == [newest] * 2
        after = what_is_packed(layer)
        for then, now in zip(before, after, strict=True):
            assert {at: now[at] for at in then} == then
            assert sorted(now) == list(range(prompt + number - waiting))
        if number and not waiting:
            high = [[at for at in head if at >= prompt + number - buffer] for head in packed_as(layer, 4)]
            assert [len(head) for head in high] == [share(0.6, buffer)] * 2
        assert torch.equal(layer.table.keys[0], tokens[1][0][:, newest])
        assert torch.equal(layer.table.values[0], tokens[2][0][:, newest])
        before = after


@given(turns=st.lists(st.tuples(st.integers(2, 20), st.integers(0, 8)), min_size=2, max_size=3), seed=seeds)
def test_a_second_turn_packs_what_is_new(turns, seed):
    """A turn packs its prompt with what still waits from the turn before, and leaves older codes as they are."""
    sizes = [size for prompt, generated in turns for size in [prompt] + [1] * generated]
    tokens = random_tokens(1, sum(sizes), seed=seed)
    layer, before, held = PrunedLayer(ZipCache(buffer=5), 0), [{}, {}], 0
    for part in zip(*(tensor.split(sizes, dim=2) for tensor in tokens), strict=True):
        output = step(layer, part)
        assert output.isfinite().all()
        held += part[0].shape[2]
        after = what_is_packed(layer)
        assert all({at: now[at] for at in then} == then for then, now in zip(before, after, strict=True))
        if part[0].shape[2] > 1:
            assert [sorted(head) for head in after] == [list(range(held))] * 2
        assert [sorted(a + b) for a, b in zip(packed_as(layer, 0), map(list, after), strict=True)] == [
            list(range(held))
        ] * 2
        before = after


@thorough
@given(several=st.lists(st.integers(1, 40), min_size=2, max_size=3), padding=st.integers(0, 4), seed=seeds)
def test_a_padded_batch_has_the_codes_of_each_sequence_alone(several, padding, seed):
    """Whatever the padding, each sequence has bit for bit the codes that it has alone, also for generated tokens."""
    width, more = max(several) + padding, 8
    tokens = random_tokens(len(several), width + more, seed=seed)
    together = PrunedLayer(ZipCache(buffer=3), 0)
    valid = torch.arange(width) >= width - torch.tensor(several)[:, None]
    outputs = [step(together, tuple(tensor[:, :, :width] for tensor in tokens), None if valid.all() else valid)]
    outputs += [step(together, tuple(t[:, :, at : at + 1] for t in tokens)) for at in range(width, width + more)]
    for row, length in enumerate(several):
        own = tuple(tensor[row : row + 1, :, width - length :] for tensor in tokens)
        alone = PrunedLayer(ZipCache(buffer=3), 0)
        for number, part in enumerate(zip(*(t.split([length] + [1] * more, dim=2) for t in own), strict=True)):
            expected = step(alone, part)
            torch.testing.assert_close(outputs[number][row, -1], expected[0, -1], **ROUNDING)
        assert what_is_packed(together, row) == what_is_packed(alone)
        assert packed_as(together, 0, row) == packed_as(alone, 0)


@given(data=st.data(), seed=seeds)
def test_beams_and_forks_keep_codes(data, seed):
    """Sequences that are reordered or repeated, and forks, decode to what they did, and go on packing by themselves."""
    tokens = random_tokens(2, 20, seed=seed)
    layer = PrunedLayer(ZipCache(buffer=4), 0)
    step(layer, tuple(tensor[:, :, :12] for tensor in tokens))
    for at in range(12, 17):
        step(layer, tuple(tensor[:, :, at : at + 1] for tensor in tokens))
    before = [what_is_packed(layer, row) for row in range(2)]
    fork = layer.fork()
    index = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4))
    layer.reorder_cache(torch.tensor(index))
    assert [what_is_packed(layer, row) for row in range(len(index))] == [before[source] for source in index]
    for at in range(17, 20):
        step(layer, tuple(tensor[index][:, :, at : at + 1] for tensor in tokens))
    assert [what_is_packed(fork, row) for row in range(2)] == before
    for at in range(17, 20):
        step(fork, tuple(tensor[:, :, at : at + 1] for tensor in tokens))
    for row, source in enumerate(index):
        assert what_is_packed(layer, row) == what_is_packed(fork, source)


@given(waiting=st.integers(1, 4), taken_back=st.integers(1, 6), seed=seeds)
def test_tokens_that_wait_can_be_taken_back(waiting, taken_back, seed):
    """crop() takes back tokens that wait in full precision, and refuses where some of them have been packed."""
    tokens = random_tokens(1, 9 + waiting, seed=seed)
    layer = fed(ZipCache(buffer=5), tokens, [9] + [1] * waiting)
    before = what_is_packed(layer)
    if taken_back > waiting:
        with pytest.raises(CacheError, match="cannot come back"):
            layer.crop(-taken_back)
        taken_back = 0
    else:
        layer.crop(-taken_back)
    assert packed_as(layer, 0) == [list(range(9, 9 + waiting - taken_back))] * 2
    assert what_is_packed(layer) == before


# -- the model's answers -----------------------------------------------------------------------------------------------


@given(several=st.lists(st.integers(1, 40), min_size=1, max_size=3), seed=seeds)
def test_a_prompt_is_packed_after_it_was_attended_to(several, seed):
    """Logits of a prompt are those of a cache that keeps everything, bit for bit, and so those of the stock model."""
    batch = left_padded(several, seed=seed)
    logits, full = (
        feed(shared(), batch, PrunedCache(shared(), policy), [max(several)]) for policy in (ZipCache(), Full())
    )
    assert torch.equal(logits, full)
    with torch.no_grad():
        expected = stock()(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)


@given(several=st.lists(st.integers(2, 40), min_size=2, max_size=3), seed=seeds)
def test_logits_of_a_padded_batch_are_those_of_each_sequence_alone(several, seed):
    """Through a whole model, padding changes nothing, while blocks of generated tokens are packed."""
    model, more, policy = build("llama", dtype=torch.float64), 7, ZipCache(buffer=3)
    batch = left_padded([length + more for length in several], seed=seed)
    together = feed(model, batch, PrunedCache(model, policy), [max(several)] + [1] * more)
    for row, length in enumerate(several):
        own = PrunedCache(model, policy)
        alone = feed(model, sequence(batch, row), own, [length] + [1] * more)
        torch.testing.assert_close(together[row, -more:], alone[0, -more:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("group_size", [None, 8])
def test_more_bits_are_nearer_to_the_stock_model(group_size):
    """Logits after a packed prompt come nearer to the stock model's with every bit, and are close at eight."""
    batch = left_padded([60, 45])
    with torch.no_grad():
        expected = stock()(**batch).logits[:, 40:]
    error = {}
    for bits in (2, 4, 8):
        policy = ZipCache(high_bits=bits, low_bits=bits, buffer=5, group_size=group_size)
        logits = feed(shared(), batch, PrunedCache(shared(), policy), [40] + [1] * 20)[:, 40:]
        error[bits] = float((logits - expected).abs().mean() / expected.abs().mean())
    assert error[2] > 2 * error[4] > 8 * error[8]
    assert error[8] < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "policy", [ZipCache(buffer=4), ZipCache(buffer=4, normalizer="official", group_size=8)], ids=str
)
def test_half_precision_is_finite(dtype, policy):
    """Models in half precision generate with finite logits from packed rows."""
    model = build("llama", dtype=dtype)
    cache = PrunedCache(model, policy)
    out = generate(
        model, left_padded([40, 20]), 12, **cache_argument(cache), output_logits=True, return_dict_in_generate=True
    )
    assert all(logits.isfinite().all() for logits in out.logits)
    held = rows(cache, 0)
    assert held["bits"].gt(0).any()
    assert all(tensor.isfinite().all() for tensor in held.values())


def test_numbers_that_are_none_do_not_spread_into_parameters():
    """A key that overflowed to infinity, and a value that is NaN, leave a cache whose output is finite again."""
    queries, keys, values = random_tokens(1, 30)
    keys[0, 0, 3, 1], values[0, 1, 4, 2] = torch.inf, torch.nan
    layer = PrunedLayer(ZipCache(), 0)
    step(layer, (queries, keys, values))
    assert all(tensor.isfinite().all() for tensor in decoded(layer.table).values())
    assert step(layer, random_tokens(1, 1)).isfinite().all()


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_bytes_of_a_long_prompt():
    """4,096 tokens of head dim 128 at 4 and 2 bits take less than a 4.5th of float16, parameters included."""
    length, heads, dim = 4096, 2, 128
    layer = PrunedLayer(ZipCache(), 0)
    keys, values = (torch.randn(1, heads, length, dim).half() for _ in range(2))
    layer.update(keys, values)
    layer.attend(torch.randn(1, heads, length, dim).half(), None, Scoring(dim**-0.5))
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in layer.table.tensors().values() if tensor.numel()}  # fmt: skip
    assert layer.nbytes == sum(held.values())
    assert (keys.nbytes + values.nbytes) / layer.nbytes >= 4.5
    assert [len(head) for head in packed_as(layer, 4)] == [share(0.6, length)] * heads
