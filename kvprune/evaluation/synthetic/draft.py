"""An example before its length is settled, and the search for as much filler as the length has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Stream(Generic[T]):
    """The first items of an infinite iterator, as many as asked for; repeated calls give the same ones."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._drawn: list[T] = []

    def first(self, count: int) -> list[T]:
        self._drawn += islice(self._items, max(0, count - len(self._drawn)))
        return self._drawn[:count]


@dataclass(frozen=True)
class Draft:
    """An example that can be written with any number of pieces of filler: sentences or words.

    body: the text with that many pieces; more pieces make a longer text. gap: between opening, body and question.
    fewest: the least number of pieces that makes sense. fields: go into the results.
    """

    opening: str
    body: Callable[[int], str]
    question: str
    answers: tuple[str, ...]
    gap: str = "\n\n"
    fewest: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, pieces: int) -> str:
        return self.gap.join(part for part in (self.opening, self.body(pieces), self.question) if part)


def ask(question: str) -> str:
    """A question as all prompts in prose put it."""
    return f"Question: {question}\nAnswer:"


def most_that_fit(size: Callable[[int], int], limit: int, fewest: int) -> int:
    """The largest n >= fewest with size(n) <= limit, for a size that grows with n; size(fewest) must be small enough.

    Sizes are expensive and nearly linear, so the search doubles n until it is too large, then interpolates.
    """
    low, low_size = fewest, size(fewest)
    high = max(1, 2 * fewest)
    while (high_size := size(high)) <= limit:
        low, low_size, high = high, high_size, 2 * high
    while high - low > 1:
        guess = low + (limit - low_size) * (high - low) // (high_size - low_size)
        guess = min(max(guess, low + 1), high - 1)
        guess_size = size(guess)
        if guess_size <= limit:
            low, low_size = guess, guess_size
        else:
            high, high_size = guess, guess_size
    return low
