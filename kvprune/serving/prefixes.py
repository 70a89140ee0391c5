"""Compressed prefixes, found by their tokens: the most recently used in memory, and more in files.

A prefix is one sequence of tokens under one policy of one model, read in one piece. Whoever asks for it gets a fork,
the same whether it was read just now, in memory or in a file: what a server has seen before never changes an answer.

Every prefix is written to its file as soon as it was read, so that memory can let go of any, and a server that is
killed finds all of them when it starts again. A file is whole or not there, and is checked when it is read
(`kvprune.saving`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import threading
import time
import traceback
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch

from kvprune.cache.models import cache_argument
from kvprune.errors import CacheError, KVPruneError
from kvprune.policy.base import Policy
from kvprune.policy.registry import described
from kvprune.saving import PrunedCache
from kvprune.saving.files import FORMAT, VERSION
from kvprune.saving.fingerprint import fingerprint, unknown
from kvprune.serving.metrics import Metrics

logger = logging.getLogger("kvprune.serving")
Source = Literal["read", "memory", "disk"]
_ENDING = ".safetensors"
_OURS = re.compile(rf"[0-9a-f]{{64}}\{_ENDING}")  # others may keep files in the same folder
_WRITING = 2  # prefixes that wait for their file or are being written, each a copy beside what memory may hold
_ABANDONED = 3600  # seconds after which a file half written is of nobody any more


class Prefixes:
    """The prefixes of one model.

    Args:
        memory: most bytes of caches in memory, by their `nbytes`; those of running requests are beside it, and up to
            two that are being written to files.
        folder: where files are, for this model and others; None for none.
        disk: most bytes of all files in the folder.

    Raises KVPruneError where the folder cannot be written, and where the model's weights cannot be told, of which no
    cache can be saved.
    """

    def __init__(self, model: Any, metrics: Metrics, *, memory: int, folder: Path | None = None, disk: int = 0) -> None:
        self._model, self._metrics = model, metrics
        self._memory, self._folder, self._disk = memory, folder, disk
        self._held: OrderedDict[str, tuple[PrunedCache, int]] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()
        self._turns: dict[str, tuple[threading.Lock, int]] = {}
        self._unwritten = threading.Semaphore(_WRITING)
        self._writer = ThreadPoolExecutor(1, "kvprune-writer")
        facts = fingerprint(model)
        self._identity = json.dumps([VERSION, facts], sort_keys=True)  # files of another kvprune stay its own
        if folder is not None:
            if (reason := unknown(facts)) is not None:
                raise KVPruneError(f"caches of this model cannot be saved, {reason}: leave --cache-dir out.")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _sweep(folder)
                self._trim()
            except OSError as error:
                raise KVPruneError(f"cannot keep caches in {folder}: {error}") from error

    def take(self, policy: Policy, ids: Sequence[int]) -> tuple[PrunedCache, Source]:
        """A cache of one's own that has read these tokens, and where it was found."""
        key = self._key(policy, ids)
        with self._turn(key):  # one reads a document, and others who want it wait
            source: Source = "memory"
            kept = self._recent(key)
            if kept is None:
                source, kept = "disk", self._load(key, policy)
            if kept is None:
                source, kept = "read", self._read(policy, ids)
                if self._folder is not None:
                    self._write(key, kept)
            if source != "memory":
                self._hold(key, kept)
            return kept.fork(), source

    def close(self) -> None:
        """Wait until everything is written."""
        self._writer.shutdown()

    # -- one prefix ------------------------------------------------------------------------------------------------

    def _key(self, policy: Policy, ids: Sequence[int]) -> str:
        digest = hashlib.sha256(self._identity.encode())
        digest.update(json.dumps(described(policy), sort_keys=True).encode())
        digest.update(array("q", ids).tobytes())
        return digest.hexdigest()

    @contextmanager
    def _turn(self, key: str) -> Iterator[None]:
        with self._lock:
            turn, waiting = self._turns.get(key, (threading.Lock(), 0))
            self._turns[key] = turn, waiting + 1
        try:
            with turn:
                yield
        finally:
            with self._lock:
                waiting = self._turns[key][1] - 1
                if waiting:
                    self._turns[key] = turn, waiting
                else:
                    del self._turns[key]

    def _read(self, policy: Policy, ids: Sequence[int]) -> PrunedCache:
        cache = PrunedCache(self._model, policy)
        known = inspect.signature(self._model.forward).parameters
        least = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        with torch.no_grad():
            self._model(torch.tensor([ids], device=self._model.device), **cache_argument(cache), **least)
        return cache

    # -- in memory -------------------------------------------------------------------------------------------------

    def _recent(self, key: str) -> PrunedCache | None:
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key][0]

    def _hold(self, key: str, cache: PrunedCache) -> None:
        nbytes = cache.nbytes
        with self._lock:
            self._held[key] = cache, nbytes
            total = sum(each for _, each in self._held.values())
            while total > self._memory:
                _, (_, gone) = self._held.popitem(last=False)
                total -= gone
                self._metrics.add("evictions_total", 1, "memory")
            self._metrics.put("kept_bytes", total, "memory")
            self._metrics.put("prefixes", len(self._held), "memory")

    # -- in files --------------------------------------------------------------------------------------------------

    def _load(self, key: str, policy: Policy) -> PrunedCache | None:
        if self._folder is None or not (path := self._folder / (key + _ENDING)).exists():
            return None
        try:
            cache = PrunedCache.load(path, self._model, policy=policy)
        except CacheError as error:  # the file stays until a whole one takes its place: the fault may not be its own
            logger.warning("a saved prefix is read anew: %s", error)
            self._metrics.add("damaged_total")
            return None
        with suppress(OSError):
            os.utime(path)  # it was used: others go first
        return cache

    def _write(self, key: str, cache: PrunedCache) -> None:
        self._unwritten.acquire()  # a disk that is slower than the model holds it up, rather than filling the memory
        try:
            self._writer.submit(self._save, key, cache.fork())
        except BaseException:
            self._unwritten.release()
            raise

    def _save(self, key: str, cache: PrunedCache) -> None:
        assert self._folder is not None  # without one, nothing is written: see `take`
        try:
            cache.save(self._folder / (key + _ENDING))
            self._trim()
        except (CacheError, OSError) as error:
            logger.warning("a prefix could not be saved: %s", error)
        except Exception as error:  # nobody asks the future; its message may hold what somebody wrote
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a prefix could not be saved: %s\n%s", type(error).__name__, where)
        finally:
            self._unwritten.release()

    def _trim(self) -> None:
        folder = self._folder or Path()
        files = []
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name):
                with suppress(OSError):  # another server of this folder may have removed it
                    files.append((path, path.stat()))
        total, count = sum(facts.st_size for _, facts in files), len(files)
        for path, facts in sorted(files, key=lambda each: each[1].st_mtime):
            if total <= self._disk:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                total, count = total - facts.st_size, count - 1
                self._metrics.add("evictions_total", 1, "disk")
        self._metrics.put("kept_bytes", total, "disk")
        self._metrics.put("prefixes", count, "disk")


def _sweep(folder: Path) -> None:
    """Remove what a server left behind that was killed while it wrote."""
    for left in folder.glob(f".{FORMAT}.*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left)
