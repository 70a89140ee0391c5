"""Many questions about one document, which is read and compressed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.models import cache_argument
from kvprune.cache.report import CacheReport
from kvprune.cache.transcript import Transcript
from kvprune.chat.reading import read, warn_of
from kvprune.chat.streaming import Pieces, encode, ends_of, shown
from kvprune.chat.templates import around, template_of
from kvprune.errors import KVPruneError
from kvprune.policy.base import Policy
from kvprune.policy.budget import Budget
from kvprune.saving import PrunedCache


@dataclass(frozen=True)
class Answers:
    """What `ask` returns. questions, texts: one answer each. document_tokens: with those of a chat template before it.

    cache: the compressed document, without any question, to `fork` for more of them or to `save`. It knows what it has
    read (`cache.transcript`), so that it can be asked on without the document.
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
    model: Any = None,
    tokenizer: Any = None,
    document: str | None = None,
    questions: Sequence[str] = (),
    policy: Policy | str | None = None,
    *,
    cache: PrunedCache | None = None,
    max_new_tokens: int = 64,
    chat: bool = False,
    batch_size: int = 1,
    write: Callable[[int, str], None] | None = None,
    **settings: Any,
) -> Answers:
    """Compress a document once and answer questions about it, each on a fork of the cache, greedily.

        answers = ask(model, tokenizer, document, questions, KVzip(0.25))
        more = ask(model, tokenizer, cache=answers.cache, questions=others)

    Document and question are tokenized apart, and follow one another as they are: begin questions with what should
    stand between, such as a line break. A question that is long may cost rows of the document, as any prompt does.

    Args:
        model, policy: as of `PrunedCache`; the model can `generate`.
        cache: in place of a policy, the document as it was compressed before: `Answers.cache`, a fork of it, or what it
            was saved as and loaded from. It knows the document, and whether it is in a chat template, and in which.
        tokenizer: of the model. With a cache, both may be left out: then they are the model that the cache was made
            for, and the tokenizer that lies where that model was loaded from.
        document, questions: text.
        max_new_tokens: of each answer; it ends before where the model ends it.
        chat: put document, an empty line and question into the tokenizer's chat template, as one message of the user.
        batch_size: questions to answer at a time, each of which has a copy of the compressed document meanwhile. Of a
            hybrid model, and where the budget is a number of bytes ("512MiB"), they are answered one by one anyway.
        write: gets the number of a question and a piece of its answer, as it comes.
        settings: more of `PrunedCache`: device, kernels, attention.

    Warns with QuestionWarning where the policy keeps what the last queries look at (`Policy.needs_question`): there are
    no questions yet when it decides.

    Raises KVPruneError for an empty document, no questions, an empty one, a tokenizer without a chat template, and a
    cache that holds another document or no more than that, and what `PrunedCache` raises.
    """
    questions = _checked(questions)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise KVPruneError(f"batch_size is a number of questions, at least 1, not {batch_size!r}.")
    if (cache is None) == (policy is None):
        raise KVPruneError("give a policy to compress the document by, or the cache that holds it: one of them.")
    if cache is not None and settings:
        raise KVPruneError(f"{', '.join(settings)}: settings of a cache that is made, and this one is there already.")
    if cache is None and (model is None or tokenizer is None):
        raise KVPruneError("give the model and its tokenizer; only with a cache=... can they be left out.")
    if cache is not None:
        model = cache.model if model is None else model
        if model is None:
            raise KVPruneError("the model of this cache is gone: give it.")
        tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
        known = _known(cache, tokenizer, document, chat)
        return Answers(
            questions,
            _answers(model, tokenizer, cache, known, questions, max_new_tokens, batch_size, write),
            len(known.ids),
            cache,
        )
    known = _to_read(tokenizer, document, questions[0], chat)
    cache = PrunedCache(model, policy, **settings)  # type: ignore[arg-type]
    warn_of(cache.policy, stacklevel=3)  # past the decorator
    read(model, cache, known.ids)
    cache.transcript = known
    texts = _answers(model, tokenizer, cache, known, questions, max_new_tokens, batch_size, write)
    return Answers(questions, texts, len(known.ids), cache)


def _answers(
    model: Any,
    tokenizer: Any,
    cache: PrunedCache,
    known: Transcript,
    questions: tuple[str, ...],
    max_new_tokens: int,
    batch_size: int,
    write: Callable[[int, str], None] | None,
) -> tuple[str, ...]:
    rests = [_rest(tokenizer, known, question) for question in questions]
    ends = ends_of(model)
    pad = next((each for each in (tokenizer.pad_token_id, *sorted(ends)) if each is not None), 0)
    budgets = (Budget.parse(part.budget) for part in cache.policy.parts() if hasattr(part, "budget"))
    if cache.is_hybrid or any(budget.of_whole_batch for budget in budgets):
        batch_size = 1  # windows count columns
    texts: list[str] = []
    for start in range(0, len(rests), batch_size):
        some = rests[start : start + batch_size]
        width = max(map(len, some))
        ids = torch.stack([torch.cat([known.ids, rest.new_full((width - len(rest),), pad), rest]) for rest in some])
        mask = torch.ones_like(ids)
        for row, rest in enumerate(some):
            mask[row, len(known.ids) : ids.shape[1] - len(rest)] = 0
        own = cache.fork()
        own.batch_repeat_interleave(len(some))
        streamed = write and Pieces(tokenizer, ends, _numbered(write, start))
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            **cache_argument(own),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            **({"streamer": streamed} if streamed else {}),
        )
        for row in output[:, ids.shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            texts.append(shown(tokenizer, row[: end + 1]).strip())
    return tuple(texts)


def _numbered(write: Callable[[int, str], None], first: int) -> Callable[[int, str], None]:
    return lambda number, piece: write(first + number, piece)


def _rest(tokenizer: Any, known: Transcript, question: str) -> Tensor:
    """Ids `[n]` of what comes behind the document."""
    text = question
    if known.template is not None:
        assert known.document is not None  # `_known` saw to that
        text = around(tokenizer, known.messages, known.document, question, known.template)[1]
    ids = encode(tokenizer, text, special=False)
    if not len(ids):
        raise KVPruneError(f"the tokenizer makes no tokens of {text[:60]!r}.")
    return ids


def _to_read(tokenizer: Any, document: str | None, question: str, chat: bool) -> Transcript:
    """What a cache will have read of a document."""
    document = _checked_document(document)
    if not chat:
        text, template = document, None
    else:
        template = template_of(tokenizer)
        if template is None:
            raise KVPruneError("this tokenizer has no chat template: leave chat out, or set tokenizer.chat_template.")
        document = document.strip()  # most templates do
        text = around(tokenizer, (), document, question, template)[0]
    ids = encode(tokenizer, text, special=not chat)
    if not len(ids):
        raise KVPruneError(f"the tokenizer makes no tokens of {text[:60]!r}.")
    return Transcript(ids, text, template, document=document)


def _known(cache: PrunedCache, tokenizer: Any, document: str | None, chat: bool) -> Transcript:
    """What a cache has read of a document, as it knows or as it is told."""
    known = cache.transcript
    if known is None:
        if document is None:
            raise KVPruneError(
                "this cache does not know what it has read, or has read more since: give the document too, or a cache "
                "that ask() made and that no question has been added to."
            )
        known = _to_read(tokenizer, document, "\x00", chat)
        if cache.seen_tokens != len(known.ids):
            raise KVPruneError(
                f"the document has {len(known.ids)} tokens, and the cache has seen {cache.seen_tokens}: give the "
                "document that it holds, with chat= as it was, and a cache that no question has been added to."
            )
        return known
    if known.document is None or known.messages:
        raise KVPruneError("this cache holds a conversation: go on with it by kvprune.Chat, not by ask().")
    if document is not None and document.strip() != known.document.strip():
        raise KVPruneError(
            f"the document begins with {document[:40]!r}, and the cache has seen {len(known.ids)} tokens of one that "
            f"begins with {known.document[:40]!r}: leave the document out, for the cache holds its own."
        )
    if not torch.equal(encode(tokenizer, known.text, special=known.template is None), known.ids):
        raise KVPruneError(
            "this tokenizer makes other tokens of the document than the cache has read: give the tokenizer of the "
            "model that read it."
        )
    return known


def _tokenizer_of(model: Any) -> Any:
    from transformers import AutoTokenizer

    source = getattr(model, "name_or_path", "")
    try:
        if not source:
            raise ValueError("the model does not say where it was loaded from")
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise KVPruneError(
            f"give the tokenizer of the model: it cannot be loaded from {source!r} ({error})."
        ) from error


def _checked(questions: Sequence[str]) -> tuple[str, ...]:
    if isinstance(questions, str):
        raise KVPruneError(f"questions are a list, not one text: write [{questions!r}].")
    questions = tuple(questions)
    if not questions:
        raise KVPruneError("there are no questions: give at least one.")
    for number, question in enumerate(questions):
        if not isinstance(question, str) or not question.strip():
            raise KVPruneError(f"question {number} is empty: {question!r}.")
    return questions


def _checked_document(document: str | None) -> str:
    if not isinstance(document, str) or not document.strip():
        raise KVPruneError("the document is empty: give the text that the questions are about.")
    return document
