"""The queries of one step: what they see of a table, their attention output, and the mass they give to its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.attention import operations, packed, ragged
from kvprune.attention.backends import SDPA, Sdpa
from kvprune.attention.mass import RowWeights, Scoring
from kvprune.attention.ragged import OneHead
from kvprune.attention.softmax import causal_attention, positional_attention
from kvprune.state import Saved, State
from kvprune.table.ragged import RaggedTable
from kvprune.table.rows import EMPTY
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Attended:
    """What queries found: the output of attention `[B, Hq, L, Dv]`, and what was left over in finding it.

    probabilities: of a single query, `[B, Hkv, G, rows]` float32. lse: log-sum-exp of every query's logits,
    `[B, Hq, L]` float32; not every attention says it.
    """

    output: Tensor
    probabilities: Tensor | None = None
    lse: Tensor | None = None


@dataclass
class Queries:
    """The newest queries of a layer.

    states: `[B, Hq, L, D]`. first: position of each sequence's first token in this step, an int or LongTensor
    `[B, 1, 1]`. valid: bool `[B, L]`, False for padding; None if there is none. tokens: real tokens of each sequence.
    spans: where the real tokens of each sequence begin and end, if the whole sequence came in this step and has no gap.
    placed: positions `[B or 1, L]`, -1 for padding; None until somebody asks, where tokens follow one another.
    """

    states: Tensor
    first: int | Tensor
    valid: Tensor | None
    tokens: tuple[int, ...]
    spans: list[tuple[int, int]] | None = None
    placed: Tensor | None = None

    @classmethod
    def of_step(
        cls, states: Tensor, first: int | Tensor, valid: Tensor | None, *, begins: bool, placed: Tensor | None = None
    ) -> Queries:
        """begins: whether the sequences begin with this step."""
        if valid is None:
            return cls(states, first, None, (states.shape[2],) * states.shape[0], placed=placed)
        return cls(states, first, valid, tuple(valid.sum(1).tolist()), _spans(valid) if begins else None, placed)

    def __len__(self) -> int:
        return self.states.shape[2]

    @property
    def positions(self) -> Tensor:
        """`[B or 1, L]` int64, -1 for padding."""
        if self.placed is None:  # no cached_property, whose lock (Python 3.11) torch.compile does not trace
            self.placed = self._consecutive()
        return self.placed

    def _consecutive(self) -> Tensor:
        first = self.first if isinstance(self.first, int) else self.first.view(-1, 1)
        if self.valid is None:
            return torch.arange(len(self), device=self.states.device)[None] + first
        return (self.valid.cumsum(1) - 1 + first).masked_fill(~self.valid, EMPTY)

    @property
    def sight(self) -> Tensor:
        """The newest position that each query sees, `[B or 1, L]`: of padding, that of the token before it, or -1."""
        if self.valid is None:
            return self.positions
        newest = self.positions.cummax(1).values
        first = self.first if isinstance(self.first, int) else self.first.view(-1, 1)
        return torch.where(newest < 0, first - 1, newest)

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """States and positions of the newest `count` queries of each sequence; padding moves to the front."""
        if self.valid is None:
            return self.states[:, :, -count:], self.positions[:, -count:]
        positions, order = self.positions.sort(dim=1)
        order = order[:, None, -count:, None].expand(-1, self.states.shape[1], -1, self.states.shape[3])
        return self.states.gather(2, order), positions[:, -count:]

    def part(self, start: int, stop: int) -> Queries:
        """The queries `start .. stop - 1` of this step, in tensors of their own."""
        states = self.states[:, :, start:stop].clone()
        if self.valid is None:
            return Queries(states, self.first + start, None, (stop - start,) * len(self.tokens))
        before, valid = self.valid[:, :start].sum(1).view(-1, 1, 1), self.valid[:, start:stop].clone()
        return Queries(states, self.first + before, valid, tuple(valid.sum(1).tolist()))

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.states, self.first, self.valid) if isinstance(tensor, Tensor)]

    def select_batch(self, rows: Tensor) -> Queries:
        """These sequences, in this order."""
        rows = rows.to(self.states.device)
        return Queries(
            self.states[rows],
            self.first if isinstance(self.first, int) else self.first[rows],
            None if self.valid is None else self.valid[rows],
            tuple(self.tokens[row] for row in rows.tolist()),
        )

    # -- over a table whose newest rows are their own ----------------------------------------------------------------

    def attend(
        self, table: TokenTable, scoring: Scoring, *, with_probabilities: bool = False, backend: Sdpa = SDPA
    ) -> Attended:
        """Attention over all rows; with_probabilities: of a single query, those are wanted too."""
        if isinstance(table, RaggedTable):
            if len(self) == 1 and self.valid is None:
                kernels = operations.of(table)
                single = kernels.ragged_single_query if table.flat is None else kernels.flat_single_query
                return Attended(*single(self.states, table, scoring, with_probabilities))
            return self._attend_by_head(table, scoring, with_probabilities, backend)
        states, keys, values = self.states, table.keys, table.values
        if len(self) == 1 and self.valid is None:
            if table.packed:
                single_packed = operations.of(table).packed_single_query
                return Attended(*single_packed(states, table, scoring, with_probabilities))
            empty = None if table.dense else table.positions < 0
            return Attended(
                *operations.of(table).single_query(states, keys, values, scoring, empty, with_probabilities)
            )
        if table.packed:
            return Attended(packed.attention(states, self.sight, table, scoring))
        if table.dense:
            output, lse = causal_attention(states, keys, values, scoring, backend)
            return Attended(output, lse=lse)
        if self.spans is None:
            return Attended(positional_attention(states, keys, values, scoring, self.sight, table.positions))
        together = backend.spans(states, keys, values, scoring.scale, self.spans) if scoring.plain else None
        if together is not None:
            return Attended(self._with_padding_behind(together, table, scoring))
        output = states.new_zeros(*states.shape[:3], values.shape[3])
        lse = torch.zeros(states.shape[:3], dtype=torch.float32, device=states.device)
        told = True
        for one in self._sequences():  # one by one, so that no mask of L x L is ever made
            output[one], found = causal_attention(states[one], keys[one], values[one], scoring, backend)
            if found is None:
                told = False
            else:
                lse[one] = found
        return Attended(self._with_padding_behind(output, table, scoring), lse=lse if told else None)

    def _with_padding_behind(self, output: Tensor, table: TokenTable, scoring: Scoring) -> Tensor:
        """The output with that of padding behind the tokens of a sequence, which sees all of them."""
        for row, (_, end) in enumerate(self.spans or ()):
            if end < len(self):
                one, behind = slice(row, row + 1), slice(end, None)
                output[one, :, behind] = positional_attention(
                    self.states[one, :, behind], table.keys[one], table.values[one], scoring,
                    self.sight[one, behind], table.positions[one],
                )  # fmt: skip
        return output

    def weigh(
        self,
        table: TokenTable,
        scoring: Scoring,
        weights: RowWeights,
        group: str,
        *,
        attended: Attended | None = None,
        earlier: Remembered | None = None,
    ) -> Tensor:
        """Attention mass of every row of the table, `[B, Hkv, rows]` float32.

        attended: what `attend` found of these queries. earlier: queries of earlier steps to weigh as well.
        """
        probabilities, lse = (attended.probabilities, attended.lse) if attended else (None, None)
        if earlier is not None and (weights.last > len(self) or self.valid is not None):
            if isinstance(table, RaggedTable):
                return self._weigh_by_head(table, scoring, weights, group, attended, earlier)
            states, positions = earlier.followed_by(self)
            if table.packed:
                return packed.attention_mass(states, positions, table, weights, scoring, group)
            return operations.of(table).attention_mass(
                states, table.keys, weights, scoring,
                group=group, query_positions=positions, key_positions=table.positions,
            )  # fmt: skip
        if probabilities is not None and weights.rows is None:
            if weights.noise is None:
                return operations.of(table).query_mass(probabilities, group)
            if scoring.sinks is None:
                return operations.of(table).query_mass(
                    probabilities, group, weights.noise, self.positions, table.positions
                )
        if isinstance(table, RaggedTable):
            return self._weigh_by_head(table, scoring, weights, group, attended, None)
        if table.packed:
            return packed.attention_mass(self.states, self.positions, table, weights, scoring, group)
        if table.dense and weights.noise is None:
            return operations.of(table).attention_mass(self.states, table.keys, weights, scoring, group=group, lse=lse)
        if table.dense:
            return operations.of(table).attention_mass(
                self.states, table.keys, weights, scoring, group=group, query_positions=self.positions,
                key_positions=table.positions, in_order=True, lse=lse,
            )  # fmt: skip
        if self.spans is None or weights.rows is not None:
            return operations.of(table).attention_mass(
                self.states, table.keys, weights, scoring,
                group=group, query_positions=self.positions, key_positions=table.positions,
            )  # fmt: skip
        mass = torch.zeros(table.keys.shape[:3], dtype=torch.float32, device=table.keys.device)
        for one in self._sequences():
            mass[one] = operations.of(table).attention_mass(
                self.states[one], table.keys[one], weights, scoring,
                group=group, query_positions=self.positions[one[0], one[2]], key_positions=table.positions[one],
                in_order=True, lse=None if lse is None else lse[one],
            )  # fmt: skip
        return mass

    # -- over a table whose heads hold different numbers of rows, head by head -----------------------------------------

    def _attend_by_head(
        self, table: RaggedTable, scoring: Scoring, with_probabilities: bool, backend: Sdpa
    ) -> Attended:
        found = [
            self._of_head(one).attend(
                head, one.scoring(scoring), with_probabilities=with_probabilities, backend=backend
            )
            for one, head in self._heads(table)
        ]
        output = ragged.side_by_side([each.output for each in found], table.kv_heads)
        lse = [each.lse for each in found if each.lse is not None]
        told = [each.probabilities for each in found if each.probabilities is not None]
        return Attended(
            output,
            table.padded(told) if len(told) == len(found) else None,
            ragged.side_by_side(lse, table.kv_heads) if len(lse) == len(found) else None,
        )

    def _weigh_by_head(
        self,
        table: RaggedTable,
        scoring: Scoring,
        weights: RowWeights,
        group: str,
        attended: Attended | None,
        earlier: Remembered | None,
    ) -> Tensor:
        lse = None if attended is None else attended.lse
        masses = []
        for one, head in self._heads(table):
            known = None if lse is None else Attended(self.states, lse=one.part(lse))
            before = None if earlier is None else earlier.of_head(one)
            masses.append(
                self._of_head(one).weigh(
                    head, one.scoring(scoring), one.weights(weights), group, attended=known, earlier=before
                )
            )
        return table.padded(masses)

    def _heads(self, table: RaggedTable) -> list[tuple[OneHead, TokenTable]]:
        group = self.states.shape[1] // table.kv_heads
        return [(OneHead.of(number, table.kv_heads, group), head) for number, head in enumerate(table.heads)]

    def _of_head(self, one: OneHead) -> Queries:
        tokens = self.tokens[one.sequence]
        return Queries(
            one.part(self.states),
            self.first if isinstance(self.first, int) else one.sequence_of(self.first),
            None if self.valid is None or tokens == len(self) else one.sequence_of(self.valid),
            (tokens,),
            None,
            None if self.placed is None else one.sequence_of(self.placed),
        )

    def _sequences(self) -> list[tuple[slice, slice, slice]]:
        """For each sequence, the index of its real tokens in a tensor `[B, H, L, ...]`."""
        return [
            (slice(row, row + 1), slice(None), slice(begin, end))
            for row, (begin, end) in enumerate(self.spans or ())
            if end > begin
        ]


@dataclass
class Remembered:
    """The newest queries of earlier steps. states: `[B, Hq, w, D]`. positions: `[B or 1, w]`, -1 for padding."""

    states: Tensor
    positions: Tensor

    def followed_by(self, queries: Queries) -> tuple[Tensor, Tensor]:
        """States and positions of these queries and then those; padding moves to the front."""
        batch = max(self.positions.shape[0], queries.positions.shape[0])
        states = torch.cat([self.states, queries.states], dim=2)
        positions = torch.cat([self.positions.expand(batch, -1), queries.positions.expand(batch, -1)], dim=1)
        if queries.valid is None:
            return states, positions
        positions, order = positions.sort(dim=1)
        return states.gather(2, order[:, None, :, None].expand_as(states)), positions

    @classmethod
    def newest(cls, count: int, earlier: Remembered | None, queries: Queries) -> Remembered:
        """The newest `count` queries, of this step and, where it has fewer, of earlier ones."""
        if earlier is not None and min(queries.tokens) < count:
            states, positions = earlier.followed_by(queries)
            states, positions = states[:, :, -count:], positions[:, -count:]
        else:
            states, positions = queries.newest(count)
        return cls(states.clone(), positions.clone())

    def moved(self, positions: Tensor) -> Remembered:
        """The same queries where tokens have moved, positions `[B, tokens]`, -1 for those that are gone."""
        placed = self.positions.expand(len(self.states), -1)
        new = positions.long().gather(1, placed.clamp(min=0)).masked_fill(placed < 0, EMPTY)
        new, order = new.sort(dim=1)
        return Remembered(self.states.gather(2, order[:, None, :, None].expand_as(self.states)), new)

    def of_head(self, one: OneHead) -> Remembered:
        """Those of one sequence and KV head."""
        return Remembered(one.part(self.states), one.sequence_of(self.positions))

    def writable(self) -> Remembered:
        """The same in tensors of its own, with positions `[B, w]`."""
        return Remembered(
            self.states.clone(memory_format=torch.contiguous_format),
            self.positions.expand(len(self.states), -1).clone(memory_format=torch.contiguous_format),
        )

    def clone(self) -> Remembered:
        return Remembered(self.states.clone(), self.positions.clone())

    def state(self) -> State:
        return State({}, {"states": self.states, "positions": self.positions})

    @classmethod
    def restored(cls, saved: Saved, most: int, heads: tuple[int, int], dim: int) -> Remembered:
        """At most so many queries. heads: `(B, Hkv)`. dim: of a key. Raises CacheError."""
        (batch, kv_heads), (shape, dtype) = heads, saved.numbers("states")
        if shape[0] != batch or not shape[1] or shape[1] % kv_heads or not 0 < shape[2] <= most or shape[3] != dim:
            raise saved.refused(f"has states of shape {list(shape)}")
        placed, _ = saved.described("positions")
        expected = (1 if placed[:1] == (1,) else batch, shape[2])
        return cls(saved.tensor("states", shape, dtype), saved.tensor("positions", expected, torch.int64))

    def take(self, queries: Queries) -> None:
        """Forget the oldest query for a new one, in place."""
        states, positions = self.followed_by(queries)
        self.states.copy_(states[:, :, 1:])
        self.positions.copy_(positions[:, 1:])

    def select_batch(self, rows: Tensor) -> Remembered:
        rows = rows.to(self.states.device)
        return Remembered(self.states[rows], self.positions if self.positions.shape[0] == 1 else self.positions[rows])


def _spans(valid: Tensor) -> list[tuple[int, int]] | None:
    """Begin and end of the real tokens of each sequence, or None where one has a gap."""
    begins, counts = valid.int().argmax(1).tolist(), valid.sum(1).tolist()
    spans = [(begin, begin + count) for begin, count in zip(begins, counts, strict=True)]
    whole = all(bool(valid[row, begin:end].all()) for row, (begin, end) in enumerate(spans))
    return spans if whole else None
