"""Requests wait in a line, and run a few batches at a time; each can be called off, and its answer comes in pieces."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvprune.errors import KVPruneError
from kvprune.policy.base import Policy
from kvprune.serving.batch import Batches, fits
from kvprune.serving.jobs import BusyError, Done, FailedError, Job, Settings
from kvprune.serving.metrics import Metrics
from kvprune.serving.prefixes import Prefixes
from kvprune.serving.prompts import Prompt

logger = logging.getLogger("kvprune.serving")


class Engine:
    """Answers requests, first come first served, and with each those behind it that fit in a batch with it.

    Args:
        parallel: how many batches are answered at once, in threads of their own on the one model.
        queue: how many requests may wait beside them.
        batch: most requests of a batch.
        batch_tokens: most tokens of prompts that a batch reads at once, padding included. A longer prompt is read
            alone.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prefixes: Prefixes,
        metrics: Metrics,
        *,
        parallel: int,
        queue: int,
        batch: int,
        batch_tokens: int,
    ) -> None:
        self._metrics, self._prefixes = metrics, prefixes
        self._batches = Batches(model, tokenizer, prefixes, metrics)
        self._room, self._most, self._most_tokens = parallel + queue, batch, batch_tokens
        self._pool = ThreadPoolExecutor(parallel, "kvprune-answer")
        self._numbers = itertools.count(1)
        self._open: dict[int, Job] = {}
        self._lock = threading.Lock()  # of the two below
        self._line: list[Job] = []
        self._busy = 0

    def submit(self, prompt: Prompt, policy: Policy, settings: Settings) -> Job:
        """Let a request wait for its turn. To be called in the event loop. Raises BusyError."""
        self.check_room()
        job = Job(next(self._numbers), prompt, policy, settings, asyncio.get_running_loop())
        self._open[job.number] = job
        self._metrics.add("waiting")
        with self._lock:
            self._line.append(job)
        self._pool.submit(self._next)  # which may find that another batch took the job along
        return job

    def check_room(self) -> None:
        """Raises BusyError where no more may wait."""
        with self._lock:
            waiting, busy = len(self._line), self._busy
        if waiting + busy >= self._room:
            self._metrics.add("requests_total", 1, "refused")
            raise BusyError(f"{waiting} requests are waiting, and no more may: try again later.")

    def call_off(self, job: Job) -> None:
        """Nobody wants the answer any more: stop at the next token, or, while it waits, free its place at once."""
        job.called_off.set()
        with self._lock:
            waits = job in self._line
            if waits:
                self._line.remove(job)
        if waits:
            self._metrics.add("waiting", -1)
            self._close(job, "called off")

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

    def _next(self) -> None:
        with self._lock:
            if not self._line:
                return
            jobs = self._taken()
            self._busy += 1
        self._metrics.add("waiting", -len(jobs))
        self._metrics.add("running", len(jobs))
        try:
            self._answer(jobs)
        finally:
            with self._lock:
                self._busy -= 1

    def _taken(self) -> list[Job]:
        """The first of the line, and those that fit to it."""
        jobs = [self._line.pop(0)]
        if self._most > 1 and self._line and self._batches.can_be(jobs[0].policy):
            for job in list(self._line):
                if len(jobs) < self._most and fits(jobs, job, self._most_tokens):
                    self._line.remove(job)
                    jobs.append(job)
        return jobs

    def _answer(self, jobs: Sequence[Job]) -> None:
        try:
            self._batches.answer(jobs, self._ended)
        except Exception as error:
            left = [job for job in jobs if job.number in self._open]
            if len(jobs) == 1 or any(job.begun for job in jobs):
                for job in left:
                    self._tell(job, error)
                return
        else:
            return
        for job in left:  # what one brings about should not cost the others; outside, where the error holds no cache
            self._answer([job])

    def _tell(self, job: Job, error: Exception) -> None:
        if isinstance(error, KVPruneError):
            job.tell(error)
            self._ended(job, "refused")
            return
        # The message of an exception may hold what somebody wrote: it says where it happened, and no more.
        where = "".join(traceback.format_tb(error.__traceback__))
        logger.error("request %d failed with %s\n%s", job.number, type(error).__name__, where)
        job.tell(FailedError())
        self._ended(job, "failed")

    def _ended(self, job: Job, outcome: str) -> None:
        self._metrics.add("running", -1)
        self._close(job, outcome)

    def _close(self, job: Job, outcome: str) -> None:
        self._open.pop(job.number, None)
        self._metrics.add("requests_total", 1, outcome)
        seconds = time.perf_counter() - job.came
        logger.info("request %d: %s, %d prompt tokens, %.2f s", job.number, outcome, len(job.prompt), seconds)
