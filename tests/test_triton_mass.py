"""The Triton `attention_mass` against its twin in PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from devices import DTYPES, EXACT, on_devices
from hypothesis import given
from hypothesis import strategies as st
from test_mass import Case, cases, chosen_rows, groups, positioned, seeds
from torch import Tensor

from kvprune import PolicyError, RowWeights, Scoring, attention_mass
from kvprune.attention.mass import row_probabilities
from kvprune.attention.noise import Gumbel, hashed, mix

pytest.importorskip("triton", reason="needs Triton: pip install triton")
import triton
import triton.language as tl

from kvprune.kernels import gpu as kernels
from kvprune.kernels.gpu import mass as mass_kernels
from kvprune.kernels.gpu import noise as noise_kernels

SHAPES = {
    "one of all": (1, 1, 1, 1, 1, 16),
    "groups of three, dim 80": (2, 1, 3, 5, 70, 80),
    "rows of two tiles, dim 96": (1, 1, 2, 70, 80, 96),
    "tiny dim": (1, 2, 5, 3, 20, 5),
}
WEIGHTS = {
    "geometric": lambda batch, rows: RowWeights.geometric(rows, 0.9),
    "last row": lambda batch, rows: RowWeights.last_window(1),
    "window": lambda batch, rows: RowWeights.last_window(20),
    "uniform, noisy": lambda batch, rows: RowWeights.uniform(rows).noisy(Gumbel(2**40 + 3, 7, 1.5, 0.5)),
    "window, a temperature a row": lambda batch, rows: RowWeights.last_window(4).noisy(
        Gumbel(5, 0, torch.linspace(1, 2, rows))
    ),
    "explicit": lambda batch, rows: RowWeights.explicit(torch.arange(rows).flip(0)[:4], torch.linspace(1, 0, rows)[:4]),
    "explicit, a choice a sequence": lambda batch, rows: RowWeights.explicit(
        torch.randint(rows, (batch, 3)), torch.rand(batch, 3)
    ),
}


def case_of(shape: tuple[int, ...], device: str, *, dtype: torch.dtype = torch.float32, plain: bool = True) -> Case:
    """Random tokens of `(B, Hkv, G, L, S, D)`. plain: without a soft cap and attention sinks."""
    batch, kv_heads, group, rows, length, dim = shape
    heads = kv_heads * group
    return Case(
        torch.randn(batch, heads, rows, dim).to(device, dtype),
        torch.randn(batch, kv_heads, length, dim).to(device, dtype),
        Scoring(dim**-0.5) if plain else Scoring(dim**-0.5, 2.0, torch.randn(heads).to(device)),
    )


def kernel_mass(case: Case, weights: RowWeights, **settings) -> Tensor:
    return kernels.attention_mass(case.queries, case.keys, weights, case.scoring, **settings)


def on(device: str, case: Case) -> Case:
    sinks = None if case.scoring.sinks is None else case.scoring.sinks.to(device)
    scoring = Scoring(case.scoring.scale, case.scoring.softcap, sinks)
    return Case(case.queries.to(device), case.keys.to(device), scoring)


# -- against the twin --------------------------------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_weighting(device, shape, kind):
    """Each weighting of rows gives the twin's mass, over the mean or the maximum of the query heads."""
    plain = shape[1] == 1
    case = case_of(shape, device, plain=plain)
    weights = WEIGHTS[kind](case.batch, case.rows)
    group = "max" if plain else "mean"
    torch.testing.assert_close(kernel_mass(case, weights, group=group), case.mass(weights, group=group), **EXACT)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", ["mean", "max"])
def test_every_dtype(device, dtype, group):
    """Whatever the dtype of keys and queries, logits and probabilities are float32."""
    case = case_of((1, 1, 4, 6, 70, 80), device, dtype=dtype, plain=False)
    weights = RowWeights.geometric(case.rows, 0.9)
    torch.testing.assert_close(kernel_mass(case, weights, group=group), case.mass(weights, group=group), **EXACT)


@on_devices
@given(drawn=positioned(), group=groups, decay=st.sampled_from([0.0, 0.9, 1.0]), noisy=st.booleans())
def test_positions(device, drawn, group, decay, noisy):
    """Empty slots, padded queries and keys in any order, with noise by position."""
    case, queries, keys = drawn
    case, queries, keys = on(device, case), queries.to(device), keys.to(device)
    weights = RowWeights(case.rows, decay, noise=Gumbel(3, 1, 1.5) if noisy else None)
    settings = {"group": group, "query_positions": queries, "key_positions": keys}
    found = kernel_mass(case, weights, **settings)
    torch.testing.assert_close(found, case.mass(weights, **settings), **EXACT)
    assert (found[keys < 0] == 0).all()


@on_devices
@given(drawn=positioned(), group=groups, seed=seeds)
def test_explicit_rows_by_position(device, drawn, group, seed):
    """Chosen rows see by position too."""
    case, queries, keys = drawn
    rows, chosen = chosen_rows(case, seed)
    case, weights = on(device, case), RowWeights.explicit(rows.to(device), chosen.to(device))
    settings = {"group": group, "query_positions": queries.to(device), "key_positions": keys.to(device)}
    torch.testing.assert_close(kernel_mass(case, weights, **settings), case.mass(weights, **settings), **EXACT)


@on_devices
def test_positions_in_order(device):
    """Where positions only repeat the order, saying so changes nothing, with noise and without."""
    case = case_of((2, 1, 2, 9, 40, 16), device)
    keys = torch.arange(3, 43, device=device, dtype=torch.int32).expand(2, 1, -1)
    settings = {"query_positions": keys[:1, 0, -9:], "key_positions": keys}
    for weights in (RowWeights.uniform(9), RowWeights.uniform(9).noisy(Gumbel(1, 2, 2.0))):
        expected = case.mass(weights, **settings)
        torch.testing.assert_close(kernel_mass(case, weights, **settings), expected, **EXACT)
        torch.testing.assert_close(kernel_mass(case, weights, in_order=True, **settings), expected, **EXACT)


# -- what must hold ----------------------------------------------------------------------------------------------------


@on_devices
@given(case=cases(sinks=False), group=groups)
def test_rows_add_up(device, case, group):
    """The mean over query heads of a row of weight w adds up to w, and the maximum to no less."""
    total = kernel_mass(on(device, case), RowWeights.uniform(case.rows), group=group).sum(-1)
    expected = torch.full_like(total, case.rows)
    if group == "max":
        assert (total >= expected * (1 - 1e-4)).all()
    else:
        torch.testing.assert_close(total, expected, **EXACT)


@on_devices
@pytest.mark.parametrize("shape", [(1, 1, 2, 20, 50, 8), (1, 2, 1, 2, 50, 16)], ids=["many rows", "few rows"])
def test_tiles_and_splits_change_nothing(device, shape, monkeypatch):
    """The smallest tiles, and splits of them, give the same mass."""
    case = case_of(shape, device, plain=False)
    weights = RowWeights.geometric(case.rows, 0.8)
    whole = kernel_mass(case, weights)
    monkeypatch.setattr(mass_kernels, "_ROW_BYTES", 1)
    monkeypatch.setattr(mass_kernels, "_LEAST_STRETCH", 16)
    torch.testing.assert_close(kernel_mass(case, weights), whole, atol=1e-6, rtol=1e-5)


@on_devices
def test_known_log_sum_exp(device):
    """With the log-sum-exp of the weighed rows, the first kernel is not needed."""
    case = case_of((2, 2, 2, 7, 40, 16), device)
    keys = case.keys.repeat_interleave(2, dim=1)
    hidden = torch.ones(7, 40, dtype=torch.bool, device=device).triu(34)
    logits = (case.queries @ keys.transpose(2, 3) * case.scoring.scale).masked_fill(hidden, -math.inf)
    lse = logits.logsumexp(-1)[:, :, -3:]
    weights = RowWeights.last_window(3)
    torch.testing.assert_close(kernel_mass(case, weights, lse=lse), case.mass(weights), **EXACT)
    doubled = kernel_mass(case, weights, lse=lse - math.log(2))  # it is this one that counts
    torch.testing.assert_close(doubled, 2 * case.mass(weights), **EXACT)


@on_devices
def test_rows_of_no_weight_are_not_looked_at(device):
    """A row of weight zero, or one that is not weighed at all, may hold anything."""
    case = case_of((1, 2, 2, 9, 30, 16), device)
    weights = RowWeights.explicit(torch.tensor([8, 2, 5]), torch.tensor([1.0, 0.0, 0.5]))
    expected = case.mass(weights)
    case.queries[:, :, [0, 2, 7]] = torch.nan
    torch.testing.assert_close(kernel_mass(case, weights), expected, **EXACT)


@on_devices
def test_any_strides(device):
    """Queries and keys as a projection leaves them, `[B, L, H, D]`, or as a slice of a larger table."""
    case = case_of((2, 2, 2, 5, 40, 16), device)
    queries = case.queries.transpose(1, 2).contiguous().transpose(1, 2)
    keys = torch.cat([case.keys, case.keys], dim=2)[:, :, :40]
    weights = RowWeights.geometric(5, 0.5)
    expected = kernel_mass(case, weights)
    assert torch.equal(kernel_mass(Case(queries, keys, case.scoring), weights), expected)
    columns = keys.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(kernel_mass(Case(queries, columns, case.scoring), weights), expected)


@pytest.mark.parametrize("length", [0, 5])
def test_no_rows(length):
    """Without rows to weigh, or without keys, there is no mass."""
    queries, keys = torch.randn(1, 2, 0, 16), torch.randn(1, 1, length, 16)
    found = kernels.attention_mass(queries, keys, RowWeights.uniform(3), Scoring(1.0))
    assert torch.equal(found, torch.zeros(1, 1, length))


def test_unknown_group():
    """Only the mean and the maximum are known, as the twin says."""
    case = case_of(SHAPES["one of all"], "cpu")
    for weigh in (kernels.attention_mass, attention_mass):
        with pytest.raises(PolicyError, match='must be "mean" or "max"'):
            weigh(case.queries, case.keys, RowWeights.uniform(1), case.scoring, group="sum")


# -- maxima ------------------------------------------------------------------------------------------------------------


@on_devices
@given(drawn=positioned(), seed=seeds, known=st.booleans())
def test_maxima(device, drawn, seed, known):
    """The most that any query of a head gives to a key is that of all probabilities, whatever is empty or padding."""
    case, queries, keys = drawn
    case, queries, keys = on(device, case), queries.to(device), keys.to(device)
    weights = torch.rand(1, case.rows, generator=torch.Generator().manual_seed(seed)).to(device)
    weights[:, seed % case.rows] = 0.0
    hidden = (keys[:, :, None, None] > queries[:, None, None, :, None]) | (keys[:, :, None, None] < 0)
    wanted = row_probabilities(case.queries, case.keys, case.scoring, hidden).nan_to_num(0.0)
    wanted = (wanted * weights[:, None, None, :, None]).amax(3)
    lse = None
    if known:
        wide = case.keys.repeat_interleave(case.queries.shape[1] // keys.shape[1], dim=1)
        logits = case.scoring.capped(case.queries @ wide.transpose(2, 3) * case.scoring.scale)
        logits = logits.unflatten(1, (keys.shape[1], -1)).masked_fill(hidden, -math.inf)
        lse = case.scoring.log_sum_exp(logits).flatten(1, 2)
    found = kernels.attention_maxima(case.queries, case.keys, weights, case.scoring, queries, keys, lse=lse)
    torch.testing.assert_close(found, wanted.float(), **EXACT)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_maxima_over_tiles(device, dtype):
    """Several tiles of keys and of queries, in order, behind keys that all of them see; any strides."""
    case = case_of((2, 2, 3, 150, 300, 80), device, dtype=dtype, plain=False)
    queries = case.queries.transpose(1, 2).contiguous().transpose(1, 2)
    keys = torch.cat([case.keys, case.keys], dim=2)[:, :, :300]
    places = torch.arange(300, dtype=torch.int32, device=device)[None, None]
    asked = torch.arange(150, 300, device=device)[None]
    weights = torch.linspace(0.1, 1, 150, device=device)[None]
    found = kernels.attention_maxima(queries, keys, weights, case.scoring, asked, places)
    wanted = row_probabilities(queries, keys, case.scoring, places[:, :, None, None] > asked[:, None, None, :, None])
    torch.testing.assert_close(found, (wanted * weights[:, None, None, :, None]).amax(3).float(), **EXACT)


# -- noise -------------------------------------------------------------------------------------------------------------


@triton.jit
def _write_words(words, noise, queries, keys, layer_word, HEAD: tl.constexpr, SIZE: tl.constexpr):
    each = tl.arange(0, SIZE)
    heads = tl.full([SIZE], HEAD, tl.int32)
    rows = noise_kernels.row_words(layer_word, heads, tl.load(queries + each))[:, None]
    columns = noise_kernels.column_words(tl.load(keys + each))[None, :]
    places = each[:, None] * SIZE + each[None, :]
    tl.store(words + places, noise_kernels._mix(rows ^ columns).to(tl.int32, bitcast=True))
    waiting = noise_kernels.log2_exponential(noise_kernels.shifted(rows), noise_kernels.shifted(columns))
    tl.store(noise + places, waiting * 0.693147181)


@on_devices
@given(
    seed=st.integers(0, 2**64 - 1), layer=st.integers(0, 200), head=st.integers(0, 127), first=st.integers(0, 127),
    numbers=seeds,
)  # fmt: skip
def test_the_numbers_are_those_of_torch(device, seed, layer, head, first, numbers):
    """Random words are the same bit for bit, and noise is to rounding."""
    random = torch.Generator().manual_seed(numbers)
    queries, keys = torch.randint(2**31 - 1, (2, 16), generator=random, dtype=torch.int32).to(device)
    words, noise = torch.empty(16, 16, dtype=torch.int32, device=device), torch.empty(16, 16, device=device)
    gumbel = Gumbel(seed, layer, first_head=first)
    _write_words[(1,)](words, noise, queries, keys, noise_kernels.layer_word(gumbel), HEAD=head, SIZE=16)
    rows = hashed(seed, layer, torch.tensor(first + head, device=device), queries)[:, None]
    assert torch.equal(words, mix(rows ^ mix(keys ^ 0x7FEB352D)))
    zeros = torch.zeros(1, head + 1, 1, 16, 16, device=device)
    expected = gumbel.perturb(zeros, queries[None], keys[None, None])[0, head, 0]
    torch.testing.assert_close(-noise, expected, atol=1e-5, rtol=1e-5)
