"""The presses of kvpress answer questions, in a process of their own: kvpress needs another version of transformers.

    PYTHONPATH=bench bench/peers/.venv/bin/python bench/subjects/press_worker.py  # a request a line

A request is `{"measure": "answer", "job": {...}}` with the fields of `PressJob`, and an answer has those of
`asking.Answered`; or `{"measure": "versions", "job": {...}}` with the fields of `Presses`, answered by the versions of
packages and the settings of presses. Or `{"error": why not}`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from itertools import chain
from typing import Any

from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from measuring.asking import Asked, Subject, answer, merge, stock_rows
from measuring.workload import Session
from subjects.pipe import serve
from subjects.worker import reasoned, versions

EAGER = ("ObservedAttentionPress",)  # they read the matrix of probabilities, which no other attention returns
EAGER_BATCH = 1  # prompts at a time: those matrices are what fills memory
# They mask entries of heads instead of dropping rows, for as many prompts as have been read: no copies of one.
MASKING = ("AdaKVPress", "CriticalAdaKVPress", "KVzipPress")


@dataclass(frozen=True)
class PressJob:
    """A press and the questions for it.

    model: folder of the model. press: name of a class of kvpress, at its defaults but for the compression ratio, which
    is 1 - budget; "AdaKVPress(SnapKVPress)" is one that takes the scores of another. asked: with token ids, so that
    both environments read the same prompts.
    """

    model: str
    press: str
    budget: float
    known: bool
    asked: list[Asked]
    batch_size: int = 8


@dataclass(frozen=True)
class Presses:
    """Names of the presses whose defaults to report."""

    names: list[str]


@cache
def _model(folder: str, attention: str) -> Any:
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


def _press(name: str, ratio: float) -> Any:
    import kvpress

    outer, inner = _parts(name)
    press = getattr(kvpress, outer)
    return press(_press(inner, ratio)) if inner else press(compression_ratio=ratio)


def _parts(name: str) -> tuple[str, str]:
    """ "AdaKVPress(SnapKVPress)" as its two names; the second is empty for a press alone."""
    outer, _, inner = name.partition("(")
    return outer, inner.removesuffix(")")


def _answer(job: PressJob) -> dict[str, Any]:
    outer, _ = _parts(job.press)
    model = _model(job.model, "eager" if outer in EAGER else "sdpa")
    one_by_one = outer in MASKING
    batch_size = 1 if one_by_one else EAGER_BATCH if outer in EAGER else job.batch_size
    press = _press(job.press, 1 - job.budget)
    # As kvpress' pipeline does it: hooks while the prompt is read and none later, positions as if nothing were gone.
    subject = Subject(
        lambda: Session(DynamicCache(config=model.config), prefilling=press(model), logical_positions=True),
        lambda cache: stock_rows(cache) - _masked(model),
    )
    asked = list(chain(*map(_apart, job.asked))) if one_by_one else job.asked
    parts = [answer(model, subject, each, known=job.known, batch_size=batch_size) for each in asked]
    return asdict(merge(parts))


def _masked(model: Any) -> float:
    """Tokens per KV head that are in the cache and not attended to, the mean over layers."""
    masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    heads = model.config.num_key_value_heads
    return sum(len(mask[0]) / heads for mask in masks if mask is not None) / len(masks)


def _apart(asked: Asked) -> list[Asked]:
    """Every question with the document to itself."""
    return [
        Asked(asked.document, [question], [right])
        for question, right in zip(asked.questions, asked.answers, strict=True)
    ]


def _defaults(press: str) -> dict[str, Any]:
    """The settings of a press, and of the one whose scores it takes."""
    import kvpress

    names = [name for name in _parts(press) if name]
    found = [getattr(kvpress, name) for name in names]
    return {
        field.name: field.default
        for each in reversed(found)
        for field in (fields(each) if is_dataclass(each) else ())
        if field.name not in ("compression_ratio", "press")
    }


def ask(measure: str, job: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request, or `{"error": why not}`."""
    if measure == "versions":
        return reasoned(lambda: {"versions": versions(), "defaults": {name: _defaults(name) for name in job["names"]}})
    asked = [Asked(**each) for each in job.pop("asked")]
    return reasoned(lambda: _answer(PressJob(**job, asked=asked)))


if __name__ == "__main__":
    serve(ask)
