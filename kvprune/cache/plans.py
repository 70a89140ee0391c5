"""`Planner`: what the policies of one layer are told at every step, and the attention mass that they ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvprune.attention.asked import Asked
from kvprune.attention.mass import RowWeights, Scoring
from kvprune.attention.outputs import Outputs
from kvprune.attention.queries import Attended, Queries, Remembered
from kvprune.attention.rotary import NO_ROTARY, Rotary
from kvprune.cache.steady import Steady
from kvprune.errors import PolicyError
from kvprune.policy.aging import ROTATED_SINKS
from kvprune.policy.base import Decision, Policy, Step, per_sequence
from kvprune.policy.heads import ALL_HEADS, Heads
from kvprune.policy.passage import Passage
from kvprune.table.flat import index_bytes
from kvprune.table.quantize import Codec
from kvprune.table.rotated_rows import RotatedCodec
from kvprune.table.tallies import Tallies
from kvprune.table.token_table import MOST_HOLES, TokenTable

# A table that grows token by token takes 1/64 of its length as room, at least 8 slots.
_ROOM_SHARE, _LEAST_ROOM = 64, 8
# One that is cut back every so many tokens takes room for all of them, unless it would more than double by that.
_MOST_ROOM = 1024


@dataclass
class Plan:
    """One policy's part in a step: what it works on, and what it is told."""

    policy: Policy
    table: TokenTable
    step: Step
    scope: str = ""
    """What the names of its columns begin with, in the table."""

    @property
    def weights(self) -> RowWeights | None:
        return self.step.weights

    @property
    def waits(self) -> bool:
        """Whether the decision is one for all layers, and waits for them."""
        return self.step.prefill and self.policy.decides_together

    def checked(self, decision: Decision | None) -> Decision | None:
        """The decision. Raises PolicyError for what is none."""
        if decision is not None and not isinstance(decision, Decision):
            raise PolicyError(f"decide() of {self.policy} returned {decision!r}: return a Decision, or None.")
        for codec, _ in (decision and decision.quantize) or ():
            if not isinstance(codec, Codec):
                raise PolicyError(f"{self.policy} packs rows by {codec!r}: give a Codec, such as Codec(bits=4).")
        return decision

    @property
    def looks_at_slots(self) -> bool:
        """Whether what is decided is checked: a prompt's always, since it waits for the device just once.

        Later only on a CPU, where it waits for nothing, and of policies that decide otherwise than kvprune's do.
        """
        if self.step.prefill:
            return True
        kind = type(self.policy)
        own = kind.decide.__module__.startswith("kvprune.") and kind.pack.__module__.startswith("kvprune.")
        return not own and self.table.positions.is_cpu and not torch.compiler.is_dynamo_compiling()

    def put_off(self) -> Plan:
        """The same for later, without what lives in this step alone.

        Raises BudgetError where its policy could not decide then, while the step can still be refused.
        """
        self.policy.check(self.step)
        return replace(self, step=self.step.without_queries())

    def weighs_like(self, other: Plan) -> bool:
        """Whether the attention mass of one serves the other."""
        return (
            self.weights is not None
            and other.weights is not None
            and self.weights.same_as(other.weights)
            and self.policy.group == other.policy.group
            and (self.policy.query_window > 1) == (other.policy.query_window > 1)
        )


class Planner:
    """The policies of one layer, the links of a chain in their order, and what does not change from step to step."""

    def __init__(
        self,
        policy: Policy,
        layer: int,
        *,
        depth: int = 0,
        pruned_layers: int = 1,
        stock_tokens: int = 0,
        heads: Heads = ALL_HEADS,
        rotary: Rotary = NO_ROTARY,
        outputs: Outputs | None = None,
    ) -> None:
        """Args:
        layer: its index in the model. pruned_layers: how many layers share a budget. depth: its number among those.
        stock_tokens: tokens that layers with a sliding window can hold in all, to be paid from a budget in bytes.
        heads: the share of the layer's heads that is here, if the model's plan splits attention.
        rotary: how the layer turns queries and keys. outputs: what its values become, if a policy asks for that.
        """
        self.policies = policy.parts()
        # Columns of the links of a chain get a prefix each; a policy of its own sees plain names.
        self._scopes = tuple(f"{link}." for link in range(len(self.policies))) if len(self.policies) > 1 else ("",)
        self.interval = max((part.interval or 0 for part in self.policies), default=0)
        """The longest interval of any policy; 0 where nothing is evicted by intervals."""
        self.replays = tuple(
            (scope, part.replay) for scope, part in zip(self._scopes, self.policies, strict=True) if part.replay
        )
        """What is run again before a prompt is decided, and the prefixes of the columns that it fills."""
        self.codecs = policy.codecs
        self._own_codecs = tuple(codec for part in self.policies for codec in part.codecs_at(depth, pruned_layers))
        self.static_decode = len(self.policies) == 1 and self.policies[0].static_decode
        self.layer = layer
        self.depth = depth
        self.pruned_layers = pruned_layers
        self.stock_tokens = stock_tokens
        self.heads = heads
        self.rotary = rotary
        self.outputs = outputs
        self._evicts, self._buffer = policy.evicts, policy.buffer
        self.columns(), self.buffer_columns()  # raises where a cache is made, not in the middle of a pass

    # -- the table that they need ----------------------------------------------------------------------------------

    def columns(self) -> dict[str, torch.dtype]:
        """Of all rows, with the prefixes of a chain's links."""
        return self._declared("columns", [part.all_columns() for part in self.policies])

    def buffer_columns(self) -> dict[str, torch.dtype]:
        """Of the rows in full precision alone."""
        return self._declared("buffer_columns", [part.buffer_columns() for part in self.policies])

    def _declared(self, method: str, columns: list[Any]) -> dict[str, torch.dtype]:
        """What a method of each policy said, in one; raises PolicyError for what names no columns."""
        for part, named in zip(self.policies, columns, strict=True):
            if not isinstance(named, dict) or not all(
                isinstance(name, str) and isinstance(dtype, torch.dtype) for name, dtype in named.items()
            ):
                raise PolicyError(
                    f"{method}() of {part} returned {named!r}: return names with dtypes, as in "
                    '{"score": torch.float32}.'
                )
        pairs = zip(self._scopes, columns, strict=True)
        return {scope + name: dtype for scope, named in pairs for name, dtype in named.items()}

    def tallies(self, query_heads: int, kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what they remember beside rows, of one sequence."""
        return {
            scope + name: shape
            for scope, part in zip(self._scopes, self.policies, strict=True)
            for name, shape in part.tallies(query_heads, kv_heads, head_dim).items()
        }

    def room(self, table: TokenTable) -> int:
        """Slots to add when the table is full and tokens come one by one."""
        if table.packed:
            return _LEAST_ROOM  # what comes in is packed before long
        return self.interval_room(table.length) or max(_LEAST_ROOM, table.length // _ROOM_SHARE)

    def interval_room(self, rows: int) -> int:
        """Slots to hold beside so many rows for the tokens of an interval; 0 where nothing is evicted by intervals."""
        return min(self.interval, max(rows, _MOST_ROOM))

    # -- one step --------------------------------------------------------------------------------------------------

    def plans(
        self,
        table: TokenTable,
        queries: Queries,
        prefill: bool,
        *,
        tallies: Tallies,
        tokens: int | Tensor,
        prompt_tokens: tuple[int, ...],
        generated: int | Tensor,
        passage: Passage | None = None,
    ) -> list[Plan]:
        """What each policy is told of a step, and the attention rows that it asks for.

        The counts are those of `Step`. Raises PolicyError for a policy that asks for something else than rows.
        """
        device, added = queries.states.device, max(queries.tokens if passage is None else passage.added)
        heads = self.heads.present(table.kv_heads)
        token_bytes, other_bytes = self._costs(table)
        query_bytes = queries.states.nbytes // len(queries) + 8 * len(queries.states)  # a query and its position
        other_bytes += max(0, self.query_window(prefill) - 1) * query_bytes
        other_bytes += tallies.nbytes
        other_bytes += len(queries.states) * Steady.bytes_for(1) if self.static_decode else 0  # in any batch alike
        if any(part.heads_compete for part in self.policies):
            other_bytes += table.batch_size * index_bytes(table.kv_heads)
        stock_bytes = table.kv_token_bytes * self.stock_tokens * heads.size
        half_bytes = self._half_bytes(table, heads)
        plans = []
        for scope, part in zip(self._scopes, self.policies, strict=True):
            step = Step(
                layer=self.layer,
                prefill=prefill,
                due=prefill or _is_due(part.interval, generated, added),
                queries=len(queries),
                new_tokens=per_sequence(queries.tokens, device),
                tokens=tokens,
                prompt_tokens=prompt_tokens,
                token_bytes=token_bytes * self.pruned_layers * heads.size,
                other_bytes=other_bytes * self.pruned_layers * heads.size + stock_bytes,
                stock_bytes=stock_bytes,
                half_bytes=half_bytes,
                spare=2 * self.interval - 1 if self.interval else 0,
                generated=generated,
                source=queries,
                depth=self.depth,
                layers=self.pruned_layers,
                tallies=tallies.scoped(scope),
                rotary=self.rotary,
                outputs=self.outputs,
                heads=heads,
                passage=passage,
            )
            step.weights = part.row_weights(step)
            if not (step.weights is None or (isinstance(step.weights, RowWeights) and step.weights.is_whole)):
                raise PolicyError(
                    f"row_weights() of {part} returned {step.weights!r}: return RowWeights, made by uniform(count), "
                    "last_window(count), geometric(count, decay) or explicit(rows, weights), or None."
                )
            plans.append(Plan(part, table.scoped(scope), step, scope))
        return plans

    def costs(self, table: TokenTable) -> dict[str, int]:
        """What a row of a sequence costs: token_bytes and half_bytes of `Step`, of one sequence."""
        heads = self.heads.present(table.kv_heads)
        token_bytes = self._costs(table)[0] * self.pruned_layers * heads.size
        whole = {"token_bytes": token_bytes, "half_bytes": self._half_bytes(table, heads)}
        return {name: nbytes // table.batch_size for name, nbytes in whole.items()}

    def _half_bytes(self, table: TokenTable, heads: Heads) -> int:
        return table.kv_token_bytes * 2 // table.dims[2].itemsize * self.pruned_layers * heads.size

    def _costs(self, table: TokenTable) -> tuple[int, int]:
        """Bytes of one row of this layer, and of what is no row that a budget rules."""
        if not (self._own_codecs and self._evicts):  # then nobody asks what a packed row costs
            return table.token_bytes, 0
        sinks = ROTATED_SINKS if any(isinstance(codec, RotatedCodec) for codec in self._own_codecs) else 0
        waiting = self._buffer + sinks + _LEAST_ROOM + MOST_HOLES  # rows that go may all be of those that wait
        packed = max(table.packed_row_bytes(codec) for codec in self._own_codecs)  # any row may be one of many bits
        parameters = sum(table.block_bytes(codec) for codec in self._own_codecs)
        return packed, waiting * table.token_bytes + parameters

    def observe(
        self,
        plans: list[Plan],
        table: TokenTable,
        queries: Queries,
        scoring: Scoring,
        attended: Attended | None,
        earlier: Remembered | None,
    ) -> None:
        """Let the policies update their columns; links of a chain that weigh alike share the mass.

        attended: what attention found of these queries, if it has run. earlier: queries of earlier steps.
        """
        for number, plan in enumerate(plans):
            before = earlier if plan.policy.query_window > 1 else None
            plan.step.scoring = scoring
            plan.step.output = None if attended is None else attended.output
            plan.step.asked = Asked(queries, table, scoring, before)
            if plan.weights is not None:
                alike = next((other for other in plans[:number] if plan.weighs_like(other)), None)
                plan.step.weighed = (
                    alike.step.weighed
                    if alike
                    else queries.weigh(
                        table,
                        scoring,
                        plan.weights,
                        plan.policy.group,
                        attended=attended,
                        earlier=before,
                    )
                )
            plan.policy.prepare(plan.table, plan.step)
            plan.policy.observe(plan.table, plan.step)

    def query_window(self, prefill: bool) -> int:
        """Queries to remember: a policy that evicts nothing while decoding needs none once the prompt has ended."""
        return max([0, *(part.query_window for part in self.policies if prefill or part.interval)])


def _is_due(interval: int | None, generated: int | Tensor, added: int) -> bool:
    """Whether the tokens that were added have filled another interval."""
    if interval is None or isinstance(generated, Tensor):  # a step is compiled where every token is an interval
        return interval is not None
    return generated // interval != (generated - added) // interval
