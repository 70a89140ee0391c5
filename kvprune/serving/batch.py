"""Requests of one policy are answered as one batch, each with the tokens that `generate()` gives it alone.

Prompts are padded to the longest, in front or behind the prefix that all of them have, and read at once. Whenever an
answer ends, or nobody wants it any more, `generate()` returns, its row leaves the cache, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from kvprune.cache.models import cache_argument
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.cache.rotary import moving
from kvprune.policy.base import Policy
from kvprune.policy.budget import Budget
from kvprune.serving.jobs import Done, Job
from kvprune.serving.metrics import Metrics
from kvprune.serving.prefixes import Prefixes, Source
from kvprune.serving.writing import Text, processors

_BY_PLACE = (
    "no_repeat_ngram_size", "begin_suppress_tokens", "min_length", "min_new_tokens", "forced_eos_token_id",
    "exponential_decay_length_penalty",
)  # fmt: skip
"""Settings of `generate()` that go by how long a text is, padding included, or by what stands side by side in it."""
_NO_PREFIX: tuple[None, Source] = (None, "read")


def fits(jobs: Sequence[Job], another: Job, most_tokens: int) -> bool:
    """Whether another request is read along with these: of the same policy and prefix, and of a length near theirs.

    most_tokens: that are read at once, padding included, which may be half as many as those of the prompts.
    """
    first = jobs[0]
    if another.policy != first.policy or another.prompt.prefix != first.prompt.prefix:
        return False
    lengths = [len(job.prompt.rest) for job in (*jobs, another)]
    read = len(lengths) * max(lengths)
    return read <= most_tokens and read - sum(lengths) <= max(sum(lengths) // 2, 256)


class _Row:
    """One answer of a batch, while it is written."""

    def __init__(self, job: Job, tokenizer: Any, ends: set[int], source: Source) -> None:
        settings = job.settings
        self.job, self._ends = job, ends
        self._source: Source = "read" if job.read else source
        self._cached_tokens = 0 if self._source == "read" else len(job.prompt.prefix)
        self.text = Text(tokenizer, settings.stop)
        self.processors = processors(settings.temperature, settings.top_p, settings.seed)
        self.tokens = 0
        self._ended = False

    @property
    def left(self) -> int:
        return self.job.settings.max_new_tokens - self.tokens

    @property
    def over(self) -> bool:
        return self._ended or self.text.stopped or not self.left or self.job.called_off.is_set()

    def hear(self, token: int, metrics: Metrics) -> None:
        if self.tokens == 0:
            self._begin(metrics)
        self.tokens += 1
        if piece := self.text.add(token):
            self.job.tell(piece)
        self._ended = token in self._ends

    def _begin(self, metrics: Metrics) -> None:
        """Count what is counted once for every answer: one that has begun is not tried again."""
        self.job.begun = True
        metrics.add("first_token_seconds_sum", time.perf_counter() - self.job.came)
        metrics.add("first_token_seconds_count")
        if self.job.prompt.prefix:
            metrics.add("prefills_total", 1, self._source)
            metrics.add("prefill_tokens_saved_total", self._cached_tokens)

    def done(self, kept_tokens: float, nbytes: int, token_bytes: float) -> Done:
        seen = len(self.job.prompt) + self.tokens - 1  # the newest was not read
        return Done(
            finish_reason="stop" if self._ended or self.text.stopped else "length",
            prompt_tokens=len(self.job.prompt),
            completion_tokens=self.tokens,
            cached_tokens=self._cached_tokens,
            kept_tokens=kept_tokens,
            nbytes=nbytes,
            dense_nbytes=round(token_bytes * seen),
        )


class _Writing(StoppingCriteria):
    """Hears of every token that `generate()` chose, and has it return as soon as one of the answers is over."""

    def __init__(self, rows: list[_Row], cache: PrunedCache, metrics: Metrics) -> None:
        self.rows, self._cache, self._metrics = rows, cache, metrics
        self._steps = self.nbytes = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self._steps == 0:
            self._metrics.add("batches_total", 1, str(len(self.rows)))
        if self._steps % 32 == 0:
            self.weigh()
        self._steps += 1
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.hear(token, self._metrics)
        over = any(row.over for row in self.rows)
        return torch.full((len(self.rows),), over, dtype=torch.bool, device=input_ids.device)

    def weigh(self, *, gone: bool = False) -> None:
        """Tell the metrics what the cache holds now."""
        before, self.nbytes = self.nbytes, 0 if gone else self._cache.nbytes
        self._metrics.add("kept_bytes", self.nbytes - before, "running")


class _Sampling(LogitsProcessor):
    """Every row by its own settings and its own chance."""

    def __init__(self, rows: list[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = []
        for at, row in enumerate(self._rows):
            own = scores[at : at + 1]
            for each in row.processors:
                own = each(input_ids[at : at + 1], own)
            chosen.append(own)
        return torch.cat(chosen)


class Batches:
    """Writes answers to requests that fit together."""

    def __init__(self, model: Any, tokenizer: Any, prefixes: Prefixes, metrics: Metrics) -> None:
        self._model, self._tokenizer, self._prefixes, self._metrics = model, tokenizer, prefixes, metrics
        hybrid = any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers)
        self._alone = (
            hybrid or bool(moving(model)) or any(getattr(model.generation_config, name, None) for name in _BY_PLACE)
        )

    def can_be(self, policy: Policy) -> bool:
        """Whether requests of a policy are answered in a batch as they are alone.

        Of hybrid models, windows count padding; a number of bytes is of a whole batch.
        """
        budgets = (Budget.parse(part.budget) for part in policy.parts() if hasattr(part, "budget"))
        return not self._alone and not any(each.of_whole_batch for each in budgets)

    def answer(self, jobs: Sequence[Job], end: Callable[[Job, str], None]) -> None:
        """Write every answer to its end, unless it is called off. end: is told of each what became of it.

        Raises what goes wrong, which is of the jobs that `end` was not told of.
        """
        policy, prefix = jobs[0].policy, jobs[0].prompt.prefix
        cache, source = self._prefixes.take(policy, prefix) if prefix else _NO_PREFIX
        wanted = [job for job in jobs if not job.called_off.is_set()]
        for job in jobs:
            if job not in wanted:
                end(job, "called off")
        if not wanted:
            return
        cache = cache or PrunedCache(self._model, policy)
        if len(wanted) > 1:
            cache.batch_repeat_interleave(len(wanted))
        ends = _ends(self._model)
        if source == "read":
            wanted[0].read = True  # and the others find it there
        rows = [_Row(job, self._tokenizer, ends, "memory" if at else source) for at, job in enumerate(wanted)]
        self._write(rows, cache, *self._inputs(wanted), end)

    def _inputs(self, jobs: Sequence[Job]) -> tuple[Tensor, Tensor]:
        """Ids and mask `[B, L]`. Padding is made of a token of the prompt, which no penalty of repetitions minds."""
        width = max(len(job.prompt.rest) for job in jobs)
        ids, mask = [], []
        for job in jobs:
            prefix, rest = job.prompt.prefix, job.prompt.rest
            padding = width - len(rest)
            ids.append([*prefix, *rest[:1] * padding, *rest])
            mask.append([1] * len(prefix) + [0] * padding + [1] * len(rest))
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _write(
        self, rows: list[_Row], cache: PrunedCache, ids: Tensor, mask: Tensor, end: Callable[[Job, str], None]
    ) -> None:
        writing = _Writing(rows, cache, self._metrics)
        try:
            while rows:
                writing.rows = rows
                ids = self._model.generate(
                    ids,
                    attention_mask=mask,
                    **cache_argument(cache),
                    max_new_tokens=max(row.left for row in rows),
                    do_sample=False,  # chance is among the processors
                    num_beams=1,
                    pad_token_id=0,  # of rows that are over, and there are none
                    logits_processor=[_Sampling(rows)] if any(row.processors for row in rows) else [],
                    stopping_criteria=[writing],
                )
                over = [at for at, row in enumerate(rows) if row.over]  # once: a row may be called off meanwhile
                writing.weigh(gone=len(over) == len(rows))  # first: who hears of the last end finds nothing held
                self._end(over, rows, cache, end)
                stay = [at for at in range(len(rows)) if at not in over]
                if stay and len(stay) < len(rows):
                    cache.batch_select_indices(stay)
                rows = [rows[at] for at in stay]
                new = mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])
                ids, mask = ids[stay], torch.cat([mask, new], 1)[stay]
        finally:
            writing.weigh(gone=True)

    def _end(self, over: Sequence[int], rows: list[_Row], cache: PrunedCache, end: Callable[[Job, str], None]) -> None:
        kept = [(cache.kept_positions(layer) >= 0).sum(-1).float().mean(-1) for layer in cache.pruned_layers]
        held = [float(each) for each in torch.stack([each.cpu() for each in kept]).mean(0)] if kept else None
        nbytes, token_bytes = cache.nbytes // len(rows), cache.dense_nbytes / len(rows) / cache.seen_tokens
        for at in over:
            row = rows[at]
            if row.job.called_off.is_set():
                end(row.job, "called off")
                continue
            if piece := row.text.end():
                row.job.tell(piece)
            self._metrics.add("prompt_tokens_total", len(row.job.prompt))
            self._metrics.add("completion_tokens_total", row.tokens)
            row.job.tell(row.done(held[at] if held else float(cache.seen_tokens), nbytes, token_bytes))
            end(row.job, "answered")


def _ends(model: Any) -> set[int]:
    """Tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(torch.as_tensor(ends).flatten().tolist())
