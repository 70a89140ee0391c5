"""`Transcript`: what a cache has read, as whoever asks on needs to know it. It is forked and saved with the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprune.state import Saved, State

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, eq=False)
class Transcript:
    """A text that one sequence of a cache has read, and where it is in a conversation.

    ids: of all tokens that are in the cache, LongTensor `[n]` on the CPU. text: what they were made of.
    template: the chat template that wrote it; None for a text as it is.
    messages: what was said, in turns that are complete, each with a "role" and its "content".
    document: what was read of a message of the user that is still to be completed; None if there is none.
    """

    ids: Tensor
    text: str
    template: str | None = None
    messages: tuple[dict[str, str], ...] = ()
    document: str | None = None

    def state(self) -> State:
        facts = {
            "text": self.text,
            "template": self.template,
            "messages": [dict(each) for each in self.messages],
            "document": self.document,
        }
        return State(facts, {"ids": self.ids})

    @classmethod
    def restored(cls, saved: Saved, seen: int) -> Transcript:
        """seen: tokens of the cache. Raises CacheError."""
        messages = saved.fact("messages", list)
        for each in messages:
            if not _is_message(each):
                raise saved.refused("holds messages that are none")
        return cls(
            saved.tensor("ids", (seen,), torch.int64),
            saved.fact("text", str),
            saved.fact("template", str, type(None)),
            tuple(messages),
            saved.fact("document", str, type(None)),
        )


def _is_message(given: Any) -> bool:
    return (
        isinstance(given, dict)
        and given.keys() == {"role", "content"}
        and given["role"] in ROLES
        and isinstance(given["content"], str)
    )
