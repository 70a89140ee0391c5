"""Filler text, sentence by sentence, and inserting needles into it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np

from kvprune.demo.task import RecallGenerator, decode
from kvprune.errors import EvaluationError

_SENTENCES = 4000  # of Markov text to draw from, since walking the chain for every sentence is slow
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n\s*\n|<\|endoftext\|>")  # noqa: RUF001


@dataclass(frozen=True)
class Filler:
    """Sentences to fill prompts with. running: they are a continuous text, read in order from a random place."""

    sentences: tuple[str, ...]
    running: bool = False

    @classmethod
    def markov(cls, *, capitals: bool) -> Filler:
        """The language that the embedded model was trained on; with capitals it is prose."""
        return cls(tuple(text[0].upper() + text[1:] for text in _markov()) if capitals else _markov())

    @classmethod
    def from_file(cls, path: Path) -> Filler:
        """The sentences of a text file in UTF-8. Raises EvaluationError where there are none."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"cannot read the filler {path}: {error}") from error
        sentences = tuple(" ".join(piece.split()) for piece in _SENTENCE_END.split(text) if piece.strip())
        if not sentences:
            raise EvaluationError(f"the filler {path} is empty: name a file with text in it, or leave filler out.")
        return cls(sentences, running=True)

    def stream(self, rng: np.random.Generator) -> Iterator[str]:
        """An infinite iterator over sentences."""
        total = len(self.sentences)
        start = int(rng.integers(total)) if self.running else 0
        for number in count(start):
            yield self.sentences[number % total if self.running else int(rng.integers(total))]


@cache
def _markov() -> tuple[str, ...]:
    generator = RecallGenerator(seed=0)
    return tuple(decode(generator.sentence()) for _ in range(_SENTENCES))


def scatter(pieces: Sequence[str], hidden: Sequence[str], depths: Sequence[float]) -> list[str]:
    """The pieces of a text with every hidden one at its depth, in percent of the characters of the text.

    It goes between two pieces, where that is nearest to the depth. Those of equal depth keep their order.
    """
    ends = np.cumsum([0, *(len(piece) + 1 for piece in pieces)])
    slots = [int(np.abs(ends - depth / 100 * ends[-1]).argmin()) for depth in depths]
    text: list[str] = []
    used = 0
    for number in sorted(range(len(hidden)), key=lambda number: depths[number]):
        text += pieces[used : slots[number]]
        text.append(hidden[number])
        used = slots[number]
    return [*text, *pieces[used:]]
