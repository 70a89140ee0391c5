"""The tasks of LongBench, how they are asked, and what scores them."""

from __future__ import annotations

from dataclasses import dataclass

from kvprune.integrations import longbench_metrics as metrics
from kvprune.integrations.longbench_metrics import Metric


@dataclass(frozen=True)
class Task:
    """How a task is asked and scored.

    extended: whether LongBench-E has it. chat: whether a chat model gets the prompt in its template. first_line:
    whether only the first line of an answer counts. min_new_tokens, stop: see `Example`.
    """

    metric: Metric
    extended: bool = False
    chat: bool = True
    first_line: bool = False
    min_new_tokens: int = 0
    stop: str | None = None


TASKS = {
    "narrativeqa": Task(metrics.qa_f1),
    "qasper": Task(metrics.qa_f1, extended=True),
    "multifieldqa_en": Task(metrics.qa_f1, extended=True),
    "multifieldqa_zh": Task(metrics.qa_f1_zh),
    "hotpotqa": Task(metrics.qa_f1, extended=True),
    "2wikimqa": Task(metrics.qa_f1, extended=True),
    "musique": Task(metrics.qa_f1),
    "dureader": Task(metrics.rouge_l_zh),
    "gov_report": Task(metrics.rouge_l, extended=True),
    "qmsum": Task(metrics.rouge_l),
    "multi_news": Task(metrics.rouge_l, extended=True),
    "vcsum": Task(metrics.rouge_l_zh),
    "trec": Task(metrics.classification, extended=True, chat=False, first_line=True),
    "triviaqa": Task(metrics.qa_f1, extended=True, chat=False, first_line=True),
    # Models go on with a dialogue of their own after the summary, or begin with an empty line.
    "samsum": Task(metrics.rouge_l, extended=True, chat=False, first_line=True, min_new_tokens=1, stop="\n"),
    "lsht": Task(metrics.classification, chat=False, first_line=True),
    "passage_count": Task(metrics.count, extended=True),
    "passage_retrieval_en": Task(metrics.retrieval, extended=True),
    "passage_retrieval_zh": Task(metrics.retrieval_zh),
    "lcc": Task(metrics.code_similarity, extended=True, chat=False),
    "repobench-p": Task(metrics.code_similarity, extended=True, chat=False),
}
