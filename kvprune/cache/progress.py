"""`Progress`: whether the last forward pass on a cache came to its end, or was interrupted on the way.

An exception in the middle of a pass (out of memory, Ctrl-C, a user's hook) leaves some layers with the new tokens and
others without. Lengths do not always show that: layers with linear attention have none. Nor do their calls, since some
models update a state in place and call nothing in a step of one token; so their decoder is watched from outside.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache


class Progress:
    """How far forward passes come. A pass calls layer after layer in their order, and makes no call twice."""

    def __init__(self, last: int, *, watched: bool = False) -> None:
        """last: a layer that every pass reaches. watched: whether `begins_pass` and `ends_pass` are told of passes."""
        self.watched = watched
        self._last = last
        self._under_way = self._noted = False  # whether a pass that is watched has come to a layer, and to a call
        self._at: int | None = None  # None before the first pass, and where steps are compiled
        self._calls: tuple[str, ...] = ()  # in this layer
        self.changing = False
        """Whether a layer has taken keys whose step is not finished; stays True if that step was interrupted."""

    def begins(self, layer: int, call: str) -> bool:
        """Whether a call in a layer is the first of a new pass."""
        if self.watched:
            return not self._noted
        if self._at is None:
            return layer == 0
        return layer < self._at or (layer == self._at and call in self._calls)

    @property
    def is_complete(self) -> bool:
        """Whether all layers have seen the same tokens, as far as passes have been noted."""
        if self.watched:
            return not (self.changing or self._under_way)
        return not self.changing and (self._at is None or self._at >= self._last)

    def note(self, layer: int, call: str) -> None:
        """A pass has come to a call in a layer."""
        self._under_way = self._noted = True
        again = layer != self._at or call in self._calls
        self._at, self._calls = layer, (call,) if again else (*self._calls, call)

    def touch(self) -> None:
        """A pass has come to a state that it may update in place."""
        self._under_way = True

    def end(self) -> None:
        """A pass that is watched has come to its end. It reads nothing, as `forget`."""
        self._under_way = self._noted = False

    def forget(self) -> None:
        """Start over: the current pass has changed nothing, its changes have been undone, or its progress is unknown.

        It writes and reads nothing, so that compiled steps may call it: torch.compile guards on what is read.
        """
        self._at, self._calls, self.changing = None, (), False
        self._under_way = self._noted = False


def watch(decoder: torch.nn.Module) -> None:
    """Tell every cache that is given to a decoder, and has `begins_pass` and `ends_pass`, when passes do. Once only."""
    if _begin not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_begin, with_kwargs=True)
        decoder.register_forward_hook(_end, with_kwargs=True)


def _begin(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for cache in _watchers(args, kwargs):
        cache.begins_pass()


def _end(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    for cache in _watchers(args, kwargs):
        cache.ends_pass()


def _watchers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return [each for each in (*args, *kwargs.values()) if isinstance(each, Cache) and hasattr(each, "begins_pass")]
