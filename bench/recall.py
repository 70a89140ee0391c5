"""What a pruned cache remembers: recall of the embedded model, for any policies.

    python bench/recall.py --out bench/results/recall.json

The task, and how recall is counted, are those of `kvprune demo`: words of an answer, from the second on, predicted from
the compressed cache. The demo shows a few policies side by side; this measures any, on as many questions as it takes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from kvprune.demo import load
from kvprune.demo.measure import Questions, Result, measure, reference
from kvprune.demo.show import FULL
from kvprune.policy.registry import parse
from printing.output import save, table

BUDGETS = (0.25, 0.1, 0.05)
# Keyformer, and H2O with the sinks and the window of Keyformer as well as with its own.
EVICTING = tuple(
    f"{name}{pooled}"
    for pooled in ("", ",kernel_size=7")
    for name in ("h2o:sinks=4", "h2o:sinks=0,recent=0.3", "keyformer:sinks=0")
)
# The embedded model has three layers; the question has three words.
FILTERS = tuple(f"gemfilter:budget=0.25,layer={layer}{keep}" for layer in range(3) for keep in ("", ",keep_last=3"))
PACKING = (
    "zipcache", "zipcache:kernel_size=7", "zipcache:group_size=32", "zipcache:high_bits=4,low_bits=4",
    "kivi:bits=2", "kivi:bits=4",
)  # fmt: skip
CHAINS = tuple(
    f"a2sf:budget=0.5,kernel_size=7 | zipcache{settings}"
    for settings in ("", ":kernel_size=7", ":kernel_size=7,group_size=64")
)
POLICIES = (
    *(f"{name},budget={budget}" for budget in BUDGETS for name in EVICTING),
    *FILTERS,
    *PACKING,
    *CHAINS,
)


def standard_error(share: float, words: int) -> float:
    """Of a share of so many words, as if they were independent."""
    return math.sqrt(share * (1 - share) / words)


def show(results: list[Result], title: str, words: int, console: Console) -> None:
    shown = table(
        title,
        f"recall: share of {words} words, ± standard error. ratio: bytes of a sequence at its end, measured, "
        "everything included, to those of a dense cache in float32, the model's type; 16 bits: to one in 16 bits.",
        "policy", "recall", "agree", "ratio", "16 bits",
    )  # fmt: skip
    for result in results:
        shown.add_row(
            result.policy, f"{result.recall:.1%} ± {standard_error(result.recall, words):.1%}",
            f"{result.agreement:.1%}", f"{result.ratio:.1%}", f"{result.half_ratio:.1%}",
        )  # fmt: skip
    console.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--notes", type=int, default=64)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help='as in "a2sf:budget=0.5 | zipcache"')
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    policies = {FULL: None, **{text: parse(text) for text in arguments.policies}}
    questions = Questions.draw(arguments.questions, tokens=arguments.tokens, notes=arguments.notes, seed=arguments.seed)
    model, _ = load()
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(FULL, total=(1 + len(policies)) * arguments.questions)
        dense = reference(model, questions, arguments.batch)
        progress.advance(task, arguments.questions)
        results = []
        for name, policy in policies.items():
            progress.update(task, description=name)
            results.append(
                measure(
                    model, questions, dense, policy,
                    label=name, batch_size=arguments.batch, tick=lambda count: progress.advance(task, count),
                )
            )  # fmt: skip
    words = questions.answers[:, 1:].numel()
    show(results, f"{arguments.questions} questions, {arguments.tokens:,} tokens", words, console)
    save(
        arguments.out, tokens=arguments.tokens, notes=arguments.notes, questions=arguments.questions,
        seed=arguments.seed, words=words, rows=[result.to_dict() for result in results],
    )  # fmt: skip


if __name__ == "__main__":
    main()
