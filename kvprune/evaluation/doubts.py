"""What should make a reader of results doubt them, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from kvprune.evaluation.contenders import FULL
from kvprune.evaluation.results import Row


def doubts(rows: Sequence[Row]) -> Iterator[str]:
    """Tasks that the full cache cannot do, and prompts that lost a part: see `Row`'s score and left_out_tokens."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    for task in tasks:
        scores = [
            row["score"]
            for row in rows
            if row["task"] == task and row["label"] == FULL and row.get("score") is not None
        ]
        if scores and fmean(scores) == 0:
            yield (
                f"{task}: the full cache scores nothing in {len(scores)} examples, so this model cannot do the task "
                "and no policy can be judged by it."
            )
    cut = {(row["task"], row["index"]): row["prompt_tokens"] for row in rows if row.get("left_out_tokens")}
    if cut:
        yield (
            f"{len(cut)} of {len({(row['task'], row['index']) for row in rows})} prompts were longer than the model or "
            f"--max-length allows and lost their middle (they have up to {max(cut.values()):,} tokens now)."
        )
