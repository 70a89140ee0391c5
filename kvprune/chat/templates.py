"""Conversations as text: what a chat template makes of messages, and how texts stand without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from kvprune.errors import KVPruneError

Message = dict[str, str]
BETWEEN = "\n\n"
"""Stands between a document and what a user says of it, where a template makes one message of them."""


def template_of(tokenizer: Any) -> str | None:
    """The chat template of a tokenizer, the default one where it has several; None if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise KVPruneError(f"the tokenizer has several chat templates and none of them is its default: {error}") from (
            error
        )


def written(tokenizer: Any, messages: Sequence[Message], template: str | None, *, answering: bool) -> str:
    """A conversation as the model reads it. answering: up to where the next answer begins.

    Without a template, turns follow one another as they are, with a line break before what a user says.

    Raises KVPruneError for messages that the template refuses.
    """
    if template is None:
        text = ""
        for message in messages:
            text += ("\n" if text and message["role"] == "user" else "") + message["content"]
        return text
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(each) for each in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=answering,
            )
        )
    except TemplateError as error:
        roles = ", ".join(each["role"] for each in messages)
        raise KVPruneError(f"the chat template refuses these messages ({roles}): {error}") from error


def around(tokenizer: Any, messages: Sequence[Message], document: str, said: str, template: str) -> tuple[str, str]:
    """A prompt in which a user says something of a document: the part that ends with the document, and the rest."""
    message = {"role": "user", "content": f"{document}{BETWEEN}{said}"}
    prompt = written(tokenizer, [*messages, message], template, answering=True)
    both = document + BETWEEN
    # What is said may quote the document, and a template may cut what is said.
    before, found, _ = prompt.rpartition(both + said.rstrip())
    if not found:
        before, found, _ = prompt.rpartition(both)
    if not found:
        raise KVPruneError("the chat template changes the document: write the prompt out yourself, and leave chat out.")
    end = len(before) + len(document)
    return prompt[:end], prompt[end:]


def rewrites_history(tokenizer: Any, template: str | None) -> bool:
    """Whether a template shows an answer otherwise than it was given once something is said after it: without what
    the model thought.
    """
    if template is None:
        return False
    said, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}
    try:
        before = written(tokenizer, [said], template, answering=True)
        after = written(tokenizer, [said, answer, said], template, answering=True)
    except KVPruneError:
        return False
    return not after.startswith(before + answer["content"])
