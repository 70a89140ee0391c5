"""Shares: who gets how many rows of a budget, the KV heads of a layer, the layers, or all of them together.

A budget says how many rows a KV head keeps on average; a policy ranks the rows of a head; a share says how many of its
best ones each head keeps. Any policy that ranks rows takes one: `A2SF(0.25, share=Adaptive(floor=0.2))`.

    Uniform       every head of every layer keeps as many
    Pyramid       the first layers keep more than the last ones, by a rule
    Adaptive      the heads of a layer compete: rows go where the scores are
    Everywhere    so do all heads of all layers, once the last layer has seen the whole prompt

Where heads compete, their scores are compared, and have to mean the same in each of them. So they do where they are
attention mass, of which every query has as much to give in every head and layer: A2SF, H2O, SnapKV, Keyformer. Scores
of other units (norms of keys, cosines, products) say nothing across heads as they are; `normalize` brings them to one
scale first. It changes what heads get, never which rows of a head are its best.

    None     as they are
    "sum"    the scores of a head add up to 1
    "max"    the largest score of a head is 1
    "z"      mean 0 and variance 1 in every head

Sinks and the recent window are kept by every head, are part of what it gets, and take no part in these.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvprune.errors import PolicyError

NORMALIZATIONS = (None, "sum", "max", "z")
NEVER_KEPT = torch.iinfo(torch.int64).min
ALWAYS_KEPT = torch.iinfo(torch.int64).max


@dataclass(frozen=True, repr=False)
class Share:
    """Base of all shares. Frozen settings; subclass it to give rows by another rule."""

    scope: ClassVar[str] = "head"
    """Who competes for rows: nobody ("head"), the KV heads of a layer ("layer"), or those of all layers ("model")."""

    def of_layer(self, tokens: int, *, depth: int, layers: int, prompt_tokens: int, least: int) -> int:
        """Rows per KV head of one layer, of a budget of `tokens` rows per KV head on average over the layers.

        depth: number of the layer among the `layers` that share a budget, from 0. prompt_tokens: of the sequence.
        least: rows that every head keeps: sinks and recent window. Over all depths the results add up to
        `layers * tokens`.
        """
        return tokens

    def normalized(self, scores: Tensor, candidates: Tensor) -> Tensor:
        """Scores `[B, H, rows]` for comparing heads, as exact as they come. candidates: bool, rows not kept anyway."""
        return scores

    def counts(self, ranks: Tensor, capacity: Tensor) -> Tensor:
        """Rows that every head keeps, LongTensor `[B, H]`.

        ranks: int64 `[B, H, rows]`, the larger the better; `ALWAYS_KEPT`, `NEVER_KEPT` for rows that are none. H: the
        heads that compete. capacity: LongTensor `[B, 1 or H]`, rows per head on average.
        """
        return torch.minimum(capacity, (ranks > NEVER_KEPT).sum(-1))

    def __repr__(self) -> str:
        """The first setting and those that are not at their defaults; `parse` reads it."""
        shown = [
            f"{field.name}={value!r}"
            for index, field in enumerate(fields(self))
            if (value := getattr(self, field.name)) != field.default or index == 0
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def parse(cls, text: str) -> Share:
        """A share from text: "adaptive", "Adaptive(floor=0.2)", "pyramid(beta=10)". Raises PolicyError."""
        match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
        known = {kind.__name__.lower(): kind for kind in _kinds(cls)}
        kind = known.get(match[1].lower()) if match else None
        if match is None or kind is None:
            names = ", ".join(sorted(each.__name__ for each in known.values()))
            raise PolicyError(f"there is no share {text!r}: write one of {names}, as in Adaptive(floor=0.2).")
        settings = {}
        for item in filter(None, map(str.strip, (match[2] or "").split(","))):
            name, _, value = (part.strip() for part in item.partition("="))
            if name not in {field.name for field in fields(kind)}:
                raise PolicyError(f"{kind.__name__} has no setting {name!r}, in {text!r}.")
            settings[name] = _value(value)
        return kind(**settings)


@dataclass(frozen=True, repr=False)
class Uniform(Share):
    """Every KV head of every layer keeps as many rows: the budget."""


UNIFORM = Uniform()


@dataclass(frozen=True, repr=False)
class Pyramid(Share):
    """PyramidKV: rows per head fall linearly with depth. Cai et al., arXiv 2406.02069, 2024.

    Beside sinks and recent window, W rows, of a budget of C the last layer gets (C - W) / beta rows, and the first as
    many more than C - W as the last gets less; if that is more than a prompt has, the first gets all of it and the
    others share the rest. Rounded by largest remainder, so that the layers keep the budget exactly, on average.

    beta: at least 1, where all layers get the same.
    """

    beta: float = 20

    def __post_init__(self) -> None:
        if isinstance(self.beta, bool) or not isinstance(self.beta, int | float) or not 1 <= self.beta < math.inf:
            raise PolicyError(f"beta must be a number of at least 1, not {self.beta!r}.")

    def of_layer(self, tokens: int, *, depth: int, layers: int, prompt_tokens: int, least: int) -> int:
        shared = tokens - least
        if layers == 1 or shared <= 0 or prompt_tokens <= tokens:
            return tokens
        low = shared / self.beta
        high = min(2 * shared - low, prompt_tokens - least)
        low = 2 * shared - high
        exact = [high - (high - low) * layer / (layers - 1) for layer in range(layers)]
        whole = [math.floor(each + 1e-9) for each in exact]
        # Of equal remainders the earlier layer comes first, so that no layer gets more than one before it.
        order = sorted(range(layers), key=lambda layer: (whole[layer] - exact[layer], layer))
        return least + whole[depth] + (depth in order[: layers * shared - sum(whole)])


@dataclass(frozen=True, repr=False)
class Adaptive(Share):
    """AdaKV: the heads of a layer compete for its rows. Feng et al., arXiv 2407.11550, NeurIPS 2025.

    Of H heads with a budget of C rows each, the best H * C rows of all heads are counted, and head h gets

        floor * C  +  (1 - floor) * (how many of them are its own)

    rounded by largest remainder, so that a layer keeps H * C rows exactly.

    Settings:
        floor: in [0, 1], the share of the budget that every head gets whatever its scores; 1 is `Uniform`.
        normalize: None, "sum", "max" or "z": how scores of different heads are made comparable, see this module.

    Where a prompt fits into its budget, each head may grow by as many rows until the budget is reached.
    """

    floor: float = 0.2
    normalize: str | None = None

    scope: ClassVar[str] = "layer"

    def __post_init__(self) -> None:
        if isinstance(self.floor, bool) or not isinstance(self.floor, int | float) or not 0 <= self.floor <= 1:
            raise PolicyError(f"floor must be a number from 0 to 1, not {self.floor!r}.")
        if self.normalize not in NORMALIZATIONS:
            raise PolicyError(
                f"normalize must be one of {', '.join(map(repr, NORMALIZATIONS))}, not {self.normalize!r}."
            )

    def normalized(self, scores: Tensor, candidates: Tensor) -> Tensor:
        if self.normalize is None:
            return scores
        finite = candidates & scores.isfinite()
        known = torch.where(finite, scores, 0.0).double()  # a sum over many rows is to be that of each head alone
        if self.normalize == "max":
            scale = known.masked_fill(~finite, -math.inf).amax(-1, keepdim=True)
            return (scores / _divisor(scale)).to(scores.dtype)
        if self.normalize == "sum":
            return (scores / _divisor(known.sum(-1, keepdim=True))).to(scores.dtype)
        count = finite.sum(-1, keepdim=True).clamp(min=1)
        mean = known.sum(-1, keepdim=True) / count
        variance = torch.where(finite, known - mean, 0.0).square().sum(-1, keepdim=True) / count
        return ((scores - mean) / _divisor(variance.sqrt())).to(scores.dtype)

    def counts(self, ranks: Tensor, capacity: Tensor) -> Tensor:
        heads = ranks.shape[1]
        held = (ranks > NEVER_KEPT).sum(-1)
        total = torch.minimum(capacity.expand_as(held).sum(1), held.sum(1))
        own = _among_best(ranks, total)
        if self.floor == 0:
            return own
        exact = self.floor * capacity.double() + (1 - self.floor) * own
        whole = (exact + 1e-9).floor()
        missing = total - whole.sum(1).long()
        remainder = (exact - whole).argsort(dim=1, descending=True, stable=True)  # of equal ones the first head
        extra = torch.arange(heads, device=ranks.device) < missing[:, None]
        quota = whole.long().scatter_add(1, remainder, extra.long())
        # A head may hold fewer rows than it is given: what it leaves goes to the best of all other rows.
        quota = torch.minimum(quota, held)
        left = total - quota.sum(1)
        if bool((left > 0).any()):
            by_rank = ranks.sort(dim=-1, descending=True).values
            taken = torch.arange(ranks.shape[2], device=ranks.device) < quota[..., None]
            quota = quota + _among_best(by_rank.masked_fill(taken, NEVER_KEPT), left)
        return torch.where((total == held.sum(1))[:, None], held, quota)


@dataclass(frozen=True, repr=False)
class Everywhere(Adaptive):
    """The heads of all layers compete for all rows: what `Adaptive` does over a layer, over the whole model.

    Nothing can be dropped before the last layer has seen the whole prompt, so the peak of memory is that of the prompt
    in full. From there on every head keeps as many rows as it was given.

    floor, normalize: as of `Adaptive`. Layers of very different scores starve without a floor.
    """

    floor: float = 0.0

    scope: ClassVar[str] = "model"


def _divisor(scale: Tensor) -> Tensor:
    """Where there is nothing to divide by, 1."""
    return torch.where(scale.isfinite() & (scale.abs() > 1e-30), scale, 1.0)


def _among_best(ranks: Tensor, count: Tensor) -> Tensor:
    """How many of the `count` `[B]` best rows of all heads belong to each, `[B, H]`; of equal ones the first head's."""
    batch, heads, rows = ranks.shape
    order = ranks.flatten(1).sort(dim=1, descending=True, stable=True).indices
    chosen = torch.arange(heads * rows, device=ranks.device) < count[:, None]
    return torch.zeros(batch, heads, dtype=torch.int64, device=ranks.device).scatter_add_(
        1, order // max(rows, 1), chosen.long()
    )


def _kinds(base: type[Share]) -> list[type[Share]]:
    """All subclasses there are, the newest of a name last."""
    return [kind for child in base.__subclasses__() for kind in (child, *_kinds(child))]


def _value(text: str) -> Any:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    plain = text.strip("'\"")
    return None if plain.lower() == "none" else plain
