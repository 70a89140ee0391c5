"""Needles in a haystack: statements "the code of this is that" hidden in a text, and a question about some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np

from kvprune.demo.words import KEY_FIRST, KEY_SECOND, VALUE_FIRST, VALUE_SECOND, VALUE_THIRD
from kvprune.evaluation.synthetic import words
from kvprune.evaluation.synthetic.draft import Draft, Stream, ask
from kvprune.evaluation.synthetic.filler import Filler, scatter

Draw = Callable[[np.random.Generator], Iterator[str]]
KEYS: dict[str, Draw] = {"words": words.key_words, "numbers": words.numbers, "uuids": words.uuids}
VALUES: dict[str, Draw] = {
    "words": words.value_words, "word": words.single_words, "numbers": words.numbers, "uuids": words.uuids,
}  # fmt: skip


@dataclass(frozen=True)
class Language:
    """How needles are written.

    needle: with {key} and {value}. gap: before the text and after it. question: from the keys that are asked, and how
    many values each of them has.
    """

    keys: Draw
    values: Draw
    opening: str
    needle: str
    gap: str
    question: Callable[[list[str], int], str]


def prose(keys: str, values: str, digits: int = 7) -> Language:
    """English. keys, values: what they are, of KEYS and VALUES. digits: of values that are numbers."""
    return Language(
        KEYS[keys],
        partial(words.numbers, digits=digits) if values == "numbers" else VALUES[values],
        opening="Read the following text carefully. It mentions codes, and you will be asked about them at the end.",
        needle="The code of {key} is {value}.",
        gap="\n\n",
        question=_ask,
    )


def _ask(keys: list[str], values_each: int) -> str:
    if len(keys) > 1:
        asked = f"What are the codes of {', '.join(keys[:-1])} and {keys[-1]}? Reply with the {len(keys)} codes alone."
    elif values_each > 1:
        asked = f"The text gives {values_each} codes of {keys[0]}. What are they? Reply with the codes alone."
    else:
        asked = f"What is the code of {keys[0]}? Reply with the code alone."
    return ask(asked)


NOTES = Language(
    lambda rng: words.compounds(rng, KEY_FIRST, KEY_SECOND, joint=" "),
    lambda rng: words.compounds(rng, VALUE_FIRST, VALUE_SECOND, VALUE_THIRD, joint=" "),
    opening="",
    needle="note {key} {value}",  # the colon and the full stop are part of their words
    gap=" ",
    question=lambda keys, values_each: f"question {keys[0]}",
)
"""The language of the embedded model, see kvprune/demo/task.py; it has no word for more than one value or key."""


def needles(
    rng: np.random.Generator,
    filler: Filler,
    language: Language,
    *,
    asked: int = 1,
    values_each: int = 1,
    distractors: int | Literal["all"] = 0,
    depth: float | None = None,
) -> Draft:
    """`asked` keys with `values_each` values each, all of which are the answer, and distractors with other keys.

    depth: of the needle that is asked, in percent of everything around it; None for random depths. distractors: "all"
    for a text that is made of them.
    """
    key_rng, value_rng, depth_rng, filler_rng = rng.spawn(4)
    keys, values = language.keys(key_rng), language.values(value_rng)
    asked_keys = list(islice(keys, asked))
    answers = list(islice(values, asked * values_each))
    hidden = [
        language.needle.format(key=asked_keys[number // values_each], value=value)
        for number, value in enumerate(answers)
    ]
    depths = (100 * depth_rng.random(len(hidden))).tolist() if depth is None else [depth] * len(hidden)

    # Both streams never repeat, so no distractor has a key or a value that is asked.
    distracting = (language.needle.format(key=key, value=value) for key, value in zip(keys, values, strict=False))
    scattered = [] if distractors == "all" else list(islice(distracting, distractors))
    scattered_depths = (100 * depth_rng.random(len(scattered))).tolist()
    pieces = Stream(distracting if distractors == "all" else filler.stream(filler_rng))

    def body(count: int) -> str:
        haystack = scatter(pieces.first(count), scattered, scattered_depths)
        return " ".join(scatter(haystack, hidden, depths))

    fields = {"depths": [round(depth, 1) for depth in sorted(depths)]} if depth is None else {"depth": depth}
    question = language.question(asked_keys, values_each)
    return Draft(language.opening, body, question, tuple(answers), gap=language.gap, fields=fields)
