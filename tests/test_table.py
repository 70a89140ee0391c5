"""`TokenTable` against a slow model of it: rows as plain tuples, moved one by one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
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

from kvprune import CacheError, Decision, Policy, Scoring, Step, TokenTable
from kvprune.cache.layer import PrunedLayer

HEAD_DIM, VALUE_DIM = 3, 2
COLUMNS = {"score": torch.float32, "count": torch.int64}
EMPTY = None

thorough = profile(max_examples=6 * profile.default.max_examples)


@dataclass(frozen=True)
class Row:
    """A row of one head: `name` is in its key, its value and, once written there, in its policy columns."""

    name: int
    position: int
    score: float = 0.0
    count: int = 0


Rows = list[list[list[Row | None]]]


@dataclass
class Model:
    """What a table should hold: for each sequence and KV head a list of rows, None where a slot is empty."""

    heads: Rows = field(default_factory=list)

    def each(self):
        return (head for sequence in self.heads for head in sequence)

    @property
    def length(self) -> int:
        return len(self.heads[0][0])


class Names:
    """Numbers for rows, so that no two rows that were ever added are alike."""

    def __init__(self) -> None:
        self.next = 1

    def head(self, positions: list[int | None]) -> list[Row | None]:
        """New rows at these positions; None stays an empty slot."""
        first, self.next = self.next, self.next + len(positions)
        return [None if at is None else Row(first + slot, at) for slot, at in enumerate(positions)]

    def rows(self, batch: int, heads: int, positions: list[int | None]) -> Rows:
        """New rows for each head; the first sequence has empty slots where a position is None, the others have none."""
        full = [slot if at is None else at for slot, at in enumerate(positions)]
        return [[self.head(full if sequence else positions) for _ in range(heads)] for sequence in range(batch)]


def tensors(rows: Rows, *, strided: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and positions of new rows. strided: keys and values are views, as a model's often are."""
    fields = [[[(row.name, row.position) if row else (0, -1) for row in head] for head in one] for one in rows]
    names, positions = torch.tensor(fields).unbind(-1)
    keys = names[..., None] * torch.ones(HEAD_DIM)
    values = names[..., None] * -torch.ones(VALUE_DIM)
    if strided:
        keys, values = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (keys, values))
    return keys, values, positions


def read(table: TokenTable) -> Rows:
    """The rows of a table, slot by slot, after checking that key and value agree about them."""
    names = table.keys[..., 0].long()
    assert (table.keys == names[..., None]).all()
    assert (table.values == -names[..., None]).all()
    rows = torch.stack([names, table.positions, table["score"], table["count"]], dim=-1).tolist()
    return [[[row_of(*row) for row in head] for head in sequence] for sequence in rows]


def row_of(name: float, position: float, score: float, count: float) -> Row | None:
    return None if position < 0 else Row(int(name), int(position), score, int(count))


def written(row: Row | None) -> Row | None:
    """The row after `mark`."""
    return row and Row(row.name, row.position, row.name / 2, row.name * 3)


def mark(table: TokenTable) -> None:
    """Write into the policy columns of every row what can be told from its key."""
    table["score"] = table.keys[..., 0] / 2
    table["count"].copy_(table.keys[..., 0].long() * 3)


def no_order(head: list[Row | None]) -> list[tuple[int, ...]]:
    return sorted((row.name, row.position, row.score, row.count) if row else () for row in head)


def assert_equal(table: TokenTable, model: Model) -> None:
    """Same rows in every head, whatever their slots."""
    assert table.length == model.length
    for sequence, expected in zip(read(table), model.heads, strict=True):
        for head, rows in zip(sequence, expected, strict=True):
            assert no_order(head) == no_order(rows)


# -- any sequence of operations ----------------------------------------------------------------------------------------


gaps = st.lists(st.booleans(), min_size=1, max_size=6)
"""Which of the slots of new rows are empty in the first sequence."""


class TableMachine(RuleBasedStateMachine):
    """A table and its model go through the same operations."""

    @initialize(batch=st.integers(1, 3), heads=st.integers(1, 3), empty=gaps, strided=st.booleans())
    def begin(self, batch, heads, empty, strided):
        self.names, self.seen, self.fresh = Names(), 0, 0
        self.forks: list[tuple[TokenTable, Model]] = []
        rows = self.new_rows(batch, heads, empty)
        self.model = Model([[list(head) for head in sequence] for sequence in rows])
        self.table = TokenTable(*tensors(rows, strided=strided), COLUMNS, dense=not any(empty))
        self.table.own()

    def new_rows(self, batch: int, heads: int, empty: list[bool]) -> Rows:
        first, self.seen = self.seen, self.seen + len(empty)
        return self.names.rows(batch, heads, [None if gap else first + at for at, gap in enumerate(empty)])

    def sync(self) -> None:
        """Take the order of slots from the table: it carries no meaning."""
        assert_equal(self.table, self.model)
        self.model.heads = read(self.table)

    @rule(empty=gaps, room=st.integers(1, 6))
    def append(self, empty, room):
        before, capacity, length = self.table.length, self.table.capacity, len(empty)
        rows = self.new_rows(self.table.batch_size, self.table.kv_heads, empty)
        self.table.append(*tensors(rows), dense=not any(empty), room=room)
        for head, new in zip(self.model.each(), (head for sequence in rows for head in sequence), strict=True):
            head.extend(new)
        self.fresh = length
        fits = before + length <= capacity
        assert self.table.capacity == (capacity if fits else before + max(length, room))
        assert read(self.table) == self.model.heads  # behind the others, which stay where they are

    @rule()
    def write(self):
        mark(self.table)
        self.model.heads = [[[written(row) for row in head] for head in sequence] for sequence in self.model.heads]

    @rule(data=st.data())
    def compact(self, data):
        length = self.table.length
        count = data.draw(st.integers(1, length))
        slots = [[data.draw(self.choices(length, count)) for _ in sequence] for sequence in self.model.heads]
        self.table.compact(torch.tensor(slots))
        self.model.heads = [
            [[None if slot < 0 else head[slot] for slot in wanted] for head, wanted in zip(*both, strict=True)]
            for both in zip(self.model.heads, slots, strict=True)
        ]
        self.fresh = 0
        assert read(self.table) == self.model.heads  # in the order that was asked for
        assert self.table.dense == all(row is not EMPTY for head in self.model.each() for row in head)
        assert self.table.capacity == self.table.length
        assert self.table.nbytes == self.table.token_bytes * count

    @staticmethod
    def choices(length: int, count: int) -> st.SearchStrategy[list[int]]:
        """Different slots, some of them replaced by -1."""
        keep = st.permutations(range(length)).map(lambda slots: slots[:count])
        gone = st.lists(st.sampled_from([False, False, True]), min_size=count, max_size=count)
        return st.builds(lambda k, g: [-1 if gap else slot for slot, gap in zip(k, g, strict=True)], keep, gone)

    @precondition(lambda self: self.table.length > 1)
    @rule(data=st.data())
    def evict(self, data):
        length, capacity, held = self.table.length, self.table.capacity, self.table.nbytes
        count = data.draw(st.one_of(st.just(1), st.integers(1, length - 1)))
        slots = [[data.draw(st.permutations(range(length)))[:count] for _ in sequence] for sequence in self.model.heads]
        self.table.evict(torch.tensor(slots))
        self.model.heads = [
            [[row for slot, row in enumerate(head) if slot not in gone] for head, gone in zip(*both, strict=True)]
            for both in zip(self.model.heads, slots, strict=True)
        ]
        self.fresh = 0
        assert (self.table.capacity, self.table.nbytes) == (capacity, held)  # in place
        self.sync()

    @precondition(lambda self: self.fresh > 0)
    @rule(data=st.data())
    def drop_newest(self, data):
        count = data.draw(st.integers(0, min(self.fresh, self.table.length - 1)))
        self.table.drop_newest(count)
        for head in self.model.each():
            del head[len(head) - count :]
        self.fresh -= count

    @rule(data=st.data())
    def without_newest(self, data):
        count = data.draw(st.integers(0, self.table.length - 1))
        with self.table.without_newest(count):
            assert read(self.table) == [[head[: len(head) - count] for head in row] for row in self.model.heads]

    @rule(data=st.data())
    def select_batch(self, data):
        sequences = data.draw(st.lists(st.integers(0, self.table.batch_size - 1), min_size=1, max_size=4))
        self.table.select_batch(torch.tensor(sequences))
        self.model.heads = [[list(head) for head in self.model.heads[sequence]] for sequence in sequences]
        assert self.table.batch_size == len(sequences)

    @rule()
    def own(self):
        self.table.own()

    @rule(go_on_with_the_fork=st.booleans())
    def fork(self, go_on_with_the_fork):
        copy = Model([[list(head) for head in sequence] for sequence in self.model.heads])
        fork, table = self.table.fork(), self.table
        self.table, left = (fork, table) if go_on_with_the_fork else (table, fork)
        self.forks.append((left, copy))

    @invariant()
    def same_rows(self):
        assert_equal(self.table, self.model)

    @invariant()
    def same_rows_in_forks_left_behind(self):
        for table, model in self.forks:
            assert_equal(table, model)

    @invariant()
    def dense_promises_no_empty_slot(self):
        assert not (self.table.dense and any(row is EMPTY for head in self.model.each() for row in head))

    @invariant()
    def bytes_are_those_of_the_storages(self):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.table.tensors().values()}
        assert self.table.nbytes == sum(storages.values()) == self.table.token_bytes * self.table.capacity
        assert self.table.kv_nbytes == self.table.kv_token_bytes * self.table.capacity

    @invariant()
    def columns_are_as_long_as_the_keys(self):
        for tensor in (self.table.values, self.table.positions, *map(self.table.__getitem__, COLUMNS)):
            assert tensor.shape[:3] == self.table.keys.shape[:3]
        assert self.table.positions.dtype == torch.int32
        assert {name: self.table[name].dtype for name in COLUMNS} == COLUMNS


def test_any_sequence_of_operations():
    """Whatever is done to a table, every column moves alike, and what was forked off stays as it was."""
    run_state_machine_as_test(
        TableMachine, settings=profile(max_examples=6 * profile.default.max_examples, stateful_step_count=15)
    )


# -- one by one --------------------------------------------------------------------------------------------------------


def table_of(batch: int, heads: int, length: int, *, strided: bool = False) -> tuple[TokenTable, Model]:
    """A table as a model's first step makes it, with its policy columns written, and its model."""
    rows = Names().rows(batch, heads, list(range(length)))
    table = TokenTable(*tensors(rows, strided=strided), COLUMNS)
    mark(table)
    return table, Model([[[written(row) for row in head] for head in sequence] for sequence in rows])


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_evicting_from_a_table_of_any_shape(batch, heads, strided, count):
    """Rows go from one head of one sequence as well as from several, and from the tensors that a model handed over."""
    table, model = table_of(batch, heads, 5, strided=strided)
    table.evict(torch.arange(count).expand(batch, heads, -1))
    for head in model.each():
        del head[:count]
    assert_equal(table, model)


@dataclass(frozen=True)
class DropOldest(Policy):
    """Drops `count` rows of every prompt, by naming those that go instead of those that stay."""

    count: int = 1

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        return Decision(evict=torch.arange(self.count).expand(*table.positions.shape[:2], -1)) if step.prefill else None


@pytest.mark.parametrize("count", [1, 2])
def test_a_policy_may_name_the_rows_of_a_prompt_that_go(count):
    """`Decision(evict=...)` works at a prompt as for a generated token, and leaves the model's own tensors alone."""
    keys, values = (torch.randn(1, 6, 2, 4).transpose(1, 2) for _ in range(2))  # as a projection makes them
    before = keys.clone(), values.clone()
    layer = PrunedLayer(DropOldest(count), 0)
    layer.update(keys, values)
    layer.attend(torch.randn(1, 2, 6, 4), None, Scoring(1.0))
    assert layer.kept_positions()[0].tolist() == [list(range(count, 6))] * 2
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


@pytest.mark.parametrize("slots", [[4], [0], [3, 4], [0, 4], [4, 0], [2, 3, 4], [0, 1, 2], [4, 2, 0], [1, 2, 3, 4]])
@pytest.mark.parametrize("spare", [0, 3])
def test_evicting_any_slots(slots, spare):
    """The last rows take the places of those that go, which may be among the last rows themselves."""
    table, model = table_of(1, 2, 5)
    if spare:
        table.append(*tensors([[[Row(9, 9)], [Row(9, 9)]]]), room=spare)
        table.drop_newest(1)
    table.evict(torch.tensor([[slots, slots]]))
    for head in model.each():
        head[:] = [row for slot, row in enumerate(head) if slot not in slots]
    assert_equal(table, model)


def test_heads_may_lose_different_slots():
    """Every head of every sequence names slots of its own."""
    table, model = table_of(2, 2, 4)
    gone = [[[0, 1], [2, 3]], [[1, 3], [0, 3]]]
    table.evict(torch.tensor(gone))
    for sequence, slots in zip(model.heads, gone, strict=True):
        for head, own in zip(sequence, slots, strict=True):
            head[:] = [row for slot, row in enumerate(head) if slot not in own]
    assert_equal(table, model)


def test_spare_slots_are_clean_when_rows_take_them():
    """A row in a slot that another has left starts with its columns at zero."""
    table, _ = table_of(1, 2, 4)
    table.append(*tensors([[[Row(9, 4)], [Row(9, 4)]]]), room=3)
    mark(table)
    table.evict(torch.tensor([[[4], [4]]]))
    table.append(*tensors([[[Row(9, 5)], [Row(9, 5)]]]))
    assert (table["score"][:, :, -1] == 0).all()
    assert (table["count"][:, :, -1] == 0).all()


@given(cut=st.integers(1, 30))
def test_own_frees_what_the_rows_were_views_of(cut):
    """A table made of a slice of a large tensor holds, once it owns its rows, no more than they need."""
    large = torch.randn(1, 2, 100, HEAD_DIM)
    positions = torch.arange(cut).expand(1, 2, -1)
    table = TokenTable(large[:, :, :cut], large[:, :, 100 - cut :], positions, {})
    assert table.nbytes > 2 * large.nbytes
    table.own()
    assert table.nbytes == cut * 2 * (2 * HEAD_DIM * 4 + 4)
    assert torch.equal(table.keys, large[:, :, :cut])
    assert torch.equal(table.values, large[:, :, 100 - cut :])


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=20), room=st.integers(1, 9))
def test_growth_leaves_room_for_more(counts, room):
    """Tokens that fit move nothing; those that do not make the table grow by themselves, or by the room if more."""
    table, _ = table_of(1, 1, 2)
    length = capacity = 2
    for count in counts:
        storage = table.keys.data_ptr()
        new = tensors([[[Row(7, length + at) for at in range(count)]]])
        table.append(*new, room=room)
        if length + count <= capacity:
            assert table.keys.data_ptr() == storage
        else:
            capacity = length + max(count, room)
        length += count
        assert (table.length, table.capacity) == (length, capacity)


def test_copies_share_nothing():
    """Sequences that were one, and a fork, can be written to without touching each other."""
    table, model = table_of(1, 2, 3)
    fork = table.fork()
    table.select_batch(torch.tensor([0, 0]))
    table["score"][0] = -1
    table.keys[0] = 0
    assert (table["score"][1] == fork["score"][0]).all()
    assert_equal(fork, model)
    assert (table.keys[1] == fork.keys[0]).all()


def test_a_column_may_be_assigned_by_broadcasting():
    """`table[column] = content` writes in place, and takes what can be broadcast to the rows."""
    table, _ = table_of(2, 3, 4)
    storage = table["score"].data_ptr()
    table["score"] = torch.arange(4.0).expand(2, 1, -1)
    assert table["score"].data_ptr() == storage
    assert (table["score"] == torch.arange(4.0)).all()


def test_links_of_a_chain_see_their_own_columns():
    """A scoped table has columns under plain names, and is otherwise the table."""
    rows = Names().rows(1, 2, [0, 1, 2])
    table = TokenTable(*tensors(rows), {"0.score": torch.float32, "1.score": torch.float32})
    table.scoped("0.")["score"] = torch.ones(1, 2, 3)
    table.scoped("1.")["score"].fill_(2)
    assert (table["0.score"] == 1).all()
    assert (table["1.score"] == 2).all()
    assert table.scoped("1.").keys is not None
    assert table.scoped("1.").length == table.length
    assert table.scoped("") is table


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 2, 1, 3), torch.float32), ((1, 3, 1, 3), torch.float32), ((1, 2, 1, 4), torch.float32)]
    + [((1, 2, 1, 3), torch.float16)],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused(shape, dtype):
    """Keys of another batch, number of heads, head dim or dtype raise CacheError, and the table stays as it is."""
    table, model = table_of(1, 2, 3)
    values = torch.zeros(*shape[:3], VALUE_DIM, dtype=dtype)
    with pytest.raises(CacheError, match="Make a"):
        table.check_step(torch.zeros(shape, dtype=dtype), values)
    table.check_step(torch.zeros(1, 2, 5, HEAD_DIM), torch.zeros(1, 2, 5, VALUE_DIM))
    assert_equal(table, model)
