"""What compression does to answers: every policy, beside kvpress, with the question known to it and unknown.

    python bench/quality.py --out bench/results/quality.json --report bench/quality.md

The embedded model answers questions about documents; `asking.py` says what counts. The presses of kvpress that share
a method with a policy answer beside it, on the same token ids, in an environment of their own (`make peers`).
stories260K, a small model that is no part of the repository, adds likelihood where it is at hand. Contenders that are
left out are named.

Tables go to the terminal, and into the report between its markers; the text around them stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import likelihood
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

from kvprune import Policy, PrunedCache, Step, TokenTable
from kvprune.demo import MODEL_PATH, load
from kvprune.demo.measure import Questions
from kvprune.demo.task import QUESTION_LENGTH
from kvprune.policies import H2O
from kvprune.policy.registry import parse
from measuring.asking import Answered, Asked, Subject, answer, merge
from measuring.workload import Session
from printing import quality_tables as tables
from printing.output import Log, markdown, provenance, save
from printing.quality_tables import FULL, Row, Rows
from subjects.press_worker import Presses, PressJob
from subjects.worker import PEERS, Worker

BUDGETS = (0.5, 0.25, 0.1, 0.05)
EVICTING = (
    "a2sf", "a2sf:kernel_size=7", "snapkv", "h2o", "tova", "streaming_llm", "keyformer",
    "gemfilter:layer=2,keep_last=3",  # the layer of this model that does the retrieval, and the question
)  # fmt: skip
PACKING = (
    "zipcache", "zipcache:group_size=32", "kivi:bits=2", "a2sf:budget=0.5,kernel_size=7 | zipcache:kernel_size=7",
)  # fmt: skip
PRESS_WORKER = Path(__file__).parent / "subjects" / "press_worker.py"


@dataclass(frozen=True)
class MeanAttention(H2O):
    """H2O's score over the number of queries that could see the token: what ObservedAttentionPress ranks by."""

    def scores(self, table: TokenTable, step: Step) -> Tensor:
        return table["score"] / (step.tokens - table.positions)


@dataclass(frozen=True)
class Pair:
    """A policy and the press of kvpress that shares its method.

    twin: the policy with the rule of the press, by budget; None where their rules at the prompt are the same.
    """

    policy: str
    press: str
    twin: Callable[[float], Policy] | None = None

    @property
    def names(self) -> tuple[str, str, str]:
        """Of the policy, its twin (or itself), and the press."""
        return self.policy, f"{self.policy} by the rule of {self.press}" if self.twin else self.policy, self.press


PAIRS = (
    Pair(
        "snapkv", "SnapKVPress", lambda budget: parse(f"snapkv:{budget=},window=64,kernel_size=5,pooling=avg,sinks=0")
    ),
    Pair("tova", "TOVAPress"),
    Pair("streaming_llm", "StreamingLLMPress"),
    Pair("h2o", "ObservedAttentionPress", lambda budget: MeanAttention(budget, sinks=0, recent=0, interval=None)),
)


@dataclass(frozen=True)
class Candidate:
    """A contender. ask: all questions, known or not; raises PeerError where a peer cannot."""

    name: str
    budget: float | None
    ask: Callable[[bool], Answered]


class PeerError(RuntimeError):
    """Another environment could not answer."""


def asked_about(questions: Questions) -> list[Asked]:
    """The questions, document by document."""
    documents, counts = questions.prompts[:, :-QUESTION_LENGTH].unique_consecutive(dim=0, return_counts=True)
    asked = questions.prompts[:, -QUESTION_LENGTH:].split(counts.tolist())
    right = questions.answers.split(counts.tolist())
    return [Asked(*(part.tolist() for part in parts)) for parts in zip(documents, asked, right, strict=True)]


def here(name: str, budget: float | None, model: Any, policy: Policy | None, asked: Sequence[Asked]) -> Candidate:
    """A policy, or None for the stock cache, in this process."""
    if policy is None:
        subject = Subject(lambda: Session(DynamicCache(config=model.config)))
    else:
        subject = Subject(lambda: Session(PrunedCache(model, policy)), _rows, lambda cache: cache.nbytes)
    return Candidate(name, budget, lambda known: merge([answer(model, subject, each, known=known) for each in asked]))


def _rows(cache: Cache) -> float:
    layers = [(cache.kept_positions(layer) >= 0).sum(-1).float().mean().item() for layer in cache.pruned_layers]
    return sum(layers) / len(layers)


def there(press: str, budget: float, worker: Worker, asked: list[Asked]) -> Candidate:
    """A press, in the environment of kvpress."""

    def ask(known: bool) -> Answered:
        found = worker.ask("answer", PressJob(str(MODEL_PATH), press, budget, known, asked))
        if "error" in found:
            raise PeerError(found["error"])
        return Answered(**found)

    return Candidate(press, budget, ask)


def policies(model: Any, asked: Sequence[Asked], budgets: Sequence[float]) -> Iterator[Candidate]:
    yield here(FULL, None, model, None, asked)
    for budget in budgets:
        for text in EVICTING:
            yield here(text, budget, model, parse(text, budget=budget), asked)
    for text in PACKING:
        yield here(text, None, model, parse(text), asked)


def presses(model: Any, asked: list[Asked], budgets: Sequence[float], worker: Worker) -> Iterator[Candidate]:
    """Preceded by a press that keeps everything, as a check that the pipe to kvpress loses nothing."""
    yield there(PAIRS[0].press, 1.0, worker, asked)
    for budget in budgets:
        for pair in PAIRS:
            yield there(pair.press, budget, worker, asked)
            if pair.twin is not None:
                yield here(pair.names[1], budget, model, pair.twin(budget), asked)


def run(candidates: Sequence[Candidate], log: Log) -> Rows:
    """Answers of all contenders, with the question known and unknown."""
    rows: list[Row] = []
    with Progress(console=log.console, transient=True) as progress:
        task = progress.add_task("", total=2 * len(candidates))
        for candidate in candidates:
            progress.update(task, description=candidate.name)
            for known in (True, False):
                try:
                    rows.append(Row(candidate.name, candidate.budget, known, candidate.ask(known)))
                except PeerError as error:
                    log.note(f"left out: {candidate.name} at {candidate.budget:.0%}: {error}")
                progress.advance(task)
    return Rows(rows)


def likelihoods(sequences: int, log: Log) -> list[likelihood.Result]:
    """Of stories260K, which reads half of each text and is fed the other; nothing where it is not at hand."""
    folder, text = likelihood.DATA / "stories260K", likelihood.DATA / "text" / "tinystories_sample.txt"
    if not ((folder / "config.json").is_file() and text.is_file()):
        log.note("left out: likelihood, since stories260K is not part of the repository and not beside it")
        return []
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    documents = (document.strip() for document in text.read_text(encoding="utf-8").split(likelihood.SEPARATOR))
    pieces = likelihood.cut(documents, AutoTokenizer.from_pretrained(folder), sequences, likelihood.LENGTH)
    chosen = {text: parse(text) for text in likelihood.POLICIES}
    return likelihood.measure(model, pieces, chosen, prompt=likelihood.LENGTH // 2, batch_size=16)


def tables_of(
    rows: Rows, language: Sequence[likelihood.Result], budgets: Sequence[float], itemsize: int
) -> dict[str, list[Table]]:
    """By their place in the report."""
    trios = [pair.names for pair in PAIRS]
    return {
        "known": [tables.by_budget(rows, EVICTING, budgets, known=True, first=1)],
        "unknown": [tables.by_budget(rows, EVICTING, budgets, known=False, first=first) for first in (0, 1)],
        "bytes": [tables.bytes_by_budget(rows, EVICTING, budgets, itemsize)],
        "packing": [tables.packing(rows, PACKING, itemsize)],
        "side by side": [tables.side_by_side(rows, trios, budgets, known=known) for known in (True, False)],
        "likelihood": [tables.likelihoods(language)],
    }


def origin(settings: str, peers: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The command, the machine, the versions, the defaults of the presses, and the contenders left out."""
    made = provenance()
    machine = made["machine"]
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}"
    lines = [
        f"- `{made['command']}`: {settings}",
        f"- {machine['platform']}, {machine['threads']} of {machine['cores']} cores; {versions}",
    ]
    if "error" not in peers:
        lines.append("- beside it: " + ", ".join(f"{name} {version}" for name, version in peers["versions"].items()))
    for press, defaults in peers.get("defaults", {}).items():
        shown = ", ".join(f"{name}={value}" for name, value in defaults.items())
        lines.append(f"- {press}: {shown or 'no setting but its compression ratio'}")
    return "\n".join([*lines, *(f"- {note}" for note in notes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--notes", type=int, default=64)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--texts", type=int, default=32, help="for likelihood")
    parser.add_argument("--peers", type=Path, default=PEERS, help="the Python that has kvpress")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    budgets = arguments.budgets
    if min(arguments.questions, arguments.texts) < 1:
        parser.error("--questions and --texts must be at least 1")
    if not all(0 < budget <= 1 for budget in budgets):
        parser.error("--budgets are fractions of the prompt, above 0 and up to 1")
    if arguments.report is not None and not arguments.report.is_file():
        parser.error(f"there is no {arguments.report}: --report fills the tables of a report that there is")

    log = Log()
    questions = Questions.draw(arguments.questions, tokens=arguments.tokens, notes=arguments.notes, seed=arguments.seed)
    asked = asked_about(questions)
    model, _ = load()
    itemsize = model.dtype.itemsize
    candidates = list(policies(model, asked, budgets))
    with Worker(arguments.peers, script=PRESS_WORKER) as worker:
        peers: dict[str, Any] = {"error": f"no environment for it at {arguments.peers}: `make peers` makes it"}
        if arguments.peers.exists():
            peers = worker.ask("versions", Presses([pair.press for pair in PAIRS]))
        if "error" in peers:
            log.note(f"left out: kvpress: {peers['error']}")
        else:
            candidates += presses(model, asked, budgets, worker)
        rows = run(candidates, log)
    language = likelihoods(arguments.texts, log)

    parts = tables_of(rows, language, budgets, itemsize)
    for shown in parts.values():
        log.console.print(*shown)
    save(
        arguments.out, tokens=arguments.tokens, notes=arguments.notes, questions=arguments.questions,
        documents=len(asked), seed=arguments.seed, peers=peers, left_out=log.notes,
        rows=[row.to_dict(rows.full(row.known).answered, itemsize) for row in rows],
        likelihood=[result.to_dict() for result in language],
    )  # fmt: skip
    if arguments.report is not None:
        settings = (
            f"{arguments.questions} questions about {len(asked)} documents of {arguments.tokens:,} tokens with "
            f"{arguments.notes} notes each; {len(asked[0].answers[0])} words an answer"
        )
        written = {name: "\n".join(map(markdown, shown)) for name, shown in parts.items()}
        written["origin"] = origin(settings, peers, log.notes)
        arguments.report.write_text(tables.fill(arguments.report.read_text(), written))


if __name__ == "__main__":
    main()
