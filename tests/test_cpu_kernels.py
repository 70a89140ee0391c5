"""The compiled loops for a CPU against their twins in PyTorch, and what happens where there are none."""

from __future__ import annotations

import math

import pytest
import torch
from families import build, generate, kept_everywhere, left_padded, shared
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvprune import PolicyError, PrunedCache, Scoring
from kvprune.attention.mass import RowWeights, attention_mass
from kvprune.attention.noise import Gumbel
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import cache_argument
from kvprune.kernels import TORCH, choose, cpu
from kvprune.kernels.cpu import CPU, arguments, loading
from kvprune.policies import (
    A2SF,
    H2O,
    KIVI,
    TOVA,
    ExpectedAttention,
    Full,
    Keyformer,
    KVzip,
    SnapKV,
    SpAtten,
    StreamingLLM,
    ZipCache,
)
from kvprune.policy.base import Policy
from kvprune.table.operations import Columns
from kvprune.table.quantize import Codec
from kvprune.table.token_table import TokenTable

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="kvprune was installed without a C compiler")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {"atol": 2e-6, "rtol": 1e-4}

batches, heads, groups = st.integers(1, 3), st.integers(1, 3), st.sampled_from((1, 2, 3, 4, 7))
lengths = st.one_of(st.integers(1, 40), st.sampled_from((64, 255, 256, 257, 700)))
seeds = st.integers(0, 2**16)


@pytest.fixture(scope="module", params=[1, 3], ids="{} threads".format)
def threads(request):
    """Threads that the loops run on; the work is so little that only one would wake up."""
    before, alone = torch.get_num_threads(), arguments._ALONE
    torch.set_num_threads(request.param)
    arguments._ALONE = 0
    yield request.param
    torch.set_num_threads(before)
    arguments._ALONE = alone


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def in_spare_room(rows: Tensor, room: int) -> Tensor:
    """The same rows at the beginning of a longer table."""
    longer = torch.full((*rows.shape[:2], rows.shape[2] + room, rows.shape[3]), math.nan, dtype=rows.dtype)
    longer[:, :, : rows.shape[2]] = rows
    return longer[:, :, : rows.shape[2]]


# -- one query per sequence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    batch=batches, kv_heads=heads, group=groups, length=lengths, dim=st.sampled_from((16, 32, 48, 80, 128)),
    value_dim=st.sampled_from((16, 48)), room=st.integers(0, 3), holes=st.booleans(), sinks=st.booleans(), seed=seeds,
)  # fmt: skip
def test_single_query(
    threads, dtype, batch, kv_heads, group, length, dim, value_dim, room, holes, sinks, seed
):  # fmt: skip
    """Output and probabilities are those of PyTorch."""
    queries = random(batch, kv_heads * group, 1, dim, seed=seed, dtype=dtype)
    keys = in_spare_room(random(batch, kv_heads, length, dim, seed=seed + 1, dtype=dtype), room)
    values = in_spare_room(random(batch, kv_heads, length, value_dim, seed=seed + 2, dtype=dtype), room)
    empty = None
    if holes:
        empty = random(batch, kv_heads, length, seed=seed + 3) > 0.5
        empty[:, :, 0] = False
    scoring = Scoring(dim**-0.5, sinks=random(kv_heads * group, seed=seed + 4) if sinks else None)
    output, probabilities = CPU.single_query(queries, keys, values, scoring, empty, True)
    wide = (queries.float(), keys.float(), values.float())
    expected, of_pytorch = TORCH.single_query(*wide, scoring, empty, True)
    torch.testing.assert_close(probabilities, of_pytorch, **ROUNDING)
    tolerance = ROUNDING if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(output, expected.to(dtype), **tolerance)
    assert output.dtype == dtype


def test_the_largest_and_smallest_numbers_of_half_precision():
    """Denormal and largest numbers of float16 are read as what they are."""
    keys = torch.zeros(1, 1, 4, 16, dtype=torch.float16)
    keys[0, 0, :, 0] = torch.tensor([65504.0, 6e-8, -6.1e-5, 2.0**-14], dtype=torch.float16)
    queries = torch.zeros(1, 1, 1, 16)
    queries[..., 0] = 1.0
    scale = 1e-4
    _, found = CPU.single_query(queries.half(), keys, keys, Scoring(scale), None, True)
    expected = torch.softmax(keys[0, 0, :, 0].float() * scale, 0)
    torch.testing.assert_close(found.flatten(), expected, atol=1e-12, rtol=1e-5)


@pytest.mark.parametrize("dims", [(24, 24), (32, 20)], ids=str)
def test_head_dims_that_are_no_whole_vectors_are_left_to_pytorch(dims):
    """Odd head dims work like any other."""
    queries, keys, values = (
        random(1, 4, 1, dims[0], seed=0),
        random(1, 2, 9, dims[0], seed=1),
        random(1, 2, 9, dims[1], seed=2),
    )
    found, expected = (
        kernels.single_query(queries, keys, values, Scoring(0.2), None, True) for kernels in (CPU, TORCH)
    )
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@given(
    bits=st.sampled_from((2, 3, 4, 8)), low_bits=st.sampled_from((2, 4)), tokens=st.sampled_from((None, 8, 32)),
    channels=st.sampled_from((None, 16)), separable=st.booleans(), kv_heads=heads, group=groups,
    dim=st.sampled_from((16, 32, 80)), length=st.sampled_from((12, 100, 600)), evicted=st.integers(0, 10),
    loose=st.integers(1, 5), seed=seeds,
)  # fmt: skip
def test_packed_single_query(
    threads, bits, low_bits, tokens, channels, separable, kv_heads, group, dim, length, evicted, loose, seed
):
    """Over codes of several widths and rows in full precision, whatever parameters they share, also with holes."""
    keys, values = (random(2, kv_heads, length + loose, dim, seed=seed + number) for number in (0, 1))
    table = TokenTable(keys, values, torch.arange(length + loose), {})
    chosen = torch.arange(length).expand(2, kv_heads, -1)
    parts = [(Codec(bits, tokens, channels, separable), chosen[:, :, : length // 2])]
    parts += [(Codec(low_bits, tokens, channels, separable), chosen[:, :, length // 2 :])]
    table.quantize(parts)
    if evicted:
        table.evict(torch.arange(0, length, length // evicted)[:evicted].expand(2, kv_heads, -1).contiguous())
    queries = random(2, kv_heads * group, 1, dim, seed=seed + 2)
    found = CPU.packed_single_query(queries, table, Scoring(dim**-0.5))
    # Of 600 rows, added up in another order.
    torch.testing.assert_close(
        found, TORCH.packed_single_query(queries, table, Scoring(dim**-0.5)), atol=6e-6, rtol=1e-4
    )


@pytest.mark.parametrize(
    "noise", [None, Gumbel(3, 5), Gumbel(3, 5, 1.7), Gumbel(3, 5, 1.0, 0.5), Gumbel(3, 5, first_head=6)], ids=str
)
@given(batch=batches, kv_heads=heads, group=groups, length=lengths, seed=seeds)
def test_query_mass(threads, noise, batch, kv_heads, group, length, seed):
    """The mean over query heads, of plain and of noisy probabilities."""
    probabilities = torch.softmax(random(batch, kv_heads, group, length, seed=seed, scale=4.0), -1)
    positions = torch.arange(length, dtype=torch.int32).flip(0).expand(batch, kv_heads, -1).contiguous()
    at = None if noise is None else torch.tensor([[length + 2]])
    arguments = (probabilities, "mean", noise, at, None if noise is None else positions)
    torch.testing.assert_close(CPU.query_mass(*arguments), TORCH.query_mass(*arguments), **ROUNDING)


# -- attention mass ----------------------------------------------------------------------------------------------------


def log_sum_exp(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Of causal logits, the queries being the newest keys; `[B, Hq, L]`."""
    logits = queries.double() @ keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], 1).mT * scale
    rows, columns = logits.shape[2:]
    return logits.masked_fill(torch.ones(rows, columns).triu_(columns - rows + 1).bool(), -math.inf).logsumexp(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    batch=batches, kv_heads=heads, group=groups, length=lengths, older=st.integers(0, 70),
    dim=st.sampled_from((5, 16, 32)), noise=st.sampled_from((None, Gumbel(1, 2), Gumbel(1, 2, 1.5))),
    rule=st.sampled_from(("all", "forgotten", "window", "probes")), seed=seeds,
)  # fmt: skip
def test_mass_from_the_log_sum_exp(
    threads, dtype, batch, kv_heads, group, length, older, dim, noise, rule, seed
):  # fmt: skip
    """Mass is the same where the normalization is known, also under noise, for rows of all kinds."""
    length = min(length, 257)
    queries = random(batch, kv_heads * group, length, dim, seed=seed, dtype=dtype)
    keys = random(batch, older + length, kv_heads, dim, seed=seed + 1, dtype=dtype).transpose(1, 2)
    if seed % 2:
        keys = in_spare_room(keys, 3)
    rows = torch.stack([torch.randperm(length)[: max(1, length // 3)].sort().values for _ in range(batch)])
    weights = {
        "all": RowWeights.uniform(length),
        "forgotten": RowWeights.geometric(length, 0.9),
        "window": RowWeights.last_window(5),
        "probes": RowWeights.explicit(rows, random(*rows.shape, seed=seed).abs()),
    }[rule]
    weights = weights if noise is None else weights.noisy(noise)
    scoring = Scoring(dim**-0.5)
    found = attention_mass(queries, keys, weights, scoring, lse=log_sum_exp(queries, keys, scoring.scale), kernels=CPU)
    expected = attention_mass(queries.float(), keys.float(), weights, scoring)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    batch=batches, kv_heads=heads, group=groups, length=lengths, older=st.integers(0, 70),
    dims=st.sampled_from(((5, 16), (16, 48), (32, 32), (64, 80))), outputs=st.booleans(), sinks=st.booleans(),
    order=st.sampled_from(("rows", "padding in front", "any")), seed=seeds,
)  # fmt: skip
def test_attention_with_maxima(
    threads, dtype, batch, kv_heads, group, length, older, dims, outputs, sinks, order, seed
):  # fmt: skip
    """Output and maxima are those of all probabilities, whatever is empty, padding, or later than a query."""
    rows, generator = min(length, 100), torch.Generator().manual_seed(seed)
    width = older + length
    queries = random(batch, kv_heads * group, rows, dims[0], seed=seed, dtype=dtype, scale=2.0)
    keys = random(batch, width, kv_heads, dims[0], seed=seed + 1, dtype=dtype).transpose(1, 2)
    values = random(batch, kv_heads, width, dims[1], seed=seed + 2, dtype=dtype)
    weights = random(batch, rows, seed=seed + 3).abs()
    places = torch.arange(width).expand(batch, kv_heads, -1).clone()
    positions = torch.arange(width - rows, width).expand(batch, -1).clone()
    if order == "padding in front":
        places, positions = (
            each - torch.arange(batch).view(-1, *[1] * (each.ndim - 1)) * 7 for each in (places, positions)
        )
    elif order == "any":
        places = torch.stack([torch.randperm(width, generator=generator) for _ in range(batch * kv_heads)])
        places = places.view(batch, kv_heads, width).masked_fill(
            torch.rand(places.shape, generator=generator).view(batch, kv_heads, width) < 0.3, -1
        )
        positions[torch.rand(positions.shape, generator=generator) < 0.2] = -1
    places, positions = places.clamp(min=-1), positions.clamp(min=-1)
    scoring = Scoring(dims[0] ** -0.5, sinks=random(kv_heads * group, seed=seed + 4) if sinks else None)
    found, best = CPU.attention_maxima(
        queries, in_spare_room(keys, 2) if seed % 2 else keys, values if outputs else None, weights, scoring, positions,
        places,
    )  # fmt: skip

    by_head = queries.double().unflatten(1, (kv_heads, group))
    logits = torch.einsum("bhgld,bhsd->bhgls", by_head, keys.double()) * scoring.scale
    hidden = (places[:, :, None, None] > positions[:, None, None, :, None]) | (places[:, :, None, None] < 0)
    sink = scoring.sinks.double() if sinks else torch.full((kv_heads * group,), -math.inf)
    sink = sink.view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, rows, -1)
    exact = torch.softmax(torch.cat([logits.masked_fill(hidden, -math.inf), sink], -1), -1)[..., :-1].nan_to_num(0.0)
    expected = (exact * weights[:, None, None, :, None]).amax(3)
    torch.testing.assert_close(best, expected.float(), atol=2e-6, rtol=2e-4)
    assert (found is not None) == outputs
    if outputs:
        output = torch.einsum("bhgls,bhsd->bhgld", exact, values.double()).flatten(1, 2)
        tolerance = {"atol": 5e-6, "rtol": 2e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(found, output.to(dtype), **tolerance)


@given(
    batch=batches, kv_heads=heads, group=groups, rows=st.integers(1, 6), length=lengths, sinks=st.booleans(),
    temperature=st.sampled_from((1.0, 0.5, 2.0)), scale=st.sampled_from((1.0, 0.3)), known=st.booleans(), seed=seeds,
)  # fmt: skip
def test_noisy_weights(threads, batch, kv_heads, group, rows, length, sinks, temperature, scale, known, seed):
    """Rows of a noisy softmax, where keys are empty or later than the query, and padding sees none."""
    logits = random(batch, kv_heads, group, rows, length, seed=seed, scale=5.0)
    key_positions = torch.arange(length).roll(seed % length).expand(batch, kv_heads, -1).clone()
    key_positions[:, :, seed % length] = -1
    query_positions = torch.arange(length - rows, length).clamp(min=-1).expand(batch, -1)
    scoring = Scoring(1.0, sinks=random(kv_heads * group, seed=seed) if sinks else None)
    noise = Gumbel(seed, 3, temperature, scale)
    hidden = (key_positions[:, :, None, None] > query_positions[:, None, None, :, None]) | (
        key_positions[:, :, None, None] < 0
    )
    lse = logits.masked_fill(hidden, -math.inf).logsumexp(-1).clamp(min=-50) if known else None
    (found, totals), (expected, of_expected) = (
        kernels.noisy_weights(logits.clone(), noise, scoring, query_positions, key_positions, lse)
        for kernels in (CPU, TORCH)
    )
    torch.testing.assert_close(found / totals[..., None], expected / of_expected[..., None], **ROUNDING)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_torch_s_default_dtype_is_no_matter(default):
    """What the loops write is float32 whatever a user has made the default: half of the memory would be theirs."""
    model, batch = shared(), left_padded([90, 70])
    policies = (SnapKV(20, window=8), A2SF(20, recent=4, kernel_size=5), Keyformer(20, recent=4), ZipCache(buffer=8),
                KIVI(residual=8, rotate=True), KVzip(0.3), ExpectedAttention(0.4), SpAtten(recent=4))  # fmt: skip
    for policy in policies:
        found = []
        for dtype in (torch.float32, default):
            torch.set_default_dtype(dtype)
            try:
                found.append(generate(model, batch, 12, **cache_argument(PrunedCache(model, policy))))
            finally:
                torch.set_default_dtype(torch.float32)
        assert torch.equal(*found), policy


# -- rows of a table ---------------------------------------------------------------------------------------------------

SCORES = st.sampled_from((0.0, -0.0, 1.0, 1.0, 2.0, -1.0, 1e-45, math.inf, -math.inf, math.nan))
reaches = st.sampled_from((0, 1, 3, 26, 999))


@given(
    scores=st.lists(SCORES, min_size=6, max_size=60), batch=batches, kv_heads=heads, sinks=st.integers(0, 2),
    recent=st.integers(0, 3), layout=st.sampled_from(("rows", "expanded", "every other")), seed=seeds,
    staying=st.sampled_from((None, 0.0, 0.3, 1.0)),
)  # fmt: skip
def test_worst_rows(scores, batch, kv_heads, sinks, recent, layout, seed, staying):
    """The least score goes, of equal ones the oldest, whatever the numbers; never a sink or a recent token.

    And none that is to stay, as long as there are others.
    """
    length = len(scores)
    table = torch.tensor(scores).expand(batch, kv_heads, -1)
    if layout == "rows":
        table = torch.stack([row.roll(number) for number, row in enumerate(table.flatten(0, 1))]).view(table.shape)
    elif layout == "every other":
        table = table.repeat_interleave(2, dim=-1)[..., ::2]
    shuffled = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).int()
    spare = torch.full((batch, kv_heads, length + 3), -1, dtype=torch.int32)
    spare[..., :length] = shuffled
    positions = spare[..., :length]
    stay = None
    if staying is not None:
        marks = torch.rand(spare.shape, generator=torch.Generator().manual_seed(seed)) < staying
        stay = marks.int()[..., :length]
    found = CPU.worst_rows(table, positions, sinks, length - recent, stay)
    assert torch.equal(found, TORCH.worst_rows(table, positions, sinks, length - recent, stay))
    chosen = positions.gather(2, found)
    may_go = (positions >= sinks) & (positions < length - recent)
    assert may_go.gather(2, found).all(), chosen
    if stay is not None:
        others = (may_go & (stay == 0) & (table != math.inf)).any(-1, keepdim=True)
        assert (stay.gather(2, found) == 0)[others].all()


@given(
    scores=st.lists(SCORES, min_size=1, max_size=60), batch=batches, kv_heads=heads, empty=st.integers(0, 2),
    before=reaches, after=reaches, gaps=st.sampled_from((1, 3, 40)), recent=st.integers(0, 70), apart=st.booleans(),
    seed=seeds,
)  # fmt: skip
def test_largest_near(threads, scores, batch, kv_heads, empty, before, after, gaps, recent, apart, seed):
    """Whatever the order of slots, the gaps between positions, and the numbers; recent ones of each sequence."""
    rows, random = len(scores), torch.Generator().manual_seed(seed)
    table = torch.tensor(scores).expand(batch, kv_heads, -1)
    shuffled = [torch.randperm(gaps * rows, generator=random)[:rows] for _ in range(batch * kv_heads)]
    positions = torch.stack(shuffled).view(batch, kv_heads, rows).int()
    positions[-1, :, :empty] = -1
    since: int | Tensor = gaps * recent
    if apart:
        since = since - torch.arange(batch)[:, None, None]
    found = CPU.largest_near(table, positions, before, after, since)
    expected = TORCH.largest_near(table, positions, before, after, since)
    assert torch.equal(found[positions >= 0], expected[positions >= 0])


@given(batch=batches, kv_heads=heads, length=st.integers(1, 9), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_rows_move_and_come(batch, kv_heads, length, dtype, seed):
    """All columns move alike, also those of other types, and a new row begins with zeros."""
    made = [
        Columns((
            random(batch, kv_heads, length, 6, seed=seed, dtype=dtype),
            random(batch, kv_heads, length, 3, seed=seed + 1, dtype=dtype),
            torch.arange(length, dtype=torch.int32).repeat(batch, kv_heads, 1),
            random(batch, kv_heads, length, seed=seed + 2),
            random(batch, kv_heads, length, seed=seed + 3) > 0,
        ))
        for _ in range(2)
    ]  # fmt: skip
    slots = torch.randint(0, length, (batch, kv_heads, 1), generator=torch.Generator().manual_seed(seed))
    keys = random(batch, 1, kv_heads, 6, seed=seed, dtype=dtype).transpose(1, 2)
    values = random(batch, kv_heads, 1, 3, seed=seed, dtype=dtype)
    for kernels, columns in zip((CPU, TORCH), made, strict=True):
        kernels.move_rows(columns, slots, length - 1)
        kernels.append_row(columns, length - 1, keys, values, 77)
        kernels.move_rows(columns, slots[:1, :1], length - 1)  # the same slot of every head
    for mine, theirs in zip(*made, strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)


@given(batch=st.integers(1, 2), kv_heads=heads, packed=st.integers(1, 5), exact=st.integers(1, 5), seed=seeds)
def test_a_new_row_comes_behind_packed_ones(batch, kv_heads, packed, exact, seed):
    """Whose keys and values are held elsewhere, so these tensors begin later than the others."""
    made = []
    for _ in range(2):
        columns = Columns((
            random(batch, kv_heads, exact, 6, seed=seed),
            random(batch, kv_heads, exact, 3, seed=seed + 1),
            torch.arange(packed + exact, dtype=torch.int32).repeat(batch, kv_heads, 1),
            random(batch, kv_heads, packed + exact, seed=seed + 2),
        ))  # fmt: skip
        columns.before = (packed, packed, 0, 0)
        made.append(columns)
    keys, values = random(batch, kv_heads, 1, 6, seed=seed + 3), random(batch, kv_heads, 1, 3, seed=seed + 4)
    before = [column.clone() for column in made[0]]
    for kernels, columns in zip((CPU, TORCH), made, strict=True):
        kernels.append_row(columns, packed + exact - 1, keys, values, 77)
    for mine, theirs, was, new in zip(*made, before, (keys, values, 77, 0), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine[:, :, :-1], was[:, :, :-1])
        assert bool((mine[:, :, -1:] == new).all())


@pytest.mark.parametrize("slot", [-1, 5, 2**40])
def test_a_slot_that_is_not_in_use_is_an_error_and_nothing_moves(slot):
    """A policy that names a wrong slot is told, and cannot write where no table is."""
    keys = random(1, 1, 5, 2, seed=0)
    columns = Columns((keys, keys.clone(), torch.arange(5, dtype=torch.int32).view(1, 1, 5)))
    before = [column.clone() for column in columns]
    with pytest.raises(PolicyError, match="not in use"):
        CPU.move_rows(columns, torch.full((1, 1, 1), slot), 4)
    assert all(torch.equal(now, then) for now, then in zip(columns, before, strict=True))


# -- packing rows ------------------------------------------------------------------------------------------------------

CODECS = st.builds(
    Codec,
    bits=st.sampled_from((2, 3, 4, 8)),
    tokens=st.sampled_from((None, 1, 8, 32, 300)),
    channels=st.sampled_from((None, 16, 32, 256)),
    separable=st.booleans(),
)


def equal_rows(rows: Tensor) -> Tensor:
    return rows[:, :, :1].expand_as(rows).clone()


def odd_numbers(rows: Tensor) -> Tensor:
    """NaN, infinities, and the largest and smallest numbers, strewn in."""
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1e38, 65504.0, 65520.0, 1e-45, -1e-45, 6e-8, -3e-8, -0.0])
    where = torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(0))[: len(odd)]
    flat = rows.flatten()
    flat[where] = odd[: len(where)].to(rows.dtype)
    return flat.view_as(rows)


NUMBERS = {
    "normal": lambda rows: rows,
    "far from zero": lambda rows: rows + 40,
    "large": lambda rows: rows * 3e4,
    "subnormal": lambda rows: rows * 1e-7,
    "zero": torch.zeros_like,
    "equal": equal_rows,
    "odd": odd_numbers,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numbers", NUMBERS)
@given(
    codec=CODECS, batch=batches, kv_heads=heads, length=lengths, share=st.floats(0.01, 1.0), empty=st.floats(0.0, 1.0),
    dim=st.sampled_from((16, 32, 80)), value_dim=st.sampled_from((16, 48, 128)), fused=st.booleans(), seed=seeds,
)  # fmt: skip
def test_packed_rows(
    threads, dtype, numbers, codec, batch, kv_heads, length, share, empty, dim, value_dim, fused, seed
):  # fmt: skip
    """Codes, parameters and block numbers are those of PyTorch, bit for bit, wherever the rows lie."""
    made = random(batch, length, kv_heads, dim + value_dim, seed=seed)
    keys, values = (NUMBERS[numbers](part.to(dtype)).transpose(1, 2) for part in made.split([dim, value_dim], dim=3))
    if not fused:
        keys, values = in_spare_room(keys, 3), values.contiguous()
    generator = torch.Generator().manual_seed(seed)
    slots = torch.rand(batch, kv_heads, length, generator=generator).argsort(-1)[:, :, : math.ceil(share * length)]
    if seed % 2:
        slots = slots.masked_fill(torch.rand(slots.shape, generator=generator) < empty, -1)
    found, expected = (kernels.encode(codec, keys, values, slots) for kernels in (CPU, TORCH))
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name
    assert found.runs == expected.runs


@pytest.mark.parametrize("dims", [(24, 32), (32, 20)], ids=str)
@pytest.mark.parametrize("codec", [Codec(4), Codec(2, 8, 12)], ids=str)
def test_codes_that_are_no_whole_vectors_are_left_to_pytorch(dims, codec):
    """Odd head dims and groups of channels are packed like any other, and so is float64."""
    keys, values = (random(1, 2, 30, dim, seed=dim, dtype=torch.float64) for dim in dims)
    slots = torch.arange(30).expand(1, 2, -1)
    found, expected = (kernels.encode(codec, keys, values, slots) for kernels in (CPU, TORCH))
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_packing_a_slot_that_is_not_in_use_is_an_error():
    """A policy that names a wrong slot is told, and nothing beyond the table is read."""
    rows = random(1, 2, 5, 16, seed=0)
    with pytest.raises(PolicyError, match="not in use"):
        CPU.encode(Codec(4), rows, rows, torch.tensor([[[0, 1], [2, 5]]]))


# -- whole models ------------------------------------------------------------------------------------------------------

POLICIES = (
    Full(), A2SF(24, recent=4), A2SF(24, recent=4, interval=4), A2SF(24, recent=4, group="max"), H2O(24, recent=4),
    TOVA(24), StreamingLLM(24), SnapKV(24, window=4), Keyformer(24, seed=5), KIVI(residual=16, group_size=16),
    ZipCache(buffer=8), ZipCache(group_size=16, buffer=8), A2SF(24, recent=4) | ZipCache(buffer=8),
)  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_policy_keeps_the_same_with_all_kernels(policy: Policy, padded: bool):
    """Compiled loops and PyTorch choose the same tokens, and the model says the same."""
    model = build("llama", hidden_size=64, head_dim=16)
    batch = left_padded([60, 45] if padded else [60, 60], seed=3)
    found = []
    for kernels in ("cpu", "torch"):
        cache = PrunedCache(model, policy, kernels=kernels)
        tokens = generate(model, batch, 20, **cache_argument(cache))
        found.append((tokens.tolist(), kept_everywhere(cache), kept_everywhere(cache, 1)))
        assert cache.report().kernels == kernels
        assert f"kernels: {kernels}" in str(cache.report())
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_generate(dtype):
    """Probabilities are float32, outputs of the model's type."""
    model = build("llama", dtype=dtype, hidden_size=64, head_dim=32)
    cache = PrunedCache(model, A2SF(20, recent=4))
    assert generate(model, left_padded([40]), 8, **cache_argument(cache)).shape == (1, 48)
    assert cache.layers[0].table["score"].isfinite().all()


def test_gradients_are_left_to_pytorch():
    """What autograd has to see is computed by PyTorch, and the gradients are those."""
    found = []
    for kernels in ("cpu", "torch"):
        layer = PrunedLayer(Full(), 0, kernels=kernels)
        layer.update(random(1, 2, 4, 16, seed=0), random(1, 2, 4, 16, seed=1))
        layer.attend(random(1, 4, 4, 16, seed=2), None, Scoring(0.25))
        queries = random(1, 4, 1, 16, seed=3).requires_grad_()
        layer.update(random(1, 2, 1, 16, seed=4), random(1, 2, 1, 16, seed=5))
        layer.attend(queries, None, Scoring(0.25)).sum().backward()
        found.append(queries.grad)
    torch.testing.assert_close(found[0], found[1])


# -- which kernels -----------------------------------------------------------------------------------------------------


def test_auto_is_the_compiled_ones_where_there_are_any(monkeypatch):
    """And PyTorch's where there are none, or on another device."""
    assert choose("auto", torch.device("cpu")) is CPU
    assert choose("torch", torch.device("cpu")) is TORCH
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert choose("auto", torch.device("cpu")) is TORCH
    with pytest.raises(PolicyError, match="C compiler"):
        choose("cpu", torch.device("cpu"))


def test_kernels_that_cannot_be_had_are_an_error():
    """A name without kernels is refused at once, a device without them when it is known."""
    with pytest.raises(PolicyError, match="no kernels named 'gpu': write one of 'auto'"):
        PrunedCache(shared(), Full(), kernels="gpu")
    with pytest.raises(PolicyError, match=r'cache on a CPU.*kernels="auto"'):
        choose("cpu", torch.device("meta"))


def test_loops_of_another_version_are_not_called(monkeypatch):
    """A library that was compiled of other files is left alone, with a word why."""
    monkeypatch.setattr(loading, "_INTERFACE", 0)
    with pytest.warns(UserWarning, match="install kvprune again"):
        assert cpu.library.__wrapped__() is None
