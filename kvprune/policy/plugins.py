"""What installed packages, kvprune itself among them, offer under entry-point groups."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

from kvprune.errors import KVPruneError


def load(point: EntryPoint, error: type[KVPruneError]) -> Any:
    """What an entry point names. Raises `error`, with its package and the cause, where that cannot be imported."""
    try:
        return point.load()
    except Exception as cause:  # importing runs code of other packages, which may raise anything
        raise error(f"{title(point)} cannot be loaded: {type(cause).__name__}: {cause}") from cause


def title(point: EntryPoint) -> str:
    """An entry point and its package, for messages: `'peak' (my_policies:Peak, of the package my-policies)`."""
    package = "an unknown package" if point.dist is None else f"the package {point.dist.name}"
    return f"{point.name!r} ({point.value}, of {package})"
