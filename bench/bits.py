"""What few bits do to a model's predictions: divergence from the full cache, at measured bits a number.

    python bench/bits.py TEXT [--model smollm2] [--windows 3] [--policies "KIVI(2)" "Spectral(2)"]

Windows of 1,024 tokens of a text. The first half is a prompt, the second follows 64 tokens at a time, each of which is
packed as its policy says; the second half is compared. KL is that of the next token's distribution from the full
cache's, in nats; top-1 how often both have the same best token; bits are those of packed rows, parameters included, the
basis of a rotated codec not; kept is all that the cache holds at the end, of what keys and values take in 16 bits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprune import Policy, PrunedCache, policies
from kvprune.cache.models import cache_argument
from kvprune.evaluation.models import load
from kvprune.policies import Full

WINDOW, PROMPT, PIECE = 1024, 512, 64
POLICIES = ("KIVI(2)", "KIVI(4)", "Spectral(2)", "Spectral(3)", "Spectral(4)", "KIVI(2, rotate=True)")


@torch.inference_mode()
def predictions(model: PreTrainedModel, window: Tensor, policy: Policy) -> tuple[Tensor, PrunedCache]:
    """Log-probabilities of what follows each token of the second half, `[512, vocab]`, and the cache."""
    cache = PrunedCache(model, policy)
    model(window[None, :PROMPT], **cache_argument(cache))
    pieces = window[PROMPT:].split(PIECE)
    logits = [model(piece[None], **cache_argument(cache)).logits[0] for piece in pieces]
    return torch.cat(logits).float().log_softmax(-1), cache


def bits_of(cache: PrunedCache) -> float:
    """Bits of a number of a packed row, its parameters included; 0 where none is packed."""
    tiers = [tier for layer in cache.layers for tier in layer.table.packed]
    numbers = sum(tier.tensors["key_codes"].shape[:3].numel() * (tier.key_dim + tier.value_dim) for tier in tiers)
    return 8 * sum(tensor.nbytes for tier in tiers for tensor in tier.tensors.values()) / numbers if numbers else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    asked = parser.parse_args()
    named = load(asked.model, dtype="float32")
    model = named.model
    ids = named.tokenizer(asked.text.read_text("utf-8"), return_tensors="pt").input_ids[0, : asked.windows * WINDOW]
    windows = ids.view(-1, WINDOW)
    full = [predictions(model, window, Full())[0] for window in windows]
    for text in asked.policies:
        policy = eval(text, vars(policies))  # what the person at the keyboard wrote
        rows = []
        for window, expected in zip(windows, full, strict=True):
            found, cache = predictions(model, window, policy)
            divergence = (expected.exp() * (expected - found)).sum(-1).mean()
            agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean()
            half = cache.dense_nbytes * 2 // cache.layers[0].table.keys.itemsize
            rows.append([bits_of(cache), cache.nbytes / half, float(divergence), float(agreement)])
        bits, kept, divergence, agreement = torch.tensor(rows).mean(0).tolist()
        print(
            json.dumps(
                {"policy": str(policy), "bits": round(bits, 2), "kept": round(kept, 3), "kl": round(divergence, 4),
                 "top1": round(agreement, 3)}
            ),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
