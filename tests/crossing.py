"""Parametrisations: all combinations for `make test-long`, and few for `make test` that leave no value untried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pytest

Axis = Mapping[str, Any] | Sequence[Any]


def crossed(indirect: Sequence[str] = (), **axes: Axis) -> pytest.MarkDecorator:
    """Every combination of the values of two or more arguments; a mapping names its values.

    Marked long are those whose indices do not add up to a multiple of the length of the shortest axis. Without them,
    every value of two axes is in one combination at least, and of three axes every pair of values.
    """
    named = [_named(axis) for axis in axes.values()]
    shortest = min(map(len, named))
    combinations = []
    for indices in product(*map(range, map(len, named))):
        chosen = [axis[index] for axis, index in zip(named, indices, strict=True)]
        marks = [pytest.mark.long] if sum(indices) % shortest else []
        values = [value for _, value in chosen]
        combinations.append(pytest.param(*values, id="-".join(name for name, _ in chosen), marks=marks))
    return pytest.mark.parametrize(tuple(axes), combinations, indirect=list(indirect))


def mostly(argument: str, axis: Axis, *names: str) -> pytest.MarkDecorator:
    """Every value of an argument; all but those of these names are marked long."""
    named = _named(axis)
    unknown = {*names} - {name for name, _ in named}
    if unknown:
        raise ValueError(f"No values are called {sorted(unknown)}.")
    marked = [pytest.param(value, id=name, marks=[] if name in names else [pytest.mark.long]) for name, value in named]
    return pytest.mark.parametrize(argument, marked)


def _named(axis: Axis) -> list[tuple[str, Any]]:
    return list(axis.items()) if isinstance(axis, Mapping) else [(str(value), value) for value in axis]
