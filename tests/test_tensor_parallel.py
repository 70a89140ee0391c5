"""Tensor parallelism: two processes with half of the heads each keep what one process keeps, and say the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import build
from tensor_parallel import BYTES, CASES, LIMIT, MODELS, PROCESSES, TURNS, WHOLE, run

from kvprune import Rotations, UnsupportedModelError
from kvprune.cache.models import heads_of
from kvprune.policy.heads import ALL_HEADS, Heads
from kvprune.table.hadamard import hadamard

WORKER = Path(__file__).with_name("tensor_parallel.py")
EVERY = [*CASES, *TURNS]

has_gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
needs_gloo = pytest.mark.skipif(not has_gloo, reason="torch.distributed or gloo is not there")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the models, and what two processes found."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name, sizes in MODELS.items():
        build(name, **sizes).save_pretrained(folder / name)
    build("llama", num_key_value_heads=1, vocab_size=98).save_pretrained(folder / "one KV head")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(WORKER), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT + 60)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def several(folder) -> list[dict[Any, Any]]:
    """What each process found."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def one(folder) -> dict[Any, Any]:
    """What one process finds with the same models."""
    return run({name: build(name, **sizes) for name, sizes in MODELS.items()}, folder)


def is_whole(case: Any) -> bool:
    return case[0] in WHOLE


@needs_gloo
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_tokens_are_those_of_one_process(case, one, several):
    """Every process generates what one alone generates."""
    for each in several:
        assert torch.equal(each[case]["ids"], one[case]["ids"])


@needs_gloo
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_every_process_keeps_the_rows_of_its_heads(case, one, several):
    """Side by side, what processes keep is what one keeps; where attention is whole, each keeps all of it."""
    for layer, expected in enumerate(one[case]["kept"]):
        kept = [each[case]["kept"][layer] for each in several]
        if is_whole(case):
            assert all(torch.equal(each, expected) for each in kept)
        else:
            width = max(each.shape[2] for each in kept)  # of the longest head there; others have -1 in front
            kept = [F.pad(each, (width - each.shape[2], 0), value=-1) for each in kept]
            assert torch.equal(torch.cat(kept, dim=1), expected)


@needs_gloo
def test_heads_of_different_processes_get_different_numbers_of_rows(several):
    """What is compared above, where heads compete: rows that went from heads of one process to those of another."""
    for name in ("adaptive", "adaptive, z", "everywhere", "kvzip", "kvzip+", "bits", "bits, adaptive"):
        rows = [sum(int((layer >= 0).sum()) for layer in each["llama", name]["kept"]) for each in several]
        assert len({*rows}) == PROCESSES


@needs_gloo
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_bytes_are_of_one_process(case, one, several):
    """Each reports the bytes that it holds: its share, of rows that are split."""
    for each in several:
        assert each[case]["dense"] * (1 if is_whole(case) else PROCESSES) == one[case]["dense"]


@needs_gloo
@pytest.mark.parametrize("policy", ["tova, bytes", "snapkv, bytes"])
def test_a_budget_in_bytes_is_of_all_processes(policy, several):
    """All of them together hold what the budget says, and not much less."""
    assert 0.8 * BYTES < sum(each["llama", policy]["nbytes"] for each in several) <= BYTES


@needs_gloo
def test_a_saved_cache_belongs_to_a_process(several):
    """Each saves its own heads, and says so where another one would load them."""
    for rank, each in enumerate(several):
        assert f"process is '{2 - rank} of 2' there and '{rank + 1} of 2' here" in each["loaded from another"]


@needs_gloo
def test_rotations_are_of_all_heads(one, several):
    """The same in every process, and those of one that has all heads; a file of one serves the others."""
    first, other = (each["rotations"]["rotations"] for each in several)
    assert first == other
    cpu = torch.device("cpu")
    for layer in range(len(first)):
        bases = (Rotations(known).basis(layer, (1, 1), cpu) for known in (first, one["rotations"]["rotations"]))
        found, expected = ((basis.keys.turning(cpu)[0, 0], basis.values.turning(cpu)[0, 0]) for basis in bases)
        for each, wanted in zip(found, expected, strict=True):
            mixed = hadamard(len(each))  # behind it, columns are eigenvectors, which may have either sign
            shares = ((each @ mixed.T).T @ (wanted @ mixed.T)).abs()
            torch.testing.assert_close(shares, torch.eye(len(each)), atol=5e-2, rtol=0)
    for each in several:
        assert "weights are others" in each["rotations of another", False]
        assert each["rotations of another", True] == "none"


@needs_gloo
def test_query_heads_that_are_split_alone_are_refused(several):
    """Half of the query heads over all KV heads would score every row by half of its queries."""
    for each in several:
        assert "UnsupportedModelError" in each["queries alone"]
        assert "2 of its 4 query heads and 1 of its 1 KV heads" in each["queries alone"]


# -- without other processes -------------------------------------------------------------------------------------------


def test_one_process_has_all_heads():
    """A model that was loaded as usual is never asked for the sum of several: there is not even a copy."""
    heads, scores = heads_of(build("llama"), 0), torch.randn(2, 3, 5)
    assert heads is ALL_HEADS
    assert heads.sum(scores) is scores
    assert torch.equal(heads.mean(scores), scores.mean(1, keepdim=True))
    assert heads.first_query_head == 0


SHARE = Heads(rank=1, size=2, query_heads=8, kv_heads=4)


def test_a_share_counts_on_from_those_before_it():
    """The second of two processes begins with the second half of the query heads."""
    assert SHARE.present(2).first_query_head == 4
    assert SHARE.present(4) is ALL_HEADS


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(8, 4), (4, 2)])
def test_all_heads_or_an_equal_share(query_heads, kv_heads):
    """What a plan may leave of a layer."""
    SHARE.check(query_heads, kv_heads)


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (8, 2), (2, 1), (5, 2), (4, 3)])
def test_any_other_share_is_refused(query_heads, kv_heads):
    """The error says what is here, and what is needed."""
    with pytest.raises(UnsupportedModelError, match=f"{query_heads} of its 8 query heads and {kv_heads} of its 4 KV"):
        SHARE.check(query_heads, kv_heads)
