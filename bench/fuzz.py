"""Fuzzing: kvprune must accept any input of a user, a program or a file, or raise a KVPruneError. Else it is a bug.

    python bench/fuzz.py --cases 50000 --out bench/results/fuzz.json

Every case has a seed of its own: `--only files --first 1234 --cases 1` runs case 1234 of the files again. A case that
takes longer than `--seconds`, or more memory than `--gib`, is a bug as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kvprune import Budget, KVPruneError, Policy, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.evaluation.contenders import contenders
from kvprune.integrations.longbench import LongBench
from kvprune.integrations.longbench_tasks import TASKS
from kvprune.policy import registry
from kvprune.saving import files as saving
from printing.output import Log, save, save_markdown, table

# -- odd things --------------------------------------------------------------------------------------------------------

NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 3, 7, 16, 64, 1000, -1, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400),
    0.0, -0.0, 0.25, 0.5, 1.0, 1.5, 1 - 1e-7, 1e-300, 5e-324, 1e300, math.inf, -math.inf, math.nan,
)  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, True, False, "", "mean", "max", "avg", "official", "64", "1KiB", "25%", b"64", (), [], {}, [64], {"a": 1},
    object(), 1j, Fraction(1, 3), np.float32(0.5), np.float64(math.nan), np.int64(16), np.uint8(7), np.bool_(True),
    np.array(16), torch.tensor(0.5), torch.tensor([1, 2]),
)  # fmt: skip
CHARACTERS = "0123456789.,:;=|%-+_ eEkKmMgGtTiIbB\t\n\0\\\"'{}[]()²٣½∞é漢\ud800\u202e"


def number(draw: random.Random) -> Any:
    kind = draw.randrange(5)
    if kind == 0:
        return draw.choice(NUMBERS)
    if kind == 1:
        return draw.randint(-3, 100)
    if kind == 2:
        return draw.uniform(-0.5, 1.5)
    if kind == 3:
        return draw.randrange(1, 10 ** draw.randrange(1, 40))
    return math.ldexp(draw.uniform(-1, 1), draw.randint(-1074, 1024))


def anything(draw: random.Random) -> Any:
    return number(draw) if draw.random() < 0.7 else draw.choice(JUNK)


def mutated(draw: random.Random, text: str) -> str:
    """The text with up to four characters, or stretches, replaced, deleted, doubled or inserted."""
    for _ in range(draw.randrange(5)):
        at, kind = draw.randrange(len(text) + 1), draw.randrange(5)
        end = at + draw.choice((1, 1, 1, 5, 20))
        new = draw.choice(CHARACTERS) * draw.choice((1, 1, 1, 2, 5000))
        text = text[:at] + ("", new, new + text[at:end], text[at:end] * 2, str(number(draw)))[kind] + text[end:]
    return text


def json_value(draw: random.Random, depth: int = 3) -> Any:
    kind = draw.randrange(8 if depth else 5)
    if kind < 2:
        value = number(draw)
        return value if not isinstance(value, int) or abs(value) < 10**40 else 0  # JSON parsers refuse longer ones
    if kind == 2:
        return draw.choice((None, True, False, "", "text", "\ud800", "{context}", "{input}"))
    if kind in (3, 4):
        return draw.randint(-3, 50)
    inner = [json_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return inner if kind < 7 else {str(place): value for place, value in enumerate(inner)}


def places(facts: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree of JSON."""
    inner = facts.items() if isinstance(facts, dict) else enumerate(facts) if isinstance(facts, list) else ()
    return [place, *(each for name, value in inner for each in places(value, (*place, name)))]


def changed(draw: random.Random, facts: Any) -> Any:
    """The tree with something else, or nothing, at one place."""
    copied = json.loads(json.dumps(facts))
    place = draw.choice(places(copied))
    if not place:
        return json_value(draw)
    parent = copied
    for name in place[:-1]:
        parent = parent[name]
    if draw.random() < 0.2:
        del parent[place[-1]]
    else:
        parent[place[-1]] = json_value(draw)
    return copied


# -- targets -----------------------------------------------------------------------------------------------------------

Run = Callable[[], object]


@dataclass(frozen=True)
class Target:
    """make: a case of what a generator draws, as words that show it and a call that runs it. missing: why it cannot."""

    make: Callable[[random.Random], tuple[str, Run]]
    missing: str | None = None


TARGETS: dict[str, Target] = {}


def target(missing: str | None = None) -> Callable[[Callable[[random.Random], tuple[str, Run]]], Any]:
    def register(make: Callable[[random.Random], tuple[str, Run]]) -> Any:
        TARGETS[make.__name__] = Target(make, missing)
        return make

    return register


@cache
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def use(pruned: PrunedCache, tokens: int = 12) -> None:
    """A prompt, two generated tokens, and a second turn."""
    batch = next((len(pruned.layers[index].tokens) for index in pruned.pruned_layers), 0) or 1
    for length in (tokens, 1, 1, 3):
        model()(torch.ones(batch, length, dtype=torch.long), **cache_argument(pruned))


def as_budget(draw: random.Random) -> Any:
    if draw.random() < 0.5:
        return anything(draw)
    return mutated(draw, draw.choice(("0.25", "1024", "512MiB", "25%", "1.5 GB", "100 b", ".5", "7.")))


@target()
def budgets(draw: random.Random) -> tuple[str, Run]:
    """`Budget.parse`, and what the budget allows."""
    value, prompt, floor = as_budget(draw), draw.choice((0, 1, 30, 10**6)), draw.choice((1, 36))

    def run() -> None:
        tokens = Budget.parse(value).tokens(prompt, floor=floor, token_bytes=draw.choice((1, 512)), spare=1)
        if not isinstance(tokens, int) or tokens < 1:
            raise AssertionError(f"a budget of {tokens!r} tokens")

    return repr(value), run


@target()
def policies(draw: random.Random) -> tuple[str, Run]:
    """Any settings of any policy; one that can be made can be used, or says why not."""
    name = draw.choice(registry.names())
    known = [field.name for field in fields(registry.find(name))]
    chosen = draw.sample(known, draw.randrange(min(len(known), 3) + 1))
    settings = {setting: as_budget(draw) if setting == "budget" else anything(draw) for setting in chosen}

    def run() -> None:
        policy = registry.get(name, **settings)
        str(policy)
        use(PrunedCache(model(), policy))

    return f"{name}: {settings!r}", run


def policy_text(draw: random.Random) -> str:
    """A chain in words: half of them well-formed, with strange numbers; the others damaged."""
    links = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        name = draw.choice(registry.names())
        defaults = {field.name: field.default for field in fields(registry.find(name))}
        given = draw.sample(sorted(defaults), min(len(defaults), draw.randrange(3)))
        values = [number(draw) if draw.random() < 0.5 else defaults[setting] for setting in given]
        settings = ",".join(f"{setting}={value}" for setting, value in zip(given, values, strict=True))
        links.append(f"{name}:{settings}" if settings else name)
    text = draw.choice(("|", " | ")).join(links)
    if draw.random() < 0.5:
        return text
    if draw.random() < 0.3:
        text += draw.choice((":", ",")) + draw.choice(("name", "self", "text", "nothing", "")) + draw.choice(("", "=1"))
    return mutated(draw, text)


@target()
def strings(draw: random.Random) -> tuple[str, Run]:
    """`registry.parse`, with and without a default budget; what it reads can be written down and read again."""
    text, defaults = policy_text(draw), {"budget": as_budget(draw)} if draw.random() < 0.3 else {}

    def run() -> None:
        policy = registry.parse(text, **defaults)
        str(policy)
        if registry.from_description(json.loads(json.dumps(registry.described(policy)))) != policy:
            raise AssertionError("a description describes another policy")

    return f"{text!r} {defaults!r}", run


@target()
def command_line(draw: random.Random) -> tuple[str, Run]:
    """What `kvprune eval` makes of its options `--policy` and `--budget`, each of which may be repeated."""
    texts = [draw.choice((policy_text(draw), registry.names()[0], "full")) for _ in range(draw.choice((0, 1, 1, 1, 2)))]
    budgets = [str(as_budget(draw)) for _ in range(draw.choice((0, 1, 1, 1, 2)))]

    def run() -> None:
        if not all(contender.label for contender in contenders(texts, budgets)):
            raise AssertionError("a contender without a name")

    return f"{texts!r} {budgets!r}", run


# -- files -------------------------------------------------------------------------------------------------------------


@dataclass
class Saved:
    """A file of a cache, whole and in parts."""

    content: bytes
    header: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kvprune-fuzz-")  # removed when the process ends


def folder() -> Path:
    return Path(_temporary().name)


@cache
def saved(text: str) -> Saved:
    path = folder() / "whole"
    pruned = PrunedCache(model(), text)
    use(pruned, 24)
    pruned.save(path)
    with safe_open(path, "pt") as opened:
        header = json.loads(opened.metadata()["header"])
    return Saved(path.read_bytes(), header, load_file(path))


CACHES = (
    "snapkv:budget=16,window=4,interval=1",
    "a2sf:budget=16,sinks=2,recent=3 | zipcache:buffer=4",
    "gemfilter:budget=20 | a2sf:budget=16,sinks=2,recent=3 | kivi:group_size=4,residual=4",
)


@target()
def files(draw: random.Random) -> tuple[str, Run]:
    """`PrunedCache.load` of files with damaged bytes, or whose checksums are right and whose contents are made up."""
    whole, path = saved(draw.choice(CACHES)), folder() / "damaged"
    kind = draw.choice(("bytes", "end", "facts", "facts", "tensor"))
    if kind == "bytes":
        content = bytearray(whole.content)
        for _ in range(draw.choice((1, 1, 8))):
            content[draw.choice((draw.randrange(len(content)), draw.randrange(64)))] = draw.randrange(256)
        path.write_bytes(content)
    elif kind == "end":
        path.write_bytes(whole.content[: draw.randrange(len(whole.content))])
    else:
        header, tensors = whole.header, dict(whole.tensors)
        if kind == "facts":
            header = changed(draw, header)
        else:
            name = draw.choice(sorted(tensors))
            tensors[name] = other_tensor(draw, tensors[name])
        seal(path, header, tensors)

    def run() -> None:
        use(PrunedCache.load(path, model()))

    return kind, run


def other_tensor(draw: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """One of the same size with other numbers, or of another shape or dtype."""
    if draw.random() < 0.5:
        flat = tensor.clone().reshape(-1)
        if len(flat):
            flat[draw.randrange(len(flat))] = draw.choice((-2, -1, 0, 1, 100, 200))
        return flat.view(tensor.shape)
    shape = [draw.choice((size, size, 0, 1, size + 1)) for size in tensor.shape]
    return torch.ones(shape, dtype=draw.choice((tensor.dtype, tensor.dtype, torch.int64, torch.float16)))


def seal(path: Path, header: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file with all its checksums right."""
    if isinstance(header, dict):
        header = header | {"tensors": {name: saving._digest(tensor) for name, tensor in tensors.items()}}
    text = json.dumps(header)
    metadata = {"format": saving.FORMAT, "version": str(saving.VERSION), "header": text}
    save_file(tensors, path, metadata | {"sha256": saving._digest(text)})


# -- data of evaluations -----------------------------------------------------------------------------------------------

ROW = {
    "input": "Who wrote it?", "context": "A book. It was written by Ann.", "answers": ["Ann"], "length": 7,
    "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "0",
}  # fmt: skip
MINI = {
    "0": {
        "origin_prompt": "Passages: a book.\nQuestion: who?\nAnswer:",
        "gold": {"answers": ["A"], "all_classes": ["A", "B"]},
    }
}


@target()
def longbench(draw: random.Random) -> tuple[str, Run]:
    """LongBench's rows, MiniLongBench's, prompts and lengths: read, and scored with any answer."""
    task, extended = draw.choice(sorted(TASKS)), draw.random() < 0.2
    there = folder() / "longbench"
    there.mkdir(exist_ok=True)
    for file in there.iterdir():
        file.unlink()
    prompt, length = {task: "Read: {context}\nQuestion: {input}\nAnswer:"}, {task: 16}
    row: Any = ROW | {"all_classes": draw.choice((None, ["Ann", "Bob"]))}
    mini: Any = MINI
    which = draw.choice(("row", "row", "row", "mini", "prompt", "length", "text"))
    if which == "row":
        row = changed(draw, row)
    elif which == "mini":
        mini = changed(draw, mini)
    elif which == "prompt":
        prompt = changed(draw, prompt) if draw.random() < 0.5 else {task: mutated(draw, prompt[task])}
    elif which == "length":
        length = changed(draw, length)
    if which == "mini" and not extended:
        write(there / f"MiniLongBench_{task}.json", json.dumps(mini))
    else:
        text = json.dumps(row)
        write(there / f"{task}{'_e' * extended}.jsonl", mutated(draw, text) if which == "text" else text)
    write(there / "dataset2prompt.json", json.dumps(prompt))
    write(there / "dataset2maxlen.json", json.dumps(length))
    answer = mutated(draw, draw.choice(("Ann", "Paragraph 3", "1, 2", "def f():\n    return 1", "")))

    def run() -> None:
        suite = LongBench(there, extended=extended)
        for example in suite.examples():
            score = suite.score(example, answer)
            if not 0 <= score <= 1:
                raise AssertionError(f"a score of {score!r}")

    return f"{task} {which}", run


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _lm_eval_is_missing() -> str | None:
    needed = ("kvprune.integrations.lm_eval", "lm_eval")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"there is no {missing[0]}" if missing else None


@target(_lm_eval_is_missing())
def lm_eval(draw: random.Random) -> tuple[str, Run]:
    """What lm-eval makes of `--model_args`, read as the model of kvprune reads it."""
    policy = policy_text(draw).replace(",", ";") if draw.random() < 0.8 else anything(draw)
    budget = as_budget(draw) if draw.random() < 0.5 else None

    def run() -> None:
        from kvprune.integrations.lm_eval import read_policy  # type: ignore[import-not-found,unused-ignore]

        if not isinstance(read_policy(policy, budget), Policy):
            raise AssertionError("no policy, and no error")

    return f"{policy!r} {budget!r}", run


# -- running them ------------------------------------------------------------------------------------------------------


class TooLongError(Exception):
    """A case has run out of time."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLongError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Outcome:
    """Outcome of the cases of a target. bugs: by where they were raised, the first case and how many there are."""

    taken: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    bugs: dict[str, dict[str, Any]] = field(default_factory=dict)


def fuzz(
    name: str,
    first: int,
    cases: int,
    seconds: float = 20.0,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Outcome:
    """Run cases `first .. first + cases - 1` of a target."""
    outcome = Outcome()
    for case in progress(range(first, first + cases)):
        shown, run = TARGETS[name].make(random.Random(f"{seed} {name} {case}"))
        try:
            with at_most(seconds), np.errstate(over="raise"):  # where an int of numpy wraps around
                run()
        except KVPruneError as error:
            outcome.refused[type(error).__name__] += 1
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            told = str(error).partition("\n")[0][:200]
            bug = outcome.bugs.setdefault(where, {"case": case, "input": shown[:300], "error": told, "count": 0})
            bug["count"] += 1
        else:
            outcome.taken += 1
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of every target")
    parser.add_argument("--only", nargs="+", choices=sorted(TARGETS), help="some of the targets")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="that one case may take")
    parser.add_argument("--gib", type=float, default=8.0, help="of address space that the process may take")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    limit = int(arguments.gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    log, results = Log(), {}
    caption = "Cases taken, cases refused with a KVPruneError, and places where something else was raised."
    shown = table("fuzzing", caption, "target", "taken", "refused", "bugs", "s")
    for name in arguments.only or TARGETS:
        if (missing := TARGETS[name].missing) is not None:
            log.note(f"left out: {name}: {missing}")
            continue
        begin, bar = time.perf_counter(), partial(track, description=name, console=log.console, transient=True)
        outcome = fuzz(name, arguments.first, arguments.cases, arguments.seconds, arguments.seed, bar)
        taken = time.perf_counter() - begin
        results[name] = vars(outcome) | {"seconds": round(taken)}
        for where, bug in outcome.bugs.items():
            log.note(f"{name}: {where}, {bug['count']:,} times, first in case {bug['case']}: {bug['error']}")
            log.note(f"    {bug['input']}")
        shown.add_row(
            name, f"{outcome.taken:,}", f"{outcome.refused.total():,}", str(len(outcome.bugs)), f"{taken:.0f}"
        )
        save(arguments.out, cases=arguments.cases, seed=arguments.seed, notes=log.notes, targets=results)
    log.console.print(shown)
    save_markdown(arguments.out, [shown], log.notes)
    if any(result["bugs"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
