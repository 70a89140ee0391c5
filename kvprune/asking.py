"""Many questions about one document, which is read and compressed once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.models import cache_argument
from kvprune.cache.report import CacheReport
from kvprune.errors import KVPruneError, QuestionWarning
from kvprune.policy.base import Policy
from kvprune.saving import PrunedCache


@dataclass(frozen=True)
class Answers:
    """What `ask` returns. questions, texts: one answer each. document_tokens: with those of a chat template before it.

    cache: the compressed document, without any question, to `fork` for more of them or to `save`.
    """

    questions: tuple[str, ...]
    texts: tuple[str, ...]
    document_tokens: int
    cache: PrunedCache

    @property
    def report(self) -> CacheReport:
        """What was kept of the document."""
        return self.cache.report()


@torch.no_grad()
def ask(
    model: Any,
    tokenizer: Any,
    document: str,
    questions: Sequence[str],
    policy: Policy | str | None = None,
    *,
    cache: PrunedCache | None = None,
    max_new_tokens: int = 64,
    chat: bool = False,
    **settings: Any,
) -> Answers:
    """Compress a document once and answer questions about it, each on a fork of the cache, greedily.

    Document and question are tokenized apart, and follow one another as they are: begin questions with what should
    stand between, such as a line break. A question that is long may cost rows of the document, as any prompt does.

    Args:
        model, policy: as of `PrunedCache`; the model can `generate`.
        cache: in place of a policy, the document as it was compressed before: `Answers.cache`, or what it was saved as
            and loaded from. The document is then not read again, but has to be the same, and `chat` as it was.
        tokenizer: of the model. document, questions: text.
        max_new_tokens: of each answer; it ends before where the model ends it.
        chat: put document, an empty line and question into the tokenizer's chat template, as one message of the user.
        settings: more of `PrunedCache`: device, kernels, attention.

    Warns with QuestionWarning where the policy keeps what the last queries look at (`Policy.needs_question`): there are
    no questions yet when it decides.

    Raises KVPruneError for an empty document, no questions, an empty one, and a tokenizer without a chat template, and
    what `PrunedCache` raises.
    """
    questions = _checked(document, questions)
    prompts = [_in_chat(tokenizer, document, question) if chat else (document, question) for question in questions]
    if (cache is None) == (policy is None):
        raise KVPruneError("give a policy to compress the document by, or the cache that holds it: one of them.")
    if cache is not None and settings:
        raise KVPruneError(f"{', '.join(settings)}: settings of a cache that is made, and this one is there already.")
    read = _ids(model, tokenizer, prompts[0][0], special=not chat)
    if cache is not None:
        if cache.seen_tokens != read.shape[1]:
            raise KVPruneError(
                f"the document has {read.shape[1]} tokens, and the cache has seen {cache.seen_tokens}: give the "
                "document that it holds, with chat= as it was, and a cache that no question has been added to."
            )
        return Answers(
            questions, _answers(model, tokenizer, cache, read, prompts, max_new_tokens), read.shape[1], cache
        )
    cache = PrunedCache(model, policy, **settings)  # type: ignore[arg-type]
    if cache.policy.needs_question:
        warnings.warn(
            f"{cache.policy} keeps what the last queries look at, and the document is compressed before there is any "
            "question: answers may be gone. Take a policy that does not look there, such as KVzip(0.25), which reads "
            "the document a second time, or ZipCache() or KIVI(), which keep every token at fewer bits; or end the "
            "document with a question like those to come.",
            QuestionWarning,
            stacklevel=3,  # past the decorator
        )
    known = inspect.signature(model.forward).parameters
    model(read, **cache_argument(cache), **({"logits_to_keep": 1} if "logits_to_keep" in known else {}))
    return Answers(questions, _answers(model, tokenizer, cache, read, prompts, max_new_tokens), read.shape[1], cache)


def _answers(
    model: Any, tokenizer: Any, cache: PrunedCache, read: Tensor, prompts: list[tuple[str, str]], max_new_tokens: int
) -> tuple[str, ...]:
    texts = []
    for _, rest in prompts:
        ids = torch.cat([read, _ids(model, tokenizer, rest, special=False)], dim=1)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(cache.fork()),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return tuple(texts)


def _checked(document: str, questions: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(document, str) or not document.strip():
        raise KVPruneError("the document is empty: give the text that the questions are about.")
    if isinstance(questions, str):
        raise KVPruneError(f"questions are a list, not one text: write [{questions!r}].")
    questions = tuple(questions)
    if not questions:
        raise KVPruneError("there are no questions: give at least one.")
    for number, question in enumerate(questions):
        if not isinstance(question, str) or not question.strip():
            raise KVPruneError(f"question {number} is empty: {question!r}.")
    return questions


def _in_chat(tokenizer: Any, document: str, question: str) -> tuple[str, str]:
    """The prompt up to the end of the document, and the rest of it."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise KVPruneError("this tokenizer has no chat template: leave chat out, or set tokenizer.chat_template.")
    document = document.strip()  # most templates do
    message = {"role": "user", "content": f"{document}\n\n{question}"}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    before, found, rest = prompt.partition(document)
    if not found:
        raise KVPruneError("the chat template changes the document: write the prompt out yourself, and leave chat out.")
    return before + document, rest


def _ids(model: Any, tokenizer: Any, text: str, *, special: bool) -> Tensor:
    """`[1, n]`. special: whether to add what the tokenizer puts around a text, such as a token that begins it."""
    ids = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise KVPruneError(f"the tokenizer makes no tokens of {text[:60]!r}.")
    return ids.to(model.device)
