"""`TokenTable` with packed rows against a slow model, in which every row remembers what it decoded to when packed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
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
from torch import Tensor

from kvprune import TokenTable
from kvprune.table import token_table as table
from kvprune.table.packed_rows import PackedRows
from kvprune.table.quantize import Codec

HEAD_DIM, VALUE_DIM = 5, 3
CODECS = [Codec(2), Codec(4, separable=True), Codec(3, tokens=4, channels=2), Codec(8, tokens=2, separable=True)]
MOST_HOLES = 4


@dataclass(frozen=True)
class Row:
    """What reading a row gives, as of now, and the codec that it is packed with."""

    key: tuple[float, ...]
    value: tuple[float, ...]
    codec: Codec | None = None
    score: float = 0.0
    saliency: float = 0.0


Head = dict[int, Row]
"""Rows of a KV head by their positions."""


def read(table: TokenTable) -> list[list[Head]]:
    """All rows of a table, decoded."""
    tiers = [tier.decoded() for tier in table.packed]
    tiers.append((table.keys, table.values))
    keys, values = (torch.cat(parts, dim=2).tolist() for parts in zip(*tiers, strict=True))
    codecs = [tier.codec for tier in table.packed for _ in range(len(tier))]
    codecs += [None] * (table.length - table.packed_length)
    positions, scores, saliency = table.positions.tolist(), table["score"].tolist(), table["saliency"].tolist()
    return [
        [
            {
                position: Row(
                    tuple(keys[b][h][slot]),
                    tuple(values[b][h][slot]),
                    codecs[slot],
                    scores[b][h][slot],
                    0.0 if codecs[slot] else saliency[b][h][slot - table.packed_length],
                )
                for slot, position in enumerate(head)
                if position >= 0
            }
            for h, head in enumerate(sequence)
        ]
        for b, sequence in enumerate(positions)
    ]


def packed(rows: Head, codec: Codec) -> Head:
    """These rows of one head as they are once packed together: nothing else has part in it."""
    held = [rows[position] for position in sorted(rows)]
    keys = torch.tensor([row.key for row in held])[None, None]
    values = torch.tensor([row.value for row in held])[None, None]
    alone = PackedRows.encode(codec, keys, values)
    decoded = alone.decoded()
    return {
        position: replace(row, key=tuple(key), value=tuple(value), codec=codec, saliency=0.0)
        for position, row, key, value in zip(
            sorted(rows), held, decoded[0][0, 0].tolist(), decoded[1][0, 0].tolist(), strict=True
        )
    }


def padded(lists: list[list[list[int]]]) -> Tensor:
    """LongTensor `[B, Hkv, longest]`, -1 behind what is shorter."""
    longest = max(len(head) for sequence in lists for head in sequence)
    return torch.tensor([[head + [-1] * (longest - len(head)) for head in sequence] for sequence in lists]).long()


gaps = st.lists(st.booleans(), min_size=1, max_size=6)
"""Which of the slots of new rows are empty in the first sequence."""


class PackedTableMachine(RuleBasedStateMachine):
    """A table and its model go through the same operations."""

    @initialize(batch=st.integers(1, 3), heads=st.integers(1, 2), empty=gaps)
    def begin(self, batch, heads, empty):
        self.random = torch.Generator().manual_seed(len(empty))
        self.seen, self.fresh = 0, []
        self.forks: list[tuple[TokenTable, list[list[Head]]]] = []
        self.heads: list[list[Head]] = [[{} for _ in range(heads)] for _ in range(batch)]
        columns = {"score": torch.float32}, {"saliency": torch.float32}
        self.table = TokenTable(*self.new_rows([*empty, False]), *columns, dense=not any(empty))
        self.table.own()

    def new_rows(self, empty: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of new rows, which the model takes as well."""
        batch, heads, count = len(self.heads), len(self.heads[0]), len(empty)
        keys = torch.randn(batch, heads, count, HEAD_DIM, generator=self.random)
        values = torch.randn(batch, heads, count, VALUE_DIM, generator=self.random)
        positions = torch.arange(self.seen, self.seen + count).expand(batch, heads, -1).clone()
        positions[0, :, torch.tensor(empty)] = -1
        for b, sequence in enumerate(self.heads):
            for h, head in enumerate(sequence):
                for at, position in enumerate(positions[b, h].tolist()):
                    if position >= 0:
                        head[position] = Row(tuple(keys[b, h, at].tolist()), tuple(values[b, h, at].tolist()))
        self.fresh = list(range(self.seen, self.seen + count))
        self.seen += count
        return keys, values, positions

    def each(self) -> list[tuple[int, int, Head]]:
        return [(b, h, head) for b, sequence in enumerate(self.heads) for h, head in enumerate(sequence)]

    def slots_of(self, b: int, h: int) -> dict[int, int]:
        """Slot of every position that a head holds."""
        return {at: slot for slot, at in enumerate(self.table.positions[b, h].tolist()) if at >= 0}

    def copy(self) -> list[list[Head]]:
        return [[dict(head) for head in sequence] for sequence in self.heads]

    def lists(self) -> list[list[list[int]]]:
        return [[[] for _ in sequence] for sequence in self.heads]

    @rule(empty=gaps, room=st.integers(1, 6))
    def append(self, empty, room):
        self.table.append(*self.new_rows(empty), dense=not any(empty), room=room)

    @rule(by=st.integers(1, 9))
    def write(self, by):
        """Policies write their columns by the position of a row, wherever it lies."""
        self.table["score"] = self.table.positions.float() * by
        self.table["saliency"] = self.table.positions[:, :, self.table.packed_length :].float() / by
        for _, _, head in self.each():
            for position, row in head.items():
                saliency = torch.tensor(float(position)).div(by).item()
                head[position] = replace(row, score=position * by, saliency=0.0 if row.codec else saliency)

    @rule(data=st.data(), codecs=st.lists(st.sampled_from(CODECS), min_size=1, max_size=2, unique=True))
    def quantize(self, data, codecs):
        parts = [self.lists() for _ in codecs]
        for b, h, head in self.each():
            slots = self.slots_of(b, h)
            loose = sorted(position for position, row in head.items() if row.codec is None)
            chosen = data.draw(st.lists(st.integers(0, len(codecs)), min_size=len(loose), max_size=len(loose)))
            for number, codec in enumerate(codecs):
                mine = [position for position, part in zip(loose, chosen, strict=True) if part == number]
                parts[number][b][h] = [slots[position] for position in mine]
                if mine:
                    head.update(packed({position: head[position] for position in mine}, codec))
        self.table.quantize(list(zip(codecs, map(padded, parts), strict=True)))
        if any(head for part in parts for sequence in part for head in sequence):
            self.fresh = []
            assert self.table.capacity == self.table.length

    @precondition(lambda self: self.table.rows > 1)
    @rule(data=st.data())
    def evict(self, data):
        """Heads with as many rows as any lose rows; others may name empty slots instead."""
        count = data.draw(st.integers(1, min(4, self.table.rows - 1)))
        rows, gone = self.table.rows, self.lists()
        for b, h, head in self.each():
            slots = self.slots_of(b, h)
            holes = [slot for slot in range(self.table.length) if slot not in slots.values()]
            least = max(0, len(head) - (rows - count), count - len(holes))
            some = data.draw(st.integers(least, max(least, min(count, len(head)))))
            victims = data.draw(st.permutations(sorted(slots)))[:some]
            gone[b][h] = [slots[position] for position in victims] + holes[: count - some]
            for position in victims:
                del head[position]
        self.table.evict(torch.tensor(gone))
        self.fresh = []
        assert self.table.rows <= rows - count

    @precondition(lambda self: any(head for _, _, head in self.each()))
    @rule(data=st.data())
    def compact(self, data):
        most = max(len(head) for _, _, head in self.each())
        kept = self.lists()
        for b, h, head in self.each():
            slots = self.slots_of(b, h)
            least = int(len(head) == most)  # some head keeps a row
            stay = data.draw(st.permutations(sorted(slots)))[: data.draw(st.integers(least, len(head)))]
            kept[b][h] = [slots[position] for position in stay]
            self.heads[b][h] = {position: head[position] for position in stay}
        self.table.compact(padded(kept))
        self.fresh = []
        self.holds_no_more_than_its_rows()

    @precondition(lambda self: self.fresh)
    @rule(data=st.data())
    def drop_newest(self, data):
        count = data.draw(st.integers(0, min(len(self.fresh), self.table.length - 1)))
        self.table.drop_newest(count)
        for position in self.fresh[len(self.fresh) - count :]:
            for _, _, head in self.each():
                head.pop(position, None)
        self.fresh = self.fresh[: len(self.fresh) - count]

    @rule(data=st.data())
    def select_batch(self, data):
        sequences = data.draw(st.lists(st.integers(0, len(self.heads) - 1), min_size=1, max_size=3))
        self.table.select_batch(torch.tensor(sequences))
        self.heads = [[dict(head) for head in self.heads[sequence]] for sequence in sequences]

    @rule(room=st.integers(0, 3))
    def shrink(self, room):
        self.table.shrink(room)

    @rule()
    def drop_empty(self):
        self.table.drop_empty()
        self.fresh = []

    @rule(go_on_with_the_fork=st.booleans())
    def fork(self, go_on_with_the_fork):
        fork, mine = self.table.fork(), self.table
        self.table, left = (fork, mine) if go_on_with_the_fork else (mine, fork)
        self.forks.append((left, self.copy()))

    def holds_no_more_than_its_rows(self) -> None:
        """Every tier is as long as the head with most rows in it, and so are the rows in full precision."""
        each = self.each()
        for tier in self.table.packed:
            assert len(tier) == max(sum(row.codec == tier.codec for row in head.values()) for _, _, head in each)
        if self.table.packed:
            loose = max(sum(row.codec is None for row in head.values()) for _, _, head in each)
            assert self.table.length - self.table.packed_length == loose
        assert self.table.capacity == self.table.length
        for tensor in self.table.tensors().values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes

    @invariant()
    def rows_are_as_they_were(self):
        assert read(self.table) == self.heads

    @invariant()
    def rows_in_forks_left_behind_are_as_they_were(self):
        for left, heads in self.forks:
            assert read(left) == heads

    @invariant()
    def counts_agree(self):
        most = max(len(head) for _, _, head in self.each())
        assert most <= self.table.rows <= self.table.length <= self.table.capacity
        assert self.table.packed_length == sum(map(len, self.table.packed))
        assert len({tier.codec for tier in self.table.packed}) == len(self.table.packed)
        assert not (self.table.dense and any(len(head) < self.table.length for _, _, head in self.each()))

    @invariant()
    def bytes_are_those_of_the_storages(self):
        held = self.table.tensors()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held.values() if t.numel()}
        assert self.table.nbytes == sum(storages.values())
        columns = sum(held[name].untyped_storage().nbytes() for name in held if name.startswith(("column.", "buffer.")))
        assert self.table.kv_nbytes == self.table.nbytes - columns - held["positions"].untyped_storage().nbytes()

    @invariant()
    def columns_have_the_length_of_what_they_are_columns_of(self):
        loose = self.table.length - self.table.packed_length
        assert self.table["score"].shape == self.table.positions.shape
        for tensor in (self.table.keys, self.table.values, self.table["saliency"]):
            assert tensor.shape[:3] == (len(self.heads), len(self.heads[0]), loose)


def test_any_sequence_of_operations(monkeypatch):
    """Whatever is done to a table, codes once written decode to the same, and every column moves along."""
    monkeypatch.setattr(table, "MOST_HOLES", MOST_HOLES)
    run_state_machine_as_test(
        PackedTableMachine, settings=profile(max_examples=12 * profile.default.max_examples, stateful_step_count=15)
    )


# -- one by one --------------------------------------------------------------------------------------------------------


def table_of(rows: int, *, batch: int = 1, heads: int = 1, dtype: torch.dtype = torch.float32) -> TokenTable:
    shape = batch, heads, rows
    positions = torch.arange(rows).expand(shape)
    keys, values = torch.randn(*shape, HEAD_DIM, dtype=dtype), torch.randn(*shape, VALUE_DIM, dtype=dtype)
    return TokenTable(keys, values, positions, {"score": torch.float32}, {"saliency": torch.float32})


@pytest.mark.parametrize("batch", [1, 2])
def test_holes_close_up_when_there_are_many(batch):
    """As packed rows make room for new ones, they leave holes, which are closed, and the memory of them is freed."""
    rows, codec = 80, Codec(8)
    held = table_of(rows, batch=batch)
    held.quantize([(codec, torch.arange(rows).expand(batch, 1, -1))])
    for position in range(rows, 2 * rows):
        held.append(torch.ones(batch, 1, 1, HEAD_DIM), torch.ones(batch, 1, 1, VALUE_DIM), position)
        oldest = held.positions.masked_fill(held.positions < 0, 2 * rows).argmin(-1, keepdim=True)
        held.evict(oldest)
        assert held.rows == rows
        assert held.length <= rows + table.MOST_HOLES
        assert held.positions.sort(-1).values[0, 0, -rows:].tolist() == list(range(position + 1 - rows, position + 1))
    assert held.packed_length <= table.MOST_HOLES


@pytest.mark.parametrize("slots", [[[0, 1, 2]], [[-1, -1, -1]]], ids=["all", "none"])
def test_packing_all_rows_or_none(slots):
    """A table may be packed as a whole, and a decision that names no row changes nothing."""
    held = table_of(3)
    before = read(held)
    held.quantize([(Codec(8), torch.tensor([slots])), (Codec(2), torch.empty(1, 1, 0, dtype=torch.long))])
    assert read(held)[0][0].keys() == before[0][0].keys()
    if slots[0][0] == -1:
        assert read(held) == before
    else:
        assert held.keys.shape == (1, 1, 0, HEAD_DIM)
        held.append(torch.ones(1, 1, 1, HEAD_DIM), torch.ones(1, 1, 1, VALUE_DIM), 3)
        assert read(held)[0][0][3] == Row((1.0,) * HEAD_DIM, (1.0,) * VALUE_DIM)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_what_a_packed_row_costs(codec):
    """`packed_row_bytes` and `block_bytes` are what rows of a codec take, or up to two bytes a row more."""
    rows = 40
    held = table_of(rows, batch=2, heads=3)
    foretold = held.packed_row_bytes(codec) * rows + held.block_bytes(codec)
    held.quantize([(codec, torch.arange(rows).expand(2, 3, -1))])
    assert held.nbytes <= foretold <= held.nbytes + 2 * 6 * rows + 6 * (codec.block_bytes(HEAD_DIM, VALUE_DIM) + rows)
