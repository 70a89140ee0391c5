"""What a pruned cache does to a model's predictions on any text: likelihood, KL divergence, top-1 agreement.

Text is cut into sequences. The prompt of each is prefilled, which compresses it, and the remaining tokens are fed one
by one, each compressed as it comes. The predictions after each of those are measured: all of them read the
compressed cache, while the one at the end of the prompt attended to everything and is left out. The full cache is the
stock one, fed the same way. No labels are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from kvprune.cache.models import cache_argument
from kvprune.errors import EvaluationError
from kvprune.evaluation.contenders import FULL, Contender, Held
from kvprune.evaluation.models import LanguageModel
from kvprune.evaluation.results import Row

SEPARATOR = "<|endoftext|>"  # between the documents of a text file, where it has several


@dataclass(frozen=True)
class Sequence:
    """A piece of a text. ids: `[L]`. task: the name of the text. index: which piece, from 0."""

    task: str
    index: int
    ids: Tensor


@dataclass(frozen=True)
class Predictions:
    """How well sequences were predicted from a cache, per sequence, `[B]`, float64, in nats a token.

    nll: negative log-likelihood. nll_change: against the full cache. kl: divergence from the full cache's predictions.
    agreement: share of tokens with the full cache's top choice.
    """

    nll: Tensor
    nll_change: Tensor
    kl: Tensor
    agreement: Tensor


@dataclass(frozen=True)
class Likelihood:
    """Work that measures likelihood on a text file.

    length: tokens of a sequence. prompt: how many of them are prefilled. limit: most sequences. batch_size: sequences
    that go through the model together.

    Raises EvaluationError for numbers that leave nothing to predict, and texts that are too short.
    """

    model: LanguageModel
    text: Path
    length: int
    prompt: int
    limit: int = 32
    batch_size: int = 1
    name: str = "likelihood"

    def __post_init__(self) -> None:
        if not 1 <= self.prompt <= self.length - 2:
            raise EvaluationError(
                f"a prompt of {self.prompt} tokens leaves nothing to feed and to predict of {self.length}: give "
                f"--prompt from 1 to {self.length - 2}, or a larger --length."
            )
        if self.model.window is not None and self.length > self.model.window:
            raise EvaluationError(
                f"{self.model.name} has a window of {self.model.window} tokens: give a --length of at most that."
            )
        if self.limit < 1 or self.batch_size < 1:
            raise EvaluationError(f"{self.limit} sequences in batches of {self.batch_size}: ask for 1 or more.")

    @property
    def settings(self) -> Row:
        dtype = str(self.model.model.dtype).removeprefix("torch.")
        return {"length": self.length, "prompt": self.prompt, "dtype": dtype}

    def units(self) -> list[list[Sequence]]:
        """Batches of sequences, from the beginning of the text."""
        try:
            text = self.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"cannot read the text {self.text}: {error}") from error
        documents = (document.strip() for document in text.split(SEPARATOR))
        pieces = cut(documents, self.model.tokenizer, self.limit, self.length)
        if not len(pieces):
            raise EvaluationError(
                f"{self.text} is shorter than a sequence of {self.length} tokens: give a longer text or a smaller "
                "--length."
            )
        sequences = [Sequence(self.text.stem, index, ids) for index, ids in enumerate(pieces)]
        return [sequences[start : start + self.batch_size] for start in range(0, len(sequences), self.batch_size)]

    def measure(self, unit: list[Sequence], contenders: list[Contender]) -> Iterator[Row]:
        """Rows of all sequences under each contender; the full cache is fed once for all of them.

        Its logits wait in the memory of the CPU: at 16 bits and a vocabulary of 128k, 2,048 steps of 8 sequences take
        4 GB.
        """
        model = self.model.model
        ids = torch.stack([sequence.ids for sequence in unit]).to(model.device)
        reference = Contender(FULL, None, None)
        full_cache = reference.cache(model)
        full = [step.cpu() for step in logits(model, ids, self.prompt, full_cache)]
        for contender in contenders:
            cache = full_cache if contender == reference else contender.cache(model)
            steps = full if contender == reference else logits(model, ids, self.prompt, cache)
            found = compare(steps, full, ids[:, self.prompt + 1 :])
            held = {name: value // len(unit) for name, value in asdict(Held.by(cache, model)).items()}
            figures = {name: values.tolist() for name, values in vars(found).items()}
            for place, sequence in enumerate(unit):
                yield {
                    "task": sequence.task,
                    "index": sequence.index,
                    "label": contender.label,
                    "policy": contender.name,
                    "budget": contender.budget,
                    **{name: values[place] for name, values in figures.items()},
                    **held,
                }


def cut(documents: Iterable[str], tokenizer: Any, sequences: int, length: int) -> Tensor:
    """The first `sequences` pieces of `length` tokens, `[sequences, length]`, fewer where the text ends.

    Documents are tokenized one by one, each with the special tokens that the tokenizer adds, and follow one another.
    """
    tokens: list[int] = []
    for document in documents:
        if len(tokens) >= sequences * length:
            break
        tokens += tokenizer(document, verbose=False)["input_ids"]
    rows = min(sequences, len(tokens) // length)
    return torch.tensor(tokens[: rows * length], dtype=torch.long).view(rows, length)


@torch.inference_mode()
def logits(model: Any, sequences: Tensor, prompt: int, cache: Cache) -> Iterator[Tensor]:
    """Logits `[B, vocab]` after each token that is fed one by one, in the model's type.

    sequences: `[B, L]`, whose first `prompt` tokens are prefilled and whose last one is only predicted.
    """
    model(sequences[:, :prompt], **cache_argument(cache), logits_to_keep=1)
    for token in sequences[:, prompt:-1, None].unbind(1):
        yield model(token, **cache_argument(cache)).logits[:, -1]


def compare(steps: Iterable[Tensor], full: Iterable[Tensor], targets: Tensor) -> Predictions:
    """Compare the logits of a cache with those of the full cache, step by step.

    steps, full: T tensors `[B, vocab]`, on any device. targets: `[B, T]`, the tokens that were to be predicted, on the
    device that computes.
    """
    figures = []
    for found, right, target in zip(steps, full, targets.unbind(1), strict=True):
        found, right = found.to(target.device), right.to(target.device)
        log_p, log_full = found.double().log_softmax(-1), right.double().log_softmax(-1)
        nll = -log_p.gather(1, target[:, None]).squeeze(1)
        change = nll + log_full.gather(1, target[:, None]).squeeze(1)
        kl = F.kl_div(log_p, log_full, log_target=True, reduction="none").sum(-1)
        agree = (found.argmax(-1) == right.argmax(-1)).double()
        figures.append(torch.stack([nll, change, kl, agree]))
    return Predictions(*torch.stack(figures).mean(0).unbind(0))
