"""Policies by name, for the command line and for strings in other tools' arguments.

Packages register theirs under the entry-point group `kvprune.policies`; the built-in ones come the same way.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from kvprune.errors import PolicyError
from kvprune.policy import Policy

GROUP = "kvprune.policies"


@cache
def _entry_points() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """All names that `get` knows, sorted."""
    return sorted(_entry_points())


def find(name: str) -> type[Policy]:
    """The policy class of that name. Raises PolicyError for a name that is not registered."""
    key = name.strip().lower().replace("-", "_")
    if key not in _entry_points():
        close = difflib.get_close_matches(key, names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise PolicyError(f"there is no policy named {name!r}.{hint} Known names: {', '.join(names())}.")
    return _entry_points()[key].load()


def get(name: str, **settings: Any) -> Policy:
    """A policy by name: `get("a2sf", budget=0.25)`. Raises PolicyError for an unknown name or setting."""
    policy = find(name)
    unknown = settings.keys() - policy.__dataclass_fields__.keys()
    if unknown:
        raise PolicyError(
            f"{policy.__name__} has no setting {', '.join(map(repr, sorted(unknown)))}; "
            f"it has: {', '.join(policy.__dataclass_fields__)}."
        )
    return policy(**settings)
