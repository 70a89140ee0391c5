"""Aggregation: which words come most often in a text that is nothing but words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np

from kvprune.evaluation.synthetic import words
from kvprune.evaluation.synthetic.draft import Draft, Stream, ask

COMMON = 10
"""How many common words there are."""

FREQUENT = 3
"""How many frequent words are asked for."""

_LONG = 8192  # tokens of a prompt from which words are repeated more
_DOTS = "..."


def common_words(rng: np.random.Generator, length: int) -> Draft:
    """A numbered list in which ten words stand 30 times and all others 3 times; 6 times and once in short prompts."""
    common_rng, other_rng, order_rng = rng.spawn(3)
    common_repeats, other_repeats = (30, 3) if length >= _LONG else (6, 1)
    common = list(islice(words.list_words(common_rng), COMMON))
    others = Stream(_repeated(words.list_words(other_rng), set(common), other_repeats))
    seed = int(order_rng.integers(2**32))

    def body(count: int) -> str:
        listed = _shuffled(common * common_repeats + others.first(count), seed)
        return " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))

    return Draft(
        "Read the following numbered list. Some of its words stand there more often than others.",
        body,
        ask(f"Which {COMMON} words stand most often in the list? Reply with these words alone."),
        tuple(common),
        fewest=COMMON,
    )


def frequent_words(rng: np.random.Generator) -> Draft:
    """Invented words, the one of rank k as often as floor(n / k^2), where rank 1 is dots that do not count."""
    word_rng, order_rng = rng.spawn(2)
    coded = Stream(words.invented(word_rng))
    seed = int(order_rng.integers(2**32))

    def body(count: int) -> str:
        ranked = [_DOTS, *coded.first(math.isqrt(count) - 1)]
        spread = [word for rank, word in enumerate(ranked, 1) for _ in range(count // rank**2)]
        return " ".join(_shuffled(spread, seed))

    return Draft(
        "Read the following text in code. Some of its words come more often than others.",
        body,
        ask(f"Which {FREQUENT} words are the most frequent, not counting the dots? Reply with these words alone."),
        tuple(coded.first(FREQUENT)),
        fewest=_fewest_without_ties(),
    )


def _fewest_without_ties() -> int:
    """From here on the last frequent word comes more often than the first that is not, in whole numbers."""
    last = FREQUENT + 1  # rank 1 is the dots
    return math.ceil(1 / (1 / last**2 - 1 / (last + 1) ** 2))


def _repeated(stream: Iterator[str], without: set[str], times: int) -> Iterator[str]:
    return (word for word in stream if word not in without for _ in range(times))


def _shuffled(items: list[str], seed: int) -> list[str]:
    return [items[place] for place in np.random.default_rng(seed).permutation(len(items))]
