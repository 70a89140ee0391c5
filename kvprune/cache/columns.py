"""What a padding mask says of the columns of a model's input: which are tokens, now and in a later step.

A mask over columns that are cached already may hide some of them, as where the padding that ended one answer of a batch
lies before the next question. Their rows go, and the tokens behind them move up: a cache never differs from one that
was told at once. What is hidden once cannot come back. Everything here is on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvprune.errors import CacheError
from kvprune.state import Saved


@dataclass(frozen=True)
class Columns:
    """Which columns so far are tokens: bool `[B, n]`, up to the last that is none; all after it are."""

    real: Any = None

    @classmethod
    def of(cls, real: Any) -> Columns:
        """Of all columns, bool `[B, columns]`."""
        hidden = np.flatnonzero(~real.all(0))
        return ALL_REAL if not len(hidden) else cls(real[:, : hidden[-1] + 1].copy())

    @property
    def length(self) -> int:
        return 0 if self.real is None else self.real.shape[1]

    def upto(self, batch: int, columns: int) -> Any:
        """Bool `[B, columns]`."""
        all_of_them = np.ones((batch, columns), dtype=bool)
        if self.real is not None:
            all_of_them[:, : self.length] = self.real[:, :columns]
        return all_of_them

    def select_batch(self, rows: Tensor) -> Columns:
        """These sequences, in this order; looks at the rows only where sequences differ."""
        if self.real is None:
            return self
        if (self.real == self.real[:1]).all():
            return Columns(self.real[:1].repeat(len(rows), 0))
        return Columns.of(self.real[rows.cpu().numpy()])

    def crop(self, columns: int) -> Columns:
        """Only the first so many columns."""
        return self if columns >= self.length else Columns.of(self.real[:, :columns])

    def facts(self) -> dict[str, list[list[int]]]:
        """For each sequence, the columns that are no tokens; nothing where all are."""
        return {} if self.real is None else {"hidden_columns": [np.flatnonzero(~row).tolist() for row in self.real]}

    @classmethod
    def restored(cls, saved: Saved, seen: int, tokens: tuple[int, ...]) -> Columns:
        """Raises CacheError. Files of earlier versions do not say: there, padding is on the left."""
        if "hidden_columns" not in saved.facts:
            return cls.of(np.arange(seen) >= seen - np.array(tokens)[:, None])
        real = np.ones((len(tokens), seen), dtype=bool)
        for row, hidden in enumerate(saved.many_counts("hidden_columns", seen - 1, length=len(tokens))):
            real[row, list(hidden)] = False
        if real.sum(1).tolist() != list(tokens):
            raise saved.refused("says of other columns than its tokens that they are padding")
        return cls.of(real)


ALL_REAL = Columns()


@dataclass(frozen=True)
class Past:
    """What a mask hides of the tokens of a cache.

    moved: `[B, tokens]` int32: their new positions; -1: gone. shown: which columns are tokens now, bool `[B, columns]`.
    """

    moved: Any
    shown: Any

    @classmethod
    def of(cls, before: Any, now: Any) -> Past | None:
        """before, now: which columns are tokens, bool `[B, columns]`; None if nothing is hidden."""
        if (before == now).all():
            return None
        counts = before.sum(1)
        moved = np.full((len(before), max(int(counts.max()), 1)), -1, dtype=np.int32)
        for row, (old, new) in enumerate(zip(before, now, strict=True)):
            stays = new[old]
            moved[row, : len(stays)] = np.where(stays, stays.cumsum() - 1, -1)
        return cls(moved, now)

    def on(self, device: torch.device) -> Tensor:
        return torch.from_numpy(self.moved).to(device)

    def left(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Of so many first tokens of each sequence, how many stay."""
        return tuple(int((row[:count] >= 0).sum()) for row, count in zip(self.moved, counts, strict=True))


@dataclass(frozen=True)
class Looked:
    """What a mask says of a forward pass. valid: bool `[B, L]`, False for padding; None if there is none.

    past: None if nothing that is cached is hidden. columns: those of the cache after it.
    """

    valid: Tensor | None
    past: Past | None
    columns: Columns


class Reading:
    """A padding mask on its way to the host, `[B, columns]`.

    On an accelerator the copy is begun here, where a forward pass begins and layers have not come yet; by the time that
    attention asks for it, it is there, and the host need not wait.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask, self._arrived = mask.detach(), None
        self.looked: Looked | None = None
        """What `look` has found; None if nothing of note."""
        self.is_looked_at = False
        if mask.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._mask = torch.empty(mask.shape, dtype=torch.bool, pin_memory=True)
            self._mask.copy_(mask.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(mask.device))

    @classmethod
    def known(cls, looked: Looked | None) -> Reading:
        """One that needs not be looked at."""
        reading = cls(torch.empty(0, 0, dtype=torch.bool))
        reading.looked, reading.is_looked_at = looked, True
        return reading

    @property
    def real(self) -> Any:
        """Bool `[B, columns]`."""
        if self._arrived is not None and not self._arrived.query():
            self._arrived.synchronize()
        return self._mask.to("cpu", torch.bool).numpy()

    def is_ordinary(self, columns: Columns, length: int) -> bool:
        """Whether new columns are all tokens, and the others are what they were: so it is in steps of generate()."""
        real, known = self.real, columns.length
        if real.shape[1] < known + length or (columns.real is not None and len(real) != len(columns.real)):
            return False
        return bool(real[:, known:].all()) and (not known or bool((real[:, :known] == columns.real).all()))

    def look(self, columns: Columns, seen: int, length: int, device: torch.device, batch: int | None) -> None:
        """Find out what it says of a pass that brings `length` columns behind `seen` others, which were `columns`.

        batch: sequences of the pass; None if nobody knows yet. Raises CacheError for a mask that is of other sequences,
        does not cover all columns, or shows what is gone.
        """
        self._check_width(seen, length)
        if not self.is_ordinary(columns, length):
            self._check_batch(columns, batch)
            real = self.real[:, : seen + length]
            before, now, new = columns.upto(len(real), seen), real[:, :seen], real[:, seen:]
            shown = (now & ~before).any(0)
            if shown.any():
                raise CacheError(
                    f"the attention mask shows column {int(shown.argmax())}, which an earlier mask has hidden: its "
                    "rows are gone. Keep hiding what was hidden, or go on with a fork() made before"
                )
            self.looked = Looked(_valid(new, device), Past.of(before, now), Columns.of(real))
        self.is_looked_at = True

    def look_at_newest(self, columns: Columns, length: int, device: torch.device, batch: int | None) -> None:
        """The same of the newest columns alone, whatever the mask says of others; `columns` stay as they are."""
        self._check_width(0, length)
        if not self.real[:, self.real.shape[1] - length :].all():
            self._check_batch(columns, batch)
        valid = _valid(self.real[:, self.real.shape[1] - length :], device)
        self.looked, self.is_looked_at = None if valid is None else Looked(valid, None, columns), True

    def _check_batch(self, columns: Columns, batch: int | None) -> None:
        held = len(self.real) if columns.real is None else len(columns.real)
        for sequences in (held, batch):
            if sequences not in (None, len(self.real)):
                raise CacheError(
                    f"the attention mask has {len(self.real)} rows, and there are {sequences} sequences: give each a "
                    "row of its own, and other sequences another cache"
                )

    def _check_width(self, seen: int, length: int) -> None:
        shape = tuple(self.real.shape)
        if len(shape) != 2 or shape[1] < length:
            raise CacheError(
                f"the attention mask has the shape {shape}; a pruned cache takes a padding mask [batch, tokens] that "
                f"covers the {length} new tokens"
            )
        if shape[1] < seen + length:
            raise CacheError(
                f"the attention mask has {shape[1]} columns, and the cache has seen {seen} tokens before the {length} "
                "new ones. A mask covers them all; give generate() the whole conversation, which must begin with what "
                "the cache has seen. A prompt that does not, as where a chat template leaves out earlier thinking, "
                "needs a new PrunedCache or an old fork()"
            )


def _valid(real: Any, device: torch.device) -> Tensor | None:
    return None if real.all() else torch.from_numpy(real.copy()).to(device)
