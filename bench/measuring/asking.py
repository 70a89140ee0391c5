"""Questions about documents, put to any cache: before it is compressed, or after.

A question that is *known* stands at the end of the prompt, and compression sees it. One that is *unknown* comes once
the document has been compressed, as a second turn. The words of the right answer are then fed one by one, and what
counts is whether each was predicted. The first word after a known question does not count: it comes out of the
prefill, which attends over everything.

Needs nothing but torch and transformers, so it also runs in environments that have no kvprune.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from measuring.workload import Session, cache_argument, held_bytes


@dataclass(frozen=True)
class Asked:
    """Questions about one document, as token ids. document: `[n]`. questions, answers: `[A, 3]`."""

    document: list[int]
    questions: list[list[int]]
    answers: list[list[int]]


@dataclass(frozen=True)
class Answered:
    """What was answered to an `Asked`.

    right: for each question, whether each word of its answer was predicted, `[A, 3]`. kept: tokens per KV head just
    after the compression, the mean over layers. nbytes: of one sequence, at the end of its answer.
    """

    right: list[list[bool]]
    kept: float
    nbytes: float


def stock_rows(cache: Cache) -> float:
    """Tokens per KV head in a cache whose layers hold plain keys, the mean over layers."""
    return sum(layer.keys.shape[-2] for layer in cache.layers) / len(cache.layers)


@dataclass(frozen=True)
class Subject:
    """What answers: how to open a session, and how to count what its cache holds, as `Answered` says."""

    open: Callable[[], Session]
    rows: Callable[[Cache], float] = stock_rows
    nbytes: Callable[[Cache], int] = held_bytes


class _Feed:
    """Tokens into a session, and the most likely next one out of it."""

    def __init__(self, model: Any, session: Session) -> None:
        self._model, self._session, self._seen = model, session, 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """`[B, L]` to `[B]`."""
        told = {}
        if self._session.logical_positions:
            told["position_ids"] = torch.arange(self._seen, self._seen + tokens.shape[1])[None].expand_as(tokens)
        self._seen += tokens.shape[1]
        output = self._model(tokens, **cache_argument(self._session.cache), logits_to_keep=1, **told)
        choice: Tensor = output.logits[:, -1].argmax(-1)
        return choice


@torch.inference_mode()
def answer(model: Any, subject: Subject, asked: Asked, *, known: bool, batch_size: int = 8) -> Answered:
    """Put all questions about a document to a subject. batch_size: how many prompts with known questions at a time."""
    questions, answers = torch.tensor(asked.questions), torch.tensor(asked.answers)
    if not known:  # one document for all of them
        return _answer(model, subject, torch.tensor([asked.document]), questions, answers)
    document = torch.tensor([asked.document]).expand(len(questions), -1)
    batches = zip(torch.cat([document, questions], 1).split(batch_size), answers.split(batch_size), strict=True)
    parts = [_answer(model, subject, prompts, None, right) for prompts, right in batches]
    return merge(parts)


def _answer(model: Any, subject: Subject, prompts: Tensor, questions: Tensor | None, answers: Tensor) -> Answered:
    session = subject.open()
    feed = _Feed(model, session)
    with session.prefilling:
        predicted = [feed(prompts)]
    kept = subject.rows(session.cache)
    with session.decoding:
        if questions is not None:
            session.cache.batch_repeat_interleave(len(questions))
            predicted = [feed(questions)]
        predicted += [feed(word) for word in answers[:, :-1, None].unbind(1)]
    right = torch.stack(predicted, dim=1) == answers
    return Answered(right.tolist(), kept, subject.nbytes(session.cache) / len(answers))


def merge(parts: list[Answered]) -> Answered:
    """All questions together; what is kept and held, as the mean over questions."""
    total = sum(len(part.right) for part in parts)
    return Answered(
        right=[words for part in parts for words in part.right],
        kept=sum(len(part.right) * part.kept for part in parts) / total,
        nbytes=sum(len(part.right) * part.nbytes for part in parts) / total,
    )
