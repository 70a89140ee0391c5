"""The suite: its tasks, lengths and number of examples, and the score of an answer."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kvprune.demo.words import TOKEN_ID
from kvprune.errors import EvaluationError
from kvprune.evaluation.example import Example
from kvprune.evaluation.synthetic.counting import common_words, frequent_words
from kvprune.evaluation.synthetic.draft import Draft, most_that_fit
from kvprune.evaluation.synthetic.filler import Filler
from kvprune.evaluation.synthetic.needles import KEYS, NOTES, VALUES, Language, needles, prose
from kvprune.evaluation.synthetic.questions import qa
from kvprune.evaluation.synthetic.tracing import variable_tracking

FAMILIES = (
    "needle_single",
    "needle_multikey",
    "needle_multivalue",
    "needle_multiquery",
    "variable_tracking",
    "common_words",
    "frequent_words",
    "qa",
)
NOTES_FAMILIES = ("needle_single", "needle_multikey")
"""What can be asked in the language of the embedded model."""

_DEPTHS = 11  # as many as examples are spread over, unless they are chosen: 0, 10, ... 100 %
_SAMPLE = 64  # pieces of filler of the prompt on which the tokenizer is tried


@dataclass
class Synthetic:
    """Generated examples of the families of RULER (arXiv 2404.06654), with prompts in our own words.

    A prompt has as much filler as fits `length` tokens in whole sentences; special tokens count, a chat template and
    the answer come on top. The same settings give the same prompts on every machine, and an example asks the same at
    every length.

    tokenizer: counts the tokens; a tokenizer of transformers. tasks: of FAMILIES; None for all that the style has.
    lengths: tokens of a prompt, one number or several. count: examples of every task and length. seed: an int >= 0.
    depths: where in the text the answer stands, in percent, taken in turn; None for up to 11 of them, evenly from 0 to
    100. They apply to needle_single, needle_multikey and qa; what asks for several places has them at random.
    filler: a text file in UTF-8 to fill prompts with; None for generated sentences.
    style: "prose", "notes" (the language of the embedded model, for the tasks of NOTES_FAMILIES), or "auto": notes
    for the embedded model's tokenizer, prose for all others.
    keys, values: "words", "numbers" or "uuids": what needles in prose are made of; values also a single "word".
    digits: of values that are numbers; most tokenizers make a token of each, or of two or three.
    distractors: how many needles of needle_multikey are not asked; "all" for a text of nothing else.
    needles: how many values needle_multivalue asks for, and how many keys needle_multiquery.
    chains, hops: of variable_tracking: hops + 1 variables have the value of a chain.

    Raises EvaluationError for settings that have no meaning, and from `examples` for lengths that are too short.
    """

    tokenizer: Any
    tasks: str | Sequence[str] | None = None
    lengths: int | Sequence[int] = 4096
    count: int = 20
    seed: int = 0
    depths: float | Sequence[float] | None = None
    filler: str | Path | None = None
    style: Literal["auto", "prose", "notes"] = "auto"
    keys: str = "words"
    values: str = "numbers"
    digits: int = 7
    distractors: int | Literal["all"] = 16
    needles: int = 4
    chains: int = 2
    hops: int = 4
    name: str = field(default="synthetic", init=False)

    def __post_init__(self) -> None:
        if self.style not in ("auto", "prose", "notes"):
            raise EvaluationError(f'there is no style {self.style!r}: write "auto", "prose" or "notes".')
        for task in self._tasks:
            self._check_task(task)
        for kind, known in ((self.keys, KEYS), (self.values, VALUES)):
            if kind not in known:
                raise EvaluationError(f"needles cannot be made of {kind!r}: choose from {', '.join(known)}.")
        for name, least in (("count", 1), ("seed", 0), ("digits", 1), ("needles", 1), ("chains", 1), ("hops", 1)):
            self._check_number(name, getattr(self, name), least)
        if self.distractors != "all":
            self._check_number("distractors", self.distractors, 0)
        for length in self._lengths:
            self._check_number("lengths", length, 1)
        for depth in self._depths:
            if not isinstance(depth, int | float) or not 0 <= depth <= 100:
                raise EvaluationError(f"there is no depth of {depth!r} %: depths go from 0 to 100.")
        if not (self._tasks and self._lengths and self._depths):
            raise EvaluationError("there is nothing to generate: give at least one task, one length and one depth.")
        self._check_vocabulary()

    def examples(self) -> Iterator[Example]:
        """Task by task, and in a task length by length. Raises EvaluationError for a length that is too short."""
        for task in self._tasks:
            for length in self._lengths:
                self._check_room(task, length)
        for task in self._tasks:
            for at, length in enumerate(self._lengths):
                for number in range(self.count):
                    yield self._example(task, length, number, index=at * self.count + number)

    def score(self, example: Example, prediction: str) -> float:
        """The share of the answers that stand in the prediction; for qa, whether any does. Case does not count."""
        found = [answer.casefold() in prediction.casefold() for answer in example.answers]
        return float(any(found)) if example.task == "qa" else sum(found) / len(found)

    def _example(self, task: str, length: int, number: int, index: int) -> Example:
        draft = self._draft(task, length, number)
        pieces = most_that_fit(lambda pieces: self._tokens(draft.prompt(pieces)), length, draft.fewest)
        prompt = draft.prompt(pieces)
        answer = self._tokens(" " + ", ".join(draft.answers))
        return Example(
            task,
            index,
            prompt,
            draft.answers,
            # The embedded model writes the answer alone; others number lists, or begin with a few words.
            max_new_tokens=answer if self._in_notes else 2 * answer + 16,
            question_at=len(prompt) - len(draft.question),
            chat=not self._in_notes,
            fields={"length": length, **draft.fields},
        )

    def _draft(self, task: str, length: int, number: int) -> Draft:
        rng = np.random.default_rng([self.seed, number, *task.encode()])  # an example depends on no other one
        depth = float(self._depths[number % len(self._depths)])
        match task:
            case "needle_single":
                return needles(rng, self._filler, self._language, depth=depth)
            case "needle_multikey":
                return needles(rng, self._filler, self._language, depth=depth, distractors=self.distractors)
            case "needle_multivalue":
                return needles(rng, self._filler, self._language, values_each=self.needles)
            case "needle_multiquery":
                return needles(rng, self._filler, self._language, asked=self.needles)
            case "variable_tracking":
                return variable_tracking(rng, self._filler, chains=self.chains, hops=self.hops)
            case "common_words":
                return common_words(rng, length)
            case "frequent_words":
                return frequent_words(rng)
            case _:
                return qa(rng, depth=depth)

    @cached_property
    def _in_notes(self) -> bool:
        if self.style == "auto":
            return len(self.tokenizer) == len(TOKEN_ID) and self.tokenizer.get_vocab() == TOKEN_ID
        return self.style == "notes"

    @cached_property
    def _language(self) -> Language:
        return NOTES if self._in_notes else prose(self.keys, self.values, self.digits)

    @cached_property
    def _filler(self) -> Filler:
        return (
            Filler.markov(capitals=not self._in_notes) if self.filler is None else Filler.from_file(Path(self.filler))
        )

    @cached_property
    def _tasks(self) -> tuple[str, ...]:
        if self.tasks is None:
            return NOTES_FAMILIES if self._in_notes else FAMILIES
        return (self.tasks,) if isinstance(self.tasks, str) else tuple(dict.fromkeys(self.tasks))

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.lengths)) if isinstance(self.lengths, Sequence) else (self.lengths,)

    @cached_property
    def _depths(self) -> tuple[float, ...]:
        if self.depths is None:
            return tuple(np.linspace(0, 100, min(self.count, _DEPTHS)).tolist()) if self.count > 1 else (50.0,)
        return tuple(self.depths) if isinstance(self.depths, Sequence) else (self.depths,)

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def _check_task(self, task: str) -> None:
        if task not in FAMILIES:
            close = difflib.get_close_matches(str(task), FAMILIES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise EvaluationError(f"there is no synthetic task {task!r}.{hint} Known tasks: {', '.join(FAMILIES)}.")
        if self._in_notes and task not in NOTES_FAMILIES:
            raise EvaluationError(
                f"{task} cannot be asked in the language of the embedded model: choose from "
                f'{", ".join(NOTES_FAMILIES)}, or write style="prose" for a model that reads English.'
            )

    def _check_number(self, name: str, value: Any, least: int) -> None:
        if not isinstance(value, int) or value < least:
            raise EvaluationError(f"{name} is {value!r}: write a whole number of at least {least}.")

    def _check_vocabulary(self) -> None:
        """The tokenizer must know most of a prompt, and of an answer."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        draft = self._draft(self._tasks[0], length=1, number=0)
        for text in (draft.prompt(_SAMPLE), " ".join(draft.answers)):
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if unknown is not None and 2 * ids.count(unknown) > len(ids):
                other = "prose" if self._in_notes else "notes"
                raise EvaluationError(
                    f"most words of the prompts or the answers are unknown to the tokenizer: write style={other!r}"
                    + ("." if self.filler is None else ", or leave filler out.")
                )

    def _check_room(self, task: str, length: int) -> None:
        drafts = (self._draft(task, length, number) for number in range(self.count))
        least = max(self._tokens(draft.prompt(draft.fewest)) for draft in drafts)
        if least > length:
            raise EvaluationError(
                f"{task} does not fit {length:,} tokens: write a length of at least {least:,}"
                + (", or fewer distractors." if task == "needle_multikey" else ".")
            )
