"""LongBench: 21 tasks over long texts in English, Chinese and code, as its authors ask and score them.

Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", ACL 2024
(https://github.com/THUDM/LongBench, version 1). LongBench-E has 13 of the tasks, with lengths spread evenly.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from kvprune.errors import EvaluationError
from kvprune.evaluation.example import Example
from kvprune.integrations import longbench_metrics as metrics
from kvprune.integrations.longbench_data import (
    MAX_NEW_TOKENS,
    PROMPTS,
    WHERE_PROMPTS_ARE,
    Folder,
    HubTask,
    file_names,
    find_file,
    open_folder,
    read_prompts,
    read_rows,
)
from kvprune.integrations.longbench_results import summary, summary_by_length, write_predictions
from kvprune.integrations.longbench_tasks import TASKS

__all__ = ["TASKS", "LongBench", "summary", "summary_by_length", "write_predictions"]

CODE_MATCHERS = {"levenshtein": metrics.code_similarity, "difflib": metrics.code_similarity_difflib}


@dataclass
class LongBench:
    """LongBench's examples and metrics: a Suite.

    data: a folder with `TASK.jsonl` (`TASK_e.jsonl` for LongBench-E) or `MiniLongBench_TASK.json`, or LongBench's
        `data.zip`; None or "hub" gets that from the Hugging Face hub; "hub:OWNER/NAME" is a data set there that has
        LongBench's rows, a configuration for each task.
    tasks: names out of `TASKS`; all that the data have by default.
    limit: how many samples of each task, the first ones; None for all.
    extended: LongBench-E.
    prompts: the folder of LongBench's `dataset2prompt.json` and `dataset2maxlen.json`; the data folder by default.
    code_matcher: LongBench's score of code depends on what is installed: "levenshtein" where python-Levenshtein is,
        "difflib" where its own requirements are all there is. That is lower, by 1.4 points of 100 on MiniLongBench.

    Raises EvaluationError for settings it cannot work with.
    """

    data: str | Path | None = None
    tasks: Iterable[str] | None = None
    limit: int | None = None
    extended: bool = False
    prompts: str | Path | None = None
    code_matcher: str = "levenshtein"
    name: str = field(default="longbench", init=False)

    def __post_init__(self) -> None:
        if self.tasks is not None:
            self.tasks = tuple(dict.fromkeys([self.tasks] if isinstance(self.tasks, str) else self.tasks))
            for task in self.tasks:
                _check_task(task, self.extended)
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise EvaluationError(f"limit is a number of samples from 1, or None for all, not {self.limit!r}.")
        if (self.data is None or str(self.data).partition(":")[0] == "hub") and not self.prompts:
            raise EvaluationError(f"the hub has the samples, not the prompts: give prompts, {WHERE_PROMPTS_ARE}.")
        if self.code_matcher not in CODE_MATCHERS:
            raise EvaluationError(f"code_matcher is {' or '.join(CODE_MATCHERS)}, not {self.code_matcher!r}.")

    def examples(self) -> Iterator[Example]:
        """All examples, task by task, with `all_classes` and `length` in their fields. See `Suite`."""
        files = self._files()
        templates, max_new_tokens = read_prompts(Path(self.prompts or self.data or ""))
        for task in files:
            if task not in templates or task not in max_new_tokens:
                raise EvaluationError(f"{PROMPTS} and {MAX_NEW_TOKENS} say nothing about {task!r}; LongBench's own do.")
        for task, file in files.items():
            rows = read_rows(file, templates[task], self.extended)
            for index, row in enumerate(islice(rows, self.limit)):
                example = Example(
                    task=task,
                    index=index,
                    prompt=row.prompt,
                    answers=row.answers,
                    max_new_tokens=max_new_tokens[task],
                    question_at=row.question_at,
                    min_new_tokens=TASKS[task].min_new_tokens,
                    stop=TASKS[task].stop,
                    chat=TASKS[task].chat,
                    fields={"all_classes": row.all_classes, "length": row.length},
                )
                self._check_scoring(example, row.where)
                yield example

    def score(self, example: Example, prediction: str) -> float:
        """The metric of the task, the best over the right answers. See `Suite`."""
        metric = TASKS[example.task].metric
        if metric is metrics.code_similarity:
            metric = CODE_MATCHERS[self.code_matcher]
        if TASKS[example.task].first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        classes = example.fields["all_classes"] or ()
        return max(metric(prediction, answer, classes) for answer in example.answers)

    def _files(self) -> dict[str, Folder | HubTask]:
        """Where every task that is asked for is."""
        offered = [task for task in TASKS if TASKS[task].extended or not self.extended]
        hub, _, dataset = str(self.data).partition(":")
        if hub == "hub" and dataset:
            return {task: HubTask(dataset, f"{task}_e" if self.extended else task) for task in self.tasks or offered}
        folder = open_folder(self.data)
        found = {task: file for task in offered if (file := find_file(folder, task, self.extended))}
        tasks = tuple(self.tasks or found or offered)
        for task in tasks:
            if task not in found:
                names = " or ".join(file_names(task, self.extended))
                raise EvaluationError(f"there is no {names} in {folder}; its tasks: {', '.join(found) or 'none'}.")
        return {task: found[task] for task in tasks}

    def _check_scoring(self, example: Example, where: str) -> None:
        """Scores an empty answer, so that bad data and missing packages are found before hours of generating."""
        try:
            self.score(example, "")
        except EvaluationError as error:
            raise EvaluationError(f"{where}: {error}") from error


def _check_task(task: str, extended: bool) -> None:
    if task not in TASKS:
        close = difflib.get_close_matches(task, TASKS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise EvaluationError(f"LongBench has no task {task!r}.{hint} It has: {', '.join(TASKS)}.")
    if extended and not TASKS[task].extended:
        names = ", ".join(name for name in TASKS if TASKS[name].extended)
        raise EvaluationError(f"{task} is not part of LongBench-E, which has: {names}.")
