"""What `quality.py` measured, as tables, and the places of a report that the tables go to."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from likelihood import Result, standard_error
from rich.table import Table

from kvprune.errors import KVPruneError
from measuring.asking import Answered
from printing.output import table

FULL = "full cache"
KNOWN = {True: "known", False: "unknown"}
_ERROR = "± standard error over the questions."


@dataclass(frozen=True)
class Row:
    """Answers of one policy or press. budget: a fraction of the prompt; None for those that have none."""

    name: str
    budget: float | None
    known: bool
    answered: Answered

    def shares(self, first: int) -> list[float]:
        """For each question, the share of words predicted, from the one of index `first` on."""
        return [statistics.mean(words[first:]) for words in self.answered.right]

    def to_dict(self, full: Answered, itemsize: int) -> dict[str, Any]:
        """full: of the full cache, with numbers of `itemsize` bytes. right: 1 for each word predicted, by question."""
        words = {"recall": 1} if self.known else {"recall": 1, "recall_three_words": 0}
        return {
            "name": self.name,
            "budget": self.budget,
            "question": KNOWN[self.known],
            **{name: statistics.mean(self.shares(first)) for name, first in words.items()},
            **{f"{name}_error": standard_error(self.shares(first)) for name, first in words.items()},
            "kept": self.answered.kept,
            "nbytes": self.answered.nbytes,
            "ratio": self.answered.nbytes / full.nbytes,
            "half_ratio": self.answered.nbytes / full.nbytes * itemsize / 2,
            "right": " ".join("".join(str(int(word)) for word in words) for words in self.answered.right),
        }


class Rows:
    """Of a run, to be found by name, budget, and whether the question was known."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {(row.name, row.budget, row.known): row for row in rows}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def get(self, name: str, budget: float | None, known: bool) -> Row | None:
        return self._rows.get((name, budget, known))

    def full(self, known: bool) -> Row:
        return self._rows[FULL, None, known]


def share(values: Sequence[float], sign: str = "") -> str:
    """A mean with its standard error, in percent; with a sign where it is a difference."""
    error = standard_error(list(values))
    shown = f"{100 * statistics.mean(values):{sign}.0f}"
    return f"{shown}%" if error is None else f"{shown} ± {100 * error:.0f}%"


def by_budget(rows: Rows, names: Sequence[str], budgets: Sequence[float], *, known: bool, first: int) -> Table:
    """Recall of the policies that evict, counted from the word of index `first` on."""
    words = "words 2 and 3" if first else "all three words"
    shown = table(
        f"Recall, question {KNOWN[known]} at compression, {words}",
        f"{_ERROR} Full cache: {share(rows.full(known).shares(first))}.",
        "policy",
        *(f"{budget:.0%}" for budget in budgets),
    )
    for name in names:
        cells = [rows.get(name, budget, known) for budget in budgets]
        shown.add_row(name, *("" if row is None else share(row.shares(first)) for row in cells))
    return shown


def bytes_by_budget(rows: Rows, names: Sequence[str], budgets: Sequence[float], itemsize: int) -> Table:
    """Bytes of a sequence against a dense cache."""
    shown = table(
        "Bytes",
        "Of a sequence at the end of its answer, measured, everything included, to those of a dense cache in the "
        "model's type, float32; in brackets to one in 16 bits.",
        "policy",
        *(f"{budget:.0%}" for budget in budgets),
    )
    full = rows.full(True).answered.nbytes
    for name in names:
        cells = [rows.get(name, budget, True) for budget in budgets]
        shown.add_row(name, *("" if row is None else _ratio(row.answered.nbytes / full, itemsize) for row in cells))
    return shown


def at_as_many_bytes(rows: Rows, names: Sequence[str], shares: Sequence[float], *, known: bool) -> Table:
    """Recall of rows against bits, everyone in 16 bits a number; those that take no budget in the first column."""
    first = int(known)
    shown = table(
        f"At as many bytes, question {KNOWN[known]} at compression, {'words 2 and 3' if known else 'all three words'}",
        f"{_ERROR} Model and caches are bfloat16. `bits` is given a share of the bytes, eviction of the rows; those "
        "that keep every row stand in the first column. In brackets: bytes at the end of the answer, everything "
        "included, of a full cache's.",
        "policy",
        *(f"{each:.0%}" for each in shares),
    )
    full = rows.full(known)
    for name in (FULL, *names):
        alone = rows.get(name, None, known)
        cells = [rows.get(name, each, known) for each in shares] if alone is None else [alone]
        shown.add_row(
            name,
            *(
                "" if row is None else f"{share(row.shares(first))} ({row.answered.nbytes / full.answered.nbytes:.1%})"
                for row in cells
            ),
        )
    return shown


def by_length(of_words: Mapping[int, Rows], names: Sequence[str], budgets: Sequence[float], *, known: bool) -> Table:
    """Recall of answers of so many words; those that take no budget come last."""
    first = int(known)
    fulls = ", ".join(f"{words}: {share(rows.full(known).shares(first))}" for words, rows in of_words.items())
    shown = table(
        f"Answers of several lengths, question {KNOWN[known]} at compression",
        f"Words {'from the second on' if known else 'of the answer'}, {_ERROR} Full cache: {fulls}.",
        "policy",
        "budget",
        *(f"{words} words" for words in of_words),
    )
    for budget in (*budgets, None):
        for name in names:
            found = [rows.get(name, budget, known) for rows in of_words.values()]
            if any(found):
                cells = ("" if row is None else share(row.shares(first)) for row in found)
                shown.add_row(name, "" if budget is None else f"{budget:.0%}", *cells)
    return shown


def _ratio(ratio: float, itemsize: int) -> str:
    return f"{ratio:.1%} ({ratio * itemsize / 2:.1%})"


def packing(rows: Rows, names: Sequence[str], itemsize: int) -> Table:
    """Recall and bytes of the policies that quantize."""
    shown = table(
        "Fewer bits",
        f"{_ERROR} Bytes as in the table above.",
        "policy", "known, words 2 and 3", "unknown, all three words", "unknown, words 2 and 3", "bytes",
    )  # fmt: skip
    full = rows.full(True).answered.nbytes
    for name in (FULL, *names):
        known, unknown = rows.get(name, None, True), rows.get(name, None, False)
        if known and unknown:
            recalls = (share(known.shares(1)), share(unknown.shares(0)), share(unknown.shares(1)))
            shown.add_row(name, *recalls, _ratio(known.answered.nbytes / full, itemsize))
    return shown


def side_by_side(rows: Rows, trios: Sequence[tuple[str, str, str]], budgets: Sequence[float], *, known: bool) -> Table:
    """Policies beside presses. trios: a policy, a policy with the rule of the press, and the press."""
    everything = (rows.get(press, 1.0, known) for _, _, press in trios)
    unpressed = ", ".join(f"{row.name} {share(row.shares(1))}" for row in everything if row)
    shown = table(
        f"kvprune beside kvpress, question {KNOWN[known]} at compression, words 2 and 3",
        "kept: tokens per KV head just after the compression. difference: policy less press, question by question, "
        f"{_ERROR} press' rule: the policy set, or changed, to rank as the press does. "
        f"Full cache: {share(rows.full(known).shares(1))}; told to keep everything: {unpressed}.",
        "policy", "press", "budget", "kvprune", "kept", "press' rule", "kvpress", "kept", "difference",
    )  # fmt: skip
    for policy, twin, press in trios:
        for budget in budgets:
            mine, same, theirs = (rows.get(name, budget, known) for name in (policy, twin, press))
            if mine and same and theirs:
                pairs = zip(mine.shares(1), theirs.shares(1), strict=True)
                shown.add_row(
                    policy, press, f"{budget:.0%}", share(mine.shares(1)), f"{mine.answered.kept:.0f}",
                    share(same.shares(1)), share(theirs.shares(1)), f"{theirs.answered.kept:.0f}",
                    share([ours - other for ours, other in pairs], "+"),
                )  # fmt: skip
    return shown


def likelihoods(results: Sequence[Result]) -> Table:
    """Of `likelihood.measure`."""
    shown = table(
        "Likelihood",
        "nats per token, ± standard error over the texts; top-1: share of tokens on which the first choice is that of "
        "the full cache. Budgets are fractions of the prompt, which is half of the text.",
        "policy", "change of NLL", "KL", "top-1",
    )  # fmt: skip
    for result in results:
        error = "" if result.nll_error is None else f" ± {result.nll_error:.4f}"
        shown.add_row(result.policy, f"{result.nll_change:+.4f}{error}", f"{result.kl:.4f}", f"{result.agreement:.1%}")
    return shown


def marker(name: str) -> str:
    """What a table of that name stands behind in a report."""
    return f"<!-- measured: {name} -->"


def fill(text: str, parts: Mapping[str, str]) -> str:
    """A report with what stands between `<!-- measured: NAME -->` and `<!-- /measured -->` replaced, for every name.

    Raises KVPruneError for a name that has no such place.
    """
    for name, part in parts.items():
        between = re.compile(rf"({re.escape(marker(name))}\n).*?(<!-- /measured -->)", re.DOTALL)
        text, found = between.subn(partial(_between, part), text)
        if not found:
            raise KVPruneError(
                f"the report has no place for {name!r}: write the lines {marker(name)} and <!-- /measured --> where it "
                "belongs."
            )
    return text


def _between(part: str, found: re.Match[str]) -> str:
    return f"{found[1]}\n{part.strip()}\n\n{found[2]}"
