"""Answers as text while they are generated, of one sequence or of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Pieces(BaseStreamer):
    """A streamer of `model.generate` that hands on the text of every sequence as it comes.

    tokenizer: of the model. ends: ids that end a sequence. write: gets the number of a sequence and a piece of text.
    began: called when the prompt has been read and the first token is there, before it is handed on.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: frozenset[int],
        write: Callable[[int, str], None] | None = None,
        began: Callable[[], None] | None = None,
    ) -> None:
        self._tokenizer, self._ends, self._write, self._began = tokenizer, ends, write, began
        self.tokens: list[list[int]] | None = None
        """Those of each sequence so far, the one that ends it included; None until the first are there."""
        self._written: list[str] = []
        self._prompt_is_past = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_is_past:
            self._prompt_is_past = True
            return
        new = (value[:, None] if value.ndim == 1 else value).tolist()  # several of a sequence where they were drafted
        if self.tokens is None:
            if self._began is not None:
                self._began()
            self.tokens, self._written = [[] for _ in new], [""] * len(new)
        for number, row in enumerate(new):
            own = self.tokens[number]
            if own and own[-1] in self._ends:
                continue  # the others of the batch go on
            own += row
            if self._write is not None:
                self._hand_on(number, whole=False)

    def end(self) -> None:
        for number in range(len(self._written) if self._write is not None else 0):
            self._hand_on(number, whole=True)

    def _hand_on(self, number: int, *, whole: bool) -> None:
        assert self.tokens is not None and self._write is not None  # noqa: PT018 - `put` saw to both
        text = shown(self._tokenizer, self.tokens[number])
        if not whole and text.endswith("\ufffd"):
            return  # a character whose other bytes are to come
        new = text[len(self._written[number]) :]
        if new:
            self._written[number] = text
            self._write(number, new)


def shown(tokenizer: Any, ids: list[int] | Tensor) -> str:
    """The text of generated tokens, without special ones."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def ends_of(model: Any) -> frozenset[int]:
    """The ids that end what a model generates."""
    known = model.generation_config.eos_token_id
    return frozenset(() if known is None else torch.as_tensor(known).flatten().tolist())


def encode(tokenizer: Any, text: str, *, special: bool) -> Tensor:
    """Ids `[n]` on the CPU. special: whether to add what the tokenizer puts around a text, such as what begins it."""
    if not text:
        return torch.empty(0, dtype=torch.int64)
    ids: Tensor = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
    return ids[0].long()
