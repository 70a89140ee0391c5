"""What compression does to the answers of a real model, SmolLM2-135M-Instruct, under every policy, beside kvpress.

    python bench/quality_real.py --out build/quality-real.jsonl --report build/quality-real.md

Needles in prose, tasks of LongBench, and likelihood of texts; with the question known when the prompt is compressed,
and unknown. A prompt is read once, whoever compresses it. Results are JSON lines, the most important ones first: a run
that is interrupted, or has used up its --minutes, goes on where it stopped, and tables are made of what there is.

Every registered policy takes part. With --bytes, instead, some of each kind are given shares of the bytes that the
full cache takes at 16 bits a number, in caches of bfloat16 (the model computes in its own type), so that rows and bits
compare at as many bytes. Presses of kvpress answer the same prompts in an environment of their own (`make peers`, then
--presses). Data that is not part of the repository is left out where it is not at hand.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path

import torch

from kvprune import PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.errors import KVPruneError
from kvprune.evaluation.contenders import Held
from kvprune.evaluation.decoding import Reader, fed, greedy
from kvprune.evaluation.likelihood import compare
from kvprune.evaluation.models import LanguageModel, load
from kvprune.evaluation.results import Results, Row
from kvprune.evaluation.together import shareable
from kvprune.policy.base import Policy
from kvprune.policy.registry import names, parse, takes_budget
from measuring import real_prompts as prompts
from measuring.real_prompts import Prompt
from printing import real_tables
from printing.output import Log, markdown, save
from printing.quality_tables import fill, marker
from subjects.press_together import WriteJob
from subjects.worker import PEERS, Worker

QUESTIONS = ("known", "unknown")
BUDGETS = ("0.25", "0.1", "0.5")
SHARES = ("0.1", "0.05", "0.03")  # of bytes
FULL = "full"
TOGETHER = 1000  # caches that share a prompt, at most: all that there are
# Settings that are tried beside the defaults of every registered policy. Those that keep every token take no budget.
VARIANTS = (
    *(f"{name}:{real_tables.AHEAD}" for name in ("snapkv", "a2sf", "adakv", "critical_adakv", "pyramidkv", "dropkv")),
    f"a2sf:{real_tables.AHEAD} | kvcrush", "snapkv:kernel_size=63", "snapkv:kernel_size=21", "a2sf:kernel_size=63",
    "a2sf:kernel_size=21", "adakv:kernel_size=63", "pyramidkv:kernel_size=63", "expected_attention:epsilon=0.01",
)  # fmt: skip
PACKING = ("kivi:bits=2", "kivi:bits=4", "zipcache", "zipcache:group_size=32", "spectral:bits=4")
PACKED = ("kivi:bits=2", "kivi:bits=4", "zipcache:group_size=32", "spectral", "spectral:bits=4")
# At as many bytes: `Bits` is given a share of those at 16 bits, and eviction, with as many sinks and recent tokens, of
# the rows: in bytes it would pay for the queries that it remembers until the first token is generated, which `Bits`
# does not.
ALIKE = "sinks=1,recent=4"
FLOOR = "share=everywhere(floor=0.5)"
ON_BYTES = {
    "known": (
        f"bits:score=dropkv({real_tables.AHEAD}),{FLOOR}",
        *(f"bits:score={name}({real_tables.AHEAD})" for name in ("dropkv", "snapkv", "a2sf")),
        "bits:score=kvzip(group=mean)",
        f"bits:score=snapkv({real_tables.AHEAD}),widths=()",
        *(f"{name}:{real_tables.AHEAD},{ALIKE}" for name in ("snapkv", "dropkv")),
        f"kvzip:{ALIKE}",
        *PACKED,
    ),
    "unknown": (
        f"bits:score=kvzip(group=mean),{FLOOR}",
        "bits:score=kvzip(group=mean)",
        "bits:score=kvzip",
        f"bits:score=dropkv({real_tables.AHEAD})",
        f"kvzip:{ALIKE}",
        *PACKED,
    ),
}
EMBEDDED = Path(__file__).parent / "results" / "quality.json"


@dataclass(frozen=True)
class Entry:
    """A policy under a budget, with the question known to it or not."""

    name: str
    budget: str | None
    known: bool
    policy: Policy
    dtype: str | None = None  # of its cache; None for the model's

    @property
    def question(self) -> str:
        return QUESTIONS[not self.known]

    @property
    def label(self) -> str:
        held = "" if self.dtype is None else f" | {self.dtype}"
        return f"{self.name}{'' if self.budget is None else f' @ {self.budget}'} | {self.question}{held}"


def entries(
    budgets: Sequence[str], only: Sequence[str] = (), dtype: str | None = None
) -> tuple[list[Entry], list[str]]:
    """Everyone, and notes on the policies that cannot be made of a budget alone. only: names, where not all."""
    texts = [*VARIANTS, *(name for name in names() if name not in (FULL, "kivi", "zipcache")), *PACKING]
    found: dict[str, Entry] = {}
    notes = []
    for text in only or texts:
        for budget in budgets:
            budget = f"{budget}b" if dtype and text.startswith("bits") else budget
            try:
                policy = parse(text, budget=budget)
                takes_one = takes_budget(text)
            except KVPruneError as error:
                notes.append(f"left out: {text}: {error}")
                break
            for known in (True, False):
                entry = Entry(text, budget if takes_one else None, known, policy, dtype)
                found.setdefault(entry.label, entry)
    return list(found.values()), notes


PRESSES = (
    "SnapKV", "SnapKV, window 32, kernel 7", "TOVA", "StreamingLLM", "KeyDiff", "Knorm", "AdaKV(SnapKV)",
    "CriticalAdaKV(SnapKV)", "ExpectedAttention", "AdaKV(ExpectedAttention)", "PyramidKV", "KVzip",
    "AdaKV(SnapKV, window 32, kernel 7)", "CriticalAdaKV(SnapKV, window 32, kernel 7)", "PyramidKV, window 8, kernel 7",
)  # fmt: skip
PRESS_WORKER = Path(__file__).parent / "subjects" / "press_together.py"


class Presses:
    """Answers of kvpress to the same prompts, as rows of the same results."""

    def __init__(self, model: LanguageModel, folder: str, results: Results, worker: Worker, log: Log) -> None:
        self.model, self.folder, self.results, self.worker, self.log = model, folder, results, worker, log

    def ask(self, prompt: Prompt, budgets: Sequence[str], questions: Sequence[str]) -> int:
        """Measure those whose row is missing; returns how many. Of likelihood they are not asked."""
        done = 0
        for question, budget in product(questions, budgets):
            if prompt.text is not None or (question == "unknown" and not prompt.question):
                continue
            labels = {press: f"kvpress {press} @ {budget} | {question}" for press in PRESSES}
            missing = [each for each in PRESSES if not self.results.has(prompt.task, prompt.index, labels[each])]
            if not missing:
                continue
            job = WriteJob(
                self.folder,
                prompt.ids[0].tolist(),
                prompt.question if question == "unknown" else None,
                missing,
                float(budget),
                prompt.generation["max_new_tokens"],
                [list(answer) for answer in prompt.answers],
                list(prompt.generation["ends"]),
            )
            found = self.worker.ask("write", job)
            if "error" in found:
                self.log.note(f"left out: kvpress, {prompt.task} {prompt.index}, {budget}: {found['error']}")
                continue
            for press, answer in zip(missing, found["answers"], strict=True):
                if "error" in answer:
                    self.log.note(f"left out: {labels[press]}, {prompt.task} {prompt.index}: {answer['error']}")
                    continue
                done += 1
                self.results.add(
                    {
                        "suite": "quality-real",
                        "model": self.model.name,
                        "task": prompt.task,
                        "index": prompt.index,
                        "label": labels[press],
                        "policy": f"kvpress {press}",
                        "budget": budget,
                        "question": question,
                        **prompt.judged(answer["written"]),
                        **prompt.fields,
                        "nbytes": 0,  # of a cache in another process, nobody measures them
                        "dense_nbytes": 0,
                        "prompt_tokens": prompt.ids.shape[1],
                        "kept": round(answer["kept"], 1),
                    }
                )
        return done


class Quality:
    """Answers of all contenders to prompts, as rows of results."""

    def __init__(self, model: LanguageModel, results: Results, log: Log, together: int = TOGETHER) -> None:
        self.model, self.results, self.log, self.together = model, results, log, together
        self._refused: set[str] = set()

    def ask(self, prompt: Prompt, who: Sequence[Entry]) -> int:
        """Measure those whose row is missing; returns how many. Who cannot hold the prompt is left out, with a note."""
        missing = [
            entry
            for entry in who
            if (entry.known or prompt.question) and not self.results.has(prompt.task, prompt.index, entry.label)
        ]
        return sum(self._ask(prompt, missing[at : at + self.together]) for at in range(0, len(missing), self.together))

    def _ask(self, prompt: Prompt, who: Sequence[Entry]) -> int:
        caches = {entry.label: cache for entry in who if (cache := self._cache(entry)) is not None}
        asked = [entry for entry in who if entry.label in caches]
        if not asked:
            return 0
        together = [entry for entry in asked if shareable(caches[entry.label])]
        alone = [entry for entry in asked if not shareable(caches[entry.label])]
        measured = 0
        for row in self._together(prompt, together, caches) if together else ():
            self.results.add(row)
            measured += row["label"] != FULL
        for entry in alone:
            try:
                for row in self._alone(prompt, entry, caches[entry.label]):
                    self.results.add(row)
                    measured += 1
            except KVPruneError as error:
                self._leave_out(prompt, entry, error)
        return measured

    def _leave_out(self, prompt: Prompt, entry: Entry, error: KVPruneError) -> None:
        """Of this prompt alone: a budget that does not hold it may hold another."""
        self.log.note(f"left out: {entry.label}, {prompt.task} {prompt.index}: {error}")

    def _cache(self, entry: Entry) -> PrunedCache | None:
        """None for a policy that cannot be alone, or not on this model; said once."""
        try:
            return PrunedCache(self.model.model, entry.policy)
        except KVPruneError as error:
            if entry.name not in self._refused:
                self._refused.add(entry.name)
                self.log.note(f"left out: {entry.name}: {error}")
            return None

    def _together(self, prompt: Prompt, who: list[Entry], caches: dict[str, PrunedCache]) -> Iterator[Row]:
        known, unknown = ([caches[entry.label] for entry in who if entry.known is each] for each in (True, False))
        ordered = [*(entry for entry in who if entry.known), *(entry for entry in who if not entry.known)]
        began = time.process_time()
        dtype = getattr(torch, who[0].dtype) if who and who[0].dtype else None
        reader = Reader(self.model.model, known, unknown, dtype)
        logits = reader.read(prompt.ids.to(self.model.model.device), prompt.question)
        kept = reader.of_each(_kept)
        if prompt.text is not None:
            found = self._likelihood(prompt, reader)
        else:
            found = [prompt.judged(written) for written in greedy(reader, logits, **prompt.generation)]
        seconds = (time.process_time() - began) / len(reader.caches)
        for entry, cache, figures in zip([None, *ordered], reader.caches, found, strict=True):
            if (error := reader.refused.get(cache)) is not None:
                if entry is None:
                    raise error
                self._leave_out(prompt, entry, error)
            elif entry is not None or not self.results.has(prompt.task, prompt.index, FULL):
                yield self._row(prompt, entry, cache, kept[cache], seconds, figures)

    def _likelihood(self, prompt: Prompt, reader: Reader) -> list[Row]:
        """Of the text that follows the prompt, token by token; the first prediction is that of the prompt's last."""
        text = prompt.text.to(self.model.model.device)  # type: ignore[union-attr]
        steps = list(fed(reader, text[:-1]))
        full, targets = [step[:1] for step in steps], text[None, 1:]
        found = []
        for row in range(len(reader.caches)):
            figures = compare([step[row : row + 1] for step in steps], full, targets)
            found.append({name: values.item() for name, values in vars(figures).items()})
        return found

    @torch.inference_mode()
    def _alone(self, prompt: Prompt, entry: Entry, held: PrunedCache) -> Iterator[Row]:
        """A cache that does more than its layers do, as `generate()` would have it; no likelihood."""
        if prompt.text is not None or entry.dtype is not None:
            return
        began = time.process_time()
        model, ids = self.model.model, prompt.ids.to(self.model.model.device)
        if not entry.known:
            model(ids[:, : prompt.question], **cache_argument(held), logits_to_keep=1)
            held.end_prompt()
            ids = ids[:, prompt.question :]
        output = model(ids, **cache_argument(held), logits_to_keep=1)
        kept, written = _kept(held), [int(output.logits[0, -1].argmax())]
        limits = prompt.generation
        while len(written) < limits["max_new_tokens"] and not limits["done"](written):
            if written[-1] in limits["ends"]:
                break
            output = model(torch.tensor([[written[-1]]], device=ids.device), **cache_argument(held))
            written.append(int(output.logits[0, -1].argmax()))
        yield self._row(prompt, entry, held, kept, time.process_time() - began, prompt.judged(written))

    def _row(
        self, prompt: Prompt, entry: Entry | None, held: PrunedCache, kept: float, seconds: float, figures: Row
    ) -> Row:
        return {
            "suite": "quality-real",
            "model": self.model.name,
            "task": prompt.task,
            "index": prompt.index,
            "label": FULL if entry is None else entry.label,
            "policy": FULL if entry is None else entry.name,
            "budget": None if entry is None else entry.budget,
            "question": None if entry is None else entry.question,
            **({"cache": entry.dtype} if entry is not None and entry.dtype else {}),
            **figures,
            **prompt.fields,
            **asdict(Held.by(held, self.model.model)),
            "prompt_tokens": prompt.ids.shape[1],
            "kept": round(kept, 1),
            "cpu_seconds": round(seconds, 2),
        }


@torch.inference_mode()
def _kept(held: PrunedCache) -> float:
    """Tokens per KV head, the mean over layers."""
    layers = [(held.kept_positions(layer) >= 0).sum(-1).float().mean().item() for layer in held.pruned_layers]
    return sum(layers) / len(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a name, or a folder")
    parser.add_argument("--data", type=Path, default=prompts.DATA, help="the folder of longbench/ and text/")
    parser.add_argument("--budgets", nargs="+", help="instead of " + " ".join(BUDGETS))
    parser.add_argument("--policies", nargs="+", default=[], help="instead of all")
    parser.add_argument(
        "--bytes",
        action="store_true",
        help="policies of rows, bits and both, at " + " ".join(SHARES) + " (--budgets)",
    )
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="at compression")
    parser.add_argument("--cells", nargs="+", default=[], help="parts of names of tasks, instead of all")
    parser.add_argument("--count", type=int, help="prompts of each kind of needle and task, instead of the grid's")
    parser.add_argument(
        "--quick", action="store_true", help="whether everyone runs: two short prompts, a quarter, nothing is reported"
    )
    parser.add_argument("--minutes", type=float, help="stop before the next prompt once they have gone by")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument(
        "--together", type=int, metavar="N", default=TOGETHER,
        help="so many caches share a prompt at most: rows are written, and memory is free, when these are done",
    )  # fmt: skip
    parser.add_argument(
        "--share", type=int, nargs=2, metavar=("NUMBER", "OF"), default=[0, 1],
        help="every so many prompts, from this one on: for several processes, each with an --out of its own",
    )  # fmt: skip
    parser.add_argument("--presses", action="store_true", help="those of kvpress answer, and no policy")
    parser.add_argument("--peers", type=Path, default=PEERS, help="the Python that has kvpress")
    parser.add_argument("--tables", action="store_true", help="measure nothing, make the tables of what there is")
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality-real.jsonl"))
    parser.add_argument("--report", type=Path, nargs="+", default=[], help="with places for tables, which are filled")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quick:  # these figures are no part of the report
        arguments.out = arguments.out.with_stem(f"{arguments.out.stem}-quick")
        arguments.report = []
    budgets, dtype = (SHARES, "bfloat16") if arguments.bytes else (BUDGETS, None)
    arguments.budgets = arguments.budgets or list(budgets[:1] if arguments.quick else budgets)
    log = Log()
    results = Results(arguments.out)
    who: list[Entry] = []
    notes: list[str] = []
    for question in arguments.questions:
        only = arguments.policies or (ON_BYTES[question] if arguments.bytes else ())
        found, notes = entries(arguments.budgets, only, dtype)
        who += [entry for entry in found if entry.question == question]
    for note in notes:
        log.note(note)
    ends_at = time.monotonic() + 60 * arguments.minutes if arguments.minutes else None
    for report in arguments.report:
        if not report.is_file():
            parser.error(f"there is no {report}: --report fills the tables of a report that there is")
    if not arguments.tables:
        with ExitStack() as stack:
            measure(arguments, who, results, log, ends_at, stack)
    rows = results.rows()
    parts = real_tables.tables(
        rows, json.loads(EMBEDDED.read_text()).get("of_lengths", ()) if EMBEDDED.is_file() else ()
    )
    for shown in parts.values():
        log.console.print(*shown)
    if not arguments.quick:
        save(arguments.out.with_suffix(".json"), left_out=log.notes, rows=real_tables.summary(rows))
    written = {name: "\n".join(map(markdown, shown)) or "Not measured yet." for name, shown in parts.items()}
    for report in arguments.report:
        text = report.read_text()
        report.write_text(fill(text, {name: part for name, part in written.items() if marker(name) in text}))


def measure(
    arguments: argparse.Namespace,
    who: Sequence[Entry],
    results: Results,
    log: Log,
    ends_at: float | None,
    stack: ExitStack,
) -> None:
    model = load(arguments.model)
    quality = Quality(model, results, log, arguments.together)
    presses: Presses | None = None
    if arguments.presses:
        worker = stack.enter_context(Worker(arguments.peers, script=PRESS_WORKER))
        presses = Presses(model, model.model.name_or_path, results, worker, log)
    grid = prompts.grid(model, arguments.data, quick=arguments.quick, count=arguments.count, cells=arguments.cells)
    number, of = arguments.share
    for place in islice(grid, number, None, of):
        if ends_at is not None and time.monotonic() > ends_at:
            log.note("stopped: its minutes have gone by")
            break
        began = time.monotonic(), time.process_time()
        if presses is None:
            done = quality.ask(place.prompt(), place.chosen(who))
        else:
            done = presses.ask(place.prompt(), arguments.budgets, arguments.questions)
        if done:
            took, cpu = time.monotonic() - began[0], time.process_time() - began[1]
            what = f"{place.task} {place.index}: {done} answers, {took:.0f} s, {cpu:.0f} s of CPU"
            log.console.print(time.strftime("%H:%M:%S"), what, highlight=False)


if __name__ == "__main__":
    main()
