"""`TableView`: a table as one link of a chain of policies sees it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class TableView:
    """The link's own columns under their plain names, and the rest of the table as it is.

    It is read and written to like the table itself, and holds nothing of its own.
    """

    def __init__(self, table: Any, scope: str) -> None:
        """table: a `TokenTable`. scope: what the names of the link's columns begin with, in the table."""
        self._table, self._scope = table, scope
        self.one_policy = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def __getitem__(self, column: str) -> Tensor:
        return self._table[self._scope + column]

    def __setitem__(self, column: str, content: Tensor) -> None:
        self._table[self._scope + column] = content

    @property
    def given(self) -> tuple[int, ...] | None:
        return self._table.given_to(self._scope)

    @given.setter
    def given(self, rows: tuple[int, ...]) -> None:
        self._table.give(self._scope, rows)
