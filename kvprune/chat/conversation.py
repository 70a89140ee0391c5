"""`Chat`: a conversation on one cache, to which every turn brings only what is new."""

from __future__ import annotations

import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import StoppingCriteria

from kvprune.cache.models import cache_argument
from kvprune.cache.report import CacheReport
from kvprune.cache.transcript import Transcript
from kvprune.chat.reading import read, warn_of
from kvprune.chat.streaming import Pieces, encode, ends_of
from kvprune.chat.templates import BETWEEN, Message, around, rewrites_history, template_of, written
from kvprune.errors import CacheError, HistoryWarning, KVPruneError
from kvprune.policy.base import Policy
from kvprune.saving import PrunedCache

_TAIL = 8  # tokens before an answer, whose text says whether a space stands between


@dataclass(frozen=True)
class Turn:
    """What an answer took.

    prompt_tokens: of the conversation up to the answer. read_tokens: of those, what ran through the model now: what is
    new, and what had to be read again. new_tokens: of the answer. first_seconds: until its first token was there.
    decode_seconds: for the others. note: what was read again, or will be, and why; None if nothing is.
    """

    prompt_tokens: int
    read_tokens: int
    new_tokens: int
    first_seconds: float
    decode_seconds: float
    note: str | None = None


class Chat:
    """A conversation on one compressed cache: every turn reads, and compresses, only what is new.

        chat = Chat(model, tokenizer, KVzip(0.25))
        chat.read(document)
        chat.say("Who signed the contract?")

    Turns are written by the tokenizer's chat template; without one they follow one another as they are, with a line
    break before what is said. What the template makes of a conversation is compared, by token ids, with what the cache
    has read. Some templates write an answer differently, once it is history: they leave out what it thought. After an
    answer that is not what the next turn will show of it, the cache becomes what it was before the answer (a fork,
    which is made only for such templates, and takes the room of a second compressed cache while the model answers), and
    the next turn reads what is left of the answer. Where anything else has changed, all of the conversation is read
    again, with a HistoryWarning. So an answer is always to what the template says.

    Args:
        model, policy: as of `PrunedCache`; the model can `generate`.
        tokenizer: of the model.
        system: what a message of the system says, before all others.
        settings: more of `PrunedCache`: device, kernels, attention.

    Raises what `PrunedCache` raises, and KVPruneError for a template that refuses a message.
    """

    def __init__(
        self, model: Any, tokenizer: Any, policy: Policy | str, *, system: str | None = None, **settings: Any
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.cache = PrunedCache(model, policy, **settings)
        """What is held of the conversation. To `fork` or to save it is to have the conversation too."""
        self.messages: tuple[Message, ...] = ()
        """What was said, in turns that are complete: each has a "role" and its "content"."""
        self.last: Turn | None = None
        """What the last answer took."""
        self._settings, self._turning = settings, threading.Lock()
        self._template = template_of(tokenizer)
        self._document: str | None = None
        if system is not None:
            self.messages = ({"role": "system", "content": _checked(system, "the message of the system")},)
            written(tokenizer, self.messages, self._template, answering=False)  # some templates refuse it
        self._rewrites = rewrites_history(tokenizer, self._template)

    @property
    def policy(self) -> Policy:
        """By which the cache is compressed. Set it, and the next turn reads the conversation again, for a new cache."""
        return self.cache.policy

    @policy.setter
    def policy(self, policy: Policy | str) -> None:
        with self._alone():
            self.cache = PrunedCache(self.model, policy, **self._settings)

    @property
    def report(self) -> CacheReport:
        """What is held now."""
        return self.cache.report()

    # -- turns -----------------------------------------------------------------------------------------------------

    def read(self, document: str) -> int:
        """Read and compress a document, with which the next message begins; what is said next may ask about it.

        Returns how many tokens were read. Warns with QuestionWarning where the policy looks for a question, since there
        is none yet. Raises KVPruneError for an empty document, or one that the template changes.
        """
        with self._alone():
            document = _checked(document, "the document")
            if self._template is not None:
                document = document.strip()  # most templates do
            whole = document if self._document is None else f"{self._document}{BETWEEN}{document}"
            if self._template is None:
                text = written(self.tokenizer, [*self.messages, _user(whole)], None, answering=False)
            else:
                text = around(self.tokenizer, self.messages, whole, "\x00", self._template)[0]
            ids, _ = self._prepare(text)
            warn_of(self.policy, stacklevel=2)
            count = len(ids) - self.cache.seen_tokens
            read(self.model, self.cache, ids[self.cache.seen_tokens :])
            self.cache.end_prompt()  # or policies that wait for more would decide with the question
            self._document = whole
            self.cache.transcript = self._transcript(ids, text)
            return count

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 512,
        write: Callable[[str], None] | None = None,
        **generation: Any,
    ) -> str:
        """Say something, and get the answer.

        write: gets the answer in pieces as it comes. generation: more of `model.generate`, such as `do_sample=True,
        temperature=0.7`; without, the likeliest tokens are taken. A turn that raises, or is interrupted, has not been.

        Raises KVPruneError for nothing said, for several answers at a time (beams), and, as all that changes a
        conversation does, while an answer is being written.
        """
        said = _said(text, generation)
        with self._alone():
            return self._answer(said, write, max_new_tokens=max_new_tokens, **generation)

    def stream(self, text: str, *, max_new_tokens: int = 512, **generation: Any) -> Iterator[str]:
        """As `say`, in pieces as they come. Who stops to iterate stops the answer; what has come of it was said."""
        return self._stream(_said(text, generation), max_new_tokens=max_new_tokens, **generation)

    def _stream(self, said: str, **generation: Any) -> Iterator[str]:
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        stopped, ended, failed = threading.Event(), threading.Event(), []

        def answer() -> None:
            try:
                with self._alone():
                    self._answer(said, pieces.put, stopped=stopped, **generation)
            except BaseException as error:
                failed.append(error)
            finally:
                ended.set()
                pieces.put(None)

        threading.Thread(target=answer, name="kvprune chat", daemon=True).start()
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            stopped.set()
            while not ended.is_set():
                with suppress(KeyboardInterrupt):  # who is in haste waits for the token too, or the next turn could not
                    ended.wait()
        if failed:
            raise failed[0]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One at a time changes the conversation. Raises KVPruneError while another does."""
        if not self._turning.acquire(blocking=False):
            raise KVPruneError(
                "an earlier answer is still being written: iterate its stream to the end, or close() it."
            )
        try:
            yield
        finally:
            self._turning.release()

    @torch.no_grad()
    def _answer(
        self,
        said: str,
        write: Callable[[str], None] | None,
        *,
        max_new_tokens: int,
        stopped: threading.Event | None = None,
        **generation: Any,
    ) -> str:
        content = said if self._document is None else f"{self._document}{BETWEEN}{said}"
        messages = (*self.messages, _user(content))
        prompt = written(self.tokenizer, messages, self._template, answering=True)
        ids, note = self._prepare(prompt)
        before, forks, started, first = self.cache.seen_tokens, [], time.perf_counter(), []

        def begun() -> None:
            first.append(time.perf_counter())
            if self._rewrites and self.cache.seen_tokens == len(ids):
                forks.append(self.cache.fork())

        ends = ends_of(self.model)
        pieces = Pieces(self.tokenizer, ends, write and (lambda _, piece: write(piece)), begun)
        if stopped is not None:
            generation["stopping_criteria"] = [*generation.get("stopping_criteria", ()), _Stopped(stopped)]
        given = ids[None].to(self.model.device)
        self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            **cache_argument(self.cache),
            max_new_tokens=max_new_tokens,
            streamer=pieces,
            **{"do_sample": False, "pad_token_id": _pad(self.tokenizer, ends), **generation},
        )
        done = time.perf_counter()
        assert pieces.tokens is not None  # generate() gives every streamer its tokens
        new = torch.tensor(pieces.tokens[0])
        answer = self._text_after(ids, new, special=False)
        self.messages = (*messages, {"role": "assistant", "content": answer})
        self._document = None
        seen = torch.cat([ids, new])[: self.cache.seen_tokens]  # nobody asked about the last token
        self.cache.transcript = self._transcript(seen, prompt + self._text_after(ids, seen[len(ids) :], special=True))
        later = self._settle(forks, self._transcript(ids, prompt))
        notes = " ".join(each for each in (note, later) if each) or None
        self.last = Turn(len(ids), len(ids) - before, len(new), first[0] - started, done - first[0], notes)
        return answer.strip()

    # -- what the cache has read, and what it should have ------------------------------------------------------------

    def _prepare(self, text: str) -> tuple[Tensor, str | None]:
        """Ids `[n]` of a text, of which the cache has read the first, and not all; and a note if it begins anew."""
        known = self.cache.transcript
        if known is not None and len(known.ids):
            ids = self._going_on(known, text)
            if ids is not None:
                return ids, None
        ids = encode(self.tokenizer, text, special=self._template is None)
        if not len(ids):
            raise KVPruneError(f"the tokenizer makes no tokens of {text[:60]!r}.")
        if not self.cache.interrupted and self.cache.seen_tokens == 0:
            return ids, None
        if known is None:
            note = "A turn was interrupted, or the cache was used otherwise, so the conversation was read again."
        else:
            same = _common(known.ids, ids)
            note = (
                f"The chat template writes what was said differently from token {same:,} of {len(known.ids):,} on, so "
                "the conversation was read again."
            )
        warnings.warn(note, HistoryWarning, stacklevel=4)
        self.cache = PrunedCache(self.model, self.policy, **self._settings)
        return ids, note

    def _going_on(self, known: Transcript, text: str) -> Tensor | None:
        """Ids `[n]` of a text that goes on where the cache is; None if it does not."""
        ids = encode(self.tokenizer, text, special=self._template is None)
        if len(ids) > len(known.ids) and torch.equal(ids[: len(known.ids)], known.ids):
            return ids
        # An answer may be made of other tokens than its text would be, and is all the same what was said.
        if text.startswith(known.text):
            new = encode(self.tokenizer, text[len(known.text) :], special=False)
            if len(new):
                return torch.cat([known.ids, new])
        return None

    def _settle(self, forks: list[PrunedCache], before: Transcript) -> str | None:
        """After an answer: is it what the next turn will show of it? before: what a fork had read."""
        known = self.cache.transcript
        assert known is not None  # written when the answer was taken down
        try:
            following = written(self.tokenizer, [*self.messages, _user("?")], self._template, answering=True)
        except KVPruneError:
            return None  # of no other turn: the answer was given all the same
        if self._going_on(known, following) is not None:
            return None
        self._rewrites = True  # whatever the template did so far
        if not forks:
            return None  # the next turn sees to it
        self.cache = forks[0]
        self.cache.transcript = before
        return "The chat template shows this answer otherwise from the next turn on, which reads what is left of it."

    def _text_after(self, ids: Tensor, new: Tensor, *, special: bool) -> str:
        """The text of generated tokens, with a space before it where one belongs. special: such tokens too."""
        tail, both = (
            str(self.tokenizer.decode(each, skip_special_tokens=not special, clean_up_tokenization_spaces=False))
            for each in (ids[-_TAIL:], torch.cat([ids[-_TAIL:], new]))
        )
        if both.startswith(tail):
            return both[len(tail) :]
        return str(self.tokenizer.decode(new, skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def _transcript(self, ids: Tensor, text: str) -> Transcript:
        return Transcript(ids, text, self._template, self.messages, self._document)

    # -- saved and loaded ------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, trust_model: bool = False) -> None:
        """Write the conversation to a file, cache, messages and chat template; see `PrunedCache.save`."""
        with self._alone():
            if self.cache.transcript is None:  # nothing was said, or it went wrong: the next turn reads all of it
                self.cache = PrunedCache(self.model, self.policy, **self._settings)
                self.cache.transcript = self._transcript(torch.empty(0, dtype=torch.int64), "")
            self.cache.save(path, trust_model=trust_model)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        tokenizer: Any,
        *,
        policy: Policy | str | None = None,
        trust_model: bool = False,
        **settings: Any,
    ) -> Self:
        """The conversation that `save` wrote, or one about a document that was saved by `Answers.cache.save`.

        It goes on in the chat template of then. settings: device, kernels, attention. Raises what `PrunedCache.load`
        raises, and CacheError for a cache that does not know what it has read.
        """
        cache = PrunedCache.load(path, model, policy=policy, trust_model=trust_model, **settings)
        if cache.transcript is None:
            raise CacheError(
                f"{os.fspath(path)} holds a cache, and not what it has read, so nothing can be said to it: give a file "
                "that Chat.save wrote, or the cache of ask()."
            )
        return cls.of(cache, tokenizer, **settings)

    @classmethod
    def of(cls, cache: PrunedCache, tokenizer: Any, **settings: Any) -> Self:
        """A conversation that goes on with a cache that knows what it has read, such as a fork of another's.

        settings: with which it was made. Raises CacheError for a cache that does not know.
        """
        known = cache.transcript
        if known is None:
            raise CacheError("this cache does not know what it has read, or more has come since.")
        if cache.model is None:
            raise CacheError("the model of this cache is gone: keep it, or save the cache and load it for another.")
        chat = cls.__new__(cls)
        chat._turning = threading.Lock()
        chat.model, chat.tokenizer, chat.cache, chat._settings = cache.model, tokenizer, cache, settings
        chat.messages, chat._document, chat._template = known.messages, known.document, known.template
        chat.last, chat._rewrites = None, rewrites_history(tokenizer, known.template)
        return chat


class _Stopped(StoppingCriteria):
    """Ends an answer that nobody waits for any more."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._stopped.is_set(), dtype=torch.bool, device=input_ids.device)


def _said(text: str, generation: dict[str, Any]) -> str:
    """What is said, if it can be. Raises KVPruneError before anything has changed."""
    several = [name for name in ("num_beams", "num_return_sequences") if generation.get(name, 1) != 1]
    if several:
        raise KVPruneError(f"a conversation goes on with one answer: leave {', '.join(several)} out.")
    return _checked(text, "what is said")


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _checked(text: Any, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise KVPruneError(f"{what} is empty: give a text, not {text!r}.")
    return text


def _common(one: Tensor, other: Tensor) -> int:
    """How many first ids are the same."""
    length = min(len(one), len(other))
    return int((one[:length] == other[:length]).long().cumprod(0).sum())


def _pad(tokenizer: Any, ends: frozenset[int]) -> int:
    return next((each for each in (tokenizer.pad_token_id, *sorted(ends)) if each is not None), 0)
