"""Whatever is done to a cache, in any order: after every operation it is what the slow model of `slow.py` says.

`COUNT_RULES=1` prints how many operations were tried, of each kind.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import a2sf, chains, h2o, streaming_llm, tova
from families import PAD, build, kept, storage_nbytes, token_ids, windows_are_recorded
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from masked import masked
from slow import MOST_UNDECIDED, RULES, Rows, Rule, SlowCache, StoppingCache
from torch import Tensor
from transformers import PreTrainedModel

from kvprune import BudgetError, CacheError, Policy, PrunedCache
from kvprune.cache import step as layer_step
from kvprune.cache.models import cache_argument
from kvprune.policies import LazyLLM, PyramidDrop, SpAtten
from kvprune.policy.budget import Budget
from kvprune.table import token_table as table

MOST_SEQUENCES, MOST_PAIRS, MOST_TOKENS, MOST_HOLES = 4, 3, 300, 4
COUNTS: Counter[tuple[str, str]] = Counter()


def counted(**strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """A rule, and how often it was run."""

    def decorate(function: Callable[..., None]) -> Any:
        @wraps(function)
        def run(self: CacheMachine, **drawn: Any) -> None:
            COUNTS[type(self).__name__, function.__name__] += 1
            function(self, **drawn)

        return rule(**strategies)(run)

    return decorate


@pytest.fixture(scope="module", autouse=True)
def rules_are_counted(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if os.environ.get("COUNT_RULES"):
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n", *(f"{count:,} {machine}.{name}" for (machine, name), count in sorted(COUNTS.items())), sep="\n")
            print(f"{sum(COUNTS.values()):,} operations")


@dataclass
class Pair:
    """A cache, and what it should be."""

    fast: PrunedCache
    slow: SlowCache

    @property
    def batch(self) -> int:
        return len(self.slow.sequences)

    def found(self, batch: int | None = None) -> Rows:
        """What the cache keeps of so many sequences, by default those that there were before this step."""
        rows = range(self.batch if batch is None else batch)
        return [[kept(self.fast, index, row) for row in rows] for index in self.fast.pruned_layers]

    def mask(self, ids: list[list[int]], width: int) -> Tensor:
        """The padding mask of everything so far and these tokens."""
        columns = [each.columns for each in self.slow.sequences] or [[] for _ in ids]
        new = [[False] * (width - len(each)) + [True] * len(each) for each in ids]
        return torch.tensor([old + more for old, more in zip(columns, new, strict=True)]).long()


class CacheMachine(RuleBasedStateMachine):
    """Caches with one policy, on one model. The last pair is the one that rules work on; others were left behind."""

    family = "llama"
    dtype = torch.float64

    def start(self, policy: Policy, recording: bool, rule: Rule | None = None) -> None:
        self.model, links = _model(self.family, self.dtype), policy.parts()
        self.filters = policy.filters_prompt
        exact = self.dtype == torch.float64 and not policy.codecs and not self.filters
        self.packs = bool(policy.codecs)
        self.in_bytes = any(isinstance(getattr(link, "budget", None), str) for link in links)
        slow = self.slow_of(policy, exact, rule)
        self.pairs = [Pair(PrunedCache(self.model, policy), slow)]
        self.folder = tempfile.TemporaryDirectory()
        if recording:
            self.record()

    def slow_of(self, policy: Policy, exact: bool, rule: Rule | None) -> SlowCache:
        return SlowCache(masked(self.family), policy.parts(), exact=exact, rule=rule)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @property
    def pair(self) -> Pair:
        return self.pairs[-1]

    @property
    def fast(self) -> PrunedCache:
        return self.pair.fast

    @property
    def slow(self) -> SlowCache:
        return self.pair.slow

    def is_filled(self) -> bool:
        return bool(self.pair.batch)

    def has_room(self) -> bool:
        return self.slow.seen < MOST_TOKENS

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, ids: list[list[int]], width: int) -> bool:
        """Feed new tokens, left-padded to a width; whether they came in: bytes may not suffice for what has to stay."""
        padded = torch.tensor([[PAD] * (width - len(each)) + each for each in ids])
        mask = self.pair.mask(ids, width)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        dropped = self.dropped()
        try:
            with torch.no_grad():
                logits = self.model(
                    padded, attention_mask=mask, position_ids=positions, **cache_argument(self.fast)
                ).logits
        except BudgetError:
            assert self.in_bytes
            if self.is_filled():  # where it refuses the first prompt, the cache is empty as it is
                self.fast.reset()
                self.slow.reset()
            return False
        expected = self.slow.step(ids, width, self.pair.found(len(ids)), self.chosen(dropped))
        self.compare_logits(logits, ids, expected)
        for link in self.slow.due:
            if isinstance(link.budget, str):
                assert self.fast.nbytes <= Budget.parse(link.budget).amount
        return True

    def compare_logits(self, logits: Tensor, ids: list[list[int]], expected: list[Tensor] | None) -> None:
        for row, new in enumerate(ids):
            mine = logits[row, -1:] if self.filters else logits[row, -len(new) :]
            if new:
                assert mine.isfinite().all()
            if new and expected is not None:
                torch.testing.assert_close(mine, expected[row], atol=1e-5, rtol=1e-4)

    def dropped(self) -> int:
        """Tokens that a prompt filter has kept from the layers."""
        selection = self.fast.layers[self.fast.pruned_layers[0]].selection
        return sum(selection.dropped) if selection else 0

    def chosen(self, dropped: int) -> list[list[int]] | None:
        """Positions of each sequence that a prompt filter let in now, None if it let all of them in."""
        if self.dropped() == dropped:
            return None
        return [positions.tolist() for positions in self.fast.selected_positions]

    def drawn(self, counts: list[int], seed: int) -> list[list[int]]:
        return [token_ids(count, seed=seed + row).tolist() for row, count in enumerate(counts)]

    @precondition(has_room)
    @counted(
        batch=st.integers(1, 3),
        counts=st.lists(st.integers(0, 20), min_size=MOST_SEQUENCES, max_size=MOST_SEQUENCES),
        padding=st.one_of(st.just(0), st.integers(1, 4)),
        seed=st.integers(0, 2**16),
    )
    def prompt(self, batch: int, counts: list[int], padding: int, seed: int) -> None:
        """A prompt, a chunk of one, or another turn, of sequences of any lengths."""
        tokens = self.slow.tokens or [0] * batch
        counts = counts[: len(tokens)]
        width = max(1, max(counts) + padding)
        if width == 1 or self.family != "llama":
            # A single column is a token that was generated; and padding behind a token counts in a sliding window.
            counts = [width if begun else count for begun, count in zip(tokens, counts, strict=True)]
        if any(tokens) and not any(counts):
            counts[0] = 1  # a turn brings something to somebody
        self.step(self.drawn(counts, seed), width)

    @precondition(lambda self: self.is_filled() and self.has_room())
    @counted(steps=st.integers(1, 6), seed=st.integers(0, 2**16))
    def generate(self, steps: int, seed: int) -> None:
        """Tokens that are generated one by one, other ones by every sequence."""
        for index in range(steps):
            if not self.step(self.drawn([1] * self.pair.batch, seed + 10 * index), 1):
                break

    @precondition(lambda self: self.is_filled() and self.has_room() and self.slow.recording)
    @counted(length=st.integers(1, 6), rejected=st.integers(0, 6), seed=st.integers(0, 2**16))
    def draft(self, length: int, rejected: int, seed: int) -> None:
        """A draft, of which the newest tokens are rejected."""
        if self.step(self.drawn([length] * self.pair.batch, seed), length):
            self.take_back(min(rejected, length))  # a draft comes behind other tokens, so some are left

    # -- back ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.is_filled() and not self.slow.recording)
    @counted()
    def record_the_past(self) -> None:
        self.record()

    def record(self) -> None:
        self.fast.activate_past_recording()
        self.slow.recording = True

    @precondition(is_filled)
    @counted(columns=st.integers(0, 12))
    def crop(self, columns: int) -> None:
        """The newest columns are forgotten, or that is refused and nothing has changed."""
        # To none at all, only where every layer is pruned: others then keep their batch size (transformers 5.23).
        least = 0 if self.family == "llama" else 1
        self.take_back(min(columns, self.slow.seen - least))

    def take_back(self, columns: int) -> None:
        if not self.slow.can_crop(columns):
            with pytest.raises(CacheError):
                self.fast.crop(-columns)
            return
        try:
            self.fast.crop(-columns)
        except CacheError:
            # Packed rows cannot go, and among padding, slots may have been rearranged where no token was evicted.
            padded = any(not all(each.columns) for each in self.slow.sequences)
            assert self.packs or (padded and (self.slow.evicting or isinstance(self.slow, StoppingCache)))
        except BudgetError:
            assert self.in_bytes
            self.fast.reset()
            self.slow.reset()
        else:
            self.slow.crop(columns, self.pair.found())

    @precondition(lambda self: self.slow.seen > 30)  # else few histories are long
    @counted()
    def reset(self) -> None:
        self.fast.reset()
        self.slow.reset()

    # -- the batch changes -----------------------------------------------------------------------------------------

    picks = st.lists(st.integers(0, MOST_SEQUENCES - 1), min_size=1, max_size=MOST_SEQUENCES)

    @precondition(is_filled)
    @counted(picks=st.lists(st.integers(0, 3), min_size=MOST_SEQUENCES, max_size=MOST_SEQUENCES))
    def reorder_beams(self, picks: list[int]) -> None:
        rows = [pick % self.pair.batch for pick in picks[: self.pair.batch]]
        self.fast.reorder_cache(torch.tensor(rows))
        self.slow.select(rows)

    @precondition(lambda self: self.is_filled() and 2 * self.pair.batch <= MOST_SEQUENCES)
    @counted()
    def repeat_each_sequence(self) -> None:
        self.fast.batch_repeat_interleave(2)
        self.slow.select([row for row in range(self.pair.batch) for _ in range(2)])

    @precondition(is_filled)
    @counted(picks=picks, as_mask=st.booleans())
    def select_sequences(self, picks: list[int], as_mask: bool) -> None:
        rows = [pick % self.pair.batch for pick in picks]
        if as_mask:
            rows = sorted(set(rows))
            self.fast.batch_select_indices(torch.isin(torch.arange(self.pair.batch), torch.tensor(rows)))
        else:
            self.fast.batch_select_indices(torch.tensor(rows))
        self.slow.select(rows)

    @precondition(lambda self: self.is_filled() and self.slow.seen > 40)  # else there would be little else
    @counted()
    def call_with_another_batch_size(self) -> None:
        with pytest.raises(CacheError), torch.no_grad():
            self.model(token_ids(self.pair.batch + 1, 2), **cache_argument(self.fast))

    # -- copies ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.is_filled() and len(self.pairs) < MOST_PAIRS)
    @counted()
    def fork(self) -> None:
        self.pairs.append(Pair(self.fast.fork(), self.slow.fork()))

    @precondition(lambda self: len(self.pairs) > 1)
    @counted(index=st.integers(0, MOST_PAIRS - 2))
    def go_on_with_another(self, index: int) -> None:
        self.pairs.append(self.pairs.pop(index % (len(self.pairs) - 1)))

    @precondition(lambda self: len(self.pairs) == MOST_PAIRS)
    @counted()
    def drop_this_one(self) -> None:
        self.pairs.pop()

    @precondition(is_filled)
    @counted()
    def save_and_load(self) -> None:
        """A cache that was saved and loaded again takes the place of the one that was saved."""
        path = Path(self.folder.name) / "cache.safetensors"
        if self.slow.undecided is not None:
            with pytest.raises(CacheError):
                self.fast.save(path)
            return
        self.fast.save(path)
        self.pair.fast = PrunedCache.load(path, self.model)

    # -- what is always so -----------------------------------------------------------------------------------------

    @invariant()
    def every_cache_keeps_what_it_should(self) -> None:
        """Also those that were left behind: what was done to others has not changed them."""
        for pair in self.pairs:
            pair.slow.check(pair.found())
            for index in pair.fast.pruned_layers if pair.batch else ():
                positions = pair.fast.kept_positions(index)
                assert positions.dtype == torch.int64
                assert positions.shape[:2] == (pair.batch, pair.slow.model.kv_heads)
                assert all(head == sorted(head) for head in positions.flatten(0, 1).tolist())

    @invariant()
    def tokens_and_padding_are_counted(self) -> None:
        for pair in self.pairs:
            assert pair.fast.seen_tokens == pair.fast.get_seq_length() == pair.slow.seen
            assert all(list(pair.fast.layers[layer].tokens) == pair.slow.tokens for layer in pair.fast.pruned_layers)

    @invariant()
    def bytes_are_those_of_the_storages(self) -> None:
        for pair in self.pairs:
            assert pair.fast.nbytes == storage_nbytes(pair.fast)


@cache
def _model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    return build(family, dtype=dtype)


# -- the machines ------------------------------------------------------------------------------------------------------

seldom = st.sampled_from([False, False, False, True])
foretold = {"in_bytes": False, "kernel_size": st.just(1)}
simple = st.one_of(a2sf(epsilon=st.just(0.0), **foretold), h2o(**foretold), tova(**foretold), streaming_llm(**foretold))


class Simple(CacheMachine):
    """Policies whose scores plain Python can tell from the stock model's attention."""

    @initialize(policy=simple, recording=seldom)
    def begin(self, policy: Policy, recording: bool) -> None:
        self.start(policy, recording, RULES[type(policy)])


class SimpleOfHybrid(Simple):
    """The same where a layer with a sliding window lies between two that are pruned."""

    family = "qwen3-hybrid"


class AnyChain(CacheMachine):
    """Any policy and any chain."""

    @initialize(policy=chains(), recording=seldom)
    def begin(self, policy: Policy, recording: bool) -> None:
        self.start(policy, recording)


class AnyChainOfHybrid(AnyChain):
    family = "qwen3-hybrid"


class AnyChainInHalfPrecision(AnyChain):
    dtype = torch.bfloat16


class Stopping(CacheMachine):
    """Policies that let tokens stop between layers, half of those that come: go on later, or not."""

    @initialize(
        policy=st.sampled_from(
            [
                LazyLLM(((0.5, 0.5),)),
                LazyLLM(((0.5, 0.5),), revive=False),
                SpAtten(((0.5, 0.5),), recent=1),
                PyramidDrop(0.5, stages=2, keep_first=0, keep_last=1),
            ]
        ),
        recording=seldom,
    )
    def begin(self, policy: Policy, recording: bool) -> None:
        self.start(policy, recording)

    def slow_of(self, policy: Policy, exact: bool, rule: Rule | None) -> SlowCache:
        def goes_on(tokens: int) -> int:
            return 1 + tokens // 2 if isinstance(policy, PyramidDrop) else (tokens + 1) // 2

        always = isinstance(policy, SpAtten) or getattr(policy, "revive", False)
        return StoppingCache(masked(self.family), goes_on, always=always)


@pytest.mark.parametrize(
    "machine", [Simple, SimpleOfHybrid, AnyChain, AnyChainOfHybrid, AnyChainInHalfPrecision, Stopping]
)
def test_any_sequence_of_operations(machine, monkeypatch):
    """Rows, logits, counts and bytes are those of the slow model, whatever came before."""
    windows_are_recorded(machine.family)
    monkeypatch.setattr(layer_step, "_UNDECIDED", MOST_UNDECIDED)  # so that small models and short prompts get there
    monkeypatch.setattr(table, "MOST_HOLES", MOST_HOLES)
    few = 2 if machine is Stopping else 4
    run_state_machine_as_test(
        machine, settings=profile(max_examples=few * profile.default.max_examples, stateful_step_count=20)
    )
