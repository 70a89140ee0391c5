"""What the embedded model still answers where questions come after compression.

    python bench/question_unknown.py 4096 64 1 "kvzip:budget=0.1,share=everywhere(floor=0)" snapkv:budget=0.1

Tokens of a document, notes in it, documents, policies. Every note is asked for on a fork of the compressed document;
the right words are fed, and each must be predicted. Prints words found, and measured bytes.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from transformers import DynamicCache

from kvprune import PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.demo import load
from kvprune.demo.task import Recall, RecallGenerator
from kvprune.policy.registry import parse


@torch.inference_mode()
def found(model: Any, cache: Any, recall: Recall) -> float:
    right = 0
    for note, answer in enumerate(torch.as_tensor(recall.values)):
        ids = torch.cat([torch.as_tensor(recall.question(note)), answer[:-1]])[None]
        fork = cache.fork() if isinstance(cache, PrunedCache) else copy.deepcopy(cache)
        if isinstance(fork, PrunedCache):
            fork.activate_past_recording()  # a question is not to cost rows before it is answered
        logits = model(ids, **cache_argument(fork)).logits[0, -len(answer) :]
        right += int((logits.argmax(-1) == answer).sum())
    return right / torch.as_tensor(recall.values).numel()


def main(tokens: int, notes: int, documents: int, policies: list[str]) -> None:
    model, _ = load()
    generator = RecallGenerator(7)
    recalls = [generator.document(tokens, notes) for _ in range(documents)]
    for name in ("full", *policies):
        shares, kept = [], []
        for recall in recalls:
            cache = DynamicCache(config=model.config) if name == "full" else PrunedCache(model, parse(name))
            with torch.inference_mode():
                model(torch.as_tensor(recall.document)[None], **cache_argument(cache), logits_to_keep=1)
            shares.append(found(model, cache, recall))
            kept.append(1.0 if name == "full" else cache.nbytes / cache.dense_nbytes)
        print(f"{name}: {100 * sum(shares) / documents:.1f} % found, {100 * sum(kept) / documents:.1f} % of the bytes")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
