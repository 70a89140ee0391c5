"""Presses of kvpress that read a prompt together, in a process of their own; see `quality_real.py`.

    PYTHONPATH=bench bench/peers/.venv/bin/python bench/subjects/press_together.py  # a request a line

A request is `{"measure": "write", "job": {...}}` with the fields of `WriteJob`, and an answer has what each press wrote
and kept, or why it could not; or `{"measure": "versions", "job": ...}`. Or `{"error": why not}`.

The prompt is read once, with the hook of every press on every layer, each with a cache of its own. KVzipPress reads it
several times, in its own way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from measuring.workload import cache_argument
from subjects.pipe import serve
from subjects.worker import reasoned, versions

EPSILON = 1e-2  # of ExpectedAttentionPress, as its authors evaluate it


@dataclass(frozen=True)
class WriteJob:
    """What to read and what to write.

    model: folder. ids: of the prompt. question: how many of them come before the question; None where it is known to
    the presses. presses: names out of `PRESSES`. answers: token ids; writing ends where all of them have been written.
    ends: token ids.
    """

    model: str
    ids: list[int]
    question: int | None
    presses: list[str]
    budget: float
    max_new_tokens: int
    answers: list[list[int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


def _press(name: str, ratio: float) -> Any:
    import kvpress as k

    def snapkv() -> Any:
        return k.SnapKVPress(ratio)

    def as_ours() -> Any:
        return k.SnapKVPress(ratio, window_size=32, kernel_size=7)

    def expected() -> Any:
        return k.ExpectedAttentionPress(ratio, epsilon=EPSILON)

    made = {
        "SnapKV": snapkv,
        "SnapKV, window 32, kernel 7": as_ours,
        "PyramidKV": lambda: k.PyramidKVPress(ratio),
        "PyramidKV, window 8, kernel 7": lambda: k.PyramidKVPress(ratio, window_size=8, kernel_size=7),
        "AdaKV(SnapKV)": lambda: k.AdaKVPress(snapkv()),
        "AdaKV(SnapKV, window 32, kernel 7)": lambda: k.AdaKVPress(as_ours()),
        "CriticalAdaKV(SnapKV)": lambda: k.CriticalAdaKVPress(snapkv()),
        "CriticalAdaKV(SnapKV, window 32, kernel 7)": lambda: k.CriticalAdaKVPress(as_ours()),
        "TOVA": lambda: k.TOVAPress(ratio),
        "StreamingLLM": lambda: k.StreamingLLMPress(ratio),
        "Knorm": lambda: k.KnormPress(ratio),
        "KeyDiff": lambda: k.KeyDiffPress(ratio),
        "ExpectedAttention": expected,
        "AdaKV(ExpectedAttention)": lambda: k.AdaKVPress(expected()),
        "CriticalAdaKV(ExpectedAttention)": lambda: k.CriticalAdaKVPress(expected()),
        "KVzip": lambda: k.KVzipPress(ratio),
    }
    return made[name]()


@cache
def _model(folder: str) -> Any:
    import kvpress  # noqa: F401 - patches the attention functions, for presses whose heads differ

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)


@dataclass
class Compressed:
    """What a press left of a prompt: its cache, and the entries of each layer that are masked, or None."""

    cache: DynamicCache
    masked: list[tuple[Tensor, Tensor, Tensor] | None]

    @property
    def kept(self) -> float:
        """Tokens per KV head, the mean over layers."""
        rows = []
        for layer, masked in zip(self.cache.layers, self.masked, strict=True):
            gone = 0 if masked is None else len(masked[0]) / layer.keys.shape[1]
            rows.append(layer.keys.shape[2] - gone)
        return sum(rows) / len(rows)


def _attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def _read(model: Any, ids: Tensor, presses: list[Any]) -> tuple[list[Compressed], Tensor]:
    """What every press keeps of the prompt, and the logits after it."""
    layers = len(_attentions(model))
    read = [Compressed(DynamicCache(config=model.config), [None] * layers) for _ in presses]

    def hook(module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        index = module.layer_idx
        stock = kwargs["past_key_values"].layers[index]
        for press, mine in zip(presses, read, strict=True):
            mine.cache.update(stock.keys.clone(), stock.values.clone(), index)
            module.masked_key_indices = None
            press.forward_hook(module, inputs, {**kwargs, "past_key_values": mine.cache}, output)
            mine.masked[index], module.masked_key_indices = module.masked_key_indices, None

    for press in presses:
        press.post_init_from_model(model)
    for module in _attentions(model):
        module.rotary_emb = model.model.rotary_emb  # as `with press(model)` does it
    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in _attentions(model)]
    try:
        output = model(ids, **cache_argument(DynamicCache(config=model.config)), logits_to_keep=1)
    finally:
        for each in hooks:
            each.remove()
    return read, output.logits[:, -1]


def _read_alone(model: Any, ids: Tensor, press: Any) -> tuple[Compressed, Tensor]:
    """As the pipeline of kvpress does it."""
    held = DynamicCache(config=model.config)
    with press(model):
        output = model(ids, **cache_argument(held), logits_to_keep=1)
    masked = [getattr(module, "masked_key_indices", None) for module in _attentions(model)]
    for module in _attentions(model):
        module.masked_key_indices = None
    return Compressed(held, masked), output.logits[:, -1]


def _found(answer: list[int], written: list[int]) -> bool:
    return any(written[at : at + len(answer)] == answer for at in range(len(written) - len(answer) + 1))


def _write(model: Any, mine: Compressed, logits: Tensor, question: Tensor, seen: int, job: WriteJob) -> list[int]:
    """Greedily, at the positions that the tokens would have in a full cache."""
    written: list[int] = []
    tokens = question
    with _masking(model, mine.masked):
        while True:
            if tokens.shape[1]:
                places = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]
                output = model(tokens, **cache_argument(mine.cache), position_ids=places, logits_to_keep=1)
                logits = output.logits[:, -1]
                seen += tokens.shape[1]
            written.append(int(logits.argmax()))
            done = bool(job.answers) and all(_found(answer, written) for answer in job.answers)
            if done or written[-1] in job.ends or len(written) == job.max_new_tokens:
                return written
            tokens = torch.tensor([written[-1:]], device=question.device)


@contextmanager
def _masking(model: Any, masked: list[Any]) -> Iterator[None]:
    for module, entries in zip(_attentions(model), masked, strict=True):
        module.masked_key_indices = entries
    try:
        yield
    finally:
        for module in _attentions(model):
            module.masked_key_indices = None


@torch.inference_mode()
def write(job: WriteJob) -> dict[str, Any]:
    """`{"answers": [{"written": token ids, "kept": rows}, ...]}` of the presses of the job, or `{"error": why not}`."""
    model = _model(job.model)
    ids = torch.tensor([job.ids], device=model.device)
    presses = [_press(name, 1 - job.budget) for name in job.presses]
    before = ids if job.question is None else ids[:, : job.question]
    alone = [name == "KVzip" for name in job.presses]
    together = [press for press, apart in zip(presses, alone, strict=True) if not apart]
    shared, logits = _read(model, before, together) if together else ([], torch.empty(0))
    waiting = iter(shared)
    rest = ids[:, before.shape[1] :]

    def of(press: Any, apart: bool) -> dict[str, Any]:
        mine, first = _read_alone(model, before, press) if apart else (next(waiting), logits)
        return {"kept": mine.kept, "written": _write(model, mine, first, rest, before.shape[1], job)}

    answers = [reasoned(partial(of, press, apart)) for press, apart in zip(presses, alone, strict=True)]
    return {"answers": answers}


def ask(measure: str, job: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request, or `{"error": why not}`."""
    if measure == "versions":
        return reasoned(lambda: {"versions": versions()})
    return reasoned(lambda: write(WriteJob(**job)))


if __name__ == "__main__":
    serve(ask)
