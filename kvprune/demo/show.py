"""`kvprune demo`: the embedded model answers questions about a long document from ever smaller caches."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvprune.cache.models import cache_argument
from kvprune.cache.report import human_bytes
from kvprune.demo import load
from kvprune.demo.measure import CONTINUATION, Questions, Result, measure, reference
from kvprune.demo.task import ANSWER_LENGTH, QUESTION_LENGTH, decode
from kvprune.errors import KVPruneError
from kvprune.evaluation.progress import EvaluationProgress
from kvprune.policy.base import Policy
from kvprune.policy.registry import parse
from kvprune.saving import PrunedCache

FULL = "full cache"
POOLED = "A2SF, pooled"
BATCH_SIZE = 8


def contenders(budget: float) -> dict[str, Policy]:
    """The policies under a budget, side by side, at their defaults but for what their label says.

    GemFilter selects by the last layer, which does the retrieval in this model, and keeps the question.
    """
    texts = {
        POOLED: "a2sf:kernel_size=7",
        "SnapKV": "snapkv",
        "GemFilter": f"gemfilter:layer=2,keep_last={QUESTION_LENGTH}",
        "A2SF": "a2sf",
        "TOVA": "tova",
        "H2O": "h2o",
        "Keyformer": "keyformer",
        "StreamingLLM": "streaming_llm",
    }
    return {label: parse(text, budget=budget) for label, text in texts.items()}


def packers() -> dict[str, tuple[str, Policy]]:
    """The policies that quantize, by label, and the text for the budget column.

    "by 32": 32 tokens share the range of a key channel. Both links of the chain pool.
    """
    return {
        "ZipCache": ("4/2 bit", parse("zipcache")),
        "ZipCache by 32": ("4/2 bit", parse("zipcache:group_size=32")),
        "KIVI": ("2 bit", parse("kivi")),
        "A2SF | ZipCache": ("50%, 4/2", parse("a2sf:budget=0.5,kernel_size=7 | zipcache:kernel_size=7")),
    }


@dataclass
class Demo:
    """Settings of one demo; `run` does it all and returns the measurements."""

    tokens: int = 4096
    notes: int = 64
    questions: int = 32
    budgets: tuple[float, ...] = (0.25, 0.10, 0.05)
    seed: int = 1
    out: Path = Path("kvprune-demo")
    console: Console = field(default_factory=Console)

    def run(self) -> dict[str, Any]:
        model, tokenizer = load()
        most = model.config.max_position_embeddings - QUESTION_LENGTH - CONTINUATION
        if self.tokens > most:
            raise KVPruneError(f"the embedded model reads documents of at most {most:,} tokens, not {self.tokens:,}.")
        questions = Questions.draw(self.questions, tokens=self.tokens, notes=self.notes, seed=self.seed)
        self.out.mkdir(parents=True, exist_ok=True)
        self._introduce(questions, model, tokenizer)
        results = self._measure(model, questions)
        self.console.print(self._table(results))
        pictures = [
            plot_quality(results, self.out / "quality.png", self.tokens, self.notes),
            self._plot_kept(model, questions, self.out / "kept.png"),
        ]
        self.console.print(
            f"\nPictures: [bold]{pictures[0]}[/] (recall against bytes), [bold]{pictures[1]}[/] (which tokens stayed)."
        )
        return {
            "tokens": self.tokens,
            "notes": self.notes,
            "questions": self.questions,
            "seed": self.seed,
            "machine": machine(),
            "results": [result.to_dict() for result in results],
            "pictures": [str(picture) for picture in pictures],
        }

    def _introduce(self, questions: Questions, model: Any, tokenizer: Any, shown: int = 5) -> None:
        """Show the document, and a few answers with a quarter of the cache."""
        budget = self.budgets[0]
        words = decode(questions.prompts[0].tolist()).split(" ")
        self.console.print(
            f"[bold]A document of {self.tokens:,} tokens with {self.notes} notes in it[/], one word a token:\n"
        )
        self.console.print("  " + " ".join(words[:60]) + " ...", style="dim", highlight=False)
        self.console.print("  ... " + " ".join(words[-40:]), style="dim", highlight=False)
        self.console.print(
            f"\nThe embedded model answers, keeping [bold]{budget:.0%}[/] of its KV cache "
            f"(A2SF, scores pooled over 7 neighbours):\n"
        )
        policy = contenders(budget)[POOLED]
        for prompt, answer in zip(questions.prompts[:shown], questions.answers[:shown], strict=True):
            cache = PrunedCache(model, policy)
            inputs = prompt[None]
            written = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                **cache_argument(cache),
                max_new_tokens=ANSWER_LENGTH,
                do_sample=False,
            )[0, inputs.shape[1] :]
            said = tokenizer.decode(written, skip_special_tokens=True)
            right = said == decode(answer.tolist())
            mark = "[green]✓[/]" if right else f"[red]✗[/] (right: {decode(answer.tolist())})"
            question = " ".join(decode(prompt.tolist()).split(" ")[-2:])
            self.console.print(f"  {question:<18} [bold]{said:<28}[/] {mark}", highlight=False)
        self.console.print()

    def _measure(self, model: Any, questions: Questions) -> list[Result]:
        plans: list[tuple[str, str, Policy | None]] = [(FULL, "", None)]
        plans += [
            (label, f"{budget:.0%}", policy) for budget in self.budgets for label, policy in contenders(budget).items()
        ]
        plans += [(label, bits, policy) for label, (bits, policy) in packers().items()]
        with EvaluationProgress("demo", len(plans) + 1, 0, self.console, quiet=False) as progress:
            progress.begin(FULL)
            dense = reference(model, questions, BATCH_SIZE)
            progress.advance()
            results = []
            for label, budget, policy in plans:
                progress.begin(f"{label} {budget}".strip())
                results.append(
                    measure(model, questions, dense, policy, label=label, budget=budget, batch_size=BATCH_SIZE)
                )
                progress.advance()
        return results

    def _table(self, results: list[Result]) -> Table:
        table = Table(
            title=f"{self.questions} questions, {self.tokens:,} tokens, {self.notes} notes",
            caption="recall: answer words predicted from the compressed cache, that is all but the first. agree: "
            "decoded tokens as with the full cache. KV bytes: of a sequence, measured, everything included; ratio: to "
            "the full cache, which is float32 here, so twice that against one of 16 bits. prefill: seconds a prompt, "
            f"in batches of {BATCH_SIZE}; decode: time of a token against one with the full cache, in turns.",
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for heading in ("policy", "budget", "recall", "agree", "KV bytes", "ratio", "prefill", "decode"):
            table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
        for before, result in zip([results[0], *results], results, strict=False):
            if result.budget != before.budget and not {result.policy, before.policy} <= {*packers()}:
                table.add_section()
            table.add_row(
                result.policy,
                result.budget,
                f"{result.recall:.0%}",
                f"{result.agreement:.0%}",
                human_bytes(result.nbytes),
                f"{result.ratio:.1%}",
                f"{result.prefill_seconds:.2f} s",
                f"{result.decode_ratio:.2f}x",
            )
        return table

    def _plot_kept(self, model: Any, questions: Questions, path: Path) -> Path:
        """Which positions each policy kept for the first question, one strip a layer."""
        from matplotlib.figure import Figure

        budget = self.budgets[0]
        chosen = contenders(budget)
        figure = Figure(figsize=(11, 1.1 * len(chosen) + 1), layout="constrained")
        strips = figure.subplots(len(chosen), 1, sharex=True)
        where = _answer_position(questions)
        for axes, (label, policy) in zip(strips, chosen.items(), strict=True):
            cache = PrunedCache(model, policy)
            with torch.no_grad():
                model(questions.prompts[:1], **cache_argument(cache), logits_to_keep=1)
            share = cache.report().kept_share()
            image = axes.imshow(
                share.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1,
                extent=(0, cache.seen_tokens, len(share) - 0.5, -0.5),
            )  # fmt: skip
            axes.axvline(where, color="red", linewidth=0.8, alpha=0.8)
            axes.set_yticks(range(len(share)))
            axes.set_ylabel("layer")
            axes.set_title(label, fontsize=9, loc="left", pad=2)
        strips[-1].set_xlabel("position in the prompt; the red line is the note that answers the question at its end")
        figure.suptitle(f"tokens kept at a budget of {budget:.0%}")
        figure.colorbar(image, ax=strips, label="share of KV heads that keep the token")
        figure.savefig(path, dpi=120)
        return path


def _answer_position(questions: Questions) -> int:
    """Where the note stands that the first prompt asks for."""
    prompt = questions.prompts[0].tolist()
    key = prompt[-2:]
    return next(i for i in range(len(prompt) - 2) if prompt[i : i + 2] == key)


def plot_quality(results: list[Result], path: Path, tokens: int, notes: int) -> Path:
    """Recall against measured bytes, one curve a policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    full = results[0]
    labels = dict.fromkeys(result.policy for result in results[1:])
    colors = [f"C{number}" for number in range(10)] + ["navy", "crimson"]
    for marker, color, label in zip(cycle("osD^vP*Xhd<>"), cycle(colors), labels, strict=False):
        points = sorted((100 * r.ratio, 100 * r.recall) for r in results if r.policy == label)
        axes.plot(*zip(*points, strict=True), marker=marker, color=color, label=label)
    axes.axhline(100 * full.recall, color="black", linestyle="--", linewidth=1, label=f"full cache ({full.recall:.0%})")
    axes.set(
        xlabel="KV bytes, % of the dense float32 cache (measured)",
        ylabel="recall, % of answer words",
        title=f"recall against bytes: {tokens:,} tokens, {notes} notes, question at the end",
        ylim=(-3, 103),
        xlim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.savefig(path, dpi=120)
    return path


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
