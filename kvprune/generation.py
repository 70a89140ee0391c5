"""Generating from one prompt as a person watches: text as it comes, and what it cost in seconds and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, TextStreamer
from transformers.cache_utils import Cache

from kvprune.cache import stock
from kvprune.cache.models import cache_argument
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.cache.report import human_bytes
from kvprune.errors import KVPruneError


@dataclass(frozen=True)
class Generated:
    """The answer to one prompt. prefill_seconds: until the first token is there. Bytes: of the cache at the end."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    nbytes: int
    dense_nbytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there was no other."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else None

    def __str__(self) -> str:
        speed = "" if self.tokens_per_second is None else f" at {self.tokens_per_second:.1f} tokens/s"
        held = f"cache {human_bytes(self.nbytes)}"
        if self.dense_nbytes > self.nbytes:
            saved = 1 - self.nbytes / self.dense_nbytes
            held += f" instead of {human_bytes(self.dense_nbytes)}, {saved:.0%} saved"
        return (
            f"{self.prompt_tokens:,} prompt tokens in {self.prefill_seconds:.1f} s, "
            f"{self.new_tokens:,} new{speed}; {held}"
        )


def prompt_inputs(tokenizer: Any, device: torch.device, text: str, chat: bool | None) -> dict[str, Tensor]:
    """A text as the model takes it: as what a user says where there is a chat template, unless chat is False.

    Raises KVPruneError for a text without tokens, and where a template is asked for and there is none.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise KVPruneError("the tokenizer has no chat template: leave --chat out to give it the text as it is.")
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    if not text.strip():
        raise KVPruneError("the prompt holds no text: give one of at least one token.")
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise KVPruneError("the prompt holds no text: give one of at least one token.")
    return {name: tensor.to(device) for name, tensor in inputs.items() if name != "token_type_ids"}


class _Clock(TextStreamer):
    """Hands on text as it comes, and notes when the first token was there."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self.started = time.perf_counter()
        self.first: float | None = None
        self._calls = 0

    def put(self, value: Tensor) -> None:
        self._calls += 1  # the prompt comes first
        if self._calls == 2:
            self.first = time.perf_counter()
        if self._write is not None:
            super().put(value)

    def end(self) -> None:
        if self._write is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._write is not None and text:
            self._write(text)


def generate(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    cache: Cache,
    *,
    write: Callable[[str], None] | None = None,
    **settings: Any,
) -> Generated:
    """Generate from one prompt, and measure. write: gets the text as it comes. settings: of `model.generate`."""
    clock = _Clock(tokenizer, write)
    with torch.inference_mode():
        output = model.generate(**inputs, **cache_argument(cache), streamer=clock, **settings)
    done = time.perf_counter()
    prompt_tokens = inputs["input_ids"].shape[1]
    first = done if clock.first is None else clock.first
    if isinstance(cache, PrunedCache):
        held = cache.nbytes, cache.dense_nbytes
    else:
        held = sum(map(stock.nbytes, cache.layers)), sum(map(stock.dense_nbytes, cache.layers))
    return Generated(
        tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True),
        prompt_tokens,
        output.shape[1] - prompt_tokens,
        first - clock.started,
        done - first,
        *held,
    )


def full_cache(model: Any) -> DynamicCache:
    """What `generate` takes by itself, to compare with."""
    return DynamicCache(config=model.config)


def sampling(temperature: float, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """Settings of `model.generate`: greedy at temperature 0, which top_p and top_k have no part in."""
    if temperature == 0:
        if top_p is not None or top_k is not None:
            raise KVPruneError(
                "--top-p and --top-k choose among likely tokens: give a --temperature above 0 with them."
            )
        return {"do_sample": False}
    chosen = {"top_p": top_p, "top_k": top_k}
    return {"do_sample": True, "temperature": temperature} | {k: v for k, v in chosen.items() if v is not None}
