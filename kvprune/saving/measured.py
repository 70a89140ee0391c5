"""Files of what was measured once on a model: JSON that says what it is, and of which model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kvprune.errors import CacheError

_VERSION = 1


def write(path: str | os.PathLike[str], what: str, form: str, facts: dict[str, Any]) -> None:
    """Write facts that JSON can hold. what: their name in errors, form: in the file. Raises CacheError."""
    text = json.dumps({"format": form, "version": _VERSION, **facts}, indent=1)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CacheError(f"the {what} cannot be saved to {path}: {error}.") from error


def read(path: str | os.PathLike[str], what: str, form: str) -> dict[str, Any]:
    """The facts of a file that `write` wrote, "model" among them, a dict. Raises CacheError for any other."""
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"{path} cannot be loaded: {error}.") from error
    known = isinstance(facts, dict) and (facts.get("format"), facts.get("version")) == (form, _VERSION)
    if not known or not isinstance(facts.get("model"), dict):
        raise CacheError(f"{path} cannot be loaded: it holds no {what} that this kvprune saved.")
    return facts
