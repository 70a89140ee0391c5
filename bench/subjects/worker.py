"""Contenders in a process of their own, and the pipe to it.

    PYTHONPATH=bench python bench/subjects/worker.py      # reads a request a line, writes an answer a line

A request is JSON, `{"measure": "time" | "peak" | "warm_up", "job": {...}}` with the fields of `workload.Job`, or
`{"measure": "versions", "job": ...}`. An answer is what was measured, or `{"error": why not}`. Between requests the
process waits for its next line and takes no time from others.

A process of its own gives kvpress the transformers that it needs, and peaks of memory a defined start.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch

from measuring import workload
from measuring.workload import Job, fingerprint, forget_models, model_for, warm_up
from subjects.contenders import CONTENDERS, missing_package
from subjects.pipe import serve

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BENCH = Path(__file__).resolve().parents[1]
PEERS = BENCH / "peers" / ".venv" / "bin" / "python"
PACKAGES = ("torch", "transformers", "kvprune", "kvpress", "optimum-quanto", "hqq")
# glibc keeps what is freed below a threshold that grows with use: fixed, resident memory is what is alive.
STEADY_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Here:
    """Measures in this process."""

    def ask(self, measure: str, job: Job) -> dict[str, Any]:
        """What was measured, or `{"error": why not}`: one contender that fails does not end a run of many."""
        return reasoned(lambda: _answer(measure, job))

    def close(self) -> None:
        """Free the models."""
        forget_models()
        _free()


def reasoned(answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer, or `{"error": why not}`."""
    try:
        return answer()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    # Outside the handler, where no traceback keeps tensors alive.
    _free()
    return {"error": reason}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _answer(measure: str, job: Job) -> dict[str, Any]:
    contender = CONTENDERS[job.contender]
    if measure == "versions":
        return {"versions": versions(), "weights": fingerprint(model_for(contender, job))}
    if missing := missing_package(contender):
        return {"error": missing}
    if measure == "warm_up":
        warm_up(contender, job)
        return {}
    return workload.measure(contender, job, peaks=measure == "peak")


def versions() -> dict[str, str]:
    """Of Python and of those of the packages at play that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def incomparable(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Why two environments cannot be compared, by what each answered to "versions"; None if they can."""
    for answer in (ours, theirs):
        if "error" in answer:
            return str(answer["error"])
    return None if ours["weights"] == theirs["weights"] else "it builds another model from the same seed"


class Worker:
    """The same, in a process that runs `script` with another Python or other settings of its environment."""

    def __init__(
        self,
        python: Path | str = sys.executable,
        environment: Mapping[str, str] | None = None,
        script: Path = Path(__file__),
    ) -> None:
        self._command = [str(python), str(script)]
        self._environment = {**os.environ, **(environment or {})}
        # A script in a folder of its own finds the other folders, as one that stands beside them does.
        folders = [str(BENCH), self._environment.get("PYTHONPATH")]
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        self._process: subprocess.Popen[str] | None = None

    def ask(self, measure: str, job: DataclassInstance) -> dict[str, Any]:
        """As `Here.ask`, of any job that the script understands; a process that has died is an error of this job, and
        the next job gets a new one."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
            )
        process = self._process
        requests, answers = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)
        try:
            print(json.dumps({"measure": measure, "job": asdict(job)}), file=requests, flush=True)
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process = None
            return {"error": f"its process ended with {process.wait()}; -9 is how a system that lacks memory ends one"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
        self._process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    here = Here()
    serve(lambda measure, job: here.ask(measure, Job(**job)))
