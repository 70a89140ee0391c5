"""`PrunedLayer`: what one attention layer does at every forward pass.

    append      the new tokens become rows of the table
    attend      the new queries look at all rows, exactly
    observe     the policy updates its columns from the attention mass it asked for
    decide      the policy says which rows stay; the others are freed or overwritten

So the step that brings a token always attends over everything, and the table shrinks after it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvprune.attention.backends import SDPA, Sdpa
from kvprune.attention.mass import Scoring
from kvprune.attention.queries import Attended, Queries, Remembered
from kvprune.attention.rotation import Rotation
from kvprune.cache.plans import Plan, Planner
from kvprune.cache.registration import NO_MASK, SOME_LENGTH, CacheLength
from kvprune.cache.selection import FilteredStep, Selection
from kvprune.cache.steady import Counted, Steady, pin
from kvprune.cache.unread import Unread
from kvprune.errors import CacheError, KVPruneError, PolicyError
from kvprune.kernels import choose
from kvprune.policy.base import Decision, Policy, per_sequence
from kvprune.state import Saved, State
from kvprune.table.token_table import TokenTable

# While the past is recorded, the newest queries of a step are observed only when `crop` has said how many stay.
_UNDECIDED = 128


@dataclass
class Undecided:
    """A step whose tokens `crop` may still take back."""

    queries: Queries
    prefill: bool
    scoring: Scoring


class PrunedLayer(CacheLayerMixin):
    """A layer of a `PrunedCache`: a token table, and the policies that rule it."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    seen = Counted()  # columns of the model's input so far, padding included: the length transformers knows
    tokens = Counted()  # per sequence, without padding: what positions are made of
    generated = Counted()  # tokens since the last prefill step
    last_eviction = Counted()  # `seen` when rows last went away: no crop can go behind it

    def __init__(
        self,
        policy: Policy,
        index: int,
        *,
        device: torch.device | None = None,
        kernels: str = "auto",
        backend: Sdpa = SDPA,
        rotation: Rotation | None = None,
        **shared: Any,
    ) -> None:
        """Args:
        index: of the layer in the model. shared: what `Planner` takes beside them.
        device: where the table lives and is attended to; None for the model's.
        kernels: what computes on the cache, a name. backend: what attention over several new tokens runs on.
        rotation: how keys are turned by their position, where they are to be seen at their places in the cache.
        """
        super().__init__()
        self.planner = Planner(policy, index, **shared)
        self.home = device
        self.kernels = kernels
        self.backend = backend
        self.rotation = rotation
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
        self.steady: Steady | None = None  # from when on a decode step changes no shape
        self.seen = self.generated = self.last_eviction = 0
        self.tokens = ()
        self.prompt_tokens: tuple[int, ...] = ()
        self.incoming: tuple[Tensor, Tensor] | None = None
        self.remembered: Remembered | None = None  # for policies with a query window
        self.record_past = False
        self.undecided: Undecided | None = None
        self.waiting: list[Plan] = []  # of a prompt, from the first on that decides for all layers together
        self.selection: Selection | None = None  # what a prompt filter chose; the first pruned layer holds it for all
        self.unread: Unread | None = None  # what no replay has seen; the first pruned layer holds it for all
        self.is_initialized = False
        self._of_inference_mode = False  # whether tensors may have been made there

    # -- what transformers asks ------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the table is made of the first step's keys and values."""

    @property
    def is_compileable(self) -> bool:
        """Whether a decode step changes no shape and never waits for the device: one graph serves all steps.

        So it is at the budget of a policy that evicts at every token, unless the past is recorded, the batch was
        reordered since the last step, the cache lives on another device than the model, or sequences keep different
        numbers of rows.
        """
        if self.steady is None or not self._of_inference_mode:
            return self.steady is not None
        return torch.compiler.is_dynamo_compiling() or torch.is_inference_mode_enabled()  # it cannot trace the latter

    def get_seq_length(self) -> int:
        if self.steady is not None and torch.compiler.is_dynamo_compiling():
            return self.steady.seen  # type: ignore[return-value]  # as StaticLayer does, transformers 5.23
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.steady is not None and query_length == 1:
            return NO_MASK, 0
        if torch.compiler.is_dynamo_compiling():  # which cannot make such an int of a symbolic one (torch 2.13)
            return SOME_LENGTH, 0
        return CacheLength(self.seen + query_length), 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take this step's keys `[B, Hkv, L, D]` and values; they become rows when the attention runs."""
        if self.table is not None:
            self.table.check_step(key_states, value_states)
        self.incoming = (key_states, value_states)
        return key_states, value_states

    # -- one step --------------------------------------------------------------------------------------------------

    def attend(
        self, states: Tensor, valid: Tensor | None, scoring: Scoring, filtered: FilteredStep | None = None
    ) -> Tensor:
        """One step: the output of attention, `[B, L, Hq, Dv]`, and everything the policies do after it.

        Args:
            states: queries `[B, Hq, L, D]`. valid: bool `[B, L]`, False where the input is padding; None if none is.
            scoring: how the model makes probabilities of logits.
            filtered: what a prompt filter left of this step, if there is one.
        """
        if self.table is not None and self.steady is not None and torch.compiler.is_dynamo_compiling():
            return self._compiled_step(self.table, self.steady, states, scoring)
        self._settle_mode()
        first = self.table is None
        try:
            return self._attend(states, valid, scoring, filtered)
        except KVPruneError:
            if first:
                self.reset()
            raise

    def _attend(self, states: Tensor, valid: Tensor | None, scoring: Scoring, filtered: FilteredStep | None) -> Tensor:
        self.accept()
        device = states.device
        if self.home is not None:
            states, scoring = states.to(self.home), scoring.to(self.home)
        if valid is not None:
            valid = valid.to(states.device)
        if states.shape[2] > 1:
            self._leave_steady()
        prefill = self.takes_prompt(states.shape[2], filtered)
        table, queries = self._append(states, valid, filtered)
        if prefill:
            self.prompt_tokens, self.generated = self.tokens, 0
        else:
            self.generated += max(queries.tokens)

        if self.record_past:
            output = queries.attend(self._placed(table), scoring, backend=self.backend).output
            self._defer(table, queries, prefill, scoring)
        else:
            plans = self._plans(table, queries, prefill)
            wanted = any(plan.weights is not None for plan in plans)
            seen = self._placed(table)
            attended = queries.attend(seen, scoring, with_probabilities=wanted, backend=self.backend)
            output = attended.output
            self._observe(seen, plans, queries, scoring, attended)
            self._decide(plans, prefill=prefill)
        return output.transpose(1, 2).contiguous().to(device)

    def takes_prompt(self, length: int, filtered: FilteredStep | None) -> bool:
        """Whether a step of so many columns is one of a prompt."""
        # A draft of several tokens that is being verified is generated text.
        return self.table is None or (length > 1 and not self.record_past) or filtered is not None

    def _settle_mode(self) -> None:
        """What was made in inference mode cannot be written to outside of it: there, it is copied once."""
        if torch.is_inference_mode_enabled():
            self._of_inference_mode = True
        elif self._of_inference_mode:
            self._of_inference_mode = False
            steady = self.steady is not None
            self._leave_steady()
            if self.table is not None:
                self.table.leave_inference_mode()
            self.remembered = self.remembered and self.remembered.clone()
            if steady:
                self._enter_steady(self.table)  # type: ignore[arg-type]

    # -- the steady state -------------------------------------------------------------------------------------------

    def _enter_steady(self, table: TokenTable) -> None:
        """After a step that evicted: the next token takes the spare slot, and another row goes."""
        if not table.dense or table.packed or table.capacity == table.length or self.home is not None:
            return
        if self.remembered is not None:
            if self.remembered.states.shape[2] < self.planner.query_window(False) - 1:
                return
            self.remembered = self.remembered.writable()
        self.steady = Steady.of(self.seen, self.generated, self.tokens, table.positions.device)
        pin(self._tensors())

    def _leave_steady(self) -> None:
        if self.steady is not None:
            self.catch_up()
            self.steady = None

    def catch_up(self) -> None:
        """Count what compiled steps have counted on the device."""
        if self.steady is not None and self.steady.ahead:
            self.seen, self.generated, self.tokens = self.steady.read()
            self.last_eviction = self.seen

    def _compiled_step(self, table: TokenTable, steady: Steady, states: Tensor, scoring: Scoring) -> Tensor:
        """`_attend` for a generated token in the steady state: nothing here depends on what an int has counted."""
        keys, values = self.incoming  # type: ignore[misc]
        self.incoming = None
        queries = Queries(states, steady.tokens, None, (1,) * len(states))
        table.append(keys, values, queries.first)
        plans = self._plans(table, queries, False)
        wanted = plans[0].weights is not None
        seen = self._placed(table)
        attended = queries.attend(seen, scoring, with_probabilities=wanted, backend=self.backend)
        self._observe(seen, plans, queries, scoring, attended)
        decision = plans[0].policy.decide(plans[0].table, plans[0].step)
        table.evict(decision.evict)  # type: ignore[union-attr, arg-type]  # at its budget, it evicts a row
        steady.advance()
        return attended.output.transpose(1, 2).contiguous()

    def _placed(self, table: TokenTable) -> TokenTable:
        """The table as queries see it: rows where they are in the text, or where they are in the cache."""
        if self.rotation is None:
            return table
        return table.with_keys(self.rotation.closed_up(table.keys, table.positions))

    def _append(
        self, states: Tensor, valid: Tensor | None, filtered: FilteredStep | None
    ) -> tuple[TokenTable, Queries]:
        """Make rows of the incoming keys and values."""
        keys, values = (tensor.to(states.device) for tensor in self.incoming)  # type: ignore[union-attr]
        self.incoming = None
        before = self.tokens or (0,) * keys.shape[0]
        placed = None if filtered is None else filtered.positions.to(states.device)
        first = per_sequence(before, states.device)
        queries = Queries.of_step(states, first, valid, begins=self.table is None, placed=placed)
        if self.table is None:
            self.planner.heads.check(states.shape[1], keys.shape[1])
            self.table = self.new_table(keys, values, queries.positions[:, None], dense=valid is None)
            self.is_initialized = True
        elif len(queries) == 1 and valid is None and placed is None:
            self.table.append(keys, values, queries.first, room=self.planner.room(self.table))
        else:
            self.table.append(keys, values, queries.positions[:, None], dense=valid is None)
        added = queries.tokens if filtered is None else filtered.tokens
        self.tokens = tuple(a + b for a, b in zip(before, added, strict=True))
        self.seen += len(queries) if filtered is None else filtered.columns
        if filtered is not None:
            self.last_eviction = self.seen  # what the filter dropped never was in the table
        return self.table, queries

    def new_table(self, keys: Tensor, values: Tensor, positions: Tensor, *, dense: bool) -> TokenTable:
        """A table of these rows, with the columns of this layer's policies."""
        columns, buffered = self.planner.columns(), self.planner.buffer_columns()
        return TokenTable(
            keys, values, positions, columns, buffered, dense=dense, kernels=choose(self.kernels, keys.device)
        )

    # -- the policies ----------------------------------------------------------------------------------------------

    def _plans(self, table: TokenTable, queries: Queries, prefill: bool, to_come: tuple[int, ...] = ()) -> list[Plan]:
        """to_come: tokens of each sequence that have been counted, and come after these queries."""
        if (steady := self.steady) is not None and torch.compiler.is_dynamo_compiling():
            tokens: int | Tensor = steady.tokens + 1
            generated: int | Tensor = steady.generated + 1
        else:
            counts = tuple(a - b for a, b in zip(self.tokens, to_come, strict=True)) if to_come else self.tokens
            tokens = per_sequence(counts, queries.states.device)
            generated = self.generated - max(to_come, default=0)
        return self.planner.plans(
            table, queries, prefill, tokens=tokens, prompt_tokens=self.prompt_tokens, generated=generated
        )

    def _observe(
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
                plan.policy.check(plan.step)
                self.waiting = [replace(each, step=replace(each.step, source=None)) for each in plans[number:]]
                break
            evicted |= self._apply(plan, plan.policy.decide(plan.table, plan.step))
        table: TokenTable = self.table  # type: ignore[assignment]
        if prefill:
            table.drop_empty()
            table.own()
        if self.steady is not None:
            self.steady.advance()
        elif evicted and self.planner.static_decode and not self.record_past:
            self._enter_steady(table)

    def decide_waiting(self, decision: Decision | None) -> None:
        """Do what the first of the plans that wait has decided together with the other layers, and go on from there."""
        self._settle_mode()
        plan, *others = self.waiting
        self._decide(others, prefill=True, evicted=self._apply(plan, decision))

    def _apply(self, plan: Plan, decision: Decision | None) -> bool:
        """Do what a policy has decided; whether rows went away by that."""
        table: TokenTable = self.table  # type: ignore[assignment]
        if decision is None:
            return False
        if not isinstance(decision, Decision):
            raise PolicyError(f"decide() of {plan.policy} returned {decision!r}: return a Decision, or None.")
        if plan.step.prefill:  # once, since it waits for the device
            decision.check(table)
        if decision.quantize is not None:
            table.quantize(decision.quantize)
            newest = table.length - table.packed_length if table.dense else 0
            self.last_eviction = max(self.last_eviction, self.seen - newest)  # packed rows cannot be cropped
            return False
        if decision.keep is not None:
            table.compact(decision.keep, room=self.planner.interval_room(decision.keep.shape[2]))
        elif decision.evict is not None:
            table.evict(decision.evict)
            table.shrink(plan.step.spare)
        self.last_eviction = self.seen
        return True

    # -- rolling back ----------------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """From now on nothing is evicted in a step until `crop` has said how many of its tokens were accepted.

        Of a longer step, the newest 128 tokens can be taken back as if they had never come; what queries before them
        added to the scores stays there.
        """
        self._leave_steady()
        self.record_past = True

    def _defer(self, table: TokenTable, queries: Queries, prefill: bool, scoring: Scoring) -> None:
        """Observe all but the newest queries now, and leave those, and the decision, to `_commit`."""
        split = max(0, len(queries) - _UNDECIDED)
        if split:
            early = queries.part(0, split)
            with table.without_newest(len(queries) - split):  # all that these queries can see
                to_come = tuple(a - b for a, b in zip(queries.tokens, early.tokens, strict=True))
                self._observe(self._placed(table), self._plans(table, early, prefill, to_come), early, scoring)
        self.undecided = Undecided(queries.part(split, len(queries)), prefill, scoring)

    def accept(self) -> None:
        """The model goes on without a crop: all was accepted, and several tokens were a prompt, not a draft."""
        if self.undecided is not None:
            self.undecided.prefill |= len(self.undecided.queries) > 1
            self._commit()

    def _commit(self) -> None:
        undecided, self.undecided = self.undecided, None
        if undecided is None or self.table is None:
            return
        if undecided.prefill:
            self.prompt_tokens, self.generated = self.tokens, 0
        plans = self._plans(self.table, undecided.queries, undecided.prefill)
        self._observe(self._placed(self.table), plans, undecided.queries, undecided.scoring)
        self._decide(plans, prefill=undecided.prefill)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; 0 only ends the step that waits while the past is recorded.

        Without recording, what the forgotten queries added to the scores stays there.

        Raises CacheError for a positive number, and where rows were evicted since: those cannot come back.
        """
        self.check_crop(tokens_to_remove)
        self._settle_mode()
        if self.table is None:
            return
        remove = -tokens_to_remove
        if remove:
            newest = slice(max(0, self.table.length - remove), None)
            dropped = (self.table.positions[:, 0, newest] >= 0).sum(-1).tolist()
            self.table.drop_newest(remove)
            self.seen -= remove
            self.tokens = tuple(a - b for a, b in zip(self.tokens, dropped, strict=True))
            self.prompt_tokens = tuple(min(a, b) for a, b in zip(self.prompt_tokens, self.tokens, strict=True))
            self.generated = max(0, self.generated - max(dropped))
            if self.undecided is None or len(self.undecided.queries) <= remove:
                self.remembered = None  # it may hold queries that are taken back
            self.selection = self.selection and self.selection.crop(remove)
            self.unread = self.unread and self.unread.crop(remove)
        if self.undecided is not None:
            left = len(self.undecided.queries) - remove
            if left > 0:
                self.undecided.queries = self.undecided.queries.part(0, left)
                self._commit()
            else:
                self.undecided = None

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise CacheError if `crop` could not do this; changes nothing."""
        left = self.seen + tokens_to_remove
        if tokens_to_remove > 0:
            raise CacheError(f"crop takes minus the number of tokens to remove: write crop(-{tokens_to_remove}).")
        if left < 0:
            raise CacheError(f"cannot remove {-tokens_to_remove} tokens: the cache has seen only {self.seen}.")
        if left < self.last_eviction:
            raise CacheError(
                f"cannot crop to {left} tokens: rows were evicted when the cache had seen {self.last_eviction}, and "
                "they cannot come back. Call activate_past_recording() before steps that you may want to take back, "
                "or keep a fork() of the cache."
            )

    # -- the batch changes -----------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.table is not None:
            self.batch_select_indices(torch.arange(self.table.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order; a sequence may come several times."""
        if self.table is None:
            return
        self._settle_mode()
        self._leave_steady()  # the tensors that graphs know are gone
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        self.table.select_batch(indices)
        if len({*zip(self.tokens, self.prompt_tokens, strict=True)}) == 1:  # no need to wait for the device
            self.tokens, self.prompt_tokens = self.tokens[:1] * len(indices), self.prompt_tokens[:1] * len(indices)
        else:
            rows = indices.tolist()
            self.tokens = tuple(self.tokens[row] for row in rows)
            self.prompt_tokens = tuple(self.prompt_tokens[row] for row in rows)
        if self.remembered is not None:
            self.remembered = self.remembered.select_batch(indices)
        if self.undecided is not None:
            self.undecided.queries = self.undecided.queries.select_batch(indices)
        self.selection = self.selection and self.selection.select_batch(indices)
        self.unread = self.unread and self.unread.select_batch(indices)

    def fork(self) -> PrunedLayer:
        """An independent copy: every tensor is copied, settings are shared."""
        self._settle_mode()
        self.catch_up()
        other = copy.copy(self)
        other.table = self.table and self.table.fork()
        other.remembered = self.remembered and self.remembered.clone()
        other.selection = self.selection and self.selection.clone()
        other.unread = self.unread and self.unread.clone()
        if self.undecided is not None:
            queries = self.undecided.queries
            other.undecided = replace(self.undecided, queries=queries.part(0, len(queries)))
        if self.steady is not None:
            other._enter_steady(other.table)  # type: ignore[arg-type]
        return other

    # -- saved and restored ----------------------------------------------------------------------------------------

    _COUNTS = ("seen", "generated", "last_eviction")

    def state(self) -> State:
        """Everything but the settings. Raises CacheError while a step waits for `crop`."""
        if self.undecided is not None:
            raise CacheError(
                "the past is being recorded, and the newest step is neither accepted nor taken back, so there is "
                "nothing to save yet: call crop(0) to accept all of its tokens, or crop(-n) to take n back."
            )
        state = State({name: getattr(self, name) for name in self._COUNTS})
        state.facts |= {"tokens": self.tokens, "prompt_tokens": self.prompt_tokens}
        state.facts |= {"record_past": self.record_past, "steady": self.steady is not None}
        state.add("table", None if self.table is None else self.table.state())
        state.add("remembered", None if self.remembered is None else self.remembered.state())
        state.add("selection", None if self.selection is None else self.selection.state())
        state.add("unread", None if self.unread is None else self.unread.state())
        return state

    def restore(self, saved: Saved) -> None:
        """Take over a `state`; this layer is new. Raises CacheError for one that this layer cannot have."""
        self._settle_mode()
        self.seen = saved.count("seen")
        self.generated, self.last_eviction = (saved.count(name, self.seen) for name in self._COUNTS[1:])
        self.record_past, steady = saved.flag("record_past"), saved.flag("steady")
        table, remembered = saved.part("table", self.home), saved.part("remembered", self.home)
        selection, unread = saved.part("selection"), saved.part("unread")
        if table is None:
            if self.seen:
                raise saved.refused(f"has seen {self.seen} tokens, and has no table")
            return
        self.tokens = saved.counts("tokens", self.seen)
        self.prompt_tokens = saved.counts("prompt_tokens", self.seen, length=len(self.tokens))
        self.table = self._restored_table(table)
        self.is_initialized = True
        if remembered is not None:
            heads, dim = (self.table.batch_size, self.table.kv_heads), self.table.keys.shape[3]
            self.remembered = Remembered.restored(remembered, self.planner.query_window(True) - 1, heads, dim)
        if selection is not None:
            self.selection = Selection.restored(selection, self.seen, self.tokens)
        if unread is not None:
            self.unread = Unread.restored(unread, len(self.tokens), self.seen)
        if steady:
            if not self.planner.static_decode or self.record_past:
                raise saved.refused("is said to be steady, which the policy never is")
            self._enter_steady(self.table)

    def _restored_table(self, saved: Saved) -> TokenTable:
        (shape, dtype), (value_shape, value_dtype) = saved.numbers("keys"), saved.numbers("values")
        batch, heads, rows, key_dim = shape
        value_dim = value_shape[3]
        alike = value_shape == (batch, heads, rows, value_dim) and value_dtype == dtype
        if not alike or batch != len(self.tokens) or not all((batch, heads, key_dim, value_dim)):
            raise saved.refused(f"has keys of shape {list(shape)} and values of shape {list(value_shape)}")
        none = torch.empty(batch, heads, 0, key_dim + value_dim, dtype=dtype, device=saved.device)
        table = self.new_table(none[..., :key_dim], none[..., key_dim:], none[..., 0], dense=True)
        table.restore(saved, self.planner.codecs, max(self.tokens))
        if table.rows > self.seen:
            raise saved.refused(f"has {table.rows} rows of {self.seen} tokens")
        return table

    # -- what it holds ---------------------------------------------------------------------------------------------

    def kept_positions(self) -> Tensor:
        """`[B, Hkv, rows]` int64, ascending, -1 for empty rows; rows that are empty everywhere are left out."""
        if self.table is None:
            return torch.empty(0, 0, 0, dtype=torch.int64)
        positions = self.table.positions.long().sort(dim=-1).values
        return positions[:, :, int((positions < 0).sum(-1).min()) :]

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor this layer holds."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        held = [] if self.table is None else list(self.table.tensors().values())
        if self.remembered is not None:
            held += [self.remembered.states, self.remembered.positions]
        if self.steady is not None:
            held.append(self.steady.counts)
        if self.undecided is not None:
            held += self.undecided.queries.tensors()
        if self.selection is not None and self.selection.columns is not None:
            held.append(self.selection.columns)
        if self.unread is not None:
            held += self.unread.tensors()
        return held
