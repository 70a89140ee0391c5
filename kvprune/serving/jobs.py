"""One request on its way: what is asked, where its answer goes, and what that took."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from kvprune.errors import KVPruneError
from kvprune.policy.base import Policy
from kvprune.serving.prompts import Prompt


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
    """What an answer took.

    cached_tokens: of the prompt, those that were not read again. nbytes: of its cache, or its share of the cache of the
    batch that it was answered in. dense_nbytes: of a full cache of its tokens.
    """

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    kept_tokens: float
    nbytes: int
    dense_nbytes: int


@dataclass(eq=False)
class Job:
    """One request. Its answer comes as pieces of text, then `Done`; or an exception."""

    number: int
    prompt: Prompt
    policy: Policy
    settings: Settings
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[str | Done | Exception] = field(default_factory=asyncio.Queue)
    called_off: threading.Event = field(default_factory=threading.Event)
    came: float = field(default_factory=time.perf_counter)
    read: bool = False
    """Whether its prefix was read for it, maybe in a batch that then failed."""
    begun: bool = False
    """Whether its first token was chosen: from then on it is counted, and never answered anew."""

    def tell(self, event: str | Done | Exception) -> None:
        """From the thread that writes the answer."""
        with suppress(RuntimeError):  # nobody listens any more: the server has stopped
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
