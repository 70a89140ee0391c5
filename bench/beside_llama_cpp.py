"""Decode steps over few-bit caches beside llama.cpp's: the same model and prompts, one machine, one run, taking turns.

    make llama smollm2
    python bench/beside_llama_cpp.py --out bench/results/beside_llama_cpp.json

SmolLM2-135M-Instruct. Here in float32 over the stock cache (DynamicCache with sdpa) and over policies that keep every
token at few bits; in llama.cpp from the GGUF file of 4-bit weights that the others were unpacked from, over caches of
f16, q8_0 and q4_0 with flash attention, and of f16 without. All caches are filled first, and then each generates a few
tokens, one after the other, again and again. Ratios are those of the same round: to the stock cache, and to llama.cpp's
f16 cache with flash attention. Speed does not depend on what tokens say, so prompts are random.

A step reads all weights whatever the cache: 538 MB here, 98 there. What a cache changes is what grows with it, which
has a ratio of its own: of the times of a step less the times of a step over a few tokens, in the same round.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import DynamicCache

from kvprune import Policy, PrunedCache, policies
from kvprune.evaluation import smollm2
from kvprune.evaluation.models import load
from measuring.turns import take_turns
from measuring.workload import Generation, Job, held_bytes, prompt_of
from printing.output import Log, save, save_markdown, table
from subjects.llama_worker import LlamaJob, Turn
from subjects.worker import BENCH, Worker

HERE, THERE = "kvprune", "llama.cpp"
STOCK, F16, NO_FLASH = "stock, float32", "f16", "f16, no flash"
BASES = {HERE: (STOCK,), THERE: (F16, NO_FLASH)}  # what others of the same library are compared with
POLICIES = ("Spectral(2)", "Spectral(4)", "KIVI(2)", "KIVI(4)")
LLAMA_CACHES = {F16: ("f16", True), "q8_0": ("q8_0", True), "q4_0": ("q4_0", True), NO_FLASH: ("f16", False)}
CLAIM = {HERE: "Spectral(2)", THERE: "q4_0"}
WANTED = 0.5  # of a stock step
FEW = 64  # tokens of a cache that is as good as empty
STEPS = 6  # of a turn
ROWS = 1024  # that llama.cpp reads of a prompt; it repeats them
TITLES = {"step": "whole step", "growing": "what grows"}
PYTHON = BENCH / "peers" / ".venv-llama" / "bin" / "python"


@dataclass(frozen=True)
class Key:
    """Whose cache, which, and after a prompt of how many tokens."""

    library: str
    cache: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.library} {self.cache} {self.tokens}"


@dataclass(frozen=True)
class Ratios:
    """Of a cache to the base of its library, round by round: of whole steps, and of what grows with the cache."""

    step: list[float]
    growing: list[float]


class There:
    """A cache of llama.cpp, in its process."""

    def __init__(self, worker: Worker, job: LlamaJob) -> None:
        self._worker, self._name = worker, job.name
        self.nbytes = int(_checked(worker.ask("open", job))["nbytes"])

    def turn(self, steps: int) -> float:
        return float(_checked(self._worker.ask("turn", Turn(self._name, steps)))["seconds"])


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise SystemExit(f"llama.cpp: {answer['error']}")
    return answer


def ratios(seconds: Mapping[Key, Sequence[float]], key: Key, beside: str) -> Ratios:
    """To another cache of the same library after as many tokens. What grows is a step less that of the same cache after
    FEW tokens; a round in which the other did not grow is left out of it."""
    base = Key(key.library, beside, key.tokens)
    few, base_few = (Key(each.library, each.cache, FEW) for each in (key, base))
    rounds = list(zip(*(seconds[each] for each in (key, base, few, base_few)), strict=True))
    return Ratios(
        [step / of for step, of, _, _ in rounds],
        [(step - start) / (of - of_start) for step, of, start, of_start in rounds if of > of_start],
    )


def spread(values: Sequence[float]) -> str:
    """The median, and the middle half."""
    if len(values) < 2:
        return ""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f}x ({low:.2f}-{high:.2f})"


def verdict(seconds: Mapping[Key, Sequence[float]], tokens: int) -> list[str]:
    """What is claimed, and what was measured, of whole steps and of what grows with the cache."""
    ours = ratios(seconds, Key(HERE, CLAIM[HERE], tokens), STOCK)
    lines = []
    for what in ("step", "growing"):
        here = statistics.median(getattr(ours, what) or [math.nan])
        claim = f"{here:.2f}x of {STOCK}, at most {WANTED:.2f}x: {'yes' if here <= WANTED else 'no'}"
        for beside in BASES[THERE]:
            theirs = ratios(seconds, Key(THERE, CLAIM[THERE], tokens), beside)
            there = statistics.median(getattr(theirs, what) or [math.nan])
            claim += (
                f"; below llama.cpp's {CLAIM[THERE]}, {there:.2f}x of its {beside}: {'yes' if here < there else 'no'}"
            )
        lines.append(f"{tokens:,} tokens, {TITLES[what]}: {CLAIM[HERE]} {claim}")
    return lines


def shown(seconds: Mapping[Key, Sequence[float]], nbytes: Mapping[Key, int], tokens: int) -> Table:
    made = table(
        f"A decode step after {tokens:,} tokens",
        f"Medians over {len(next(iter(seconds.values())))} turns of {STEPS} steps, and their middle halves. Ratios are "
        f"to {STOCK}, and to llama.cpp's {F16}. {TITLES['growing']}: a step less a step after {FEW} tokens.",
        "cache", "ms", f"ms, {FEW} tokens", *TITLES.values(), "MB",
    )  # fmt: skip
    for key in (each for each in seconds if each.tokens == tokens):
        found = ratios(seconds, key, BASES[key.library][0])
        few = Key(key.library, key.cache, FEW)
        made.add_row(
            f"{key.library}: {key.cache}",
            *(f"{1000 * statistics.median(seconds[each]):.1f}" for each in (key, few)),
            spread(found.step), spread(found.growing), f"{nbytes[key] / 1e6:.1f}",
        )  # fmt: skip
    return made


def policy(text: str) -> Policy:
    made = eval(text, vars(policies))  # what the person at the keyboard wrote
    if not isinstance(made, Policy):
        raise SystemExit(f'{text} is no policy: write one such as "Spectral(2)".')
    return made


def fill(worker: Worker, arguments: argparse.Namespace, log: Log) -> dict[Key, Generation | There]:
    """Every cache after a prompt of every length."""
    read = {text: policy(text) for text in arguments.of}
    # The stock cache has a model of its own: policies switch the attention of theirs.
    stock, pruned = (load(smollm2.NAME, dtype="float32").model for _ in range(2))
    prompts = {tokens: prompt_of(Job(STOCK, tokens), stock) for tokens in (FEW, *arguments.lengths)}
    going: dict[Key, Generation | There] = {}
    for tokens, prompt in prompts.items():
        log.note(f"{HERE} reads {tokens:,} tokens, {1 + len(read)} times")
        going[Key(HERE, STOCK, tokens)] = Generation(stock, DynamicCache(config=stock.config), prompt)
        for text, each in read.items():
            going[Key(HERE, text, tokens)] = Generation(pruned, PrunedCache(pruned, each), prompt)
    for tokens, prompt in prompts.items():
        for cache, (kind, flash) in LLAMA_CACHES.items():
            key = Key(THERE, cache, tokens)
            job = LlamaJob(
                str(key), str(arguments.gguf), kind, flash, prompt[0, :ROWS].tolist(), tokens,
                room=(arguments.turns + 1) * (STEPS + 1), threads=arguments.threads, filling=arguments.filling,
            )  # fmt: skip
            going[key] = There(worker, job)
    return going


def hindrance(python: Path, gguf: Path | None) -> str | None:
    """Why llama.cpp cannot run, and what to do about it."""
    if not python.exists():
        return (
            f"there is no {python}: `make llama` builds llama.cpp there, which takes a C++ compiler and some minutes."
        )
    if gguf is None or not gguf.exists():
        return f"there is no {gguf or 'GGUF file of SmolLM2'}: `make smollm2` gets it, or give another as --gguf."
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], help="tokens of the prompts")
    parser.add_argument("--of", nargs="+", default=list(POLICIES), metavar="POLICY", help="as one writes them")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="of a step")
    parser.add_argument("--filling", type=int, default=os.cpu_count(), help="threads while prompts are read")
    parser.add_argument("--gguf", type=Path, default=smollm2.packed(), help="of SmolLM2; that of its package")
    parser.add_argument("--python", type=Path, default=PYTHON, help="one that has llama-cpp-python")
    parser.add_argument("--out", type=Path, help="JSON; the tables in Markdown go beside it")
    arguments = parser.parse_args()
    if reason := hindrance(arguments.python, arguments.gguf):
        raise SystemExit(reason)
    log = Log()
    with Worker(arguments.python, script=BENCH / "subjects" / "llama_worker.py") as worker:
        torch.set_num_threads(arguments.filling)
        going = fill(worker, arguments, log)
        nbytes = {
            key: held_bytes(each.cache) if isinstance(each, Generation) else each.nbytes for key, each in going.items()
        }
        torch.set_num_threads(arguments.threads)
        built = _checked(worker.ask("versions", Turn("", 0)))["versions"]
        log.note(f"taking {arguments.turns} turns")
        seconds = take_turns(going, arguments.turns, STEPS)
    tables = [shown(seconds, nbytes, tokens) for tokens in arguments.lengths]
    for made in tables:
        log.console.print(made)
    if CLAIM[HERE] in arguments.of:
        for tokens in arguments.lengths:
            for line in verdict(seconds, tokens):
                log.note(line)
    rows = [{**asdict(key), "nbytes": nbytes[key], "seconds": seconds[key]} for key in going]
    save(arguments.out, llama_cpp=built, threads=arguments.threads, notes=log.notes, rows=rows)
    save_markdown(arguments.out, tables, log.notes)


if __name__ == "__main__":
    main()
