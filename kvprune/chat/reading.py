"""Texts into a cache, before anything is asked about them."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.models import cache_argument
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.errors import QuestionWarning
from kvprune.policy.base import Policy


@torch.no_grad()
def read(model: Any, cache: PrunedCache, ids: Tensor) -> None:
    """Let a model read ids `[n]` into a cache of one sequence."""
    named = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
    model(ids[None].to(model.device), **cache_argument(cache), **last)


def warn_of(policy: Policy, *, stacklevel: int) -> None:
    """Warn with QuestionWarning of a policy that looks for a question; stacklevel: 1 is the caller of this."""
    if policy.needs_question:
        warnings.warn(
            f"{policy} keeps what the last queries look at, and the document is compressed before there is any "
            "question: answers may be gone. Take a policy that does not look there, such as KVzip(0.25), which reads "
            "the document a second time, or ZipCache() or KIVI(), which keep every token at fewer bits; or end the "
            "document with a question like those to come.",
            QuestionWarning,
            stacklevel=stacklevel + 1,
        )
