"""`Progress`: whether the last forward pass on a cache came to its end, or was interrupted on the way.

An exception in the middle of a pass (no memory left, Ctrl-C, a hook of somebody's) leaves layers that have seen the new
tokens, and others that have not. Lengths do not always tell: layers with linear attention have none.
"""

from __future__ import annotations


class Progress:
    """How far forward passes come. A pass calls layer after layer in their order, and makes no call twice."""

    def __init__(self, last: int) -> None:
        """last: a layer that every pass comes to. Where passes are seen to go on beyond it, it becomes a later one."""
        self._last = last
        self._at: int | None = None  # None before the first pass, and where steps are compiled
        self._calls: tuple[str, ...] = ()  # in this layer
        self.changing = False
        """Whether a layer has taken keys, and is not done with them; for good, where that step was interrupted."""

    def begins(self, layer: int, call: str) -> bool:
        """Whether a call in a layer is the first of a new pass."""
        if self._at is None:
            return layer == 0
        return layer < self._at or (layer == self._at and call in self._calls)

    @property
    def is_complete(self) -> bool:
        """Whether all layers have seen the same tokens, as far as calls tell."""
        return not self.changing and (self._at is None or self._at >= self._last)

    def note(self, layer: int, call: str) -> None:
        """A pass has come to a call in a layer."""
        again = layer != self._at or call in self._calls
        self._at, self._calls = layer, (call,) if again else (*self._calls, call)
        self._last = max(self._last, layer)

    def forget(self) -> None:
        """The pass at hand has changed nothing, or nothing is left of what it has changed, or nobody can tell.

        It writes and reads nothing, so that compiled steps may call it: torch.compile guards on what is read.
        """
        self._at, self._calls, self.changing = None, (), False
