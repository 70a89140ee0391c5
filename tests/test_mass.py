"""`attention_mass` against its dense twin, for every weighting of rows and every kind of softmax."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvprune import PolicyError, RowWeights, Scoring, attention_mass

ROUNDING = {"atol": 1e-5, "rtol": 1e-4}

thorough = settings(max_examples=6 * settings.default.max_examples)


@dataclass(frozen=True)
class Case:
    """Queries `[B, Hq, L, D]` and keys `[B, Hkv, S, D]` of which they are the newest, and a softmax."""

    queries: Tensor = field(repr=False)
    keys: Tensor = field(repr=False)
    scoring: Scoring

    @property
    def rows(self) -> int:
        return self.queries.shape[2]

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    @property
    def batch(self) -> int:
        return self.queries.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    def __repr__(self) -> str:
        return f"Case({tuple(self.queries.shape)}, {tuple(self.keys.shape)}, {self.scoring})"

    def mass(self, weights: RowWeights, **settings) -> Tensor:
        return attention_mass(self.queries, self.keys, weights, self.scoring, **settings)

    def dense(self, weights: np.ndarray | Tensor, *, group: str = "mean", visible: np.ndarray | None = None) -> Tensor:
        """The same by brute force. weights: `[L]` or `[B, L]`. visible: bool `[B, Hkv, L, S]`, causal if not given."""
        weights = np.broadcast_to(np.asarray(weights, np.float64), (self.batch, self.rows))
        result = []
        for row in range(self.batch):
            seen = reference.causal(self.rows, self.length, self.kv_heads) if visible is None else visible[row]
            probabilities = reference.probabilities(
                self.queries[row].double(),
                self.keys[row].double(),
                seen,
                self.scoring.scale,
                softcap=self.scoring.softcap,
                sinks=self.scoring.sinks,
            )
            result.append(reference.mass(probabilities, weights[row], self.kv_heads, group))
        return torch.tensor(np.stack(result)).float()


# -- strategies --------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**16)
groups = st.sampled_from(["mean", "max"])
decays = st.one_of(st.sampled_from([0.0, 0.2, 0.95, 0.999, 1.0]), st.floats(0.01, 0.99))


@st.composite
def cases(draw: st.DrawFn, *, sinks: bool | None = None, most_rows: int = 12) -> Case:
    """Few random tokens, with and without a soft cap; with attention sinks in half of the cases, if not as told."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows, dim = draw(st.integers(1, most_rows)), draw(st.sampled_from([2, 4, 8]))
    length = rows + draw(st.integers(0, 12))
    random = torch.Generator().manual_seed(draw(seeds))
    logits = torch.randn(kv_heads * group, generator=random)
    return Case(
        torch.randn(batch, kv_heads * group, rows, dim, generator=random),
        torch.randn(batch, kv_heads, length, dim, generator=random),
        Scoring(
            draw(st.sampled_from([0.35, 1.0, 3.0])),
            draw(st.sampled_from([None, 2.0])),
            logits if (draw(st.booleans()) if sinks is None else sinks) else None,
        ),
    )


@st.composite
def positioned(draw: st.DrawFn) -> tuple[Case, Tensor, Tensor]:
    """A case with positions of queries `[B, L]` and of keys `[B, Hkv, S]`; some are -1, and keys are in no order."""
    case = draw(cases())
    random = torch.Generator().manual_seed(draw(seeds))
    queries, keys = [], []
    for _ in range(case.batch):
        padding = draw(st.integers(0, case.rows))
        first = draw(st.integers(0, case.length))
        queries.append([-1] * padding + list(range(first, first + case.rows - padding)))
        heads = [torch.randperm(case.length + 4, generator=random)[: case.length] for _ in range(case.kv_heads)]
        empty = [torch.rand(case.length, generator=random) < draw(st.sampled_from([0, 0.3, 1])) for _ in heads]
        keys.append(torch.stack([head.masked_fill(gone, -1) for head, gone in zip(heads, empty, strict=True)]))
    return case, torch.tensor(queries), torch.stack(keys)


def chosen_rows(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """All rows of each sequence in any order, and a weight for each, both `[B, L]`."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(case.rows, generator=random) for _ in range(case.batch)])
    return rows, torch.rand(rows.shape, generator=random)


def visible_by_position(queries: Tensor, keys: Tensor) -> np.ndarray:
    """bool `[B, Hkv, L, S]`: a query sees what is at its position or before; nothing is seen at -1, nor from there."""
    seen = (keys[:, :, None, :] <= queries[:, None, :, None]) & (keys[:, :, None, :] >= 0)
    return seen.numpy()


# -- the weightings ----------------------------------------------------------------------------------------------------


@thorough
@given(case=cases(), group=groups)
def test_uniform(case, group):
    """Every row counts 1."""
    expected = case.dense(np.ones(case.rows), group=group)
    torch.testing.assert_close(case.mass(RowWeights.uniform(case.rows), group=group), expected, **ROUNDING)


@thorough
@given(case=cases(), group=groups, decay=decays)
def test_geometric(case, group, decay):
    """The row of age a counts decay to the power of a, and 0 to the power of 0 is 1."""
    ages = np.arange(case.rows)[::-1]
    found = case.mass(RowWeights.geometric(case.rows, decay), group=group)
    torch.testing.assert_close(found, case.dense(np.power(decay, ages), group=group), **ROUNDING)


@thorough
@given(case=cases(), group=groups, window=st.integers(1, 15))
def test_last_window(case, group, window):
    """The last rows count 1, the others nothing; a window larger than the step is all of it."""
    weights = np.arange(case.rows)[::-1] < window
    found = case.mass(RowWeights.last_window(window), group=group)
    torch.testing.assert_close(found, case.dense(weights, group=group), **ROUNDING)


@thorough
@given(case=cases(), group=groups, count=st.integers(1, 12), shared=st.booleans(), seed=seeds)
def test_explicit_rows(case, group, count, shared, seed):
    """Chosen rows count what was chosen for them, the same for all sequences or something else for each."""
    rows, chosen = (part[:, :count] for part in chosen_rows(case, seed))
    if shared:
        rows, chosen = rows[:1], chosen[:1]
    weights = torch.zeros(len(rows), case.rows).scatter_(1, rows, chosen)
    if shared:
        rows, chosen = rows[0], chosen[0]
    found = case.mass(RowWeights.explicit(rows, chosen), group=group)
    torch.testing.assert_close(found, case.dense(weights, group=group), **ROUNDING)


@given(case=cases(), group=groups)
def test_explicit_rows_of_all_equal_uniform(case, group):
    """Naming every row with weight 1 is the uniform weighting."""
    every = RowWeights.explicit(torch.arange(case.rows), torch.ones(case.rows))
    torch.testing.assert_close(
        case.mass(every, group=group), case.mass(RowWeights.uniform(case.rows), group=group), **ROUNDING
    )


# -- what epsilon leaves out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "rows"),
    [(0.2, 6), (0.5, 15), (0.8, 49), (0.9, 110), (0.95, 238), (0.97, 418), (0.99, 1375), (0.999, 16111)],
)
def test_number_of_rows_that_matter(decay, rows):
    """T for an epsilon of 1e-4, as in the table of the algorithm reference."""
    assert RowWeights.geometric(10**6, decay, 1e-4).last == rows
    assert RowWeights.geometric(rows - 1, decay, 1e-4).last == rows - 1


@thorough
@given(decay=st.floats(0.01, 0.99), epsilon=st.floats(1e-6, 0.5))
def test_rows_are_as_few_as_epsilon_allows(decay, epsilon):
    """T is the least number of rows for which decay^T / (1 - decay) is at most epsilon, and never less than 1."""
    rows = RowWeights.geometric(10**9, decay, epsilon).last
    assert decay**rows / (1 - decay) <= epsilon * (1 + 1e-9)
    assert rows == 1 or decay ** (rows - 1) / (1 - decay) > epsilon * (1 - 1e-9)


@thorough
@given(
    case=cases(most_rows=40),
    group=groups,
    decay=st.floats(0.05, 0.8),
    epsilon=st.sampled_from([0.5, 0.1, 0.01, 1e-4]),
)
def test_epsilon_bounds_the_error_of_every_key(case, group, decay, epsilon):
    """Rows left out would add between nothing and decay^T / (1 - decay) <= epsilon to any key."""
    rows = case.rows
    weights = RowWeights.geometric(rows, decay, epsilon)
    error = case.mass(RowWeights.geometric(rows, decay), group=group) - case.mass(weights, group=group)
    bound = decay**weights.last / (1 - decay) if weights.last < rows else 0.0
    assert error.min() >= -1e-6
    assert error.max() <= bound + 1e-6
    assert bound <= epsilon * (1 + 1e-9)


@pytest.mark.parametrize(("decay", "epsilon"), [(1.0, 1e-4), (0.5, 0.0), (1.0, 0.0)])
def test_all_rows_are_read_where_none_may_be_left_out(decay, epsilon):
    """Without forgetting, or with an epsilon of 0, every row counts."""
    assert RowWeights.geometric(5000, decay, epsilon).last == 5000


@pytest.mark.parametrize("decay", [0.2, 0.95])
def test_weights_of_long_ago_underflow_to_zero(decay):
    """Weights come from exponents: the oldest are 0, the newest is 1, and none is NaN."""
    weights = RowWeights.geometric(100_000, decay).suffix(torch.device("cpu"), 100_000)
    assert weights[0] == 0
    assert weights[-1] == 1
    assert weights.isfinite().all()
    assert torch.equal(weights, weights.sort().values)


# -- positions ---------------------------------------------------------------------------------------------------------


@thorough
@given(drawn=positioned(), group=groups, decay=decays)
def test_empty_slots_and_padded_queries_by_position(drawn, group, decay):
    """With positions, order is theirs: an empty slot gets nothing, and a padded query gives nothing."""
    case, queries, keys = drawn
    weights = RowWeights.geometric(case.rows, decay)
    found = case.mass(weights, group=group, query_positions=queries, key_positions=keys)
    by_age = np.power(decay, np.arange(case.rows)[::-1])
    expected = case.dense(by_age, group=group, visible=visible_by_position(queries, keys))
    torch.testing.assert_close(found, expected, **ROUNDING)
    assert (found[keys < 0] == 0).all()


@given(drawn=positioned(), group=groups, seed=seeds)
def test_explicit_rows_by_position(drawn, group, seed):
    """Chosen rows see by position too; a chosen row that is padding counts nothing."""
    case, queries, keys = drawn
    rows, chosen = chosen_rows(case, seed)
    found = case.mass(RowWeights.explicit(rows, chosen), group=group, query_positions=queries, key_positions=keys)
    weights = torch.zeros(rows.shape).scatter_(1, rows, chosen)
    expected = case.dense(weights, group=group, visible=visible_by_position(queries, keys))
    torch.testing.assert_close(found, expected, **ROUNDING)


@given(case=cases(), group=groups, decay=decays, first=st.integers(0, 5))
def test_positions_in_order_change_nothing(case, group, decay, first):
    """Positions that say what holds without them, wherever they begin, give the same mass."""
    weights = RowWeights.geometric(case.rows, decay)
    keys = torch.arange(first, first + case.length)
    queries = keys[case.length - case.rows :].expand(case.batch, -1)
    found = case.mass(
        weights,
        group=group,
        query_positions=queries,
        key_positions=keys.expand(case.batch, case.kv_heads, -1),
    )
    torch.testing.assert_close(found, case.mass(weights, group=group), **ROUNDING)


# -- blocks ------------------------------------------------------------------------------------------------------------


@thorough
@given(drawn=positioned(), group=groups, decay=decays, block_bytes=st.integers(1, 4000), by_position=st.booleans())
def test_block_sizes_change_nothing_but_rounding(drawn, group, decay, block_bytes, by_position):
    """However small a block is, down to a single row, the mass is the same."""
    case, queries, keys = drawn
    positions = {"query_positions": queries, "key_positions": keys} if by_position else {}
    weights = RowWeights.geometric(case.rows, decay)
    whole = case.mass(weights, group=group, **positions)
    in_blocks = case.mass(weights, group=group, block_bytes=block_bytes, **positions)
    torch.testing.assert_close(in_blocks, whole, atol=1e-6, rtol=1e-5)


# -- what a row adds up to ---------------------------------------------------------------------------------------------


@given(case=cases(sinks=False), decay=decays)
def test_rows_add_up_to_their_weights(case, decay):
    """A row of weight w gives w in all: A2SF's total after n rows is (1 - gamma^n) / (1 - gamma)."""
    total = case.mass(RowWeights.geometric(case.rows, decay)).sum(-1)
    expected = case.rows if decay == 1 else (1 - decay**case.rows) / (1 - decay)
    torch.testing.assert_close(total, torch.full_like(total, expected), **ROUNDING)


@given(case=cases(sinks=False), data=st.data())
def test_each_row_alone_adds_up_to_its_weight(case, data):
    """The same for any single row and any weight."""
    row, weight = data.draw(st.integers(0, case.rows - 1)), data.draw(st.floats(0, 10))
    total = case.mass(RowWeights.explicit(torch.tensor([row]), torch.tensor([weight]))).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, weight), **ROUNDING)


@given(case=cases(sinks=True))
def test_attention_sinks_take_their_part(case):
    """With a sink in each head the keys share no more than 1, and less the larger its logit."""
    total = case.mass(RowWeights.last_window(1)).sum(-1)
    larger = replace(case, scoring=replace(case.scoring, sinks=case.scoring.sinks + 100))
    assert (total <= 1 + 1e-6).all()
    assert (larger.mass(RowWeights.last_window(1)).sum(-1) < total).all()


@given(case=cases())
def test_no_key_gets_mass_from_what_comes_before_it(case):
    """The last key is seen by the last row alone, and gets nothing from the others."""
    others = RowWeights.explicit(torch.arange(case.rows - 1), torch.ones(case.rows - 1))
    if case.rows > 1:
        assert (case.mass(others)[..., -1] == 0).all()


@given(case=cases())
def test_max_over_the_group_is_at_least_the_mean(case):
    """The most attentive head of a group gives no less than the average one, and the same if it is the only one."""
    weights = RowWeights.uniform(case.rows)
    most, mean = case.mass(weights, group="max"), case.mass(weights)
    assert (most >= mean - 1e-5).all()
    if case.queries.shape[1] == case.kv_heads:
        torch.testing.assert_close(most, mean, **ROUNDING)


# -- half precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@given(case=cases(), group=groups)
def test_half_precision_in_float32_out(dtype, case, group):
    """Queries and keys in half precision give the float32 mass of the numbers they hold."""
    rounded = replace(case, queries=case.queries.to(dtype), keys=case.keys.to(dtype))
    found = rounded.mass(RowWeights.uniform(case.rows), group=group)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rounded.dense(np.ones(case.rows), group=group), **ROUNDING)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["sum", "", None, "MEAN"])
def test_unknown_group_is_refused(group):
    """The query heads of a KV head are reduced by mean or max, and the message says so."""
    tokens = torch.randn(1, 1, 2, 2)
    with pytest.raises(PolicyError, match='"mean" or "max"'):
        attention_mass(tokens, tokens, RowWeights.uniform(2), Scoring(1.0), group=group)


@pytest.mark.parametrize(("rows", "weights"), [((2,), (3,)), ((1, 2), (2,)), ((), ()), ((1, 1, 2), (1, 1, 2))])
def test_rows_and_weights_of_other_shapes_are_refused(rows, weights):
    """Rows and their weights come in pairs, [R] or [B, R]."""
    with pytest.raises(PolicyError, match="same shape"):
        RowWeights.explicit(torch.zeros(rows, dtype=torch.long), torch.zeros(weights))
