"""What a server counts, as text that Prometheus reads. Nothing here is made of what a prompt says."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Self

_KNOWN = {
    "requests_total": ("counter", "Requests that were answered, called off, refused, or failed, by outcome."),
    "prompt_tokens_total": ("counter", "Tokens of prompts that were answered, prefixes included."),
    "completion_tokens_total": ("counter", "Tokens that were generated."),
    "prefills_total": ("counter", "Answers begun after a prefix, by where it came from: read, memory, disk."),
    "prefill_tokens_saved_total": ("counter", "Tokens of their prefixes that did not have to be read again."),
    "evictions_total": ("counter", "Prefixes that left a store for want of room: memory, disk."),
    "damaged_total": ("counter", "Times that a file of a prefix could not be read, and the prefix was read anew."),
    "batches_total": ("counter", "Batches that began to be written, by how many requests each began with."),
    "first_token_seconds_sum": ("counter", "Seconds from a request to its first token, added up."),
    "first_token_seconds_count": ("counter", "Requests that got a first token."),
    "waiting": ("gauge", "Requests that wait."),
    "running": ("gauge", "Requests that are being answered."),
    "kept_bytes": ("gauge", "Bytes of caches, by what holds them: running, memory, disk."),
    "prefixes": ("gauge", "Prefixes that are held: memory, disk."),
}
_LABELS = {
    "batches_total": "requests",
    "requests_total": "outcome",
    "prefills_total": "source",
    "evictions_total": "store",
    "kept_bytes": "store",
    "prefixes": "store",
}


class Metrics:
    """Counters and gauges, safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, str], float] = {}

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        """Add to a counter or a gauge."""
        with self._lock:
            self._values[name, label] = self._values.get((name, label), 0) + amount

    def put(self, name: str, value: float, label: str = "") -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name, label] = value

    def value(self, name: str, label: str = "") -> float:
        """What a counter or gauge is at."""
        with self._lock:
            return self._values.get((name, label), 0)

    def values(self) -> dict[tuple[str, str], float]:
        """All of them, by name and label."""
        with self._lock:
            return dict(self._values)

    @classmethod
    def added_up(cls, several: Iterable[dict[tuple[str, str], float]]) -> Self:
        """What several servers count, by the `values` of each. The files of a folder that they share count once."""
        made = cls()
        for values in several:
            for (name, label), value in values.items():
                if _KNOWN[name][0] == "gauge" and label == "disk":
                    made.put(name, max(value, made.value(name, label)), label)
                else:
                    made.add(name, value, label)
        return made

    def __str__(self) -> str:
        values = self.values()
        lines = []
        for name, (kind, meaning) in _KNOWN.items():
            lines += [f"# HELP kvprune_{name} {meaning}", f"# TYPE kvprune_{name} {kind}"]
            found = sorted((label, value) for (of, label), value in values.items() if of == name)
            for label, value in found or ([] if name in _LABELS else [("", 0.0)]):
                braces = f'{{{_LABELS[name]}="{label}"}}' if label else ""
                lines.append(f"kvprune_{name}{braces} {value:.10g}")
        return "\n".join(lines) + "\n"
