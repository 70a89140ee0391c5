"""What a pruned cache does to the predictions of a small trained model: likelihood, KL divergence, top-1 agreement.

    python bench/likelihood.py --out bench/results/likelihood.json

`kvprune eval likelihood` measures any model on any text this way, and says what counts; this measures the policies of
bench/README.md on one model and one text, in batches.

Budgets are fractions of the prompt. Bytes are measured at the end, where the full cache holds prompt and continuation.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvprune.evaluation.contenders import Contender, Held
from kvprune.evaluation.likelihood import SEPARATOR, Predictions, compare, cut, logits
from kvprune.policy.base import Policy
from kvprune.policy.registry import parse
from printing.output import save, table

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LENGTH = 512  # tokens of a sequence: the context of the model
FULL = "full cache"
_FIGURES = ("nll", "nll_change", "kl", "agreement")
_BYTES = ("nbytes", "dense_nbytes", "half_nbytes")

EVICTING = ("h2o", "keyformer", "snapkv:interval=1", "tova", "streaming_llm", "a2sf", "a2sf:kernel_size=7")
# A tenth of 256 prompt tokens is 26, but a fraction is never taken below sinks + recent, which is 36 by default, so the
# budget would not be what it says. With recent=16 sinks and window take 20 of the 26, the score decides on the rest.
BUDGETS = ("budget=0.5", "budget=0.25", "budget=0.1,recent=16")
POLICIES = (
    *(f"{name},{budget}" if ":" in name else f"{name}:{budget}" for budget in BUDGETS for name in EVICTING),
    "gemfilter:budget=0.5",
    "gemfilter:budget=0.25",
    "zipcache",
    "zipcache:high_bits=8,low_bits=4",
    "kivi:bits=2",
    "kivi:bits=4",
    "a2sf:budget=0.5,kernel_size=7 | zipcache",
)


@dataclass(frozen=True)
class Result:
    """What one policy did. nll, nll_change, kl: nats per token. agreement: share of tokens with the same top choice.

    nll_change is against the full cache, nll_error its standard error over the sequences, None for a single one. Bytes
    are of one sequence, at its end, everything that the cache holds. half_nbytes: a dense cache in 16 bits.
    """

    policy: str
    nll: float
    nll_change: float
    nll_error: float | None
    kl: float
    agreement: float
    nbytes: int
    dense_nbytes: int
    half_nbytes: int

    @property
    def ratio(self) -> float:
        return self.nbytes / self.dense_nbytes

    @property
    def half_ratio(self) -> float:
        return self.nbytes / self.half_nbytes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "half_ratio": self.half_ratio}


def measure(
    model: Any,
    sequences: Tensor,
    policies: Mapping[str, Policy],
    *,
    prompt: int,
    batch_size: int,
    tick: Callable[[str], None] = lambda policy: None,
) -> list[Result]:
    """The full cache, then each policy under its name, on `[N, L]` sequences. tick: called before every pass."""
    everyone = [Contender(FULL, None, None), *(Contender(name, None, policy) for name, policy in policies.items())]
    found: dict[str, list[Predictions]] = {each.name: [] for each in everyone}
    held: dict[str, list[Held]] = {each.name: [] for each in everyone}
    for batch in sequences.to(model.device).split(batch_size):
        full: list[Tensor] = []
        for contender in everyone:
            tick(contender.name)
            cache = contender.cache(model)
            steps = list(logits(model, batch, prompt, cache))
            full = full or steps
            found[contender.name].append(compare(steps, full, batch[:, prompt + 1 :]))
            held[contender.name].append(Held.by(cache, model))
    return [_result(name, found[name], held[name]) for name in found]


def _result(name: str, batches: list[Predictions], held: list[Held]) -> Result:
    of_sequences = {field: torch.cat([getattr(batch, field) for batch in batches]) for field in _FIGURES}
    values: dict[str, Any] = {field: values.mean().item() for field, values in of_sequences.items()}
    for field in _BYTES:
        values[field] = sum(getattr(each, field) for each in held) // len(of_sequences["nll"])
    return Result(policy=name, nll_error=standard_error(of_sequences["nll_change"].tolist()), **values)


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def show(results: list[Result], title: str, console: Console) -> None:
    shown = table(
        title,
        "NLL, KL: nats per token; ± standard error over sequences. top-1: share of tokens on which the first "
        "choice is that of the full cache. ratio: bytes of a sequence at its end, measured, everything included, to "
        "those of a dense cache of the model's type; 16 bits: to those of a dense cache in 16 bits.",
        "policy", "NLL", "change", "KL", "top-1", "ratio", "16 bits",
    )  # fmt: skip
    for result in results:
        error = "" if result.nll_error is None else f" ± {result.nll_error:.4f}"
        shown.add_row(
            result.policy, f"{result.nll:.4f}", f"{result.nll_change:+.4f}{error}", f"{result.kl:.4f}",
            f"{result.agreement:.1%}", f"{result.ratio:.1%}", f"{result.half_ratio:.1%}",
        )  # fmt: skip
    console.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DATA / "stories260K", help="folder of a Hugging Face model")
    parser.add_argument("--text", type=Path, default=DATA / "text" / "tinystories_sample.txt")
    parser.add_argument("--prompt", type=int, default=LENGTH // 2, help="tokens to prefill")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--policies", nargs="+", default=list(POLICIES), help='as in "a2sf:budget=0.5,kernel_size=7 | zipcache"'
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not 1 <= arguments.prompt <= LENGTH - 2:
        parser.error(f"--prompt must leave tokens of {LENGTH} to feed and to predict: 1 to {LENGTH - 2}")
    if arguments.sequences < 1 or arguments.batch < 1:
        parser.error("--sequences and --batch must be at least 1")
    if not (arguments.model / "config.json").is_file():
        parser.error(f"there is no model in {arguments.model}: give the folder of one with --model")
    if not arguments.text.is_file():
        parser.error(f"there is no text {arguments.text}: give a file with --text")
    policies = {text: parse(text) for text in arguments.policies}

    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    documents = arguments.text.read_text(encoding="utf-8").split(SEPARATOR)
    sequences = cut((document.strip() for document in documents), tokenizer, arguments.sequences, LENGTH)
    if len(sequences) < arguments.sequences:
        parser.error(f"{arguments.text} holds {len(sequences)} sequences of {LENGTH} tokens: ask for no more")
    console = Console()
    with Progress(console=console, transient=True) as progress:
        passes = (1 + len(policies)) * math.ceil(len(sequences) / arguments.batch)
        task = progress.add_task("", total=passes, completed=-1)
        results = measure(
            model,
            sequences,
            policies,
            prompt=arguments.prompt,
            batch_size=arguments.batch,
            tick=lambda policy: progress.update(task, description=policy, advance=1),
        )
    fed = LENGTH - 1 - arguments.prompt
    show(results, f"{len(sequences)} sequences, {arguments.prompt} tokens prefilled, {fed} fed one by one", console)
    save(
        arguments.out, model=arguments.model.name, text=arguments.text.name, length=LENGTH, prompt=arguments.prompt,
        sequences=len(sequences), batch=arguments.batch, rows=[result.to_dict() for result in results],
    )  # fmt: skip


if __name__ == "__main__":
    main()
