"""What `quality_real.py` measured, as tables and as JSON. Rows are those of `Results`."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from likelihood import standard_error
from rich.table import Table

from kvprune.evaluation.results import Row
from kvprune.policy.registry import parse
from printing import quality_tables
from printing.output import table

FULL = "full"
ANSWERS = (1, 3, 7, 20)
SHARES = ("0.5", "0.25", "0.1", "0.05", "0.03", "0.02", "0.01")  # of bytes, those that may have a column
# Of the overview, what README begins with.
AHEAD = "kernel_size=27,ahead=23"
FIRST = (
    *(f"{name}:{AHEAD}" for name in ("dropkv", "snapkv", "a2sf", "adakv")), "snapkv", "tova", "h2o", "streaming_llm",
    "kvzip", "keydiff", "leverage", "kivi:bits=4", "spectral:bits=4", "spectral", "kivi:bits=2",
)  # fmt: skip
FIGURES = ("score", "tokens_right", "nll_change", "kl", "agreement")
ALIKE = "An error of 0 says that all of these prompts were alike: of n alike, up to 3 in n others may not be."
# A policy, and the press of kvpress with its method and its settings.
PAIRS = (
    ("snapkv", "kvpress SnapKV, window 32, kernel 7"),
    ("adakv", "kvpress AdaKV(SnapKV, window 32, kernel 7)"),
    ("critical_adakv", "kvpress CriticalAdaKV(SnapKV, window 32, kernel 7)"),
    ("pyramidkv", "kvpress PyramidKV, window 8, kernel 7"),
    ("tova", "kvpress TOVA"),
    ("streaming_llm", "kvpress StreamingLLM"),
    ("keydiff", "kvpress KeyDiff"),
    ("knorm", "kvpress Knorm"),
    ("expected_attention:epsilon=0.01", "kvpress ExpectedAttention"),  # as its authors evaluate it
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

    def share(self, policy: str, share: str) -> dict[Key, Row]:
        """Of rows or of bytes."""
        return self.get(policy, share) or self.get(policy, f"{share}b")

    def contenders(self) -> list[tuple[str, str | None]]:
        """Those without a budget last; by budget, and in it kvprune's before those of kvpress."""

        def place(who: tuple[str, str | None]) -> tuple[bool, float, bool]:
            return who[1] is None, -float((who[1] or "0").rstrip("b")), who[0].startswith("kvpress")

        return sorted(self._rows, key=place)


def percent(values: Sequence[float], *, sign: str = "") -> str:
    """A mean and its standard error, with how many there are."""
    return f"{_share(values, sign)} ({len(values)})" if values else ""


def _share(values: Sequence[float], sign: str = "") -> str:
    digits = int(0.995 <= statistics.mean(values) < 1)  # what is not all should not read as if it were
    return f"{_measured([100 * value for value in values], digits, sign)}%"


def _measured(values: Sequence[float], digits: int, sign: str = "") -> str:
    error = standard_error(list(values))
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else 0.0


def _nats(values: Sequence[float], *, sign: str = "") -> str:
    """As `percent`, in nats."""
    return f"{_measured(values, 3, sign)} ({len(values)})" if values else ""


def _bytes(rows: Iterable[Row]) -> str:
    """Of a full cache of the same type; of presses, which are in another process, nobody measures them."""
    shares = [row["nbytes"] / row["dense_nbytes"] for row in rows if row["nbytes"]]
    return f"{_mean(shares):.0%}" if shares else ""


def _thousands(length: int) -> str:
    return f"{length / 1000:g}k"


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
        f"{kind}, {_thousands(length)} tokens, question {question}",
        "hits: prompts whose whole answer was written, ± standard error (number of prompts). of full: of those that "
        "the full cache answers. tokens: the longest run of the answer's tokens that was written, as a share of them. "
        "bytes: at the end of the answer, everything included, of a full cache in the same type, float32; of one in 16 "
        "bits, packed rows take twice that share."
        + (" By length of the answer: hits." if several else "")
        + f" {ALIKE}",
        "policy",
        "budget",
        "hits",
        "of full",
        "tokens",
        "bytes",
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
            _bytes(values),
            *(
                percent([row["score"] for row in values if row["answer_tokens"] == n])
                for n in (lengths if several else ())
            ),
        )

    line("full cache", None, found.full)
    for name, budget in found.contenders():
        line(name, budget, found.get(name, budget))
    return shown


def overview(rows: Sequence[Row], only: Sequence[str] = ()) -> Table | None:
    """Single needles of 1,000 tokens whose answers are numbers: a line for every policy, what keeps all last."""
    chosen = _numbers(rows, 1000)
    known, unknown = (Found(chosen, question) for question in ("known", "unknown"))
    columns = ((known, "0.25"), (known, "0.1"), (unknown, "0.25"), (unknown, "0.1"))
    lines = []
    for name in only or dict.fromkeys(name for found in (known, unknown) for name, _ in found.contenders()):
        keeps = any(found.get(name, None) for found in (known, unknown))
        budgets = (None, "", None, "") if keeps else (budget for _, budget in columns)
        cells = [list(found.get(name, budget).values()) for (found, _), budget in zip(columns, budgets, strict=True)]
        if not name.startswith("kvpress") and any(cells):
            lines.append((keeps, [-_mean([row["tokens_right"] for row in cell]) for cell in cells], name, cells))
    if not lines:
        return None
    shown = table(
        "A number of 3, 7 or 20 digits in 1,000 tokens",
        "The share of its digits that SmolLM2-135M-Instruct wrote, ± standard error (prompts in which it wrote all of "
        "them). bytes: at 25%, of a full cache in float32; packed rows take twice that share of one in 16 bits. "
        f"{ALIKE}",
        "policy",
        "question known, 25%",
        "known, 10%",
        "comes later, 25%",
        "later, 10%",
        "bytes",
    )
    shown.add_row("full cache", *[_written(list(known.full.values()))] * 4, "100%")
    for _, _, name, cells in lines if only else sorted(lines):
        shown.add_row(constructed(name), *map(_written, cells), _bytes(cells[0] or cells[2]))
    return shown


def _numbers(rows: Sequence[Row], length: int) -> list[Row]:
    """Those of single needles that are numbers, in prompts of so many tokens."""
    single = (row for row in rows if row.get("kind") == "single" and row["length"] == length)
    return [row for row in single if row["answer_tokens"] > 1]


def on_bytes(rows: Sequence[Row], length: int, question: str) -> Table | None:
    """Needles, everyone in a cache of 16 bits a number: rows against bits at as many bytes."""
    chosen = _numbers(rows, length)
    found = Found(_held(chosen, "bfloat16"), question)
    full = list(Found([row for row in chosen if row["policy"] == FULL], question).full.values())
    names = list(dict.fromkeys(name for name, _ in found.contenders()))
    shares = [share for share in SHARES if any(found.share(name, share) for name in names)]
    if not shares:
        return None
    lines = []
    for name in names:
        cells = [list(found.share(name, share).values()) for share in shares]
        cells[0] = cells[0] or list(found.get(name, None).values())
        keeps = bool(found.get(name, None))
        lines.append((keeps, [-_mean([row["tokens_right"] for row in cell]) for cell in reversed(cells)], name, cells))
    digits = [str(each) for each in sorted({row["answer_tokens"] for row in _held(chosen, "bfloat16")})]
    answers = " or ".join(filter(None, (", ".join(digits[:-1]), digits[-1])))
    shown = table(
        f"A number of {answers} digits in {length:,} tokens, at as many bytes, question {question}",
        "The share of its digits that was written, ± standard error (prompts in which all of them were). Caches are "
        "bfloat16, the model computes in float32. Eviction is given a share of the rows, `Bits` of the bytes. bytes: "
        "at the end of the answer, everything included, of a full cache in 16 bits, at each of the budgets; those that "
        f"keep every row stand in the first column. {ALIKE}",
        "policy",
        *(f"{float(share):.0%}" for share in shares),
        "bytes",
    )
    shown.add_row("full cache", *[_written(full)] * len(shares), "100%")
    for _, _, name, cells in sorted(lines, key=lambda line: line[:3]):
        held = (_mean([row["nbytes"] / row["half_nbytes"] for row in cell]) for cell in cells if cell)
        shown.add_row(constructed(name), *map(_written, cells), ", ".join(f"{share:.1%}" for share in held))
    return shown


def _held(rows: Sequence[Row], dtype: str | None) -> list[Row]:
    """Those of caches in this type, None for the model's."""
    return [row for row in rows if row.get("cache") == dtype]


def _written(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    whole = sum(row["score"] == 1 for row in rows)
    return f"{_share([row['tokens_right'] for row in rows])} ({whole} of {len(rows)})"


def constructed(text: str) -> str:
    """How a policy of the command line is written in Python, its budget left open."""
    links = []
    for link in text.split("|"):
        settings = link.strip().partition(":")[2]
        made = parse(link.strip())
        open_budget = ["budget"] if hasattr(made, "budget") else []
        written = ", ".join([*open_budget, *filter(None, (each.strip() for each in settings.split(",")))])
        links.append(f"{type(made).__name__}({written})")
    return "`" + " | ".join(links) + "`"


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
        "first choice. Each text: 128 tokens after 1,024.",
        "policy",
        "budget",
        *(f"{text}: {what}" for text in texts for what in ("change", "KL", "top-1")),
    )
    for name, budget in found.contenders():
        cells = []
        for text in texts:
            mine = [row for key, row in found.get(name, budget).items() if key[0] == text]
            cells.append(_nats([row["nll_change"] for row in mine], sign="+"))
            cells.append(_nats([row["kl"] for row in mine]))
            cells.append(percent([row["agreement"] for row in mine]))
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


def beside_embedded(rows: Sequence[Row], embedded: Sequence[Mapping[str, Any]], question: str) -> Table | None:
    """What both models measured of answers of several lengths, in the order of this one.

    embedded: the rows of the part "lengths" of `quality.py`.
    """
    found = Found([row for row in rows if row.get("kind") == "single" and row["length"] == 1000], question)
    others: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for row in embedded:
        if row["question"] == question and row["name"] != quality_tables.FULL:
            others.setdefault((row["name"], row["budget"]), []).append(row)
    both: list[tuple[str, float | None, list[float], float, float]] = []
    for (name, budget), of_lengths in others.items():
        answers = found.get(name, None if budget is None else str(budget))
        if answers:
            recall = _mean([row["recall"] for row in of_lengths])
            error = math.hypot(*(row["recall_error"] for row in of_lengths)) / len(of_lengths)
            both.append((name, budget, [row["tokens_right"] for row in answers.values()], recall, error))
    if not both:
        return None
    both.sort(key=lambda line: -_mean(line[2]))
    alike = against = 0
    for place, (*_, mine, recall, error) in enumerate(both):
        for *_, later, another, its_error in both[place + 1 :]:
            here = _apart(_mean(mine) - _mean(later), standard_error(mine), standard_error(later))
            there = _apart(recall - another, error, its_error)
            alike += here * there > 0
            against += here * there < 0
    pairs = len(both) * (len(both) - 1) // 2
    words = ", ".join(str(words) for words in sorted({row["words"] for row in embedded}))
    shown = table(
        f"Both models, question {question}",
        f"tokens: as above, of all single needles of 1,000 tokens. words: of answers of {words} words in 4,096, see "
        f"quality.md. Of {pairs} pairs {alike} stand in the same order in both and {against} in the other; the rest "
        "differ, in one of the two, by no more than twice the standard error of the difference.",
        "policy",
        "budget",
        "SmolLM2, tokens",
        "embedded, words",
    )
    for name, budget, values, recall, error in both:
        cells = ("" if budget is None else f"{budget:.0%}", percent(values), f"{100 * recall:.0f} ± {100 * error:.0f}%")
        shown.add_row(name, *cells)
    return shown


def _apart(difference: float, first: float | None, second: float | None) -> int:
    """The sign of a difference that is larger than twice its standard error, else 0; unknown errors are large."""
    if first is None or second is None or abs(difference) <= 2 * math.hypot(first, second):
        return 0
    return 1 if difference > 0 else -1


def tables(rows: Sequence[Row], embedded: Sequence[Mapping[str, Any]] = ()) -> dict[str, list[Table]]:
    """By their place in the report; those of which nothing has been measured are left out."""
    at_equal_bytes = [
        on_bytes(rows, length, question) for length in (1000, 2000, 4000) for question in ("known", "unknown")
    ]
    rows = _held(rows, None)
    kinds = sorted(
        {(row["kind"], row["length"]) for row in rows if "kind" in row},
        key=lambda kind: (("single", "multi-key", "multi-value").index(kind[0]), kind[1]),
    )
    questions = ("known", "unknown")
    parts: dict[str, Iterable[Table | None]] = {
        "overview": [overview(rows)],
        "first": [overview(rows, FIRST)],
        "bytes": at_equal_bytes,
        **{
            f"needles {question}": [needles(rows, question, kind, length) for kind, length in kinds]
            for question in questions
        },
        "longbench": [longbench(rows, question) for question in questions],
        "likelihood": [likelihood(rows)],
        "side by side": [side_by_side(rows, question) for question in questions],
        "both models": [beside_embedded(rows, embedded, question) for question in questions],
    }
    return {name: [each for each in shown if each is not None] for name, shown in parts.items()}


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for every contender on every task, without any text of the data.

    prompts: the figures of each, from the lowest to the highest, in the order in which the line has their means.
    indices: which these are, so that prompts can be compared one by one; lines of earlier versions do not say.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["policy"], row["budget"], row["question"], row.get("cache")].append(row)
    lines = []
    for (task, policy, budget, question, held), group in groups.items():
        line: dict[str, Any] = {"task": task, "policy": policy, "budget": budget, "question": question, "n": len(group)}
        line |= {"cache": held} if held else {}
        measured = [name for name in FIGURES if name in group[0]]
        for name in measured:
            values = [row[name] for row in group]
            line |= {name: _mean(values), f"{name}_error": standard_error(values)}
        prompts = sorted(([round(row[name], 4) for name in measured], row["index"]) for row in group)
        line |= {"prompts": [figures for figures, _ in prompts], "indices": [index for _, index in prompts]}
        line |= {name: round(_mean([row[name] for row in group]), 1) for name in ("kept", "nbytes", "dense_nbytes")}
        lines.append(line)
    return lines
