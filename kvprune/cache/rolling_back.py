"""`RollingBack`: tokens are taken back, sequences change places, caches are copied: the rest of the Cache contract."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Sequence
from typing import Any, NoReturn, Self, SupportsIndex

import torch
from torch import Tensor

from kvprune.cache import stock
from kvprune.cache.forward_pass import ForwardPass
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.modes import without_gradients
from kvprune.cache.recording import Graphs
from kvprune.cache.transcript import Transcript
from kvprune.errors import CacheError


class RollingBack(ForwardPass):
    """The part of a `PrunedCache` that `generate()` calls between forward passes. All of it changes the cache."""

    _empty: dict[int, Any]
    _transcript: Transcript | None

    @without_gradients
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, e.g. `crop(-3)`; while the past is recorded, `crop(0)` ends a step.

        Raises CacheError, before anything has changed, where rows were evicted since.
        """
        self._check_closed()
        self._check_complete()
        self.end_prompt()
        try:
            tokens_to_remove = operator.index(tokens_to_remove)  # transformers 5.17 counts in tensors
        except TypeError as error:
            raise CacheError(
                f"crop takes an int, such as -3 for the newest 3 tokens, not {tokens_to_remove!r}."
            ) from error
        for layer in self.layers:
            if isinstance(layer, PrunedLayer):
                layer.check_crop(tokens_to_remove)
            elif stock.has_lost_what_it_needs(layer, -tokens_to_remove):
                raise CacheError(
                    "cannot crop: a sliding-window layer has dropped tokens that would be needed again. Call "
                    "activate_past_recording() before steps that you may want to take back, or keep a fork()."
                )
        super().crop(tokens_to_remove)
        if self._transcript and self.get_seq_length() < len(self._transcript.ids):
            self._transcript = None  # others may come in their place

    def activate_past_recording(self) -> None:
        """From now on nothing is evicted in a step before `crop` has said how many of its tokens were accepted."""
        self.end_prompt()
        super().activate_past_recording()

    def reset(self) -> None:
        """Empty the cache, whatever has happened to it; it may then be used with another batch size."""
        self._open = self.trip = None
        self._forget_step()
        self._progress.forget()
        self._transcript = None
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PrunedLayer):
                layer.reset()
            else:  # transformers' reset leaves states of a batch of their size, and the recording of the past (5.23)
                self.layers[index] = copy.deepcopy(self._empty[index])

    @without_gradients
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these sequences, LongTensor `[B]`, in this order: what beam search does after every step.

        On a CPU other choices are taken as `batch_select_indices` takes them; elsewhere nobody waits to look at them.
        """
        if self._batch_size is None:
            return
        if not isinstance(beam_idx, Tensor) or beam_idx.ndim != 1 or beam_idx.is_floating_point() or beam_idx.is_cpu:
            beam_idx = _sequences(beam_idx, self._batch_size, "reorder_cache")
        self.end_prompt()
        super().reorder_cache(beam_idx)

    @without_gradients
    def batch_repeat_interleave(self, repeats: int | Tensor) -> None:
        """Let every sequence stand so many times, side by side: an int, or a LongTensor `[B]` with one for each.

        Raises CacheError, before anything has changed, for less than once, or none of any sequence.
        """
        batch = self._batch_size
        times = _times(repeats, batch)
        if batch is not None:
            self.end_prompt()
            super().reorder_cache(torch.arange(batch).repeat_interleave(times))

    @without_gradients
    def batch_select_indices(self, indices: Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Keep these sequences, in this order: a tensor or sequence of ints `[n]`, negative ones counted from the end,
        or of bools `[B]`. An empty cache takes anything, as DynamicCache does.

        Raises CacheError, before anything has changed, for what names no sequences of this batch.
        """
        batch = self._batch_size
        if batch is not None:
            rows = _sequences(indices, batch, "batch_select_indices")
            self.end_prompt()
            super().reorder_cache(rows)  # layers of every kind take such indices as those of beams

    @property
    def _batch_size(self) -> int | None:
        """How many sequences it holds; None if it is empty."""
        sizes = (
            layer.batch_size if isinstance(layer, PrunedLayer) else stock.batch_size(layer) for layer in self.layers
        )
        return next((size for size in sizes if size is not None), None)

    @without_gradients
    def fork(self) -> Self:
        """An independent copy: compress a document once, ask many questions. Raises CacheError in a forward pass."""
        self._check_closed()
        self._check_complete()
        self.end_prompt()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._progress = copy.copy(self._progress)
        other.layers = [
            layer.fork() if isinstance(layer, PrunedLayer) else stock.copied(layer) for layer in self.layers
        ]
        graphs = Graphs(self.cuda_graphs)  # what is recorded of both may run at the same time
        for index in self.pruned_layers:
            other.layers[index].graphs = graphs
        other._forget_step()
        return other

    def __copy__(self) -> Self:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()  # which does not copy the model along

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CacheError(
            "a PrunedCache is not pickled: save(path) writes it, and PrunedCache.load(path, model) reads it."
        )


def _sequences(indices: Any, batch: int, taker: str) -> Tensor:
    """Numbers of sequences of a batch, LongTensor `[n]`, made of what PyTorch takes as an index."""
    given = indices if isinstance(indices, slice | Tensor) else _as_tensor(indices, taker)
    try:
        rows = torch.arange(batch)[given.to("cpu") if isinstance(given, Tensor) else given]
    except (IndexError, TypeError, ValueError) as error:
        raise CacheError(
            f"{taker} takes numbers of sequences from {-batch} to {batch - 1}, or {batch} bools, and was "
            f"given {indices!r} ({error})."
        ) from None
    if rows.ndim != 1 or not len(rows):
        raise CacheError(f"{taker} takes a list of sequences, at least one, not {indices!r}.")
    return rows


def _as_tensor(indices: Any, taker: str) -> Tensor:
    try:
        return torch.as_tensor([*indices])
    except (TypeError, ValueError, RuntimeError) as error:
        raise CacheError(f"{taker} takes a tensor, list or tuple of sequences, not {indices!r} ({error}).") from None


def _times(repeats: Any, batch: int | None) -> int | Tensor:
    """How often sequences are to stand: an int, or a LongTensor `[B]`."""
    if isinstance(repeats, Tensor) and repeats.ndim == 1 and len(repeats) in (1, batch or len(repeats)):
        times = repeats.to("cpu").expand(batch or len(repeats))
        if times.dtype in (torch.int32, torch.int64) and bool((times >= 0).all() and times.any()):
            return times.long()
    elif isinstance(repeats, SupportsIndex) and not (isinstance(repeats, Tensor) and repeats.ndim):
        with contextlib.suppress(TypeError):  # a tensor of floats has __index__ as well
            if (count := operator.index(repeats)) >= 1:
                return count
    raise CacheError(
        "batch_repeat_interleave takes an int of at least 1, or a LongTensor [batch] with one for each sequence, not "
        f"{repeats!r}."
    )
