"""Attention over tables with packed rows, against the dense softmax over what the rows decode to."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvprune import RowWeights, Scoring, TokenTable, attention_mass
from kvprune.attention import mass, packed
from kvprune.attention.noise import Gumbel
from kvprune.attention.softmax import positional_attention
from kvprune.table import packed_rows
from kvprune.table.quantize import Codec

ROUNDING = {"atol": 2e-5, "rtol": 1e-4}
CODECS = [Codec(2), Codec(4, separable=True), Codec(3, tokens=4, channels=2), Codec(8, tokens=3, separable=True)]

thorough = settings(max_examples=6 * settings.default.max_examples)


@dataclass(frozen=True)
class Case:
    """A table with packed rows and holes, queries `[B, Hq, L, D]`, and their positions `[B, L]`, -1 for padding."""

    table: TokenTable = field(repr=False)
    queries: Tensor = field(repr=False)
    positions: Tensor
    scoring: Scoring

    @property
    def rows(self) -> int:
        return self.queries.shape[2]

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows."""
        tiers = [tier.decoded() for tier in self.table.packed]
        tiers.append((self.table.keys.float(), self.table.values.float()))
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*tiers, strict=True))
        return keys, values

    def probabilities(self, noise: Gumbel | None = None, temperature: float = 1.0) -> np.ndarray:
        """`[B, Hq, L, S]` by brute force."""
        keys, held = self.decoded()[0], self.table.positions
        visible = (held[:, :, None, :] <= self.positions[:, None, :, None]) & (held[:, :, None, :] >= 0)
        group = self.queries.shape[1] // self.table.kv_heads
        result = []
        for row, queries in enumerate(self.queries):
            by_head = None
            if noise is not None:
                heads = len(queries)
                each = [
                    reference.gumbel(
                        noise.seed, noise.layer, heads, self.positions[row].tolist(), held[row, head // group].tolist()
                    )[head]
                    for head in range(heads)
                ]
                by_head = noise.scale * np.stack(each)
            result.append(
                reference.probabilities(
                    queries.double(),
                    keys[row].double(),
                    visible[row].numpy(),
                    self.scoring.scale,
                    self.scoring.softcap,
                    self.scoring.sinks,
                    by_head,
                    [temperature] * self.rows,
                )
            )
        return np.stack(result)

    def mass(self, weights, *, group: str = "mean", probabilities: np.ndarray | None = None) -> Tensor:
        """`[B, Hkv, S]` by brute force. weights: `[B, L]`."""
        probabilities = self.probabilities() if probabilities is None else probabilities
        each = [
            reference.mass(one, weight, self.table.kv_heads, group)
            for one, weight in zip(probabilities, np.asarray(weights, np.float64), strict=True)
        ]
        return torch.tensor(np.stack(each)).float()


# -- strategies --------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**16)
groups = st.sampled_from(["mean", "max"])
blocks = st.integers(1, 600)
"""Bytes of a block, so few that it is a row or several."""


@st.composite
def tables(draw: st.DrawFn, random: torch.Generator) -> TokenTable:
    """Rows in up to three tiers and in full precision, of which some are empty, in any order of positions."""
    batch, kv_heads, rows = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 14))
    key_dim, value_dim = draw(st.sampled_from([2, 5, 8])), draw(st.sampled_from([1, 4]))
    shape = batch, kv_heads, rows
    order = torch.stack([torch.randperm(rows + 3, generator=random)[:rows] for _ in range(batch * kv_heads)])
    positions = order.view(shape)
    positions[torch.rand(shape, generator=random) < draw(st.sampled_from([0.0, 0.3]))] = -1
    positions[:, :, 0] = positions[:, :, 0].abs()
    table = TokenTable(
        torch.randn(*shape, key_dim, generator=random),
        torch.randn(*shape, value_dim, generator=random),
        positions,
        {},
        dense=bool((positions >= 0).all()),
    )
    for codec in draw(st.lists(st.sampled_from(CODECS), max_size=3)):
        loose = table.length - table.packed_length
        count = draw(st.integers(0, loose))
        chosen = torch.stack([torch.randperm(loose, generator=random)[:count] for _ in range(batch * kv_heads)])
        chosen = chosen.view(batch, kv_heads, count) + table.packed_length
        chosen = chosen.masked_fill(table.positions.gather(2, chosen) < 0, -1)
        if (chosen >= 0).any():
            table.quantize([(codec, chosen)])
    if table.packed and draw(st.booleans()):
        live = table.positions >= 0
        victims = live.to(torch.int8).argmax(-1, keepdim=True)
        if int(live.sum(-1).min()) > 1:
            table.evict(victims)
    return table


@st.composite
def cases(draw: st.DrawFn, *, most_queries: int = 6, padding: bool = True, sinks: bool = True) -> Case:
    """A table and a few queries, with and without a soft cap and attention sinks."""
    random = torch.Generator().manual_seed(draw(seeds))
    table = draw(tables(random))
    count, group = draw(st.integers(1, most_queries)), draw(st.integers(1, 3))
    heads, batch = table.kv_heads * group, table.batch_size
    first = torch.randint(0, table.length + 2, (batch, 1), generator=random)
    positions = first + torch.arange(count)
    if padding:
        positions = positions.masked_fill(torch.arange(count) < draw(st.integers(0, count)), -1)
    logits = torch.randn(heads, generator=random)
    return Case(
        table,
        torch.randn(batch, heads, count, table.keys.shape[3], generator=random),
        positions,
        Scoring(
            draw(st.sampled_from([0.35, 1.0, 3.0])),
            draw(st.sampled_from([None, 2.0])),
            logits if sinks and draw(st.booleans()) else None,
        ),
    )


@contextmanager
def small_blocks(size: int):
    """Blocks of so many bytes, of decoded rows and of logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packed_rows._BLOCK_BYTES, "cpu", size)
        patch.setitem(mass._BLOCK_BYTES, "cpu", size)
        yield


# -- output ------------------------------------------------------------------------------------------------------------


@thorough
@given(case=cases(most_queries=1, padding=False), size=blocks)
def test_a_single_query(case, size):
    """A generated token sees every row that is not empty: its output and its probabilities are the dense ones."""
    newest = Case(case.table, case.queries, torch.full_like(case.positions, 10**6), case.scoring)
    expected = newest.probabilities()
    with small_blocks(size):
        output, probabilities = packed.single_query(case.queries, case.table, case.scoring)
    group = case.queries.shape[1] // case.table.kv_heads
    weighted = expected @ newest.decoded()[1].double().repeat_interleave(group, dim=1).numpy()
    torch.testing.assert_close(probabilities.flatten(1, 2), torch.tensor(expected[:, :, 0]).float(), **ROUNDING)
    torch.testing.assert_close(output, torch.tensor(weighted).float(), **ROUNDING)


@thorough
@given(case=cases(), size=blocks)
def test_queries_by_position(case, size):
    """A query sees what is at its position or before, and padding gives zero, however small the blocks are."""
    group = case.queries.shape[1] // case.table.kv_heads
    expected = case.probabilities() @ case.decoded()[1].double().repeat_interleave(group, dim=1).numpy()
    with small_blocks(size):
        output = packed.attention(case.queries, case.positions, case.table, case.scoring)
    torch.testing.assert_close(output, torch.tensor(expected).float(), **ROUNDING)
    unseen = (case.positions < 0)[:, None].expand(output.shape[:3])
    assert (output[unseen] == 0).all()


@thorough
@given(case=cases())
def test_it_is_the_attention_of_dense_tables(case):
    """Queries that see something get what the attention over full-precision rows makes of the decoded ones."""
    keys, values = case.decoded()
    expected = positional_attention(case.queries, keys, values, case.scoring, case.positions, case.table.positions)
    found = packed.attention(case.queries, case.positions, case.table, case.scoring)
    seen = (case.probabilities().sum(-1) > 0) & (case.positions >= 0).numpy()[:, None]
    seen = torch.tensor(seen)
    torch.testing.assert_close(found[seen], expected[seen], **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@given(case=cases(), seed=seeds)
def test_half_precision_queries(dtype, case, seed):
    """Output has the dtype of the queries, of the numbers that they hold."""
    queries = case.queries.to(dtype)
    expected = packed.attention(queries.float(), case.positions, case.table, case.scoring)
    assert torch.equal(packed.attention(queries, case.positions, case.table, case.scoring), expected.to(dtype))
    single = packed.single_query(queries[:, :, :1], case.table, case.scoring)
    same = packed.single_query(queries[:, :, :1].float(), case.table, case.scoring)
    assert torch.equal(single[0], same[0].to(dtype))
    assert torch.equal(single[1], same[1])


@given(case=cases(sinks=False), scale=st.sampled_from([50.0, 500.0]))
def test_large_logits_do_not_overflow(case, scale):
    """Logits in the thousands give finite output and mass, as the running softmax subtracts its maximum."""
    scoring = Scoring(scale)
    output = packed.attention(case.queries * 10, case.positions, case.table, scoring)
    assert output.isfinite().all()
    weights = RowWeights.uniform(case.rows)
    found = packed.attention_mass(case.queries * 10, case.positions, case.table, weights, scoring, "mean")
    assert found.isfinite().all()


# -- mass --------------------------------------------------------------------------------------------------------------


def packed_mass(case: Case, weights: RowWeights, group: str, size: int) -> Tensor:
    with small_blocks(size):
        return packed.attention_mass(case.queries, case.positions, case.table, weights, case.scoring, group)


@thorough
@given(case=cases(), group=groups, decay=st.sampled_from([0.0, 0.5, 0.95, 1.0]), size=blocks)
def test_geometric_mass(case, group, decay, size):
    """The row of age a counts decay to the power of a, wherever the keys are stored."""
    by_age = np.power(decay, np.arange(case.rows)[::-1]) * (case.positions >= 0).numpy()
    found = packed_mass(case, RowWeights.geometric(case.rows, decay), group, size)
    torch.testing.assert_close(found, case.mass(by_age, group=group), **ROUNDING)
    assert (found[case.table.positions < 0] == 0).all()


@thorough
@given(case=cases(), group=groups, window=st.integers(1, 8), size=blocks)
def test_mass_of_the_last_window(case, group, window, size):
    """The last rows count 1, the others nothing."""
    weights = (np.arange(case.rows)[::-1] < window) * (case.positions >= 0).numpy()
    found = packed_mass(case, RowWeights.last_window(window), group, size)
    torch.testing.assert_close(found, case.mass(weights, group=group), **ROUNDING)


@thorough
@given(case=cases(), group=groups, count=st.integers(1, 6), shared=st.booleans(), seed=seeds, size=blocks)
def test_mass_of_explicit_rows(case, group, count, shared, seed, size):
    """Chosen rows count what was chosen for them, the same for all sequences or something else for each."""
    random = torch.Generator().manual_seed(seed)
    batch = 1 if shared else len(case.queries)
    rows = torch.stack([torch.randperm(case.rows, generator=random)[:count] for _ in range(batch)])
    chosen = torch.rand(rows.shape, generator=random)
    weights = torch.zeros(batch, case.rows).scatter_(1, rows, chosen) * (case.positions >= 0)
    found = packed_mass(case, RowWeights.explicit(rows, chosen), group, size)
    torch.testing.assert_close(found, case.mass(weights, group=group), **ROUNDING)


@thorough
@given(case=cases(), group=groups, temperature=st.sampled_from([0.5, 1.0, 2.0]), each=st.booleans(), seed=seeds,
       size=blocks)  # fmt: skip
def test_noisy_mass(case, group, temperature, each, seed, size):
    """Noise goes by positions, so that of a packed row is the one it had before."""
    noise = Gumbel(seed, 3, torch.full((case.rows,), temperature) if each else temperature, 0.7)
    expected = case.mass(
        (case.positions >= 0).numpy(), group=group, probabilities=case.probabilities(noise, temperature)
    )
    found = packed_mass(case, RowWeights.uniform(case.rows).noisy(noise), group, size)
    torch.testing.assert_close(found, expected, **ROUNDING)


@thorough
@given(case=cases(), group=groups, decay=st.sampled_from([0.5, 1.0]), noisy=st.booleans())
def test_it_is_the_mass_of_dense_tables(case, group, decay, noisy):
    """What `attention_mass` gives for the decoded rows."""
    weights = RowWeights.geometric(case.rows, decay)
    if noisy:
        weights = weights.noisy(Gumbel(1, 2, 1.5))
    expected = attention_mass(
        case.queries,
        case.decoded()[0],
        weights,
        case.scoring,
        group=group,
        query_positions=case.positions,
        key_positions=case.table.positions,
    )
    found = packed.attention_mass(case.queries, case.positions, case.table, weights, case.scoring, group)
    torch.testing.assert_close(found, expected, **ROUNDING)


@given(case=cases(sinks=False))
def test_rows_that_see_something_add_up_to_one(case):
    """Each query that is no padding and sees a row gives 1 in all."""
    assume((case.positions >= 0).all())
    found = packed.attention_mass(
        case.queries, case.positions, case.table, RowWeights.uniform(case.rows), case.scoring, "mean"
    )
    seeing = (case.table.positions[:, :, None] <= case.positions[:, None, :, None]) & (
        case.table.positions[:, :, None] >= 0
    )
    torch.testing.assert_close(found.sum(-1), seeing.any(-1).sum(-1).float(), **ROUNDING)
