"""`SteadyState`: the part of a layer that knows when its decode steps have come to be all alike, and runs those."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvprune.attention.backends import Sdpa
from kvprune.attention.mass import Scoring
from kvprune.attention.queries import Queries, Remembered
from kvprune.attention.rotation import Rotation
from kvprune.cache.plans import Plan, Planner
from kvprune.cache.recording import Graphs
from kvprune.cache.steady import Counted, Steady, pin
from kvprune.table.token_table import TokenTable


class SteadyState(CacheLayerMixin):
    """From the first step on that evicts, if the policy does so at every token, until anything else happens."""

    seen = Counted()  # columns of the model's input so far, padding included: the length transformers knows
    tokens = Counted()  # per sequence, without padding: what positions are made of
    generated = Counted()  # tokens since the last prefill step
    last_eviction = Counted()  # `seen` when rows last went away: no crop can go behind it

    planner: Planner
    graphs: Graphs
    home: Any
    backend: Sdpa
    rotation: Rotation | None
    table: TokenTable | None
    steady: Steady | None
    remembered: Remembered | None
    incoming: tuple[Tensor, Tensor] | None
    prompt_tokens: tuple[int, ...]

    def _enter_steady(self, table: TokenTable) -> None:
        """After a step that evicted: the next token takes the spare slot, and another row goes."""
        if not table.dense or table.packed or table.capacity == table.length or self.home is not None:
            return
        if self.remembered is not None:
            if self.remembered.states.shape[2] < self.planner.query_window(False) - 1:
                return
            self.remembered = self.remembered.writable()
        self.steady = Steady.of(self.seen, self.generated, self.tokens, table.positions.device)
        pin(self.tensors())

    def leave_steady(self) -> None:
        """Steps may change shapes again."""
        if self.steady is not None:
            self.catch_up()
            self.steady = None

    def catch_up(self) -> None:
        """Count what compiled steps have counted on the device."""
        if self.steady is not None and self.steady.ahead:
            self.seen, self.generated, self.tokens = self.steady.read()
            self.last_eviction = self.seen

    def count_one(self) -> None:
        """Count a step of one token that has counted itself on the device."""
        self.seen, self.generated, self.tokens = self.seen + 1, self.generated + 1, tuple(n + 1 for n in self.tokens)
        self.last_eviction = self.seen

    def steady_step(self, table: TokenTable, steady: Steady, states: Tensor, scoring: Scoring) -> Tensor:
        """`_attend` for a generated token in the steady state: nothing here depends on what an int has counted."""
        keys, values = self.incoming  # type: ignore[misc]
        self.incoming = None
        queries = Queries(states, steady.tokens, None, (1,) * len(states))
        table.append(keys, values, queries.first)
        plans = self.plans(table, queries, False)
        wanted = plans[0].weights is not None
        seen = self.placed(table)
        attended = queries.attend(seen, scoring, with_probabilities=wanted, backend=self.backend)
        self.observe(seen, plans, queries, scoring, attended)
        decision = plans[0].policy.decide(plans[0].table, plans[0].step)
        table.evict(decision.evict)  # type: ignore[union-attr, arg-type]  # at its budget, it evicts a row
        steady.advance()
        return attended.output.transpose(1, 2).contiguous()

    def placed(self, table: TokenTable) -> TokenTable:
        """The table as queries see it: rows where they are in the text, or where they are in the cache."""
        if self.rotation is None:
            return table
        return table.with_keys(self.rotation.closed_up(table.keys, table.positions))

    # -- what a whole step has as well -----------------------------------------------------------------------------

    def plans(self, table: TokenTable, queries: Queries, prefill: bool) -> list[Plan]:
        raise NotImplementedError  # by the step, of which this is a part

    def observe(self, *args: Any) -> None:
        raise NotImplementedError  # by the step, of which this is a part

    def tensors(self) -> list[Tensor]:
        raise NotImplementedError  # by the layer, of which this is a part
