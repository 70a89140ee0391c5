"""What a policy is: a value with settings and four short methods. Everything it remembers lives in the table.

At every forward pass, prefill or decode, each layer asks its policy, in this order:

    row_weights(step)        which attention rows to weigh; the layer computes `step.mass` from them
    observe(table, step)     update the columns, e.g. add the mass to a score
    decide(table, step)      which rows stay, and which are packed at how many bits

Most policies rank rows by a score and keep the best: derive those from `Eviction` and write `columns`, `row_weights`
and `observe`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from kvprune.attention.mass import RowWeights
from kvprune.errors import PolicyError
from kvprune.policy.decision import Decision
from kvprune.policy.naming import SettingsType
from kvprune.policy.order import check_order
from kvprune.policy.replaying import Replay
from kvprune.policy.step import Step
from kvprune.table.quantize import Codec
from kvprune.table.token_table import TokenTable


@dataclass(frozen=True)
class Policy(metaclass=SettingsType):
    """Base of all policies: keeps everything and asks for nothing."""

    files = frozenset[str]()
    """Settings that may name a file: for text that a person writes, never for requests or saved caches."""

    def __post_init__(self) -> None:
        """Numbers of other kinds become ints and floats: numpy's wrap around, and no file can say Fraction(1, 3)."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Real) and type(value) not in (bool, int, float):
                object.__setattr__(self, each.name, int(value) if isinstance(value, Integral) else float(value))

    def note(self, prompt_tokens: tuple[int, ...], *, token_bytes: int, half_bytes: int) -> str | None:
        """What `cache.report()` says of prompts of so many tokens; costs are those of `Step`, of one sequence."""
        return None

    @property
    def interval(self) -> int | None:
        """Generated tokens from one decision to the next; None if generated tokens are never evicted."""
        return None

    @property
    def group(self) -> str:
        """How the mass of the query heads of a KV head is reduced: "mean" or "max"."""
        return "mean"

    @property
    def query_window(self) -> int:
        """How many of the newest queries `row_weights` may weigh, also those that earlier steps brought.

        With an `interval`, the window also spans generated tokens; without, it ends where they begin.
        """
        return 0

    @property
    def evicts(self) -> bool:
        """Whether it drops tokens that are in the cache."""
        return False

    @property
    def decides_together(self) -> bool:
        """Whether a prompt step is decided for all layers at once, by `decide_together`, when the last has seen it."""
        return False

    @property
    def renumbers(self) -> bool:
        """Whether queries see rows at their places in the cache, side by side, not where they were in the text."""
        return False

    @property
    def needs_question(self) -> bool:
        """Whether the last queries of a prompt decide what is dropped, so that a question has to be among them."""
        return False

    @property
    def heads_compete(self) -> bool:
        """Whether KV heads share out a layer's rows; a budget in bytes also pays for where each head's begin."""
        return False

    @property
    def static_decode(self) -> bool:
        """Whether, once sequences have reached their budget, every generated token costs one row: see `Steady`.

        Where steps are compiled, or recorded on a GPU, the policy runs once for all of them: `step.tokens` and
        `step.generated` are then tensors, and no value may be looked at.
        """
        return False

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """The codecs that it packs rows with; none for a policy that leaves them in full precision."""
        return ()

    def codecs_at(self, depth: int, layers: int) -> tuple[Codec, ...]:
        """Those of `codecs` that the layer of this number, among so many, packs rows with."""
        return self.codecs

    @property
    def buffer(self) -> int:
        """Of a policy that packs rows: most rows that wait in full precision while tokens are generated."""
        return 0

    @property
    def turns_back(self) -> bool:
        """Whether it asks `step.rotary` what queries or keys are before positions turn them."""
        return False

    @property
    def weighs_outputs(self) -> bool:
        """Whether it asks `step.outputs` what values become in the output of the layer."""
        return False

    @property
    def filters_prompt(self) -> bool:
        """Whether it shortens the prompt before the layers run, see `PromptFilter`: then it is the first of a chain."""
        return False

    @property
    def stops_tokens(self) -> bool:
        """Whether it lets tokens stop between layers, see `Cascade`: then it is the first of a chain."""
        return False

    def attach(self, cache: Any, model: Any) -> None:
        """Called once when a `PrunedCache` of this policy is made, before its model is switched to kvprune's attention.

        For policies that do something around a forward pass, see `kvprune.passes`. What it raises, making the cache
        raises.
        """

    @property
    def replay(self) -> Replay | None:
        """What is to be run again before it decides, and which of its columns that fills; None for no replay."""
        return None

    def columns(self) -> dict[str, torch.dtype]:
        """Extra columns of the table, zero for new rows."""
        return {}

    def all_columns(self) -> dict[str, torch.dtype]:
        """`columns`, and those that its base class keeps for it."""
        return self.columns()

    def buffer_columns(self) -> dict[str, torch.dtype]:
        """Extra columns of the rows in full precision, zero for new rows, gone when a row is packed."""
        return {}

    def tallies(self, query_heads: int, kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """What it remembers of a sequence beside its rows: float32 tensors of these shapes, zero when it begins.

        They are paid from a budget in bytes like rows. The numbers of heads are those of this process.
        """
        return {}

    def row_weights(self, step: Step) -> RowWeights | None:
        """Which attention rows to weigh into `step.mass`; None if the policy needs no attention."""
        return None

    def prepare(self, table: TokenTable, step: Step) -> None:
        """Update what its base class keeps; called before `observe`."""

    def observe(self, table: TokenTable, step: Step) -> None:
        """Update the columns."""

    def decide(self, table: TokenTable, step: Step) -> Decision | None:
        """Which rows stay; None keeps everything."""
        return None

    def pack(self, table: TokenTable, step: Step) -> Decision | None:
        """At what precision rows stay, asked when what `decide` said is done; None leaves them as they are."""
        return None

    def check(self, step: Step) -> None:
        """Raise BudgetError for a prompt step that it could not decide about; asked where the decision waits."""

    def decide_together(self, tables: list[TokenTable], steps: list[Step]) -> list[Decision | None]:
        """What `decide` says, for all pruned layers at once, after a prompt step."""
        return [self.decide(table, step) for table, step in zip(tables, steps, strict=True)]

    def with_representatives(self, chooser: Policy) -> Policy:
        """The same with a part of what it keeps chosen by another, see `Representatives`. Raises PolicyError."""
        raise PolicyError(
            f"{chooser} chooses among the rows that the link right before it would drop, which has to rank rows, and "
            f"can have but one of its kind behind it: write A2SF(0.25) | {chooser}."
        )

    def behind(self, before: Policy | None) -> tuple[Policy, ...]:
        """What to run where it is a link of a chain: for the link before it, if there is one, and for itself."""
        return (self,) if before is None else (before, self)

    def __or__(self, other: Policy) -> Chain:
        """Run this policy, then the other, at every step."""
        if not isinstance(other, Policy):
            return NotImplemented
        return Chain((self, other))

    def parts(self) -> tuple[Policy, ...]:
        """The policies to run one after the other: itself, or the links of a chain."""
        return (self,)

    def __str__(self) -> str:
        """The first setting and those that are not at their defaults: `A2SF(budget=0.25, kernel_size=7)`."""
        shown = [
            f"{field.name}={value!r}"
            for index, field in enumerate(fields(self))
            if (value := getattr(self, field.name)) != field.default or index == 0
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class Chain(Policy):
    """Several policies, run one after the other at every step. Made with `|`."""

    links: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        if not self.links or not all(isinstance(link, Policy) for link in self.links):
            raise PolicyError(f"a chain is made of policies, as in A2SF(0.5) | TOVA(0.25), not of {self.links!r}.")
        flat = tuple(part for link in self.links for part in (link.links if isinstance(link, Chain) else (link,)))
        check_order(flat)
        object.__setattr__(self, "links", flat)
        self.parts()  # raises for a link that finds nothing to stand behind

    def parts(self) -> tuple[Policy, ...]:
        parts: tuple[Policy, ...] = ()
        for link in self.links:
            before = parts[-1] if parts else None
            parts = (*parts[:-1], *link.behind(before))
        return parts

    def attach(self, cache: Any, model: Any) -> None:
        for part in self.parts():
            part.attach(cache, model)

    @property
    def filters_prompt(self) -> bool:
        return self.links[0].filters_prompt

    @property
    def evicts(self) -> bool:
        return any(link.evicts for link in self.links)

    @property
    def renumbers(self) -> bool:
        return any(link.renumbers for link in self.links)

    @property
    def needs_question(self) -> bool:
        return any(link.needs_question for link in self.links)

    @property
    def codecs(self) -> tuple[Codec, ...]:
        return tuple(codec for link in self.links for codec in link.codecs)

    @property
    def buffer(self) -> int:
        return sum(link.buffer for link in self.links)

    def __str__(self) -> str:
        return " | ".join(str(link) for link in self.links)


def per_sequence(counts: tuple[int, ...], device: torch.device) -> int | Tensor:
    """One int where all counts are equal, else a LongTensor `[B, 1, 1]`, to combine with `[B, Hkv, rows]`.

    The tensor is not to be written to: all layers of a step get the same one, so that it is copied to the device once.
    """
    if counts.count(counts[0]) == len(counts):
        return counts[0]
    return _on_device.__wrapped__(counts, device) if torch.compiler.is_compiling() else _on_device(counts, device)


@lru_cache(maxsize=16)
def _on_device(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device).view(-1, 1, 1)
