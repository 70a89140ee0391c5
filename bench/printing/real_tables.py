"""What `quality_real.py` measured, as tables and as JSON. Rows are those of `Results`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from likelihood import standard_error
from rich.table import Table

from kvprune.evaluation.results import Row
from printing.output import table

FULL = "full"
ANSWERS = (1, 3, 7, 20)
# A policy, and the press of kvpress with its method and its settings.
PAIRS = (
    ("snapkv", "kvpress SnapKV, window 32, kernel 7"),
    ("tova", "kvpress TOVA"),
    ("streaming_llm", "kvpress StreamingLLM"),
    ("keydiff", "kvpress KeyDiff"),
    ("knorm", "kvpress Knorm"),
    ("expected_attention", "kvpress ExpectedAttention"),
    ("kvzip", "kvpress KVzip"),
)

Key = tuple[str, int]


class Found:
    """Rows of one question (or of the full cache) by policy and budget, and by prompt."""

    def __init__(self, rows: Iterable[Row], question: str) -> None:
        self._rows: dict[tuple[str, str | None], dict[Key, Row]] = defaultdict(dict)
        for row in rows:
            if row["question"] in (question, None):
                self._rows[row["policy"], row["budget"]][row["task"], row["index"]] = row
        self.full = self._rows.pop((FULL, None), {})

    def __bool__(self) -> bool:
        return bool(self._rows)

    def get(self, policy: str, budget: str | None) -> dict[Key, Row]:
        return self._rows.get((policy, budget), {})

    def contenders(self) -> list[tuple[str, str | None]]:
        """Those without a budget last; by budget, and in it kvprune's before those of kvpress."""
        return sorted(self._rows, key=lambda who: (who[1] is None, -float(who[1] or 0), who[0].startswith("kvpress")))


def percent(values: Sequence[float], *, sign: str = "") -> str:
    """A mean and its standard error, with how many there are."""
    if not values:
        return ""
    error = standard_error(list(values))
    spread = "" if error is None else f" ± {100 * error:.0f}"
    return f"{100 * statistics.mean(values):{sign}.0f}{spread}% ({len(values)})"


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else 0.0


def needles(rows: Sequence[Row], question: str, kind: str, length: int) -> Table | None:
    """Hits and tokens by answer length, of one kind of needle at one length of prompts."""
    of_kind = [row for row in rows if row.get("kind") == kind and row["length"] == length]
    found = Found(of_kind, question)
    if not found:
        return None
    lengths = [tokens for tokens in ANSWERS if any(row["answer_tokens"] == tokens for row in of_kind)]
    several = len(lengths) > 1
    columns = [f"{tokens} token{'s' if tokens > 1 else ''}" for tokens in lengths] if several else []
    shown = table(
        f"{kind}, {length // 1000}k tokens, question {question}",
        "hits: prompts whose whole answer was written, ± standard error (number of prompts). of full: of those that "
        "the full cache answers. tokens: the longest run of the answer's tokens that was written, as a share of them."
        + (" By length of the answer: hits." if several else ""),
        "policy",
        "budget",
        "hits",
        "of full",
        "tokens",
        *columns,
    )

    def line(name: str, budget: str | None, mine: Mapping[Key, Row]) -> None:
        values = list(mine.values())
        answered = [row["score"] for key, row in mine.items() if found.full.get(key, {}).get("score") == 1]
        shown.add_row(
            name,
            "" if budget is None else f"{float(budget):.0%}",
            percent([row["score"] for row in values]),
            percent(answered),
            percent([row["tokens_right"] for row in values]),
            *(
                percent([row["score"] for row in values if row["answer_tokens"] == n])
                for n in (lengths if several else ())
            ),
        )

    line("full cache", None, found.full)
    for name, budget in found.contenders():
        line(name, budget, found.get(name, budget))
    return shown


def longbench(rows: Sequence[Row], question: str) -> Table | None:
    """Scores by task, and what they differ by from the full cache's on the same prompts."""
    of_kind = [row for row in rows if row["task"].startswith("LongBench")]
    found = Found(of_kind, question)
    if not found:
        return None
    tasks = list(dict.fromkeys(row["task"] for row in of_kind))
    shown = table(
        f"LongBench, question {question}",
        "The scores of LongBench, 0 to 100, ± standard error (number of prompts). change: to the full cache, prompt by "
        "prompt.",
        "policy",
        "budget",
        "all",
        "change",
        *(task.removeprefix("LongBench ") for task in tasks),
    )

    def line(name: str, budget: str | None, mine: Mapping[Key, Row]) -> None:
        change = [row["score"] - found.full[key]["score"] for key, row in mine.items() if key in found.full]
        shown.add_row(
            name,
            "" if budget is None else f"{float(budget):.0%}",
            percent([row["score"] for row in mine.values()]),
            percent(change, sign="+") if name != "full cache" else "",
            *(percent([row["score"] for key, row in mine.items() if key[0] == task]) for task in tasks),
        )

    line("full cache", None, found.full)
    for name, budget in found.contenders():
        line(name, budget, found.get(name, budget))
    return shown


def likelihood(rows: Sequence[Row]) -> Table | None:
    """Change of likelihood, divergence and agreement, by text."""
    found = Found([row for row in rows if "nll_change" in row], "known")
    if not found:
        return None
    texts = list(dict.fromkeys(key[0] for key in found.full))
    shown = table(
        "Likelihood of text that follows",
        "nats a token against the full cache, ± standard error (number of texts); top-1: share of tokens with its "
        "first choice.",
        "policy",
        "budget",
        *(f"{text}: {what}" for text in texts for what in ("change", "KL", "top-1")),
    )
    for name, budget in found.contenders():
        cells = []
        for text in texts:
            mine = [row for key, row in found.get(name, budget).items() if key[0] == text]
            changes = [row["nll_change"] for row in mine]
            error = standard_error(changes) if len(changes) > 1 else None
            spread = "" if error is None else f" ± {error:.3f}"
            cells.append(f"{_mean(changes):+.3f}{spread} ({len(mine)})" if mine else "")
            cells.append(f"{_mean([row['kl'] for row in mine]):.3f}" if mine else "")
            cells.append(f"{100 * _mean([row['agreement'] for row in mine]):.1f}%" if mine else "")
        shown.add_row(name, "" if budget is None else f"{float(budget):.0%}", *cells)
    return shown


def side_by_side(rows: Sequence[Row], question: str) -> Table | None:
    """Policies beside presses that share their method, on the prompts that both have answered."""
    found = Found([row for row in rows if "tokens_right" in row], question)
    shown = table(
        f"kvprune beside kvpress, question {question}",
        "On the same prompts (their number); kept: tokens per KV head just after compression. difference: policy less "
        "press, prompt by prompt.",
        "policy",
        "budget",
        "kvprune, tokens",
        "kept",
        "kvpress, tokens",
        "kept",
        "difference",
    )
    for policy, press in PAIRS:
        for budget in ("0.5", "0.25", "0.1"):
            ours, theirs = found.get(policy, budget), found.get(press, budget)
            both = [key for key in theirs if key in ours]
            if both:
                pairs = [(ours[key], theirs[key]) for key in both]
                shown.add_row(
                    f"{policy} / {press.removeprefix('kvpress ')}",
                    f"{float(budget):.0%}",
                    percent([mine["tokens_right"] for mine, _ in pairs]),
                    f"{_mean([mine['kept'] for mine, _ in pairs]):.0f}",
                    percent([other["tokens_right"] for _, other in pairs]),
                    f"{_mean([other['kept'] for _, other in pairs]):.0f}",
                    percent([mine["tokens_right"] - other["tokens_right"] for mine, other in pairs], sign="+"),
                )
    return shown if shown.row_count else None


def tables(rows: Sequence[Row]) -> dict[str, list[Table]]:
    """By their place in the report; those of which nothing has been measured are left out."""
    kinds = sorted(
        {(row["kind"], row["length"]) for row in rows if "kind" in row},
        key=lambda kind: (("single", "multi-key", "multi-value").index(kind[0]), kind[1]),
    )
    questions = ("known", "unknown")
    parts: dict[str, Iterable[Table | None]] = {
        **{
            f"needles {question}": [needles(rows, question, kind, length) for kind, length in kinds]
            for question in questions
        },
        "longbench": [longbench(rows, question) for question in questions],
        "likelihood": [likelihood(rows)],
        "side by side": [side_by_side(rows, question) for question in questions],
    }
    return {name: [each for each in shown if each is not None] for name, shown in parts.items()}


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for every contender on every task, without any text of the data."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["policy"], row["budget"], row["question"]].append(row)
    lines = []
    for (task, policy, budget, question), group in groups.items():
        line: dict[str, Any] = {"task": task, "policy": policy, "budget": budget, "question": question, "n": len(group)}
        for name in ("score", "tokens_right", "nll_change", "kl", "agreement"):
            values = [row[name] for row in group if name in row]
            if values:
                line |= {name: _mean(values), f"{name}_error": standard_error(values) if len(values) > 1 else None}
        line |= {name: round(_mean([row[name] for row in group]), 1) for name in ("kept", "nbytes", "dense_nbytes")}
        lines.append(line)
    return lines
