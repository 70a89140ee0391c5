"""`Unread`: what a cache remembers of the tokens that no replay has seen yet, see `passes/replay.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvprune.state import Saved, State


@dataclass(frozen=True)
class Unread:
    """The newest tokens of a cache, which no replay has seen. Sequences are those of the batch.

    inputs: of the model, ids `[B, n]` or embeddings `[B, n, H]`. valid: bool `[B, n]`, False for padding; None if there
    is none. ends: the position id of each sequence's last token, `[B or 1]`; None where the model counts columns.
    columns: the padding mask of all columns that a hybrid model has seen, `[B, C]`; None if no layer needs one.
    """

    inputs: Tensor
    valid: Tensor | None = None
    ends: Tensor | None = None
    columns: Tensor | None = None

    def __len__(self) -> int:
        return self.inputs.shape[1]

    def followed_by(self, new: Unread, embed: torch.nn.Module) -> Unread:
        """And these behind them. embed: makes embeddings of ids, where one has those and the other ids."""
        if self.inputs.ndim != new.inputs.ndim:
            mine, theirs = (each.inputs if each.inputs.ndim == 3 else embed(each.inputs) for each in (self, new))
        else:
            mine, theirs = self.inputs, new.inputs
        valid = None
        if self.valid is not None or new.valid is not None:
            valid = torch.cat([self._all_valid(), new._all_valid().to(self.inputs.device)], dim=1)
        return replace(new, inputs=torch.cat([mine, theirs.to(mine)], dim=1), valid=valid)

    def _all_valid(self) -> Tensor:
        if self.valid is not None:
            return self.valid
        return torch.ones(self.inputs.shape[:2], dtype=torch.bool, device=self.inputs.device)

    def hiding(self, shown: Any, new: int) -> Unread:
        """Where a mask hides earlier columns. shown: bool `[B, columns]` of a cache before `new` columns came."""
        earlier = len(self) - new
        if earlier <= 0:
            return self
        valid = self._all_valid().clone()
        valid[:, :earlier] &= torch.from_numpy(shown[:, shown.shape[1] - earlier :].copy()).to(valid.device)
        return replace(self, valid=valid)

    def crop(self, count: int) -> Unread | None:
        """Without the newest `count` columns; None if nothing is left, or they were read already."""
        left = len(self) - count
        if left <= 0:
            return None
        return Unread(
            self.inputs[:, :left],
            None if self.valid is None else self.valid[:, :left],
            None if self.ends is None else self.ends - count,
            None if self.columns is None else self.columns[:, :-count],
        )

    def select_batch(self, rows: Tensor) -> Unread:
        """These sequences, in this order."""
        rows = rows.to(self.inputs.device)
        ends = self.ends if self.ends is None or len(self.ends) == 1 else self.ends[rows]
        chosen = (None if tensor is None else tensor[rows] for tensor in (self.valid, self.columns))
        valid, columns = chosen
        return Unread(self.inputs[rows], valid, ends, columns)

    def clone(self) -> Unread:
        return Unread(*(None if tensor is None else tensor.clone() for tensor in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.inputs, self.valid, self.ends, self.columns

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self._parts() if tensor is not None]

    # -- saved and restored --------------------------------------------------------------------------------------------

    def state(self) -> State:
        names = ("inputs", "valid", "ends", "columns")
        named = zip(names, self._parts(), strict=True)
        return State({}, {name: tensor for name, tensor in named if tensor is not None})

    @classmethod
    def restored(cls, saved: Saved, batch: int, seen: int) -> Unread:
        """seen: columns of the cache. Raises CacheError."""
        shape, dtype = saved.described("inputs")
        ids = len(shape) == 2 and dtype == torch.int64
        if not (ids or (len(shape) == 3 and dtype.is_floating_point)) or shape[0] != batch or not 0 < shape[1] <= seen:
            raise saved.refused(f"has inputs of shape {list(shape)} in {dtype}")
        valid = saved.tensor("valid", shape[:2], torch.bool) if saved.has("valid") else None
        ends = columns = None
        if saved.has("ends"):
            (count, *_), _ = saved.described("ends")
            ends = saved.tensor("ends", (1 if count == 1 else batch,), torch.int64)
        if saved.has("columns"):
            (_, width), _ = saved.described("columns")
            columns = saved.tensor("columns", (batch, min(width, seen)), torch.int64)
        return cls(saved.tensor("inputs", shape, dtype), valid, ends, columns)
