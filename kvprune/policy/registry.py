"""Policies by name, for the command line and for strings in other tools' arguments.

Packages register theirs under the entry-point group `kvprune.policies`; the built-in ones come the same way.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from contextlib import suppress
from dataclasses import fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from numbers import Integral, Real
from typing import Any

from kvprune.errors import PolicyError
from kvprune.policy import plugins
from kvprune.policy.base import Chain, Policy
from kvprune.policy.naming import settings_of
from kvprune.policy.shares import Share

GROUP = "kvprune.policies"


@cache
def _entry_points() -> dict[str, EntryPoint]:
    """By normalized name: packages may write theirs with hyphens and capitals."""
    return {_normalized(point.name): point for point in entry_points(group=GROUP)}


def _normalized(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def names() -> list[str]:
    """All names that `get` knows, sorted."""
    return sorted(_entry_points())


def find(name: str) -> type[Policy]:
    """The policy class of that name; capitals and hyphens do not matter.

    Raises PolicyError for a name that is not registered, and for an entry point that does not lead to a policy class.
    """
    if not isinstance(name, str):
        raise PolicyError(f'a policy is named by a string, such as "a2sf", not by {name!r}.')
    key = _normalized(name)
    if key not in _entry_points():
        close = difflib.get_close_matches(key, names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise PolicyError(f"there is no policy named {name!r}.{hint} Known names: {', '.join(names())}.")
    return _load(_entry_points()[key])


def _load(point: EntryPoint) -> type[Policy]:
    policy = plugins.load(point, PolicyError)
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise PolicyError(f"{plugins.title(point)} is no subclass of kvprune.Policy, but {policy!r}.")
    return policy


def get(name: str, /, **settings: Any) -> Policy:
    """A policy by name: `get("a2sf", budget=0.25)`.

    Raises PolicyError for an unknown name or setting, and for one that is missing.
    """
    return find(name)(**settings)


def parse(text: str, /, **defaults: Any) -> Policy:
    """A policy or a chain from text: "a2sf", "a2sf:budget=0.25,kernel_size=7", "a2sf:budget=0.5 | streaming_llm".

    What is in brackets is one value: a tuple such as "(2,4)", or a policy or share with settings of its own,
    "bits:score=snapkv(kernel_size=27,ahead=23)". A policy may be written that way too.

    A class that has no name is written with its module: "package.module:Class", "package.module:Class:setting=value".

    defaults: settings for every link that has such a setting and does not give it itself. Raises PolicyError.
    """
    if not isinstance(text, str):
        raise PolicyError(f'a policy is written as text, such as "a2sf:budget=0.5", not as {text!r}.')
    links = [_parse_link(link, defaults) for link in text.split("|")]
    return links[0] if len(links) == 1 else Chain(tuple(links))


def takes_budget(text: str) -> bool:
    """Whether the policy of a text leaves it to `parse(text, budget=...)` how much it keeps. Raises PolicyError."""
    return parse(text, budget=0.25) != parse(text, budget=0.5)


def _parse_link(text: str, defaults: dict[str, Any]) -> Policy:
    if (inner := re.fullmatch(r"\s*([\w:.]+)\((.*)\)\s*", text)) is not None:
        text = f"{inner[1]}:{inner[2]}" if inner[2].strip() else inner[1]
    name, colon, rest = text.partition(":")
    own, own_colon, own_rest = rest.partition(":")
    if own.strip().isidentifier() and _normalized(name) not in _entry_points():
        policy, colon, rest = _own(name.strip(), own.strip()), own_colon, own_rest
    else:
        policy = find(name)
    known = settings_of(policy)
    settings = {setting: value for setting, value in defaults.items() if setting in known}
    for item in _separated(rest) if colon else ():
        setting, equals, value = (part.strip() for part in item.partition("="))
        if not (setting and equals and value):
            raise PolicyError(f"cannot read {item!r} in {text!r}: write settings as name:setting=value,setting=value.")
        settings[setting] = _value(value)
    return policy(**settings)


def _own(module: str, name: str) -> type[Policy]:
    """A policy class that is not registered, by its module and name: for text that a person writes, never for files."""
    written = f"{module}:{name}"
    try:
        policy = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PolicyError(f"there is no policy {written!r} ({error}): write package.module:Class.") from error
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise PolicyError(f"{written} is no subclass of kvprune.Policy, but {policy!r}.")
    return policy


def _separated(text: str) -> list[str]:
    """What stands between commas, but for those in brackets: they are of a share's settings, or another policy's."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    return items


def _value(text: str) -> Any:
    """`"7"` -> 7, `"0.5"` -> 0.5, `"none"` -> None, `"true"` -> True, `"(2,4)"` -> (2, 4), anything else as it is."""
    if text.startswith("(") and text.endswith(")"):
        return tuple(_value(item.strip()) for item in _separated(text[1:-1]) if item.strip())
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return {"none": None, "true": True, "false": False}.get(text.lower(), text)


# -- policies as plain data --------------------------------------------------------------------------------------------


def described(policy: Policy) -> Any:
    """A policy and all its settings as JSON: an object with `policy` and `settings`, or of a chain a list of them.

    A class that is not registered goes by its module and name, and only its owner can make a policy of it again. Raises
    PolicyError for a setting that is no number, text, truth value, None, or a tuple of those.
    """
    if isinstance(policy, Chain):
        return [described(link) for link in policy.links]
    settings = {field.name: _plain(policy, field.name) for field in fields(policy) if field.init}
    return {"policy": _name_of(type(policy)), "settings": settings}


def from_description(description: Any) -> Policy:
    """The policy that `described` described. Nothing is imported but what is registered.

    Raises PolicyError for a policy that is not registered, and for what describes none.
    """
    if isinstance(description, list):
        return Chain(tuple(from_description(link) for link in description))
    if not isinstance(description, dict) or description.keys() != {"policy", "settings"}:
        raise PolicyError(f"{description!r} describes no policy.")
    name, settings = description["policy"], description["settings"]
    if not isinstance(name, str) or not isinstance(settings, dict):
        raise PolicyError(f"{description!r} describes no policy.")
    if any(isinstance(settings.get(each), str) for each in find(name).files):
        raise PolicyError(f"{name} names a file, and saved caches hold what such a file says themselves.")
    try:
        return get(name, **{setting: _hashable(value) for setting, value in settings.items()})
    except PolicyError:
        raise
    except Exception as error:  # whatever a class of somebody else makes of settings that it has never had
        raise PolicyError(f"{name} cannot have the settings {settings!r}: {error}") from error


def _name_of(policy: type[Policy]) -> str:
    """The name it is registered under, else its module and name."""
    for name, point in _entry_points().items():
        if point.module not in sys.modules:  # then no policy of it can exist
            continue
        with suppress(PolicyError):  # a broken entry point of another package is not this policy's
            if _load(point) is policy:
                return name
    return f"{policy.__module__}:{policy.__qualname__}"


def _plain(policy: Policy, setting: str) -> Any:
    try:
        return _as_json(getattr(policy, setting))
    except TypeError as error:
        raise PolicyError(
            f"{type(policy).__name__} cannot be written down: its setting {setting} is {error}, and should be a "
            "number, text, True, False, None, or a tuple of those."
        ) from None


def _as_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Share):
        return str(value)
    if isinstance(value, Policy):  # whose scores another takes
        return described(value)
    if isinstance(value, tuple):
        return [_as_json(each) for each in value]
    if isinstance(value, Integral | Real):  # of numpy, too
        return int(value) if isinstance(value, Integral) else float(value)
    raise TypeError(repr(value))


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return from_description(value)
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
