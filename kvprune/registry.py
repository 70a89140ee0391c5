"""Policies by name, for the command line and for strings in other tools' arguments.

Packages register theirs under the entry-point group `kvprune.policies`; the built-in ones come the same way.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kvprune.errors import PolicyError
from kvprune.policy import Chain, Policy

GROUP = "kvprune.policies"


@cache
def _entry_points() -> dict[str, EntryPoint]:
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
    policy: type[Policy] = _entry_points()[key].load()
    return policy


def get(name: str, **settings: Any) -> Policy:
    """A policy by name: `get("a2sf", budget=0.25)`. Raises PolicyError for an unknown name or setting."""
    policy = find(name)
    known = [field.name for field in fields(policy)]
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise PolicyError(
            f"{policy.__name__} has no setting {', '.join(map(repr, unknown))}; it has: {', '.join(known) or 'none'}."
        )
    return policy(**settings)


def parse(text: str, **defaults: Any) -> Policy:
    """A policy or a chain from text: "a2sf", "a2sf:budget=0.25,kernel_size=7", "a2sf:budget=0.5 | streaming_llm".

    defaults: settings for every link that has such a setting and does not give it itself. Raises PolicyError.
    """
    links = [_parse_link(link, defaults) for link in text.split("|")]
    return links[0] if len(links) == 1 else Chain(tuple(links))


def _parse_link(text: str, defaults: dict[str, Any]) -> Policy:
    name, colon, rest = text.partition(":")
    known = {field.name for field in fields(find(name))}
    settings = {setting: value for setting, value in defaults.items() if setting in known}
    for item in rest.split(",") if colon else ():
        setting, equals, value = (part.strip() for part in item.partition("="))
        if not (setting and equals and value):
            raise PolicyError(f"cannot read {item!r} in {text!r}: write settings as name:setting=value,setting=value.")
        settings[setting] = _value(value)
    return get(name, **settings)


def _value(text: str) -> Any:
    """`"7"` -> 7, `"0.5"` -> 0.5, `"none"` -> None, `"true"` -> True, `"false"` -> False, anything else as it is."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    words = {"none": None, "true": True, "false": False}
    return words.get(text.lower(), text)
