"""Contenders side by side: which jobs to run, in rounds of one run each, and ratios within a round."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from measuring.workload import MODELS, Contender, Job
from subjects.contenders import CONTENDERS, KVPRESS, STOCK, WITHOUT_CUDNN, missing_package
from subjects.worker import PEERS

Row = dict[str, Any]
TIMES = ("prefill_s", "decode_ms")
SIZES = ("nbytes", "prefill_peak_bytes", "decode_peak_bytes")


class Runner(Protocol):
    """Runs jobs, in this process or in another."""

    def ask(self, measure: str, job: Job) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Cell:
    """What all contenders of one comparison have in common."""

    tokens: int = 4096
    batch: int = 1
    dtype: str = "float32"
    budget: float = 0.25

    def __str__(self) -> str:
        """In words."""
        return f"{self.tokens:,} tokens, batch {self.batch}, {self.dtype}, budget {self.budget:.0%}"

    def job(self, contender: Contender, new_tokens: int) -> Job:
        budget = self.budget if contender.has_budget else None
        return Job(contender.name, self.tokens, budget, self.batch, self.dtype, new_tokens)


def star(tokens: Sequence[int], batches: Sequence[int], dtypes: Sequence[str], budgets: Sequence[float]) -> list[Cell]:
    """Cells around the first of each list, along one axis at a time: their product would take days."""
    center = Cell(tokens[0], batches[0], dtypes[0], budgets[0])
    arms = (
        *(replace(center, tokens=each) for each in tokens),
        *(replace(center, batch=each) for each in batches),
        *(replace(center, dtype=each) for each in dtypes),
        *(replace(center, budget=each) for each in budgets),
    )
    return list(dict.fromkeys(arms))


def taking_part(cell: Cell, names: Iterable[str], center: Cell) -> list[Contender]:
    """Where only the budget differs from the center, those without one have been measured there; stock always runs."""
    chosen = [CONTENDERS[name] for name in dict.fromkeys((STOCK, *names))]
    if cell.budget == center.budget:
        return chosen
    return [contender for contender in chosen if contender.has_budget or contender.name == STOCK]


# -- what can run ------------------------------------------------------------------------------------------------------


def hindrance(contender: Contender, job: Job, peers: Path = PEERS) -> str | None:
    """Why a contender cannot run here, or None if it can."""
    if contender.name == WITHOUT_CUDNN and job.device == "cpu":
        return "cuDNN is a library for GPUs"
    if contender.family == KVPRESS:
        if not peers.exists():
            return f"no environment for kvpress at {peers}: `make peers` makes it"
    elif missing := missing_package(contender):
        return missing
    if contender.attention == "eager" and job.device == "cpu":
        # Logits, their softmax in float32 and what it is cast to are alive at once.
        needed = 3 * 4 * job.batch * MODELS[job.model]["num_attention_heads"] * job.tokens**2
        if needed > available_bytes():
            return (
                f"eager attention would take {needed / 2**30:.0f} GiB for matrices of {job.tokens:,} x {job.tokens:,}"
            )
    return None


def available_bytes() -> int:
    """Memory available to a new process (Linux); practically unlimited where that cannot be read."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


# -- rounds ------------------------------------------------------------------------------------------------------------


def interleave(
    jobs: Sequence[Job], runner_of: Callable[[Job], Runner], *, rounds: int, minutes: float, say: Callable[[str], None]
) -> dict[Job, list[Row]]:
    """Measure every job once per round; one that fails is left out of later rounds, with a note saying why.

    After the first round there is another only while it can be expected to end within so many minutes. A job warms up
    right before its first run: who stops waiting has figures of those before.
    """
    measured: dict[Job, list[Row]] = {job: [] for job in jobs}
    began = time.monotonic()
    for done in range(rounds):
        elapsed = time.monotonic() - began
        if done and elapsed * (done + 1) / done > 60 * minutes:
            break
        for job in list(measured):
            if not done and (error := runner_of(job).ask("warm_up", job).get("error")):
                say(f"skipped: {label(job.contender, job.budget)}: {error}")
                del measured[job]
                continue
            result = runner_of(job).ask("time", job)
            if "error" in result:
                say(f"dropped: {label(job.contender, job.budget)}: {result['error']}")
                del measured[job]
            else:
                measured[job].append(result)
    return measured


def summarise(measured: Mapping[Job, Sequence[Row]], reference: str = STOCK) -> list[Row]:
    """A row for each job: medians over the rounds, of times and of their ratios to the reference in the same round.

    Every time t comes with t_ratio and its range over the rounds, t_ratio_range; bytes are those of the last round. No
    ratios where the reference is missing.
    """
    stock = next((results for job, results in measured.items() if job.contender == reference), None)
    rows = []
    for job, results in measured.items():
        row = described(job) | {"rounds": len(results)}
        for time_taken in TIMES:
            row[time_taken] = statistics.median(result[time_taken] for result in results)
            if stock is not None:
                ratios = [a[time_taken] / b[time_taken] for a, b in zip(results, stock, strict=True)]
                row[f"{time_taken}_ratio"] = statistics.median(ratios)
                row[f"{time_taken}_ratio_range"] = [min(ratios), max(ratios)]
        row["last_to_first_quarter"] = statistics.median(result["last_to_first_quarter"] for result in results)
        for size in SIZES:
            if size not in results[-1]:
                continue
            row[size] = results[-1][size]
            if stock is not None:
                row[f"{size}_ratio"] = row[size] / stock[-1][size]
        rows.append(row)
    return rows


def label(contender: str, budget: float | int | None) -> str:
    """A contender with its budget, as in "A2SF 25%" or "GemFilter 1,024 tokens"."""
    if budget is None:
        return contender
    return f"{contender} {budget:,} tokens" if isinstance(budget, int) else f"{contender} {budget:.0%}"


def described(job: Job) -> Row:
    """The columns that say what was measured."""
    return {
        "contender": job.contender,
        "family": CONTENDERS[job.contender].family,
        **{name: getattr(job, name) for name in ("tokens", "batch", "dtype", "budget")},
    }


# -- what the command lines of speed.py and memory.py share ------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, *, tokens: Sequence[int]) -> None:
    varied = "; one axis is varied at a time around the first of each"
    parser.add_argument("--lengths", type=int, nargs="+", default=list(tokens), help="tokens of the prompt" + varied)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.1, 0.5])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--peers", type=Path, default=PEERS, help="a Python that has kvpress")
    parser.add_argument("--quick", action="store_true", help="1k and 2k tokens, few rounds: whether everything runs")
    parser.add_argument("--out", type=Path, help="JSON; tables in Markdown go beside it")


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    if arguments.quick:
        return star([1024, 2048], [1], ["float32"], [0.25])
    return star(arguments.lengths, arguments.batches, arguments.dtypes, arguments.budgets)


def jobs_of(cell: Cell, center: Cell, arguments: argparse.Namespace, say: Callable[[str], None]) -> list[Job]:
    """The jobs of those that can run; the others are named with their reasons."""
    jobs = []
    for contender in taking_part(cell, arguments.contenders, center):
        job = cell.job(contender, arguments.new_tokens)
        if reason := hindrance(contender, job, arguments.peers):
            say(f"skipped: {contender.name}: {reason}")
        else:
            jobs.append(job)
    return jobs
