"""How well a model answers from a compressed cache.

The first word of an answer comes out of the prefill, which attends over everything, so it says nothing about the
compressed cache. Only the words after it count: the right words are fed one by one, and each must be predicted
from what the cache kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from kvprune.cache.models import cache_argument
from kvprune.demo.task import ANSWER_LENGTH, RecallGenerator
from kvprune.policy.base import Policy
from kvprune.saving import PrunedCache

CONTINUATION = 24  # tokens decoded after the prompt: the answer and what the dense model writes next


@dataclass(frozen=True)
class Questions:
    """Prompts of one length with a question at the end. prompts: `[Q, n]`. answers: `[Q, words]`. Token ids."""

    prompts: Tensor
    answers: Tensor

    @classmethod
    def draw(
        cls, count: int, *, tokens: int, notes: int, seed: int, per_document: int = 8, words: int = ANSWER_LENGTH
    ) -> Questions:
        """`count` questions, at most `per_document` of them about the same document of `tokens` tokens.

        words: of every answer.
        """
        generator = RecallGenerator(seed)
        prompts: list[np.ndarray] = []
        answers: list[np.ndarray] = []
        while len(prompts) < count:
            recall = generator.document(tokens, notes, words)
            asked = generator.rng.choice(notes, size=min(per_document, notes, count - len(prompts)), replace=False)
            prompts += [recall.prompt(note) for note in asked]
            answers += [recall.values[note] for note in asked]
        return cls(torch.from_numpy(np.stack(prompts)), torch.from_numpy(np.stack(answers)))


@dataclass(frozen=True)
class Result:
    """Measurements of one policy on a set of questions.

    recall: share of answer words, from the second on, predicted from the compressed cache. agreement: share of decoded
    tokens on which it agrees with the full cache. Bytes are of one sequence, after decoding, measured; `half_nbytes`
    is what a dense cache would hold at 16 bits a number. Times are medians over batches, prefill per prompt, decode per
    token of a sequence; decode_ratio is that of a step to one of the dense cache that was taken right after it.
    """

    policy: str
    budget: str
    recall: float
    agreement: float
    nbytes: int
    kv_nbytes: int
    dense_nbytes: int
    half_nbytes: int
    prefill_seconds: float
    decode_ms: float
    decode_ratio: float

    @property
    def ratio(self) -> float:
        return self.nbytes / self.dense_nbytes

    @property
    def half_ratio(self) -> float:
        """Bytes held for every byte of a dense cache at 16 bits a number."""
        return self.nbytes / self.half_nbytes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "half_ratio": self.half_ratio}


@dataclass(frozen=True)
class Reference:
    """The dense model on the same questions.

    continuation: `[Q, CONTINUATION - 1]`, what is fed after the prompt: the right answer, then what the model writes.
    predictions: `[Q, CONTINUATION]`, its choice after the prompt and after each of those tokens.
    cache: of the first batch of prompts and all but the last token of their continuation, for steps to time beside.
    """

    continuation: Tensor
    predictions: Tensor
    cache: DynamicCache


@torch.no_grad()
def reference(model: Any, questions: Questions, batch_size: int = 8) -> Reference:
    """Run the dense cache: it is fed the right answer, then its own choices."""
    continuations, predictions = [], []
    caches: list[DynamicCache] = []
    for start in range(0, len(questions.prompts), batch_size):
        prompts = questions.prompts[start : start + batch_size]
        answers = questions.answers[start : start + batch_size]
        cache = DynamicCache(config=model.config)
        caches = caches or [cache]
        chosen = [_next(model, prompts, cache)]
        fed: list[Tensor] = []
        for step in range(CONTINUATION - 1):
            fed.append(answers[:, step] if step < answers.shape[1] else chosen[-1])
            chosen.append(_next(model, fed[-1][:, None], cache))
        continuations.append(torch.stack(fed, dim=1))
        predictions.append(torch.stack(chosen, dim=1))
    return Reference(torch.cat(continuations), torch.cat(predictions), caches[0])


@torch.no_grad()
def measure(
    model: Any,
    questions: Questions,
    dense: Reference,
    policy: Policy | None,
    *,
    label: str,
    budget: str = "",
    batch_size: int = 8,
    tick: Callable[[int], None] = lambda questions: None,
) -> Result:
    """Answer all questions with one policy (None: the stock DynamicCache), feeding the reference's continuation."""
    right_answers = agreeing = counted = 0
    prefills, decodes, beside = [], [], []
    held = kv_held = dense_held = 0
    for start in range(0, len(questions.prompts), batch_size):
        rows = slice(start, start + batch_size)
        prompts, fed = questions.prompts[rows], dense.continuation[rows]
        cache: Cache = DynamicCache(config=model.config) if policy is None else PrunedCache(model, policy)
        began = time.perf_counter()
        chosen = [_next(model, prompts, cache)]
        prefilled = time.perf_counter()
        steps = []
        for step in range(fed.shape[1]):
            before = time.perf_counter()
            chosen.append(_next(model, fed[:, step : step + 1], cache))
            steps.append(time.perf_counter() - before)
            if start == 0 and step % 3 == 0:
                beside.append(steps[-1] / _seconds_of_a_step(model, fed[:, -1:], dense.cache))
        prefills.append((prefilled - began) / len(prompts))
        decodes.append(float(np.median(steps)) / len(prompts))
        predicted = torch.stack(chosen, dim=1)
        answers = questions.answers[rows]
        right_answers += int((predicted[:, 1 : answers.shape[1]] == answers[:, 1:]).sum())
        counted += answers[:, 1:].numel()
        agreeing += int((predicted[:, 1:] == dense.predictions[rows][:, 1:]).sum())
        if isinstance(cache, PrunedCache):
            report = cache.report()
            held, kv_held, dense_held = report.nbytes, report.kv_nbytes, report.dense_nbytes
        else:
            held = kv_held = dense_held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        per_sequence = len(prompts)
        tick(len(prompts))
    return Result(
        policy=label,
        budget=budget,
        recall=right_answers / counted,
        agreement=agreeing / dense.predictions[:, 1:].numel(),
        nbytes=held // per_sequence,
        kv_nbytes=kv_held // per_sequence,
        dense_nbytes=dense_held // per_sequence,
        half_nbytes=dense_held // per_sequence * 2 // model.dtype.itemsize,
        prefill_seconds=float(np.median(prefills)),
        decode_ms=1000 * float(np.median(decodes)),
        decode_ratio=float(np.median(beside)),
    )


def _seconds_of_a_step(model: Any, tokens: Tensor, cache: DynamicCache) -> float:
    """How long the dense cache takes for a token, which it then forgets."""
    began = time.perf_counter()
    _next(model, tokens, cache)
    took = time.perf_counter() - began
    cache.crop(-1)
    return took


def _next(model: Any, tokens: Tensor, cache: Cache) -> Tensor:
    """The most likely next token of each sequence, `[B]`."""
    return model(tokens.to(model.device), **cache_argument(cache), logits_to_keep=1).logits[:, -1].argmax(-1).cpu()
