"""From the text of an example to token ids: chat template, cut in the middle, where the question begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, tensor

from kvprune.errors import EvaluationError
from kvprune.evaluation.example import Example
from kvprune.evaluation.models import LanguageModel

_LEAST = 8  # tokens of a prompt, special tokens included


@dataclass(frozen=True)
class Prompt:
    """ids: `[1, n]`. question: how many of them come before the question; None where that is not known.

    left_out: tokens cut from the middle. max_new_tokens: of the answer, no more than half of the model's window.
    """

    ids: Tensor
    question: int | None
    left_out: int
    max_new_tokens: int


@dataclass(frozen=True)
class PromptMaker:
    """How examples become prompts for one model.

    max_length: most tokens of a prompt before the chat template goes around it; longer ones lose their middle, as in
    LongBench, since instructions stand at both ends. None: what the model's window leaves beside the answer.
    chat: True for the chat template on every example that allows it; None where the tokenizer has one; False for none.

    Raises EvaluationError for a chat template that is asked for and not there.
    """

    model: LanguageModel
    max_length: int | None = None
    chat: bool | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < _LEAST:
            raise EvaluationError(f"a prompt of {self.max_length} tokens says nothing: allow at least {_LEAST}.")
        if self.chat and not self._has_template:
            raise EvaluationError(
                f"the tokenizer of {self.model.name} has no chat template: leave --chat out to give it prompts as they "
                "are."
            )

    @property
    def _has_template(self) -> bool:
        return getattr(self.model.tokenizer, "chat_template", None) is not None

    @property
    def uses_chat(self) -> bool:
        return self._has_template if self.chat is None else self.chat

    def __call__(self, example: Example) -> Prompt:
        chat = self.uses_chat and example.chat
        window = self.model.window
        new = example.max_new_tokens if window is None else min(example.max_new_tokens, max(1, window // 2))
        limit = self.max_length
        if window is not None:
            room = window - new - (len(self._ids(self._in_template("x"), False)) if chat else 0)
            limit = room if limit is None else min(limit, room)
            if limit < _LEAST:
                raise EvaluationError(
                    f"{self.model.name} has a window of {window} tokens, and {new} for the answer and the chat "
                    "template leave nothing for the prompt: leave the template out with --no-chat."
                )
        text, question, left_out = self._cut(example.prompt, example.question_at, limit)
        if chat:
            inside, text = text, self._in_template(text)
            start = text.find(inside.strip())  # templates strip whitespace around it
            question = None if question is None or start < 0 else question + start - _leading(inside)
        ids = self._ids(text, not chat)
        if not ids:
            raise EvaluationError(
                f"{example.task}, row {example.index}: the tokenizer makes no token of the prompt, which is "
                f"{example.prompt[:60]!r}."
            )
        before = None if question is None else _shared(self._ids(text[:question], not chat), ids)
        return Prompt(tensor([ids]), before, left_out, new)

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.model.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _in_template(self, text: str) -> str:
        message = [{"role": "user", "content": text}]
        rendered: str = self.model.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return rendered

    def _cut(self, text: str, question: int | None, limit: int | None) -> tuple[str, int | None, int]:
        """A text without its middle if it is longer than `limit` tokens, where its question begins, tokens lost."""
        ids = self._ids(text, True)
        if limit is None or len(ids) <= limit:
            return text, question, 0
        head, tail = limit // 2, limit - limit // 2
        left, right = self._halves(text, head, tail)
        # Joining the halves can create new tokens, and special tokens are added.
        while (over := len(self._ids(text[:left] + text[right:], True)) - limit) > 0 and tail > 1:
            tail = max(1, tail - over)
            left, right = self._halves(text, head, tail)
        if question is not None:
            question = question - (right - left) if question >= right else min(question, left)
        return text[:left] + text[right:], question, len(ids) - limit

    def _halves(self, text: str, head: int, tail: int) -> tuple[int, int]:
        """Characters at which the first `head` tokens end and the last `tail` tokens begin."""
        tokenizer: Any = self.model.tokenizer
        if getattr(tokenizer, "is_fast", False):
            # By offsets, since decoding would drop characters that are unknown to the tokenizer.
            encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
            spans = [span for span in encoded["offset_mapping"] if span[1] > span[0]]
            end = spans[min(head, len(spans)) - 1][1]
            before = len(spans) - tail - 1  # where this token ends, the space before the next one begins
            return end, max(end, spans[before][1] if before >= 0 else 0)
        ids = tokenizer(text, verbose=False)["input_ids"]
        first, last = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:head], ids[-tail:]))
        return len(first), max(len(first), len(text) - len(last))


def _leading(text: str) -> int:
    return len(text) - len(text.lstrip())


def _shared(some: list[int], ids: list[int]) -> int:
    """Length of the common prefix of two token lists: a cut in the text can change the token before it."""
    return next((n for n, (a, b) in enumerate(zip(some, ids, strict=False)) if a != b), min(len(some), len(ids)))
