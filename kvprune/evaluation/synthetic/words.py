"""Words to hide, to count and to name things with: endless streams of them, none twice, the same from the same seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from uuid import UUID

import numpy as np

from kvprune.demo.words import FILLER, KEY_FIRST, KEY_SECOND, VALUE_FIRST, VALUE_SECOND, VALUE_THIRD
from kvprune.errors import EvaluationError


def _bare(words: Sequence[str]) -> list[str]:
    return [word.rstrip(".:") for word in words]


_ANIMALS, _COUNTS, _PLACES = _bare(KEY_SECOND), _bare(VALUE_THIRD), _bare(FILLER["place"])
_QUALITIES = sorted({*KEY_FIRST, *FILLER["adjective"], *VALUE_FIRST})
_THINGS = sorted({*_ANIMALS, *VALUE_SECOND, *FILLER["noun"], *_PLACES})
_OTHERS = " ".join([*KEY_FIRST, *_ANIMALS, *_QUALITIES, *_bare([word for words in FILLER.values() for word in words])])
_SINGLE = sorted(word for word in VALUE_SECOND if word not in _OTHERS)
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def compounds(rng: np.random.Generator, *parts: Sequence[str], joint: str = "") -> Iterator[str]:
    """Words made of one piece of every part, in random order, until each of them has been.

    Raises EvaluationError after the last one.
    """
    available = math.prod(len(part) for part in parts)
    seen: set[int] = set()
    while len(seen) < available:
        number = int(rng.integers(available)) if available < 1 << 63 else int.from_bytes(rng.bytes(32)) % available
        if number in seen:
            continue
        seen.add(number)
        pieces = []
        for part in reversed(parts):
            number, place = divmod(number, len(part))
            pieces.append(part[place])
        yield joint.join(reversed(pieces))
    raise EvaluationError(
        f"there are only {available:,} different words such as {joint.join(part[0] for part in parts)!r}, too few for "
        'a prompt of this length: write keys="uuids" and values="uuids", fewer distractors, or a smaller length.'
    )


def numbers(rng: np.random.Generator, digits: int = 7) -> Iterator[str]:
    """4817263"""
    return compounds(rng, "123456789", *["0123456789"] * (digits - 1))


def uuids(rng: np.random.Generator) -> Iterator[str]:
    """UUIDs of version 4, assumed to be unique."""
    while True:
        yield str(UUID(bytes=rng.bytes(16), version=4))


def key_words(rng: np.random.Generator) -> Iterator[str]:
    """amber-falcon"""
    return compounds(rng, KEY_FIRST, _ANIMALS, joint="-")


def value_words(rng: np.random.Generator) -> Iterator[str]:
    """seven-copper-lantern: the number comes first, since "seven" at the end would be found in "seventeen"."""
    return compounds(rng, _COUNTS, VALUE_FIRST, VALUE_SECOND, joint="-")


def single_words(rng: np.random.Generator) -> Iterator[str]:
    """lantern: none is part of another word of a prompt, since answers are looked for as text."""
    return compounds(rng, _SINGLE)


def list_words(rng: np.random.Generator) -> Iterator[str]:
    """windy-harbour"""
    return compounds(rng, _QUALITIES, _THINGS, joint="-")


def invented(rng: np.random.Generator) -> Iterator[str]:
    """A pronounceable word of six letters without meaning: kadomi."""
    return compounds(rng, _SYLLABLES, _SYLLABLES, _SYLLABLES)
