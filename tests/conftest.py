"""What every test gets: one thread, a fixed seed, hypothesis profiles, the `gpu` marker, and Triton interpreted."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Where there is no GPU, Triton's kernels are interpreted; it reads this once, when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Models here are so small that threads only wait for each other.
torch.set_num_threads(1)

# A first example may build a model, which says nothing about the data it was given.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=5, derandomize=True, **_COMMON)
settings.register_profile("more", max_examples=12, derandomize=True, print_blob=True, **_COMMON)
settings.register_profile("explore", max_examples=100, print_blob=True, **_COMMON)  # new examples in every run
settings.register_profile("long", max_examples=1000, print_blob=True, **_COMMON)
# The same examples everywhere, so that what passes at hand passes in CI, and within its time.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "dev")


MOST_PROCESSES = 8
"""Of a test run that takes as many as it likes: each has torch, transformers, and models of its own in memory."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What `-n auto` is: one process for every core that this one may use, hyperthreads among them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
