"""The recall task: long readable documents with notes to remember, and questions about them.

A *document* is filler prose with *notes* scattered in it::

    <s> slowly the old baker carried the lamp across the harbour. note amber falcon: copper lantern seven. the ...

A note maps a two-word key (``amber falcon:``) to a three-word value (``copper lantern seven.``). A *question* repeats a
key at the end of the prompt and expects the value::

    question amber falcon: copper lantern seven. </s>

Every word is one token (punctuation is part of the word), so a person can read a prompt and count its tokens. Key and
value words are drawn independently: the answer can be known from the note alone. The filler is a Markov chain over the
words of a small grammar. `bench/train_recall.py` trains the embedded model on these documents.

Values may be longer, ``copper lantern slate anchor seven.``: the model, trained on three words, copies what follows a
key.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import cycle, islice, pairwise

import numpy as np

from kvprune.demo.words import (
    BOS,
    FILLER,
    KEY_FIRST,
    KEY_SECOND,
    NOTE,
    QUESTION,
    SENTENCES,
    TOKEN_ID,
    VALUE_FIRST,
    VALUE_SECOND,
    VALUE_THIRD,
    VOCABULARY,
)
from kvprune.errors import KVPruneError

QUESTION_LENGTH = 3  # question k1 k2:
ANSWER_LENGTH = 3  # v1 v2 v3.
NOTE_LENGTH = QUESTION_LENGTH + ANSWER_LENGTH  # note k1 k2: v1 v2 v3.
_SUCCESSORS = 6  # words that may follow a filler word within the next word class, each half as likely as the one before
_RANKED = {count: 0.5 ** np.arange(count) / (0.5 ** np.arange(count)).sum() for count in range(1, _SUCCESSORS + 1)}
_UP_TO = {count: (ranked.cumsum() / ranked.cumsum()[-1]).tolist() for count, ranked in _RANKED.items()}


def _ids(words: list[str]) -> np.ndarray:
    return np.array([TOKEN_ID[word] for word in words])


_FILLER_IDS = {name: _ids(words).tolist() for name, words in FILLER.items()}
_SENTENCE_LENGTHS = tuple(len(sentence.split()) for sentence in SENTENCES)


@cache
def _fillable(length: int) -> bool:
    """Whether whole sentences can have `length` tokens in all."""
    if length > sum(_SENTENCE_LENGTHS) * min(_SENTENCE_LENGTHS):
        return True  # far above the largest length that two of them cannot reach
    return length == 0 or any(_fillable(length - n) for n in _SENTENCE_LENGTHS if n <= length)


@dataclass(frozen=True)
class Recall:
    """One document and the notes in it, as token ids.

    document: `[n]`, beginning with `<s>`. keys: `[notes, 2]`. values: `[notes, words]`. positions: `[notes]`, where
    each note starts in the document.
    """

    document: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    positions: np.ndarray

    def question(self, note: int) -> np.ndarray:
        """Token ids of the question about one note, `[3]`; the answer is `values[note]`."""
        return np.concatenate([[TOKEN_ID[QUESTION]], self.keys[note]])

    def prompt(self, note: int) -> np.ndarray:
        """The document followed by one question, `[n + 3]`."""
        return np.concatenate([self.document, self.question(note)])


class RecallGenerator:
    """Draws documents from a seed: the same seed gives the same documents on every machine."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    @cached_property
    def _chain(self) -> dict[tuple[str, str], dict[int, list[int]]]:
        """For two neighbouring word classes: the ids of the second that may follow each id of the first."""
        fixed = np.random.default_rng(2407)  # one language for all documents, whatever the generator's seed
        pairs = {pair for sentence in SENTENCES for pair in pairwise(sentence.split())}
        return {
            (a, b): {
                word: fixed.choice(_FILLER_IDS[b], size=min(_SUCCESSORS, len(_FILLER_IDS[b])), replace=False).tolist()
                for word in _FILLER_IDS[a]
            }
            for a, b in sorted(pairs)
        }

    @cached_property
    def _sentence_pool(self) -> list[np.ndarray]:
        """A few thousand sentences to draw from: quicker than to walk the chain word by word."""
        return [self.sentence() for _ in range(4000)]

    def sentence(self) -> np.ndarray:
        """Token ids of one sentence of filler, `[7 to 13]`, walking the chain."""
        classes = SENTENCES[self.rng.integers(len(SENTENCES))].split()
        first = _FILLER_IDS[classes[0]]
        words = [first[self.rng.integers(len(first))]]
        for before, after in pairwise(classes):
            followers = self._chain[before, after][words[-1]]
            # What rng.choice(followers, p=...) makes of the same random number, in a tenth of the time.
            words.append(followers[bisect_right(_UP_TO[len(followers)], self.rng.random())])
        return np.array(words)

    def _filler(self, length: int) -> list[np.ndarray]:
        """Sentences of `length` tokens in all; where no whole sentence fits the rest, the last one is cut."""
        sentences: list[np.ndarray] = []
        pool = self._sentence_pool
        while length > 0:
            sentence = pool[self.rng.integers(len(pool))]
            if not _fillable(length - len(sentence)) and _fillable(length):
                continue
            sentences.append(sentence[:length])
            length -= len(sentences[-1])
        return sentences

    def document(self, length: int, notes: int, words: int = ANSWER_LENGTH) -> Recall:
        """A document of exactly `length` tokens with `notes` notes whose keys are all different.

        words: of a value; the last ends the sentence. Raises KVPruneError where the notes do not fit or there are not
        enough keys.
        """
        if words < 1:
            raise KVPruneError(f"a value has at least one word, not {words}.")
        note_length = QUESTION_LENGTH + words
        if notes < 1 or 1 + notes * note_length > length:
            raise KVPruneError(
                f"{notes} notes of {note_length} tokens do not fit a document of {length} tokens: "
                f"ask for 1 to {max(1, (length - 1) // note_length)} notes, or a longer document."
            )
        if notes > len(KEY_FIRST) * len(KEY_SECOND):
            raise KVPruneError(
                f"there are {len(KEY_FIRST) * len(KEY_SECOND)} different keys, fewer than {notes} notes."
            )
        pairs = self.rng.choice(len(KEY_FIRST) * len(KEY_SECOND), size=notes, replace=False)
        keys = np.stack([_ids(KEY_FIRST)[pairs // len(KEY_SECOND)], _ids(KEY_SECOND)[pairs % len(KEY_SECOND)]], axis=1)
        of_words = [*islice(cycle((VALUE_FIRST, VALUE_SECOND)), words - 1), VALUE_THIRD]
        values = np.stack([self.rng.choice(_ids(list(each)), size=notes) for each in of_words], axis=1)
        filler = self._filler(length - 1 - notes * note_length)
        where = np.sort(self.rng.integers(0, len(filler) + 1, size=notes))
        pieces: list[np.ndarray] = [np.array([TOKEN_ID[BOS]])]
        positions = np.empty(notes, dtype=np.int64)
        used, n = 0, 1
        for note, slot in enumerate(where):
            pieces += filler[used:slot]
            n += sum(len(sentence) for sentence in filler[used:slot])
            used = slot
            positions[note] = n
            pieces.append(np.concatenate([[TOKEN_ID[NOTE]], keys[note], values[note]]))
            n += note_length
        pieces += filler[used:]
        return Recall(np.concatenate(pieces), keys, values, positions)


def decode(ids: np.ndarray | list[int]) -> str:
    """Token ids as readable text."""
    return " ".join(VOCABULARY[token_id] for token_id in ids)
