"""The settings of a policy class: their defaults, what they mean, and mistakes in their names."""

from __future__ import annotations

import difflib
import re
from abc import ABCMeta
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from kvprune.errors import PolicyError

# "high_bits, low_bits: 2, 3, 4 or 8.", at the beginning or behind the end of a sentence
_ENTRY = re.compile(r"(?:^|(?<=\. ))(?P<names>[a-z_]+(?:, [a-z_]+)*): ")


def settings_of(policy: type) -> dict[str, Any]:
    """The settings of a policy class and their defaults; `dataclasses.MISSING` for one that must be given."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(policy)
        if field.init
    }


def meanings(policy: type) -> dict[str, str]:
    """What each setting of a policy class means: the entries under "Settings" in its docstring and its bases'."""
    found: dict[str, str] = {}
    for base in policy.__mro__:
        _, _, text = (base.__doc__ or "").partition("Settings")
        text = " ".join(text.partition("\n\n")[0].partition(":\n")[2].split())
        entries = list(_ENTRY.finditer(text))
        ends = [entry.start() for entry in entries[1:]] + [len(text)]
        for entry, end in zip(entries, ends, strict=False):  # no entries, one end
            for name in entry["names"].split(", "):
                found.setdefault(name, text[entry.end() : end].strip(" ."))
    return {name: found.get(name, "") for name in settings_of(policy)}


def check_names(policy: type, given: Iterable[str], positional: int = 0) -> None:
    """Raise PolicyError for a setting that the class does not have, and for one without a default that is missing.

    given: names of settings. positional: how many were given without a name.
    """
    known = settings_of(policy)
    unknown = [name for name in given if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        raise PolicyError(
            f"{policy.__name__} has no setting {', '.join(map(repr, unknown))}; "
            + (f"did you mean {close[0]!r}? It has: " if close else "it has: ")
            + f"{', '.join(known) or 'none'}."
        )
    missing = [
        name for place, (name, default) in enumerate(known.items())
        if default is MISSING and name not in given and place >= positional
    ]  # fmt: skip
    if missing:
        raise PolicyError(f"{policy.__name__} has no default for {', '.join(missing)}: give a value.")


class SettingsType(ABCMeta):
    """The class of policy classes, so that a typing mistake in Python is answered as on the command line."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        """Raises PolicyError for a setting that is not known or missing, TypeError as any class does."""
        try:
            return super().__call__(*args, **settings)
        except TypeError:
            if is_dataclass(cls):
                check_names(cls, settings, len(args))
            raise
