"""How well a text is predicted beyond the window of its model, with positions of the text and those of the cache.

    python bench/beyond_window.py --out bench/results/beyond-window.json

A text four times as long as the window is fed token by token, each evicting one, and the likelihood of every piece of
it is what counts: with the full cache it falls apart where the window ends. Any model with rotary positions can be
given (--model), with a text in its language; that of `likelihood.py` is small, and not part of the repository.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from likelihood import DATA, standard_error
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvprune import PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.evaluation.likelihood import SEPARATOR, cut
from kvprune.policy.registry import parse
from printing.output import save, save_markdown, table

FULL = "full cache"
POLICIES = (
    "streaming_llm:positions=cache",
    "streaming_llm",
    "a2sf:positions=cache",
    "a2sf",
)


@torch.inference_mode()
def losses(model: Any, texts: Tensor, policy: str | None, prompt: int) -> Tensor:
    """Nats of every token behind the one after the prompt, `[B, L - prompt - 1]`: all are predicted from the cache.

    texts: `[B, L]`. policy: None for the full cache, which may be fed many tokens a step: they predict the same.
    """
    cache = DynamicCache(config=model.config) if policy is None else PrunedCache(model, parse(policy))
    model(texts[:, :prompt], **cache_argument(cache), logits_to_keep=1)
    step, found = 1 if policy else prompt, []
    for tokens, targets in zip(texts[:, prompt:-1].split(step, 1), texts[:, prompt + 1 :].split(step, 1), strict=True):
        logits = model(tokens, **cache_argument(cache)).logits
        found.append(F.cross_entropy(logits.mT.float(), targets, reduction="none"))
    return torch.cat(found, 1)


def pieces(losses: Tensor, prompt: int) -> dict[str, list[float]]:
    """By place in the text, in pieces as long as the prompt: the mean nats a token of each text."""
    ends = range(prompt, prompt + losses.shape[1] + 1, prompt)
    split = losses.split(prompt, 1)
    return {f"{end} to {end + prompt}": part.mean(1).tolist() for end, part in zip(ends, split, strict=False)}


def shown(found: dict[str, dict[str, list[float]]], model: str, window: int, budget: int, texts: int) -> Table:
    made = table(
        f"Nats a token beyond a window of {window} tokens",
        f"{model}, {texts} texts, a cache of {budget} tokens. ± standard error over the texts; by place in the text.",
        "cache",
        *next(iter(found.values())),
    )
    for name, by_place in found.items():
        made.add_row(name, *map(_cell, by_place.values()))
    return made


def _cell(values: list[float]) -> str:
    error = standard_error(values)
    return f"{statistics.mean(values):.2f}" + ("" if error is None else f" ± {error:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DATA / "stories260K"), help="a name, or a folder")
    parser.add_argument("--text", type=Path, default=DATA / "text" / "tinystories_sample.txt")
    parser.add_argument("--texts", type=int, default=8, help="pieces of the text, side by side in a batch")
    parser.add_argument("--budget", type=int, help="tokens of a cache, instead of half of the window")
    parser.add_argument("--length", type=int, help="of a text, instead of four windows")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="to which the budget is added")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    window: int = model.config.max_position_embeddings
    budget = arguments.budget or window // 2
    documents = (each.strip() for each in arguments.text.read_text(encoding="utf-8").split(SEPARATOR))
    length = arguments.length or 4 * window
    texts = cut(documents, tokenizer, arguments.texts, length)
    if not len(texts):
        parser.error(f"{arguments.text} is shorter than {length} tokens: give a smaller --length")
    console = Console()
    found = {}
    for name in (None, *arguments.policies):
        text = name and f"{name}{',' if ':' in name else ':'}budget={budget}"
        found[name or FULL] = pieces(losses(model, texts, text, budget), budget)
        console.print(name or FULL, *map(_cell, found[name or FULL].values()), highlight=False)
    made = shown(found, Path(arguments.model).name, window, budget, len(texts))
    console.print(made)
    save(arguments.out, model=Path(arguments.model).name, window=window, budget=budget, texts=len(texts), nats=found)
    save_markdown(arguments.out, [made])


if __name__ == "__main__":
    main()
