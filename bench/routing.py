"""What a router of FTP that is fitted to a text is worth on another one, beside the static router.

    python bench/routing.py
    python bench/routing.py --model smollm2 --text wikitext2_test.txt --steps 30

Without a text, the embedded model reads documents of its own kind. A router is fitted to the first half of the text,
and what is reported is of pieces of the second: KL divergence of the routed model from the model itself, in nats a
token, at the same share of tokens in every layer.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from kvprune import Router
from kvprune.demo.task import RecallGenerator
from kvprune.evaluation.models import load
from kvprune.policies import FTP
from printing.output import Log, table


def recall_text(tokens: int) -> torch.Tensor:
    """Documents with questions about their notes, ids `[1, n]`."""
    generator, parts = RecallGenerator(1), [np.empty(0, dtype=np.int64)]
    while sum(len(part) for part in parts) < tokens:
        recall = generator.document(200, 6)
        parts += [recall.document, *(np.concatenate([recall.question(note), recall.values[note]]) for note in range(6))]
    return torch.tensor(np.concatenate(parts))[None, :tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--schedule", nargs="+", default=["0.3:0.3", "0.3:0.5"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pieces", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    language = load(arguments.model, dtype="float32")
    model, tokenizer = language.model, language.tokenizer
    tokens = 2 * arguments.pieces * arguments.length
    text = None if arguments.text is None else arguments.text.read_text("utf-8")
    ids = recall_text(tokens) if text is None else tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    known, other = ids.chunk(2, dim=1)
    pieces = [piece for piece in other.split(arguments.length, dim=1) if piece.shape[1] == arguments.length]
    shown = table(
        f"{arguments.model}: KL divergence", f"Means over {len(pieces)} pieces of {arguments.length} tokens.",
        "schedule", "static", "learned",
    )  # fmt: skip
    for schedule in arguments.schedule:
        policy = FTP(schedule)
        routed = replace(
            policy, router=Router.fit(model, known, policy, steps=arguments.steps, length=arguments.length)
        )
        told = [mean(Router.divergence(model, piece, each) for piece in pieces) for each in (policy, routed)]
        shown.add_row(schedule, *(f"{each:.3f}" for each in told))
    Log().console.print(shown)


if __name__ == "__main__":
    main()
