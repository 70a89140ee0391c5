"""What a request says, as tokens: a prefix that is read and compressed by itself, which may be empty, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from kvprune.errors import KVPruneError


@dataclass(frozen=True)
class Prompt:
    """Token ids in two parts, which follow one another as they are."""

    prefix: tuple[int, ...]
    rest: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prefix) + len(self.rest)


def of_messages(tokenizer: Any, messages: Sequence[dict[str, str]], prefix: int) -> Prompt:
    """Messages in the tokenizer's chat template, of which the first `prefix` are read by themselves.

    Raises KVPruneError where there is no template, where it does not take these messages, and where what it makes of
    the first ones is not what it makes of all of them begins with.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise KVPruneError("this model has no chat template: use /v1/completions, or start with --chat-template FILE.")
    if not prefix < len(messages):
        raise KVPruneError(f"prefix is {prefix} of {len(messages)} messages: leave at least the last one out of it.")
    whole = _templated(tokenizer, messages, add_generation_prompt=True)
    if prefix == 0:
        return _split(tokenizer, "", whole, special=False)
    head = _templated(tokenizer, messages[:prefix], add_generation_prompt=False)
    if not whole.startswith(head):
        raise KVPruneError(
            f"the chat template writes the first {prefix} messages otherwise when others follow: choose another "
            "prefix, or 0."
        )
    return _split(tokenizer, head, whole[len(head) :], special=False)


def of_text(tokenizer: Any, text: str, prefix: int) -> Prompt:
    """A text, of which the first `prefix` characters are read by themselves."""
    if not prefix < max(len(text), 1):
        raise KVPruneError(f"prefix is {prefix} of {len(text)} characters: leave at least the question out of it.")
    return _split(tokenizer, text[:prefix], text[prefix:], special=True)


def _templated(tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise KVPruneError(f"the chat template of this model refuses these messages: {error}") from error


def _split(tokenizer: Any, head: str, rest: str, *, special: bool) -> Prompt:
    """special: whether to add what the tokenizer puts around a text, such as a token that begins it."""
    prefix = tokenizer(head, add_special_tokens=special)["input_ids"] if head else []
    ids = tokenizer(rest, add_special_tokens=special and not head)["input_ids"]
    if not ids:
        raise KVPruneError("the prompt has no tokens: give some text.")
    return Prompt(tuple(prefix), tuple(ids))
