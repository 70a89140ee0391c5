"""One example, answered from one cache: the prediction, its score, and the bytes that the cache held."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.models import cache_argument
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.errors import EvaluationError
from kvprune.evaluation.contenders import Contender, Held
from kvprune.evaluation.example import Example, Suite
from kvprune.evaluation.prompts import Prompt, PromptMaker
from kvprune.evaluation.results import Row


@dataclass(frozen=True)
class Answers:
    """Work that asks a model examples of a suite.

    question_known: whether the question is there when the prompt is compressed. If not, what comes before the question
    is compressed first, and the question follows as a second turn.
    """

    suite: Suite
    examples: Sequence[Example]
    prompts: PromptMaker
    question_known: bool = True
    limits: Row | None = None
    """Settings of the suite that change its examples, to be kept with the results."""

    @property
    def name(self) -> str:
        return self.suite.name

    @property
    def settings(self) -> Row:
        return {
            "question": "known" if self.question_known else "unknown",
            "max_length": self.prompts.max_length,
            "chat": self.prompts.uses_chat,
            "dtype": str(self.prompts.model.model.dtype).removeprefix("torch."),
            **(self.limits or {}),
        }

    def units(self) -> list[list[Example]]:
        """Examples one by one."""
        return [[example] for example in self.examples]

    def measure(self, unit: list[Example], contenders: list[Contender]) -> Iterator[Row]:
        """A row for every contender, in turn. Raises EvaluationError where a question cannot be held back."""
        (example,) = unit
        prompt = self.prompts(example)
        if not self.question_known and not prompt.question:
            raise EvaluationError(
                f"{example.task}, row {example.index}: nothing says where the question begins, so it cannot be held "
                "back: leave --question unknown out, or this task."
            )
        for contender in contenders:
            yield self._answer(example, prompt, contender)

    def _answer(self, example: Example, prompt: Prompt, contender: Contender) -> Row:
        model, tokenizer = self.prompts.model.model, self.prompts.model.tokenizer
        ids = prompt.ids.to(model.device)
        began = time.perf_counter()
        with torch.inference_mode():
            cache = contender.cache(model)
            if not self.question_known:
                model(ids[:, : prompt.question], **cache_argument(cache), logits_to_keep=1)
                if isinstance(cache, PrunedCache):
                    cache.end_prompt()  # a policy may wait for more of it
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **cache_argument(cache),
                **self._generation(example, prompt),
            )
        written = output[0, ids.shape[1] :]
        said = tokenizer.decode(written, skip_special_tokens=True)
        return {
            "task": example.task,
            "index": example.index,
            "label": contender.label,
            "policy": contender.name,
            "budget": contender.budget,
            "score": self.suite.score(example, said),
            "prediction": said,
            "answers": list(example.answers),
            **asdict(Held.by(cache, model)),
            "prompt_tokens": ids.shape[1],
            "left_out_tokens": prompt.left_out,
            "new_tokens": len(written),
            "seconds": round(time.perf_counter() - began, 3),
            **example.fields,
        }

    def _generation(self, example: Example, prompt: Prompt) -> dict[str, Any]:
        """Greedy decoding up to an end of sequence, or to the text that ends an answer."""
        model, tokenizer = self.prompts.model.model, self.prompts.model.tokenizer
        ends = _as_list(model.generation_config.eos_token_id) or _as_list(tokenizer.eos_token_id)
        if example.stop is not None:
            # A token, as in LongBench: its text may stand inside other tokens, and then does not end an answer.
            ends += tokenizer(example.stop, add_special_tokens=False)["input_ids"][-1:]
        padding = tokenizer.pad_token_id
        return {
            "max_new_tokens": prompt.max_new_tokens,
            "min_new_tokens": example.min_new_tokens or None,
            "eos_token_id": ends or None,
            "pad_token_id": (ends[0] if ends else 0) if padding is None else padding,
            "do_sample": False,
            **dict.fromkeys(("temperature", "top_p", "top_k")),  # a model's own are for sampling
        }


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    return ids.tolist() if isinstance(ids, Tensor) else list(ids) if isinstance(ids, list | tuple) else [int(ids)]
