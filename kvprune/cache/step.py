"""`LayerStep`: what one attention layer does at every forward pass.

    append      the new tokens become rows of the table
    attend      the new queries look at all rows, exactly
    observe     the policy updates its columns from the attention mass it asked for
    decide      the policy says which rows stay; the others are freed or overwritten

So the step that brings a token always attends over everything, and the table shrinks after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.attention.backends import SDPA, Sdpa
from kvprune.attention.mass import Scoring
from kvprune.attention.queries import Attended, Queries, Remembered
from kvprune.attention.rotation import Rotation
from kvprune.cache.columns import ALL_REAL, Past
from kvprune.cache.ledger import Ledger
from kvprune.cache.plans import Plan, Planner
from kvprune.cache.recording import Graphs, note_thread
from kvprune.cache.selection import FilteredStep, Selection
from kvprune.cache.steady import Steady
from kvprune.cache.steady_state import SteadyState
from kvprune.cache.undecided import Undecided
from kvprune.cache.unread import Unread
from kvprune.errors import KVPruneError
from kvprune.kernels import choose
from kvprune.policy.base import Decision, Policy, per_sequence
from kvprune.policy.passage import Passage
from kvprune.table.kept_heads import KeptHeads
from kvprune.table.ragged import keep_rows, pack_rows
from kvprune.table.tallies import Tallies
from kvprune.table.token_table import TokenTable

# While the past is recorded, the newest queries of a step are observed only when `crop` has said how many stay.
_UNDECIDED = 128


class LayerStep(SteadyState):
    """The part of a `PrunedLayer` that a forward pass goes through. `attend` changes its table, and frees memory."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        policy: Policy,
        index: int,
        *,
        device: torch.device | None = None,
        kernels: str = "auto",
        backend: Sdpa = SDPA,
        rotation: Rotation | None = None,
        graphs: Graphs | None = None,
        **shared: Any,
    ) -> None:
        """Args:
        index: of the layer in the model. shared: what `Planner` takes beside them.
        device: where the table lives and is attended to; None for the model's.
        kernels: what computes on the cache, a name. backend: what attention over several new tokens runs on.
        rotation: how keys are turned by their position, where they are to be seen at their places in the cache.
        graphs: what records steps for all layers of a cache.
        """
        super().__init__()
        self.planner = Planner(policy, index, **shared)
        self.home = device
        self.kernels = kernels
        self.backend = backend
        self.rotation = rotation
        self.graphs = graphs or Graphs()
        self.reset()

    @property
    def index(self) -> int:
        """Of the layer in the model."""
        return self.planner.layer

    @property
    def batch_size(self) -> int | None:
        """How many sequences it holds; None if it is empty."""
        return None if self.table is None else self.table.batch_size

    def reset(self) -> None:
        self.table: TokenTable | None = None
        self.tallies = Tallies()
        self.steady: Steady | None = None  # from when on a decode step changes no shape
        self.seen = self.generated = self.last_eviction = self.query_heads = 0
        self.tokens = ()
        self.prompt_tokens: tuple[int, ...] = ()
        self.incoming: tuple[Tensor, Tensor] | None = None
        self.remembered: Remembered | None = None  # for policies with a query window
        self.record_past = False
        self.undecided: Undecided | None = None
        self.waiting: list[Plan] = []  # of a prompt, from the first on that decides for all layers together
        self.columns = ALL_REAL  # of the model's input so far, which are tokens
        self.selection: Selection | None = None  # what a prompt filter chose; the first pruned layer holds it for all
        self.unread: Unread | None = None  # what no replay has seen; the first pruned layer holds it for all
        self.kept_heads: KeptHeads | None = None  # where heads have stopped before this layer
        self.ledger: Ledger | None = None  # of tokens that stopped between layers; the first one holds it for all
        self.is_initialized = False
        self._of_inference_mode = False  # whether tensors may have been made there

    # -- one step --------------------------------------------------------------------------------------------------

    def attend(
        self,
        states: Tensor,
        valid: Tensor | None,
        scoring: Scoring,
        filtered: FilteredStep | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """One step: the output of attention, `[B, L, Hq, Dv]`, and everything the policies do after it.

        Args:
            states: queries `[B, Hq, L, D]`. valid: bool `[B, L]`, False where the input is padding; None if none is.
            scoring: how the model makes probabilities of logits.
            filtered: what a prompt filter left of this step, if there is one.
            past: what the mask of this step hides of what is cached, if there is any; it goes.
        """
        if self.table is not None and self.steady is not None and torch.compiler.is_dynamo_compiling():
            return self.steady_step(self.table, self.steady, states, scoring)
        self.settle_mode()
        note_thread(states)
        first = self.table is None
        one = states.shape[2] == 1 and valid is None and past is None and filtered is None
        if self.steady is not None and one and self.graphs.wanted(self, states):
            recorded = self.steady.recorded(self.graphs).step(self, states, scoring)
            if recorded is not None:
                return recorded
        try:
            return self._attend(states, valid, scoring, filtered, past)
        except KVPruneError:
            if first:
                self.reset()
            raise

    def _attend(
        self, states: Tensor, valid: Tensor | None, scoring: Scoring, filtered: FilteredStep | None, past: Past | None
    ) -> Tensor:
        self.accept()
        if past is not None and self.table is not None:
            self._hide(past, self.table)
        device = states.device
        if self.home is not None:
            states, scoring = states.to(self.home), scoring.to(self.home)
        if valid is not None:
            valid = valid.to(states.device)
        if states.shape[2] > 1 or valid is not None:
            self.leave_steady()
        prefill = self.takes_prompt(states.shape[2], filtered)
        passage = None if filtered is None else filtered.passage
        states = self._of_kept_heads(states, passage)
        table, queries = self._append(states, valid, filtered)
        if prefill:
            self.prompt_tokens, self.generated = self.tokens, 0
        else:
            self.generated += max(queries.tokens if filtered is None else filtered.tokens)

        if self.record_past:
            output = queries.attend(self.placed(table), scoring, backend=self.backend).output
            self._defer(table, queries, prefill, scoring)
        else:
            plans = self.plans(table, queries, prefill, passage=passage)
            wanted = any(plan.weights is not None for plan in plans)
            seen = self.placed(table) if passage is None else passage.seen(table)
            attended = queries.attend(seen, scoring, with_probabilities=wanted, backend=self.backend)
            output = attended.output
            self.observe(seen, plans, queries, scoring, attended)
            self._decide(plans, prefill=prefill)
            padded = passage is not None and valid is not None
            if padded and self.table.close_up(self.planner.room(self.table), self.seen):  # type: ignore[union-attr, arg-type]
                self.last_eviction = self.seen  # the newest slots are not those of the newest columns any more
        output = output if self.kept_heads is None else self.kept_heads.among_all(output)
        return output.transpose(1, 2).contiguous().to(device)

    def _of_kept_heads(self, states: Tensor, passage: Passage | None) -> Tensor:
        """Of queries, and of the keys and values that came in, those of the heads that have not stopped before.

        A sequence that begins here takes over which those are, and they are the same in all that follows.
        """
        if passage is not None and passage.begins and passage.heads is not None:
            begun = tuple(not tokens for tokens in self.tokens)
            if self.kept_heads is None and all(begun):  # a table, if there is one, has padding alone
                self.kept_heads, self.table, self.remembered = passage.heads.clone(), None, None
            elif self.kept_heads is not None:
                self.kept_heads = self.kept_heads.where(begun, passage.heads)
        if self.kept_heads is None:
            return states
        keys, values = self.incoming  # type: ignore[misc]
        self.incoming = self.kept_heads.of(keys), self.kept_heads.of(values)
        return self.kept_heads.of(states)

    def _hide(self, past: Past, table: TokenTable) -> None:
        raise NotImplementedError  # by the layer, of which this is a part

    def takes_prompt(self, length: int, filtered: FilteredStep | None) -> bool:
        """Whether a step of so many columns is one of a prompt."""
        # A draft of several tokens that is being verified is generated text.
        begins = self.table is None or (length > 1 and not self.record_past)
        return begins if filtered is None else filtered.prefill

    def settle_mode(self) -> None:
        """What was made in inference mode cannot be written to outside of it: there, it is copied once."""
        if torch.is_inference_mode_enabled():
            self._of_inference_mode = True
        elif self._of_inference_mode:
            self._of_inference_mode = False
            steady = self.steady is not None
            self.leave_steady()
            if self.table is not None:
                self.table.leave_inference_mode()
            self.tallies = self.tallies.clone()
            self.remembered = self.remembered and self.remembered.clone()
            if steady:
                self._enter_steady(self.table)  # type: ignore[arg-type]

    def _append(
        self, states: Tensor, valid: Tensor | None, filtered: FilteredStep | None
    ) -> tuple[TokenTable, Queries]:
        """Make rows of the incoming keys and values."""
        keys, values = (tensor.to(states.device) for tensor in self.incoming)  # type: ignore[union-attr]
        self.incoming = None
        before = self.tokens or (0,) * keys.shape[0]
        placed = None if filtered is None or filtered.positions is None else filtered.positions.to(states.device)
        first = per_sequence(before, states.device)
        queries = Queries.of_step(states, first, valid, begins=self.table is None, placed=placed)
        if self.table is None:
            self.planner.heads.check(states.shape[1], keys.shape[1])
            self.table = self.new_table(keys, values, queries.positions[:, None], dense=valid is None)
            self.query_heads = states.shape[1]
            self.tallies = Tallies.zeros(self._tally_shapes(self.table), len(keys), keys.device)
            self.query_heads *= bool(self.tallies)  # which alone are of queries
            self.is_initialized = True
        elif len(queries) == 1 and valid is None and placed is None:
            self.table.append(keys, values, queries.first, room=self.planner.room(self.table))
        else:
            room = 1 if filtered is None or filtered.prefill else self.planner.room(self.table)
            self.table.append(keys, values, queries.positions[:, None], dense=valid is None, room=room)
        added = queries.tokens if filtered is None else filtered.tokens
        self.tokens = tuple(a + b for a, b in zip(before, added, strict=True))
        self.seen += len(queries) if filtered is None else filtered.columns
        if placed is not None:
            self.last_eviction = self.seen  # what was left out never was in the table
        return self.table, queries

    def new_table(self, keys: Tensor, values: Tensor, positions: Tensor, *, dense: bool) -> TokenTable:
        """A table of these rows, with the columns of this layer's policies."""
        columns, buffered = self.planner.columns(), self.planner.buffer_columns()
        return TokenTable(
            keys, values, positions, columns, buffered, dense=dense, kernels=choose(self.kernels, keys.device)
        )

    def _tally_shapes(self, table: TokenTable) -> dict[str, tuple[int, ...]]:
        return self.planner.tallies(self.query_heads, table.kv_heads, table.keys.shape[3])

    # -- the policies ----------------------------------------------------------------------------------------------

    def plans(
        self, table: TokenTable, queries: Queries, prefill: bool, to_come: tuple[int, ...] = (),
        passage: Passage | None = None,
    ) -> list[Plan]:  # fmt: skip
        """to_come: tokens of each sequence that have been counted, and come after these queries."""
        if (steady := self.steady) is not None and (steady.in_graph or torch.compiler.is_dynamo_compiling()):
            tokens: int | Tensor = steady.tokens + 1
            generated: int | Tensor = steady.generated + 1
        else:
            counts = tuple(a - b for a, b in zip(self.tokens, to_come, strict=True)) if to_come else self.tokens
            tokens = per_sequence(counts, queries.states.device)
            generated = self.generated - max(to_come, default=0)
        return self.planner.plans(
            table,
            queries,
            prefill,
            tallies=self.tallies,
            tokens=tokens,
            prompt_tokens=self.prompt_tokens,
            generated=generated,
            passage=passage,
        )

    def observe(
        self,
        table: TokenTable,
        plans: list[Plan],
        queries: Queries,
        scoring: Scoring,
        attended: Attended | None = None,
    ) -> None:
        """Let the policies update their columns, and remember the newest queries."""
        self.planner.observe(plans, table, queries, scoring, attended, self.remembered)
        if self.steady is not None and self.remembered is not None:
            self.remembered.take(queries)
            return
        window = self.planner.query_window(plans[0].step.prefill)
        self.remembered = Remembered.newest(window - 1, self.remembered, queries) if window > 1 else None

    def _decide(self, plans: list[Plan], *, prefill: bool, evicted: bool = False) -> None:
        """Let the policies decide in their order, up to one that does so for all layers together.

        evicted: whether rows have gone in this step.
        """
        self.waiting = []
        for number, plan in enumerate(plans):
            if plan.waits:
                self.waiting = [each.put_off() for each in plans[number:]]
                break
            plan.table = self.table.scoped(plan.scope)  # type: ignore[union-attr]  # an earlier link may have replaced it
            evicted |= self._apply(plan, plan.policy.decide(plan.table, plan.step))
        table: TokenTable = self.table  # type: ignore[assignment]
        if prefill:
            table.drop_empty()
            table.own()
        table.settle()
        if self.steady is not None:
            self.steady.advance()
        elif evicted and self.planner.static_decode and not self.record_past:
            self._enter_steady(table)

    def decide_waiting(self, decision: Decision | None) -> None:
        """Do what the first of the plans that wait has decided together with the other layers, and go on from there."""
        self.settle_mode()
        self._decide(self.waiting[1:], prefill=True, evicted=self._apply(self.waiting[0], decision))

    def _apply(self, plan: Plan, decision: Decision | None) -> bool:
        """Do what a policy has decided, and pack as it then says; whether rows went away by that."""
        evicted = self._change(plan, plan.checked(decision))
        packed = plan.policy.pack(self.table.scoped(plan.scope), plan.step)  # type: ignore[union-attr]
        return self._change(plan, plan.checked(packed)) or evicted

    def _change(self, plan: Plan, decision: Decision | None) -> bool:
        if decision is None:
            return False
        table: TokenTable = self.table  # type: ignore[assignment]
        if plan.looks_at_slots:
            decision.check(table)
        if decision.quantize is not None:
            self.table = table = pack_rows(table, decision.quantize, decision.keep, apart=decision.apart)
            last = self.seen if decision.keep is not None else self.seen - table.newest_exact  # what is packed stays
            self.last_eviction = max(self.last_eviction, last)
            return decision.keep is not None
        if decision.keep is not None:
            room = self.planner.interval_room(decision.keep.shape[2])
            self.table = keep_rows(table, decision.keep, room, apart=decision.apart)
        else:
            table.evict(decision.evict, exact=decision.exact)  # type: ignore[arg-type]  # one of three is there
            if not table.packed_length:  # else little comes at a time, and closes up when it is packed
                table.shrink(plan.step.spare or 2 * self.planner.room(table))
        self.last_eviction = self.seen
        return True

    # -- a step that may be taken back -----------------------------------------------------------------------------

    def _defer(self, table: TokenTable, queries: Queries, prefill: bool, scoring: Scoring) -> None:
        """Observe all but the newest queries now, and leave those, and the decision, to `_commit`."""
        split = max(0, len(queries) - _UNDECIDED)
        if split:
            early = queries.part(0, split)
            with table.without_newest(len(queries) - split):  # all that these queries can see
                to_come = tuple(a - b for a, b in zip(queries.tokens, early.tokens, strict=True))
                self.observe(self.placed(table), self.plans(table, early, prefill, to_come), early, scoring)
        self.undecided = Undecided(queries.part(split, len(queries)), prefill, scoring)

    def _commit(self) -> None:
        undecided, self.undecided = self.undecided, None
        if undecided is None or self.table is None:
            return
        if undecided.prefill:
            self.prompt_tokens, self.generated = self.tokens, 0
        plans = self.plans(self.table, undecided.queries, undecided.prefill)
        self.observe(self.placed(self.table), plans, undecided.queries, undecided.scoring)
        self._decide(plans, prefill=undecided.prefill)
