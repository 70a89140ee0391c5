"""Evaluations that integrations bring. They are found by entry point, since nothing below imports an integration."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from kvprune.errors import EvaluationError
from kvprune.policy import plugins

GROUP = "kvprune.evaluations"


def integration(name: str) -> Any:
    """What is registered under a name of the group `kvprune.evaluations`.

    Raises EvaluationError where nothing is, and where that cannot be imported, as with a missing optional dependency.
    """
    points = tuple(entry_points(group=GROUP, name=name))
    if not points:
        raise EvaluationError(
            f"no installed package registers {name!r} under {GROUP}: if kvprune was updated in place, install it "
            "again, since entry points are read at installation."
        )
    return plugins.load(points[0], EvaluationError)
