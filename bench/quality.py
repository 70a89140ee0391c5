"""What compression does to answers: every policy, beside kvpress, with the question known to it and unknown.

    python bench/quality.py --out bench/results/quality.json --report bench/quality.md

The embedded model answers questions about documents; `asking.py` says what counts. The presses of kvpress that share
a method with a policy answer beside it, on the same token ids, in an environment of their own (`make peers`).
stories260K, a small model that is no part of the repository, adds likelihood where it is at hand. Contenders that are
left out are named.

Tables go to the terminal, and into the report between its markers; the text around them stays. --parts measures some:
"answers", everyone at a share of the tokens, beside kvpress; "bytes", rows and bits at as many bytes; "lengths",
answers of more words.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import likelihood
import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

from kvprune import Policy, PrunedCache, Step, TokenTable
from kvprune.demo import MODEL_PATH, load
from kvprune.demo.measure import Questions
from kvprune.demo.task import ANSWER_LENGTH, QUESTION_LENGTH
from kvprune.policies import H2O
from kvprune.policy.registry import parse, takes_budget
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
    "adakv", "criticalkv", "critical_adakv", "pyramidkv", "dropkv", "kvzip", "keydiff", "knorm", "leverage",
    "expected_attention", "tri_attention", "random", "a2sf:kernel_size=7 | kvcrush",
)  # fmt: skip
PACKING = (
    "zipcache", "zipcache:group_size=32", "zipvl", "kivi:bits=2", "kivi:bits=4", "turboquant", "oscar", "spectral",
    "spectral:bits=4", "a2sf:budget=0.5,kernel_size=7 | zipcache:kernel_size=7",
)  # fmt: skip
# At as many bytes, the model and its caches in bfloat16: `Bits` is given a share of the bytes, eviction of the rows.
SHARES = (0.5, 0.25, 0.1, 0.05, 0.03, 0.02, 0.01)
ON_BYTES = (
    "bits:score=snapkv", "bits:score=dropkv", "bits:score=kvzip", "bits:score=kvzip(group=mean)", "bits:score=leverage",
    "bits:score=dropkv,share=everywhere(floor=0.5)", "bits:score=kvzip(group=mean),share=everywhere(floor=0.5)",
    "snapkv:recent=16", "a2sf:kernel_size=7,recent=16", "dropkv:recent=16", "kvzip:recent=16", "leverage:recent=16",
    "kivi:bits=2", "zipcache:group_size=32", "spectral", "spectral:bits=4",
)  # fmt: skip
# Answers of more words than the model was trained on; spans are those that the real model's report recommends.
WORDS = (3, 7, 11)
SPAN = "kernel_size=27,ahead=23"
LENGTH_BUDGETS = (0.25, 0.1)
OF_LENGTHS = (
    *(f"{name}:{SPAN}" for name in ("snapkv", "a2sf", "adakv", "criticalkv", "critical_adakv", "dropkv", "pyramidkv")),
    f"a2sf:{SPAN} | kvcrush", "snapkv", "a2sf:kernel_size=7", "kvzip", "keydiff", "leverage", "knorm", "tova", "h2o",
    "streaming_llm", "expected_attention", "tri_attention", "random",
    "zipcache", "zipcache:group_size=32", "zipvl", "kivi:bits=2", "kivi:bits=4", "spectral", "spectral:bits=4",
)  # fmt: skip
PARTS = ("answers", "bytes", "lengths")
KEYS = ("answers", "rows", "likelihood", "at_as_many_bytes", "of_lengths")  # of the file, whatever part they are of
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


def _with(settings: str, *names: str) -> dict[str, Callable[[float], Policy]]:
    """Policies with these settings, by name: each makes one of a budget."""
    return {name: lambda budget, name=name: parse(f"{name}:{budget=},{settings}") for name in names}  # type: ignore[misc]


# Window and pooling of SnapKVPress; presses that score keys keep neither sinks nor recent tokens for being such.
TWINS = {
    **_with(
        "window=64,kernel_size=5,pooling=avg,sinks=0", "snapkv", "adakv", "criticalkv", "critical_adakv", "pyramidkv"
    ),
    **_with("sinks=0,recent=0,interval=none", "keydiff", "knorm", "leverage"),
    **_with("sinks=4,recent=0,interval=none", "expected_attention"),
}

PAIRS = (
    Pair("snapkv", "SnapKVPress", TWINS["snapkv"]),
    Pair("tova", "TOVAPress"),
    Pair("streaming_llm", "StreamingLLMPress"),
    Pair("h2o", "ObservedAttentionPress", lambda budget: MeanAttention(budget, sinks=0, recent=0, interval=None)),
    Pair("adakv", "AdaKVPress(SnapKVPress)", TWINS["adakv"]),
    Pair("criticalkv", "CriticalKVPress(SnapKVPress)", TWINS["criticalkv"]),
    Pair("critical_adakv", "CriticalAdaKVPress(SnapKVPress)", TWINS["critical_adakv"]),
    Pair("pyramidkv", "PyramidKVPress", TWINS["pyramidkv"]),
    Pair("keydiff", "KeyDiffPress", TWINS["keydiff"]),
    Pair("knorm", "KnormPress", TWINS["knorm"]),
    Pair("expected_attention", "ExpectedAttentionPress", TWINS["expected_attention"]),
    Pair("leverage", "LeverageScorePress", TWINS["leverage"]),
    Pair("random", "RandomPress"),
    Pair("kvzip", "KVzipPress"),
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
    """Those that evict under every budget, and those that pack."""
    return _everyone(model, asked, (*EVICTING, *PACKING), budgets)


def on_bytes(model: Any, asked: Sequence[Asked], shares: Sequence[float]) -> Iterator[Candidate]:
    """model: in 16 bits. `Bits` is given shares of bytes, others of rows."""

    def given(text: str, share: float) -> float | str:
        return f"{share}b" if text.startswith("bits") else share

    return _everyone(model, asked, ON_BYTES, shares, given)


def of_length(model: Any, asked: Sequence[Asked]) -> Iterator[Candidate]:
    return _everyone(model, asked, OF_LENGTHS, LENGTH_BUDGETS)


def _everyone(
    model: Any,
    asked: Sequence[Asked],
    names: Sequence[str],
    budgets: Sequence[float],
    given: Callable[[str, float], float | str] = lambda _, budget: budget,
) -> Iterator[Candidate]:
    """The full cache, and these policies; once, where they take no budget. given: the budget, as a policy writes it."""
    yield here(FULL, None, model, None, asked)
    for text in names:
        if not takes_budget(text):
            yield here(text, None, model, parse(text), asked)
            continue
        for budget in budgets:
            yield here(text, budget, model, parse(text, budget=given(text, budget)), asked)


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
    """Of the part "answers", by their place in the report."""
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--notes", type=int, default=64)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of bytes")
    parser.add_argument("--words", type=int, nargs="+", default=list(WORDS), help="of answers, in the part of lengths")
    parser.add_argument("--texts", type=int, default=32, help="for likelihood")
    parser.add_argument("--peers", type=Path, default=PEERS, help="the Python that has kvpress")
    parser.add_argument("--out", type=Path, help="what other parts have left there stays")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if min(arguments.questions, arguments.texts, *arguments.words) < 1:
        parser.error("--questions, --texts and --words must be at least 1")
    if not all(0 < budget <= 1 for budget in [*arguments.budgets, *arguments.shares]):
        parser.error("--budgets and --shares are fractions, above 0 and up to 1")
    if arguments.report is not None and not arguments.report.is_file():
        parser.error(f"there is no {arguments.report}: --report fills the tables of a report that there is")

    log = Log()
    parts: dict[str, list[Table | str]] = {}
    found: dict[str, Any] = {}
    settings = f"{arguments.questions} questions, documents of {arguments.tokens:,} tokens with {arguments.notes} notes"
    if "answers" in arguments.parts:
        more, figures, peers = measure_answers(arguments, log)
        parts |= more
        found |= figures
        parts["origin"] = [origin(settings, peers, log.notes)]
    for part, measured in (("bytes", measure_bytes), ("lengths", measure_lengths)):
        if part in arguments.parts:
            more, figures = measured(arguments, log)
            parts |= {**more, f"origin of {part}": [origin(settings, {"error": ""}, ())]}
            found |= figures
    for shown in parts.values():
        log.console.print(*shown)
    if arguments.out is not None and arguments.out.is_file():
        before = json.loads(arguments.out.read_text())
        found = {name: before[name] for name in KEYS if name in before} | found
    save(arguments.out, seed=arguments.seed, left_out=log.notes, **found)
    if arguments.report is not None:
        written = {name: "\n".join(map(_in_markdown, shown)) for name, shown in parts.items()}
        arguments.report.write_text(tables.fill(arguments.report.read_text(), written))


def _in_markdown(shown: Table | str) -> str:
    return shown if isinstance(shown, str) else markdown(shown)


Measured = tuple[dict[str, Any], dict[str, Any]]
"""Tables by their place in the report, and what is written to the file, by its key."""


def measure_answers(arguments: argparse.Namespace, log: Log) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """As `Measured`, and what the environment of kvpress says of itself."""
    asked = asked_about(questions_of(arguments))
    model, _ = load()
    itemsize = model.dtype.itemsize
    candidates = list(policies(model, asked, arguments.budgets))
    with Worker(arguments.peers, script=PRESS_WORKER) as worker:
        peers: dict[str, Any] = {"error": f"no environment for it at {arguments.peers}: `make peers` makes it"}
        if arguments.peers.exists():
            peers = worker.ask("versions", Presses([pair.press for pair in PAIRS]))
        if "error" in peers:
            log.note(f"left out: kvpress: {peers['error']}")
        else:
            candidates += presses(model, asked, arguments.budgets, worker)
        rows = run(candidates, log)
    language = likelihoods(arguments.texts, log)
    asked_of = {"tokens": arguments.tokens, "notes": arguments.notes, "questions": arguments.questions}
    figures = {
        "answers": {**asked_of, "documents": len(asked), "peers": peers},
        "rows": [row.to_dict(rows.full(row.known).answered, itemsize) for row in rows],
        "likelihood": [result.to_dict() for result in language],
    }
    return tables_of(rows, language, arguments.budgets, itemsize), figures, peers


def measure_bytes(arguments: argparse.Namespace, log: Log) -> Measured:
    asked = asked_about(questions_of(arguments))
    rows = run(list(on_bytes(load()[0].to(torch.bfloat16), asked, arguments.shares)), log)
    shown = [tables.at_as_many_bytes(rows, ON_BYTES, arguments.shares, known=known) for known in (True, False)]
    figures = [row.to_dict(rows.full(row.known).answered, itemsize=2) for row in rows]
    return {"at as many bytes": shown}, {"at_as_many_bytes": figures}


def measure_lengths(arguments: argparse.Namespace, log: Log) -> Measured:
    model, _ = load()
    of_words = {
        words: run(list(of_length(model, asked_about(questions_of(arguments, words)))), log)
        for words in arguments.words
    }
    shown = [tables.by_length(of_words, OF_LENGTHS, LENGTH_BUDGETS, known=known) for known in (True, False)]
    figures = [
        {"words": words, **row.to_dict(rows.full(row.known).answered, model.dtype.itemsize)}
        for words, rows in of_words.items()
        for row in rows
    ]
    return {"lengths": shown}, {"of_lengths": figures}


def questions_of(arguments: argparse.Namespace, words: int = ANSWER_LENGTH) -> Questions:
    sizes = {"tokens": arguments.tokens, "notes": arguments.notes, "seed": arguments.seed}
    return Questions.draw(arguments.questions, **sizes, words=words)


if __name__ == "__main__":
    main()
