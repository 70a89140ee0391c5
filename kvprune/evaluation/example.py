"""Examples: prompts with their right answers, and suites of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Example:
    """A prompt and its right answers.

    task, index: name it; index is its place in the task, from 0. question_at: the character of the prompt at which the
    question begins, for asking it only once the rest has been compressed; None where there is nothing to hold back.
    max_new_tokens, min_new_tokens: tokens of the answer. stop: a text that ends the answer where it is generated.
    chat: whether a chat model gets the prompt in its template. fields: more of what goes into the results, as JSON.
    """

    task: str
    index: int
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    question_at: int | None = None
    min_new_tokens: int = 0
    stop: str | None = None
    chat: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)


class Suite(Protocol):
    """Examples that belong together, and their metric."""

    name: str

    def examples(self) -> Iterator[Example]:
        """All examples, task by task, in an order that is always the same. Raises EvaluationError for bad data."""

    def score(self, example: Example, prediction: str) -> float:
        """How right a prediction is, from 0 to 1."""
