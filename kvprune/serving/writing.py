"""One answer while it is written: tokens become text, strings end it, and chance has a generator of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

_COLDEST = 1e-5  # logits divided by less lose the digits that noise is made of


class Text:
    """Tokens as text, piece by piece: what `add` and `end` return makes, joined, the answer up to a stop string.

    A piece never ends within a character, nor with what may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._start = self._read = 0  # the tokens between these are text already, and decode what follows them rightly
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain with one more token, which may be none."""
        self._ids.append(token)
        before, now = self._decoded(self._read), self._decoded(len(self._ids))
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._cut(now[len(before) :])

    def end(self) -> str:
        """What is still held back when no token follows."""
        if self.stopped:
            return ""
        rest = self._decoded(len(self._ids))[len(self._decoded(self._read)) :]
        self._read = len(self._ids)
        piece = self._cut(rest)
        held, self._held = ("" if self.stopped else self._held), ""
        return piece + held

    def _decoded(self, stop: int) -> str:
        return self._tokenizer.decode(self._ids[self._start : stop], skip_special_tokens=True)

    def _cut(self, piece: str) -> str:
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        held = next(
            (size for size in range(min(longest, len(text)), 0, -1) if self._begins(text[len(text) - size :])), 0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _begins(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stop)


class Chance(LogitsProcessor):
    """Noise by which the likeliest token is a sample: the largest of logits plus Gumbel noise has their softmax.

    `generate()` draws from the one generator of the process; of several requests at once, each has its own here, and
    the same seed gives the same answer whoever else is asking.
    """

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand(scores.shape, generator=self._generator, dtype=torch.float64).clamp_(min=1e-300)
        return scores + -torch.log(-torch.log(uniform)).to(scores)


def processors(temperature: float, top_p: float, seed: int | None) -> list[Any]:
    """What makes greedy `generate()` sample; nothing at temperature 0, or next to it."""
    if temperature < _COLDEST:
        return []
    nucleus = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return [TemperatureLogitsWarper(float(temperature)), *nucleus, Chance(seed)]
