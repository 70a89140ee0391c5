"""Question answering among distractors: short passages about invented people and towns, one of which has the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np

from kvprune.evaluation.synthetic import words
from kvprune.evaluation.synthetic.draft import Draft, Stream, ask
from kvprune.evaluation.synthetic.filler import scatter

_JOBS = ["baker", "carpenter", "doctor", "lawyer", "miller", "painter", "pilot", "tailor", "teacher", "weaver"]
_SUBJECTS = ["astronomy", "chess", "drawing", "fencing", "geometry", "grammar", "painting", "singing"]


@dataclass(frozen=True)
class Passage:
    """Sentences that belong together, and what can be asked about them: pairs of a question and its right answers."""

    sentences: tuple[str, ...]
    questions: tuple[tuple[str, tuple[str, ...]], ...]


def qa(rng: np.random.Generator, *, depth: float) -> Draft:
    """A question about the passage at that depth, in percent. The names in a passage occur in no other."""
    passage_rng, question_rng = rng.spawn(2)
    passages = _passages(passage_rng)
    asked = next(passages)
    question, answers = asked.questions[question_rng.integers(len(asked.questions))]
    sentences = Stream(
        (number, sentence) for number, passage in enumerate(passages) for sentence in passage.sentences
    )  # one by one, so that a prompt is filled to the sentence

    def body(count: int) -> str:
        others = [
            " ".join(sentence for _, sentence in group)
            for _, group in groupby(sentences.first(count), key=itemgetter(0))
        ]
        scattered = scatter(others, [" ".join(asked.sentences)], [depth])
        return "\n\n".join(f"Passage {number}: {passage}" for number, passage in enumerate(scattered, 1))

    return Draft(
        "Read the following passages carefully. One of them answers the question at the end.",
        body,
        ask(f"{question} Reply with the name alone."),
        answers,
        fields={"depth": depth},
    )


def _passages(rng: np.random.Generator) -> Iterator[Passage]:
    """About people and towns, at random."""
    name_rng, rng = rng.spawn(2)
    names = map(str.capitalize, words.invented(name_rng))
    while True:
        yield _person(rng, names) if rng.random() < 0.5 else _town(rng, names)


def _person(rng: np.random.Generator, names: Iterator[str]) -> Passage:
    name, teacher = _full_name(names), _full_name(names)
    birthplace, home = next(names), next(names)
    subject, job = rng.choice(_SUBJECTS), rng.choice(_JOBS)
    return Passage(
        (
            f"{name} was born in {birthplace} in {rng.integers(1850, 1990)}.",
            f"As a child, {name} learned {subject} from {teacher}, who lived next door.",
            f"After many journeys {name} settled in {home} and works there as a {job}.",
        ),
        (
            (f"Where was {name} born?", (birthplace,)),
            (f"Who taught {name} {subject}?", (teacher, teacher.split()[1])),
            (f"Where does {name} work as a {job}?", (home,)),
        ),
    )


def _town(rng: np.random.Generator, names: Iterator[str]) -> Passage:
    town, river, port = next(names), next(names), next(names)
    founder = _full_name(names)
    return Passage(
        (
            f"{town} is a town of {rng.integers(2, 90)} thousand people on the river {river}.",
            f"It was founded in {rng.integers(1100, 1700)} by {founder}, whose statue stands at the gate.",
            f"An old road leads from {town} to the port of {port}.",
        ),
        (
            (f"On which river does {town} lie?", (river,)),
            (f"Who founded {town}?", (founder, founder.split()[1])),
            (f"To which port does a road lead from {town}?", (port,)),
        ),
    )


def _full_name(names: Iterator[str]) -> str:
    return f"{next(names)} {next(names)}"
