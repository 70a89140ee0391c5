"""Some cases of every fuzzing target, what fuzzing has found, and that it finds what is there to be found."""

from __future__ import annotations

import time
from fractions import Fraction

import fuzz
import numpy as np
import pytest
import torch

from kvprune import Budget, BudgetError, PolicyError, PrunedCache, RowWeights
from kvprune.policies import A2SF, KIVI, TOVA, GemFilter, Keyformer, SnapKV, ZipCache
from kvprune.policy import registry
from kvprune.table.token_table import TokenTable

CASES = {
    "budgets": 2000,
    "policies": 150,
    "strings": 1000,
    "command_line": 500,
    "files": 60,
    "longbench": 200,
    "lm_eval": 500,
}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_nothing_but_errors_of_kvprune(name):
    """Cases are taken, or refused with a KVPruneError; there are some of each."""
    if (missing := fuzz.TARGETS[name].missing) is not None:
        pytest.skip(missing)
    outcome = fuzz.fuzz(name, 0, CASES[name])
    assert outcome.bugs == {}
    assert outcome.taken > 0
    assert outcome.refused.total() > 0


# -- the fuzzer --------------------------------------------------------------------------------------------------------


def test_an_error_of_another_kind_is_a_bug(monkeypatch):
    """With the case that found it first, to be run again, and how many others there were."""
    monkeypatch.setattr(Budget, "parse", lambda value: 1 // 0)
    outcome = fuzz.fuzz("budgets", 40, 7)
    (where,) = outcome.bugs
    assert where.startswith("ZeroDivisionError at test_fuzz.py:")
    assert (outcome.bugs[where]["case"], outcome.bugs[where]["count"]) == (40, 7)


def test_a_case_that_hangs_is_a_bug(monkeypatch):
    monkeypatch.setattr(Budget, "parse", lambda value: time.sleep(10))
    (where,) = fuzz.fuzz("budgets", 0, 1, seconds=0.05).bugs
    assert where.startswith("TooLongError")


@pytest.mark.parametrize("name", ["budgets", "strings"])
def test_a_case_is_the_same_in_every_run(name):
    """Whatever ran before it: a case is known by its number."""
    target = fuzz.TARGETS[name]
    shown = [target.make(fuzz.random.Random(f"0 {name} {case}"))[0] for case in (5, 6, 5)]
    assert shown[0] == shown[2] != shown[1]


# -- what it has found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1" * 5000, "9" * 400, f"{'1' * 5000}.5", f"{'1' * 5000} GiB"], ids=len)
def test_budgets_of_thousands_of_digits(text):
    """int() refuses them with a ValueError of its own."""
    with pytest.raises(BudgetError):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["a2sf:name=4", "a2sf:text=4", "a2sf:self=4"])
def test_settings_by_the_names_of_arguments(text):
    """What a function calls its own arguments is no setting of a policy."""
    with pytest.raises(PolicyError, match="has no setting"):
        registry.parse(text)


@pytest.mark.parametrize("setting", ["interval", "sinks", "recent", "kernel_size", "window"])
def test_counts_beyond_any_sequence(setting):
    """Positions have 31 bits; a larger count would overflow somewhere later, in words of another library."""
    with pytest.raises(PolicyError, match=f"{setting} must be an int of at most 2147483647"):
        SnapKV(0.5, **{setting: 2**31 + 1})


def test_seeds_have_64_bits():
    assert A2SF(seed=2**64 - 1).seed == 2**64 - 1
    with pytest.raises(PolicyError, match="seed must be an int of at most"):
        A2SF(seed=2**64)


@pytest.mark.parametrize(
    "policy",
    [TOVA(8, interval=2**31 - 1), TOVA(8, kernel_size=2**31 - 1), SnapKV(8, window=2**31 - 1, recent=2),
     SnapKV(8, window=4, pooling="avg", kernel_size=2**31 - 1), GemFilter(8, kernel_size=2**31 - 1),
     ZipCache(group_size=2**31 - 1), KIVI(group_size=2**31 - 1)],
    ids=str,
)  # fmt: skip
def test_settings_beyond_any_sequence_cost_no_memory(policy):
    """Room, windows and kernels are as large as what there is, not as large as they might be."""
    pruned = PrunedCache(fuzz.model(), policy)
    fuzz.use(pruned, 24)
    assert pruned.nbytes < 2**20


def test_a_wide_kernel_pools_like_one_that_reaches_everything():
    """Nothing is left to tell one token from another by, however much wider it is than the sequence."""
    scores, rows = torch.randn(20), torch.zeros(1, 1, 20, 4)
    table = TokenTable(rows, rows, torch.arange(20, dtype=torch.int32)[None, None], {})
    averaged = SnapKV(8, window=4, pooling="avg", kernel_size=999).pool(scores[None, None], table, 20)
    smoothed = GemFilter(8, kernel_size=999)._smooth(scores)
    for pooled in (averaged, smoothed):  # every token has the same neighbours: all of them
        torch.testing.assert_close(pooled, pooled.mean().expand_as(pooled))


def test_weights_of_rows_that_are_there():
    """A window that is longer than the step weighs the step's rows, by their age."""
    rows, weights = RowWeights(2**40, 0.5).chosen(3, torch.device("cpu"))
    assert rows.tolist() == [0, 1, 2]
    assert weights.tolist() == [0.25, 0.5, 1.0]


def test_an_epsilon_too_small_to_be_multiplied():
    """5e-324 times anything below one half is zero, which has no logarithm."""
    assert RowWeights.geometric(10**6, 0.95, 5e-324).last == 14_572


def test_a_fraction_comes_back_from_its_description():
    policy = TOVA(Fraction(1, 3))
    assert registry.from_description(registry.described(policy)) == policy == TOVA(1 / 3)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.uint64], ids=lambda kind: kind.__name__)
def test_numbers_of_numpy_are_numbers(kind):
    """Eleven sinks and three rows are no -8 in eight bits without a sign; hashes of seeds wrapped around as well."""
    made = [Keyformer(0.5, sinks=number(11), recent=number(2), seed=number(7)) for number in (kind, int)]
    assert made[0] == made[1]
    assert {type(getattr(made[0], name)) for name in ("sinks", "recent", "seed")} == {int}
    assert [
        type(ZipCache(kind(1)).salient),
        type(KIVI(kind(4)).bits),
        type(GemFilter(keep_last=kind(3)).keep_last),
    ] == [int] * 3
