"""Whatever is done to a cache, in any order: after every operation it is what the slow model of `slow.py` says.

`COUNT_RULES=1` prints how many operations were tried, of each kind.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import a2sf, bits_policies, chains, fractions, h2o, streaming_llm, tova
from families import PAD, build, kept, storage_nbytes, token_ids, windows_are_recorded
from held import EXACT, MOST_ERROR, FirstLayer, assert_rows_only_lost_bits, held_by
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

from kvprune import Adaptive, BudgetError, CacheError, Everywhere, Policy, PrunedCache, Router, Uniform
from kvprune.cache import step as layer_step
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, FTP, H2O, KIVI, OSCAR, Bits, LazyLLM, PyramidDrop, SpAtten, Spectral, TurboQuant
from kvprune.policies import bits as bits_module
from kvprune.policy import aging
from kvprune.policy.budget import Budget
from kvprune.table import token_table as table

MOST_SEQUENCES, MOST_PAIRS, MOST_TOKENS, MOST_HOLES = 4, 3, 300, 4
PACKED_TOGETHER = 4
"""Generated tokens that some policies pack together: 32 of them are more than a history has in a row."""
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
class Fed:
    """A step of one sequence: its columns, which of them are tokens, and the logits of its newest one."""

    ids: list[int]
    real: list[bool]
    logits: Tensor


@dataclass
class Pair:
    """A cache, and what it should be.

    past: what every sequence has come through, `Fed`, an int for columns that were taken back, None where recording of
    the past began. alike: whether all sequences got as many tokens wherever that counts.
    """

    fast: PrunedCache
    slow: SlowCache
    past: list[list[Fed | int | None]] = field(default_factory=list)
    alike: bool = True

    def fork(self) -> Pair:
        return Pair(self.fast.fork(), self.slow.fork(), [list(each) for each in self.past], self.alike)

    def select(self, rows: list[int]) -> None:
        self.slow.select(rows)
        self.past = [list(self.past[row]) for row in rows]

    def reset(self) -> None:
        self.fast.reset()
        self.slow.reset()
        self.past, self.alike = [], True

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
    shape: tuple[tuple[str, int], ...] = ()
    """What the model's config has otherwise."""

    def start(self, policy: Policy, recording: bool, rule: Rule | None = None) -> None:
        self.model, links = _model(self.family, self.dtype, self.shape), policy.parts()
        self.first_layer = _first_layer(self.family, self.dtype, self.shape)
        self.policy, self.filters = policy, policy.filters_prompt
        self.packs = any(link.codecs and getattr(link, "widths", True) for link in links)  # Bits without: nothing ages
        exact = self.dtype == torch.float64 and not self.packs and not self.filters
        self.in_bytes = any(isinstance(getattr(link, "budget", None), str) for link in links)
        self.may_refuse = self.in_bytes or any(isinstance(link, Bits) and link.budget > 1 for link in links)
        slow = self.slow_of(policy, exact, rule)
        self.pairs = [Pair(PrunedCache(self.model, policy), slow)]
        self.folder = tempfile.TemporaryDirectory()
        if recording:
            self.record()

    def slow_of(self, policy: Policy, exact: bool, rule: Rule | None) -> SlowCache:
        return SlowCache(masked(self.family, **dict(self.shape)), policy.parts(), exact=exact, rule=rule)

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
        dropped, before = self.dropped(), held_by(self.fast) if self.is_filled() else None
        try:
            with torch.no_grad():
                logits = self.model(
                    padded, attention_mask=mask, position_ids=positions, **cache_argument(self.fast)
                ).logits
        except BudgetError:
            assert self.may_refuse
            if self.is_filled():  # where it refuses the first prompt, the cache is empty as it is
                self.pair.reset()
            return False
        expected = self.slow.step(ids, width, self.pair.found(len(ids)), self.chosen(dropped))
        self.compare_logits(logits, ids, expected)
        self.note(padded, mask[:, -width:], logits, ids)
        if before is not None:
            assert_rows_only_lost_bits(before, held_by(self.fast))
        for link in self.slow.due:
            if isinstance(link, Bits):
                self.compare_exact_rows(link.sinks, link.recent)
                if self.policy is link:  # in a chain, another link may want slots for the tokens to come
                    assert table_nbytes(self.fast) <= self.most_bytes(link)
            elif isinstance(link.budget, str):
                assert self.fast.nbytes <= Budget.parse(link.budget).amount
        return True

    def compare_exact_rows(self, sinks: int, recent: int) -> None:
        """Sinks and recent tokens have their 16 bits, where the rows are there."""
        for held in held_by(self.fast):
            for row, tokens in enumerate(self.slow.tokens):
                always = [*range(min(sinks, tokens)), *range(max(0, tokens - recent), tokens)]
                assert set(held.bits[row, :, always].flatten().tolist()) <= {0, EXACT}

    def most_bytes(self, policy: Bits) -> float:
        """Of rows, when it has decided: a share of 16-bit bytes or so many tokens; of few what is always exact."""
        heads = len(self.fast.pruned_layers) * self.slow.model.kv_heads
        numbers = 2 * self.first_layer.keys.shape[-1]
        exact = numbers * self.first_layer.keys.itemsize + 4 + 4 * len(policy.columns())
        if isinstance(policy.budget, str):
            return Budget.parse(policy.budget).amount
        overhead = max(2 * len(policy.codecs), 24) * heads
        each = []
        for tokens in self.slow.tokens:
            least = heads * min(tokens, policy.sinks + policy.recent) * exact + overhead
            share = policy.budget * heads * numbers * 2
            each.append(share if policy.budget > 1 else max(share * tokens, least))
        # Of sequences that all fit, a shorter one has slots for the longest.
        apart = all(self.fast.layers[index].table.is_ragged for index in self.fast.pruned_layers)
        return sum(each) if apart else max(each) * len(each)

    def note(self, columns: Tensor, real: Tensor, logits: Tensor, ids: list[list[int]]) -> None:
        """Write down what every sequence was fed."""
        pair = self.pair
        if not pair.past:
            pair.past = [[None] if pair.slow.recording else [] for _ in ids]
        for past, *fed in zip(pair.past, columns.tolist(), real.bool().tolist(), logits[:, -1], strict=True):
            past.append(Fed(*fed))
        counted = columns.shape[1] == 1 or pair.slow.recording  # as generated tokens, of all sequences alike
        pair.alike &= not counted or len({len(new) for new in ids}) == 1

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
        for past in self.pair.past:
            past.append(None)

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
            assert self.may_refuse
            self.pair.reset()
        else:
            self.slow.crop(columns, self.pair.found())
            for past in self.pair.past:
                past.append(columns)

    @precondition(lambda self: self.slow.seen > 30)  # else few histories are long
    @counted()
    def reset(self) -> None:
        self.pair.reset()

    # -- the batch changes -----------------------------------------------------------------------------------------

    picks = st.lists(st.integers(0, MOST_SEQUENCES - 1), min_size=1, max_size=MOST_SEQUENCES)

    @precondition(is_filled)
    @counted(picks=st.lists(st.integers(0, 3), min_size=MOST_SEQUENCES, max_size=MOST_SEQUENCES))
    def reorder_beams(self, picks: list[int]) -> None:
        rows = [pick % self.pair.batch for pick in picks[: self.pair.batch]]
        with self.rows_move(rows):
            self.fast.reorder_cache(torch.tensor(rows))

    @precondition(lambda self: self.is_filled() and 2 * self.pair.batch <= MOST_SEQUENCES)
    @counted()
    def repeat_each_sequence(self) -> None:
        with self.rows_move([row for row in range(self.pair.batch) for _ in range(2)]):
            self.fast.batch_repeat_interleave(2)

    @precondition(is_filled)
    @counted(picks=picks, as_mask=st.booleans())
    def select_sequences(self, picks: list[int], as_mask: bool) -> None:
        rows = [pick % self.pair.batch for pick in picks]
        rows = sorted(set(rows)) if as_mask else rows
        chosen = torch.isin(torch.arange(self.pair.batch), torch.tensor(rows)) if as_mask else torch.tensor(rows)
        with self.rows_move(rows):
            self.fast.batch_select_indices(chosen)

    @contextmanager
    def rows_move(self, rows: list[int]) -> Iterator[None]:
        """Something that leaves these sequences, in this order, and what is held of them as it is."""
        before = [held.of_sequences(rows) for held in held_by(self.fast)]
        yield
        assert_rows_only_lost_bits(before, held_by(self.fast), moved=True)
        self.pair.select(rows)

    @precondition(lambda self: self.is_filled() and self.slow.seen > 40)  # else there would be little else
    @counted()
    def call_with_another_batch_size(self) -> None:
        with pytest.raises(CacheError), torch.no_grad():
            self.model(token_ids(self.pair.batch + 1, 2), **cache_argument(self.fast))

    # -- copies ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.is_filled() and len(self.pairs) < MOST_PAIRS)
    @counted()
    def fork(self) -> None:
        self.pairs.append(self.pair.fork())

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
        with self.rows_move(list(range(self.pair.batch))):
            self.pair.fast = PrunedCache.load(path, self.model)
            assert self.fast.policy == self.policy

    # -- what goes wrong -------------------------------------------------------------------------------------------

    @precondition(is_filled)
    @counted(what=st.integers(0, 5))
    def is_refused(self, what: int) -> None:
        """Nothing has changed by that."""
        batch, missing = self.pair.batch, Path(self.folder.name) / "missing" / "cache.safetensors"
        calls: list[Callable[[], Any]] = [
            lambda: self.fast.crop(1),
            lambda: self.fast.crop(-self.slow.seen - 1),
            lambda: self.fast.batch_select_indices(torch.tensor([0, batch])),
            lambda: self.fast.batch_repeat_interleave(0),
            lambda: self.fast.reorder_cache(torch.tensor([batch] * batch)),
            lambda: self.fast.save(missing),
        ]
        with self.rows_move(list(range(batch))), pytest.raises(CacheError):
            calls[what]()

    @precondition(lambda self: self.is_filled() and not self.in_bytes)
    @counted(data=st.data())
    def a_pass_fails(self, data: st.DataObject) -> None:
        """On a copy, which is as it was where no layer had its keys, and else good for nothing but to begin anew."""

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        # A prompt filter runs layers without the cache first.
        length = data.draw(st.just(1) if self.filters else st.sampled_from([1, 1, 4]))
        layer = data.draw(st.integers(0, len(self.fast.layers) - 1))
        copy, ids = self.fast.fork(), token_ids(self.pair.batch, length, seed=layer)
        hook = self.model.model.layers[layer].self_attn.register_forward_pre_hook(fail)
        try:
            with pytest.raises(RuntimeError, match="out of memory"):
                self.call(copy, ids)
        finally:
            hook.remove()
        if layer:
            # Where a prompt filter counts columns, their number is found to be wrong before.
            with pytest.raises(CacheError, match="interrupted|columns" if self.filters else "interrupted"):
                self.call(copy, ids)
            copy.reset()
            assert copy.nbytes == 0
        else:
            assert_rows_only_lost_bits(held_by(self.fast), held_by(copy), moved=True)
            torch.testing.assert_close(self.call(copy, ids), self.call(self.fast.fork(), ids), atol=1e-9, rtol=1e-9)

    def call(self, cache: PrunedCache, ids: Tensor) -> Tensor:
        mask = self.pair.mask(ids.tolist(), ids.shape[1])
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        with torch.no_grad():
            return self.model(ids, attention_mask=mask, position_ids=positions, **cache_argument(cache)).logits

    # -- alone -----------------------------------------------------------------------------------------------------

    def is_comparable(self) -> bool:
        """Bytes are those of a batch; and in half precision, other shapes of a batch round otherwise."""
        return self.is_filled() and self.pair.alike and not self.in_bytes and self.dtype == torch.float64

    @precondition(is_comparable)
    @counted(pick=st.integers(0, MOST_SEQUENCES - 1))
    def compare_with_one_alone(self, pick: int) -> None:
        """A sequence of the batch has what a cache has that was fed nothing else, from its first token on."""
        row = pick % self.pair.batch
        alone = PrunedCache(self.model, self.policy)
        real: list[bool] = []
        for event in self.pair.past[row]:
            if event is None:
                alone.activate_past_recording()
            elif isinstance(event, int):
                alone.crop(-event)
                real = real[: len(real) - event]
            else:
                real += event.real
                mask = torch.tensor([real]).long()
                given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -len(event.ids) :]}
                if not any(event.real):  # of padding alone, as if the prompt began anew
                    given = {}
                with torch.no_grad():
                    logits = self.model(
                        torch.tensor([event.ids]), attention_mask=mask, **given, **cache_argument(alone)
                    ).logits
                held_by(alone)
                if event.real[-1]:
                    atol = 5e-3 if self.packs else 1e-5
                    torch.testing.assert_close(logits[0, -1], event.logits, atol=atol, rtol=1e-4)
        for index in self.fast.pruned_layers:
            assert kept(alone, index) == kept(self.fast, index, row)
        for mine, own in zip(held_by(self.fast), held_by(alone), strict=True):
            tokens = min(mine.bits.shape[2], own.bits.shape[2])
            assert torch.equal(mine.bits[row, :, :tokens], own.bits[0, :, :tokens])

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
    def rows_hold_what_is_their_tokens(self) -> None:
        """In the first layer, where that depends on the token alone, and where a prompt filter counts, its place."""
        if not self.is_filled():
            return
        (held, *_), kinds = held_by(self.fast), ("values",) if self.filters else ("keys", "values")
        for row, each in enumerate(self.slow.sequences):
            for width, errors in self.first_layer.errors(held, row, each.ids, kinds) if each.ids else ():
                exact = 1e-9 if self.dtype == torch.float64 else 0.05
                assert float(errors.max()) <= (exact if width == EXACT else MOST_ERROR[width]), width

    @invariant()
    def tokens_and_padding_are_counted(self) -> None:
        for pair in self.pairs:
            assert pair.fast.seen_tokens == pair.fast.get_seq_length() == pair.slow.seen
            assert all(list(pair.fast.layers[layer].tokens) == pair.slow.tokens for layer in pair.fast.pruned_layers)

    @invariant()
    def bytes_are_those_of_the_storages(self) -> None:
        for pair in self.pairs:
            assert pair.fast.nbytes == storage_nbytes(pair.fast)


def table_nbytes(cache: PrunedCache) -> int:
    """Of all tables, without what is remembered until a token is generated."""
    return sum(cache.layers[index].table.nbytes for index in cache.pruned_layers)


@cache
def _model(family: str, dtype: torch.dtype, shape: tuple[tuple[str, int], ...]) -> PreTrainedModel:
    return build(family, dtype=dtype, **dict(shape))


@cache
def _first_layer(family: str, dtype: torch.dtype, shape: tuple[tuple[str, int], ...]) -> FirstLayer:
    return FirstLayer(_model(family, dtype, shape))


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


class Bitwise(CacheMachine):
    """Rows that get bits by what they are worth, alone and behind policies that drop rows."""

    @initialize(policy=bits_policies(), recording=seldom)
    def begin(self, policy: Policy, recording: bool) -> None:
        self.start(policy, recording)


class BitwiseDropping(CacheMachine):
    """The same where all bits are 0 or 16, so that plain Python can tell who stays."""

    @initialize(
        score=simple,
        share=st.sampled_from([Uniform(), Adaptive(0.3), Everywhere(0)]),
        budget=st.one_of(st.integers(30, 120), fractions),
        recent=st.integers(1, 4),
        interval=st.sampled_from([None, 1, 3]),
        recording=seldom,
    )
    def begin(
        self, score: Policy, share: Uniform, budget: float, recent: int, interval: int | None, recording: bool
    ) -> None:
        policy = Bits(budget, score=score, share=share, widths=(), sinks=1, recent=recent, interval=interval)
        self.start(policy, recording, RULES[type(score)])


def staged(*shares: float) -> Callable[[int], list[int]]:
    """Tokens that layers have of a prompt, where after each such a share goes on."""
    return lambda tokens: [math.ceil(share * tokens - 1e-9) for share in (1, *shares)]


def halves_skip(tokens: int) -> list[int]:
    """Where half of the tokens, but the first and the last, skip the second layer."""
    return [tokens, max(min(2, tokens), round(tokens / 2)), tokens]


def router() -> Router:
    draw = random.Random(0)
    return Router([(), [draw.gauss(0, 1) for _ in range(18)], ()])


SCHEDULE = ((0.34, 0.7), (0.67, 0.5))
STOPPING: dict[str, tuple[Policy, Callable[[int], Sequence[int]]]] = {
    "revived": (LazyLLM(SCHEDULE), staged(0.7, 0.5)),
    "gone": (LazyLLM(SCHEDULE, revive=False), staged(0.7, 0.5)),
    "spatten": (SpAtten(SCHEDULE, recent=1), staged(0.7, 0.5)),
    "heads": (SpAtten((), heads=((0.34, 0.5), (0.67, 0.25)), recent=1), staged(1, 1)),
    "both": (SpAtten(((0.67, 0.5),), heads=((0.34, 0.5), (0.67, 0.25)), recent=1), staged(1, 0.5)),
    "pyramid": (
        PyramidDrop(0.6, stages=3, keep_first=0, keep_last=1),
        lambda tokens: [1 + count for count in staged(0.6, 0.36)(tokens - 1)],
    ),
    "ftp": (FTP(((0.3, 0.5),)), halves_skip),
    "window": (FTP(((0.3, 0.5),), window=3), halves_skip),
    "routed": (FTP(((0.3, 0.5),), router=router()), halves_skip),
}
FOLLOWERS: dict[str, Policy | None] = {
    "": None,
    "a2sf": A2SF(9, sinks=1, recent=2),
    "h2o": H2O(0.6, sinks=0, recent=1, interval=3),
    "kivi": KIVI(4, group_size=4, residual=2),
    "halves": KIVI(8, group_size=4, residual=2, theta=0.3),
    "turboquant": TurboQuant(8, residual=2, sinks=1, edge_layers=0),
    "oscar": OSCAR(4, residual=2, sinks=1, key_clip=1, value_clip=1),
    "spectral": Spectral(8, residual=2, sinks=1),
    "outliers": Spectral(6, residual=2, sinks=1, outliers=0.3, outlier_bits=8),
    "h2o-halves": H2O(12, sinks=1, recent=2) | KIVI(4, group_size=2, residual=1, theta=0.1),
    "bits": Bits(0.8, score=H2O(), share=Uniform(), sinks=1, recent=2),
}


class Stopping(CacheMachine):
    """Policies that let tokens or heads stop between layers, or skip some, and what may follow them."""

    shape = (("num_hidden_layers", 3), ("num_attention_heads", 8), ("num_key_value_heads", 4))

    @initialize(name=st.sampled_from([*STOPPING]), follower=st.sampled_from(["", "", *FOLLOWERS]), recording=seldom)
    def begin(self, name: str, follower: str, recording: bool) -> None:
        policy, self.goes_on = STOPPING[name]
        self.heads = (4, 2, 1) if isinstance(policy, SpAtten) and policy.heads else (4, 4, 4)
        self.always = isinstance(policy, SpAtten) or getattr(policy, "revive", False)
        after = FOLLOWERS[follower]
        if after is not None and not (after.codecs and getattr(policy, "revive", False)):
            policy = policy | after
        self.start(policy, recording)

    def slow_of(self, policy: Policy, exact: bool, rule: Rule | None) -> SlowCache:
        slow = masked(self.family, **dict(self.shape))
        return StoppingCache(slow, policy.parts()[1:], self.goes_on, self.heads, always=self.always)


MACHINES = [
    Simple,
    SimpleOfHybrid,
    AnyChain,
    AnyChainOfHybrid,
    AnyChainInHalfPrecision,
    Bitwise,
    BitwiseDropping,
    Stopping,
]


@pytest.mark.parametrize("machine", MACHINES)
def test_any_sequence_of_operations(machine, monkeypatch):
    """Rows, logits, counts and bytes are those of the slow model, whatever came before."""
    windows_are_recorded(machine.family)
    monkeypatch.setattr(layer_step, "_UNDECIDED", MOST_UNDECIDED)  # so that small models and short prompts get there
    monkeypatch.setattr(table, "MOST_HOLES", MOST_HOLES)
    for module in (aging, bits_module):
        monkeypatch.setattr(module, "_TOGETHER", PACKED_TOGETHER)
    few = {Stopping: 2, Bitwise: 1, BitwiseDropping: 1}.get(machine, 4)
    run_state_machine_as_test(
        machine, settings=profile(max_examples=few * profile.default.max_examples, stateful_step_count=20)
    )
