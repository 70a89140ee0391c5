"""`Progress`: whether the last forward pass on a cache came to its end, or was interrupted on the way.

An exception in the middle of a pass (out of memory, Ctrl-C, a user's hook) leaves some layers with the new tokens and
others without. Lengths do not always show that: layers with linear attention have none.
"""

from __future__ import annotations


class Progress:
    """How far forward passes come. A pass calls layer after layer in their order, and makes no call twice."""

    def __init__(self, last: int) -> None:
        """last: a layer that every pass reaches. It is moved up when a pass is seen to reach a later one."""
        self._last = last
        self._at: int | None = None  # None before the first pass, and where steps are compiled
        self._calls: tuple[str, ...] = ()  # in this layer
        self.changing = False
        """Whether a layer has taken keys whose step is not finished; stays True if that step was interrupted."""

    def begins(self, layer: int, call: str) -> bool:
        """Whether a call in a layer is the first of a new pass."""
        if self._at is None:
            return layer == 0
        return layer < self._at or (layer == self._at and call in self._calls)

    @property
    def is_complete(self) -> bool:
        """Whether all layers have seen the same tokens, judged by the calls noted so far."""
        return not self.changing and (self._at is None or self._at >= self._last)

    def note(self, layer: int, call: str) -> None:
        """A pass has come to a call in a layer."""
        again = layer != self._at or call in self._calls
        self._at, self._calls = layer, (call,) if again else (*self._calls, call)
        self._last = max(self._last, layer)

    def forget(self) -> None:
        """Start over: the current pass has changed nothing, its changes have been undone, or its progress is unknown.

        It writes and reads nothing, so that compiled steps may call it: torch.compile guards on what is read.
        """
        self._at, self._calls, self.changing = None, (), False
