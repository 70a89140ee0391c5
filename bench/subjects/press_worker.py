"""The presses of kvpress answer questions, in a process of their own: kvpress needs another version of transformers.

    PYTHONPATH=bench bench/peers/.venv/bin/python bench/subjects/press_worker.py  # a request a line

A request is `{"measure": "answer", "job": {...}}` with the fields of `PressJob`, and an answer has those of
`asking.Answered`; or `{"measure": "versions", "job": {...}}` with the fields of `Presses`, answered by the versions of
packages and the settings of presses. Or `{"error": why not}`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from measuring.asking import Asked, Subject, answer, merge
from measuring.workload import Session
from subjects.pipe import serve
from subjects.worker import reasoned, versions

EAGER = ("ObservedAttentionPress",)  # they read the matrix of probabilities, which no other attention returns
EAGER_BATCH = 1  # prompts at a time: those matrices are what fills memory


@dataclass(frozen=True)
class PressJob:
    """A press and the questions for it.

    model: folder of the model. press: name of a class of kvpress, at its defaults but for the compression ratio, which
    is 1 - budget. asked: with token ids, so that both environments read the same prompts.
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


def _answer(job: PressJob) -> dict[str, Any]:
    import kvpress

    model = _model(job.model, "eager" if job.press in EAGER else "sdpa")
    batch_size = EAGER_BATCH if job.press in EAGER else job.batch_size
    press = getattr(kvpress, job.press)(compression_ratio=1 - job.budget)
    # As kvpress' pipeline does it: hooks while the prompt is read and none later, positions as if nothing were gone.
    subject = Subject(
        lambda: Session(DynamicCache(config=model.config), prefilling=press(model), logical_positions=True)
    )
    parts = [answer(model, subject, each, known=job.known, batch_size=batch_size) for each in job.asked]
    return asdict(merge(parts))


def _defaults(press: str) -> dict[str, Any]:
    import kvpress

    return {field.name: field.default for field in fields(getattr(kvpress, press)) if field.name != "compression_ratio"}


def ask(measure: str, job: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request, or `{"error": why not}`."""
    if measure == "versions":
        return reasoned(lambda: {"versions": versions(), "defaults": {name: _defaults(name) for name in job["names"]}})
    asked = [Asked(**each) for each in job.pop("asked")]
    return reasoned(lambda: _answer(PressJob(**job, asked=asked)))


if __name__ == "__main__":
    serve(ask)
