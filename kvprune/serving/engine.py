"""Requests wait in a queue, run a few at a time, each by `generate()` on a cache of its own, and can be called off."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from kvprune.cache.models import cache_argument
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.errors import KVPruneError
from kvprune.policy.base import Policy
from kvprune.serving.metrics import Metrics
from kvprune.serving.prefixes import Prefixes
from kvprune.serving.prompts import Prompt
from kvprune.serving.writing import Text, processors

logger = logging.getLogger("kvprune.serving")


class BusyError(KVPruneError):
    """As many requests wait as may."""


class FailedError(Exception):
    """Something went wrong that is not the request's fault. The log says what."""


@dataclass(frozen=True)
class Settings:
    """How an answer is written. max_new_tokens: most tokens of it. stop: strings that end it and are not part of it."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """What an answer took. cached_tokens: of the prompt, those that were not read again. Bytes: of its cache."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    kept_tokens: float
    nbytes: int
    dense_nbytes: int


@dataclass
class Job:
    """One request on its way. Its answer comes as pieces of text, then `Done`; or an exception."""

    number: int
    prompt: Prompt
    policy: Policy
    settings: Settings
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[str | Done | Exception] = field(default_factory=asyncio.Queue)
    called_off: threading.Event = field(default_factory=threading.Event)
    turn: Future[None] | None = None
    came: float = field(default_factory=time.perf_counter)

    def tell(self, event: str | Done | Exception) -> None:
        """From the thread that writes the answer."""
        with suppress(RuntimeError):  # nobody listens any more: the server has stopped
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class _Writing(StoppingCriteria):
    """Hears of every token that `generate()` chose, and says when that is enough."""

    def __init__(self, job: Job, text: Text, cache: PrunedCache, metrics: Metrics) -> None:
        self._job, self._text, self._cache, self._metrics = job, text, cache, metrics
        self.tokens = 0
        self.nbytes = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.tokens == 0:
            self._metrics.add("first_token_seconds_sum", time.perf_counter() - self._job.came)
            self._metrics.add("first_token_seconds_count")
        if self.tokens % 32 == 0:
            self.weigh()
        self.tokens += 1
        if piece := self._text.add(int(input_ids[0, -1])):
            self._job.tell(piece)
        enough = self._text.stopped or self._job.called_off.is_set()
        return torch.full((1,), enough, dtype=torch.bool, device=input_ids.device)

    def weigh(self, *, gone: bool = False) -> None:
        """Tell the metrics what the cache holds now."""
        before, self.nbytes = self.nbytes, 0 if gone else self._cache.nbytes
        self._metrics.add("kept_bytes", self.nbytes - before, "running")


class Engine:
    """Answers requests, first come first served.

    Args:
        parallel: how many are answered at once, in threads of their own on the one model.
        queue: how many may wait beside them.
    """

    def __init__(
        self, model: Any, tokenizer: Any, prefixes: Prefixes, metrics: Metrics, *, parallel: int, queue: int
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._prefixes, self._metrics = prefixes, metrics
        self._room = parallel + queue
        self._pool = ThreadPoolExecutor(parallel, "kvprune-answer")
        self._numbers = itertools.count(1)
        self._open: dict[int, Job] = {}

    def submit(self, prompt: Prompt, policy: Policy, settings: Settings) -> Job:
        """Let a request wait for its turn. To be called in the event loop. Raises BusyError."""
        self.check_room()
        job = Job(next(self._numbers), prompt, policy, settings, asyncio.get_running_loop())
        self._open[job.number] = job
        self._metrics.add("waiting")
        job.turn = self._pool.submit(self._run, job)
        return job

    def check_room(self) -> None:
        """Raises BusyError where no more may wait."""
        if len(self._open) >= self._room:
            self._metrics.add("requests_total", 1, "refused")
            raise BusyError(f"{len(self._open)} requests are waiting or running, and no more may: try again later.")

    def call_off(self, job: Job) -> None:
        """Nobody wants the answer any more: stop at the next token, or, while it waits, free its place at once."""
        job.called_off.set()
        if job.turn is not None and not job.turn.cancelled() and job.turn.cancel():
            self._metrics.add("waiting", -1)
            self._end(job, "called off")

    async def pieces(self, job: Job) -> AsyncIterator[str | Done]:
        """The answer as it comes. Who stops listening before `Done` calls it off. Raises what went wrong."""
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            self.call_off(job)

    def close(self) -> None:
        """Call off whatever is open, and wait until it has stopped."""
        for job in list(self._open.values()):
            self.call_off(job)
        self._pool.shutdown()
        self._prefixes.close()

    # -- in the threads of the pool --------------------------------------------------------------------------------

    def _run(self, job: Job) -> None:
        self._metrics.add("waiting", -1)
        self._metrics.add("running")
        outcome = "failed"
        try:
            if job.called_off.is_set():
                outcome = "called off"
                return
            done = self._answer(job)
            outcome = "called off" if job.called_off.is_set() else "answered"
            if done is not None:
                job.tell(done)
        except KVPruneError as error:
            outcome = "refused"
            job.tell(error)
        except Exception as error:
            # The message of an exception may hold what somebody wrote: it says where it happened, and no more.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("request %d failed with %s\n%s", job.number, type(error).__name__, where)
            job.tell(FailedError())
        finally:
            self._metrics.add("running", -1)
            self._end(job, outcome)

    def _end(self, job: Job, outcome: str) -> None:
        self._open.pop(job.number, None)
        self._metrics.add("requests_total", 1, outcome)
        seconds = time.perf_counter() - job.came
        logger.info("request %d: %s, %d prompt tokens, %.2f s", job.number, outcome, len(job.prompt), seconds)

    def _answer(self, job: Job) -> Done | None:
        """None if nobody wants it any more when its prefix has been read."""
        prefix, settings = job.prompt.prefix, job.settings
        cache, known = self._prefixes.take(job.policy, prefix) if prefix else (None, False)
        if job.called_off.is_set():
            return None
        cache = cache or PrunedCache(self._model, job.policy)
        text = Text(self._tokenizer, settings.stop)
        writing = _Writing(job, text, cache, self._metrics)
        ids = torch.tensor([[*prefix, *job.prompt.rest]], device=self._model.device)
        try:
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **cache_argument(cache),
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,  # chance is among the processors
                num_beams=1,
                logits_processor=processors(settings.temperature, settings.top_p, settings.seed),
                stopping_criteria=[writing],
            )
            if piece := text.end():
                job.tell(piece)
            ended = text.stopped or int(output[0, -1]) in _ends(self._model)
            self._metrics.add("prompt_tokens_total", len(job.prompt))
            self._metrics.add("completion_tokens_total", writing.tokens)
            return Done(
                finish_reason="stop" if ended else "length",
                prompt_tokens=len(job.prompt),
                completion_tokens=writing.tokens,
                cached_tokens=len(prefix) if known else 0,
                kept_tokens=_kept(cache),
                nbytes=cache.nbytes,
                dense_nbytes=cache.dense_nbytes,
            )
        finally:
            writing.weigh(gone=True)


def _ends(model: Any) -> set[int]:
    """Tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _kept(cache: PrunedCache) -> float:
    """Tokens that a KV head holds, on average."""
    rows = [(cache.kept_positions(layer) >= 0).sum(-1).float().mean() for layer in cache.pruned_layers]
    return float(sum(rows) / len(rows)) if rows else float(cache.seen_tokens)
