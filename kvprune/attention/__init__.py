"""Attention over a table, exact, and the one statistic of it that nearly every published score is made of.

    queries      the queries of one step: what they see of a table, their output, and the mass they give to its rows
    softmax      outputs over rows in full precision; packed: over packed rows; backends: what a prompt runs on
    mass         `attention_mass`, which rows it weighs (`RowWeights`), and how a model scores (`Scoring`)
    asked        attention row by row, for policies that look at more than weighted sums of it
    outputs      what values become in the output of their layer
    noise        noise on logits, the same wherever it is asked for; neighbours: scores over positions side by side
    operations   `AttentionOperations`: what of this has faster implementations in `kvprune.kernels`

Shapes: see `kvprune.table`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from kvprune.attention.mass import RowWeights, Scoring, attention_mass

__all__ = ["RowWeights", "Scoring", "attention_mass"]


class _Callable(ModuleType):
    """`kvprune.attention(model)` is a context manager, under the name of the room in which attention is computed."""

    def __call__(self, model: Any) -> Any:
        return import_module("kvprune.cache.models").attention(model)


sys.modules[__name__].__class__ = _Callable
