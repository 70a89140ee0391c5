"""LongBench's metrics, number for number.

Every metric takes a prediction, one right answer and the classes of the task, and returns a score from 0 to 1. Some
of what LongBench computes is surprising; where it changes the score it is kept, and a comment says so.

Source: Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", ACL 2024, and its
`metrics.py` (https://github.com/THUDM/LongBench).
"""

from __future__ import annotations

import difflib
import importlib
import logging
import re
import string
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvprune.errors import EvaluationError

Metric = Callable[[str, str, Sequence[str]], float]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION_ZH = str.maketrans(
    "",
    "",
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､"  # noqa: RUF001
    + "、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏",  # noqa: RUF001
)


def qa_f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, without punctuation, case and articles."""
    return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words of Chinese text as jieba cuts them, without punctuation and case."""
    return _f1(_words_zh(prediction), _words_zh(answer))


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L F1 over sentences that end with a full stop, each word counted once, as the package `rouge` has it."""
    rouge = _package("rouge")
    if not prediction.strip(".") or not answer.strip("."):
        return 0.0  # no sentence: `rouge` raises
    # `rouge` walks back through the common subsequence of two sentences with a frame a word. LongBench scores 0 where
    # that hits the interpreter's limit, at about 980 words of two sentences, so its number would depend on the caller.
    with _room_for(len(prediction.split()) + len(answer.split())):
        return float(rouge.Rouge(metrics=["rouge-l"]).get_scores(prediction, answer)[0]["rouge-l"]["f"])


def rouge_l_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """`rouge_l` of Chinese text, cut into words by jieba."""
    return rouge_l(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """One over the number of classes that the prediction names, if the right one is among them.

    A class that is only part of the right one's name ("Individual" in "Individual, group") does not count. Raises
    EvaluationError without classes.
    """
    if not classes:
        raise EvaluationError("a classification needs all_classes, the names of the classes.")
    named, dropped = [], False
    for name in classes:
        if name not in prediction:
            continue
        # LongBench drops from the list that it walks along, so it never looks at the entry behind a dropped one.
        dropped = not dropped and name in answer and name != answer
        if not dropped:
            named.append(name)
    return 1.0 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are N, of an answer "Paragraph N". Raises EvaluationError for others."""
    return _share_of_numbers(prediction, _paragraph(answer, "Paragraph "))


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are N, of an answer "段落N". Raises EvaluationError for others."""
    return _share_of_numbers(prediction, _paragraph(answer, "段落"))


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are the answer, digit for digit."""
    return _share_of_numbers(prediction, answer)


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the first line of code, 1 - (insertions + deletions) / characters of both, in hundredths.

    LongBench's number where python-Levenshtein is installed beside its fuzzywuzzy; see `code_similarity_difflib`.
    """
    ratio = _package("rapidfuzz.fuzz").ratio(_first_line_of_code(prediction), answer)
    return round(ratio) / 100


def code_similarity_difflib(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """`code_similarity` by difflib's matching blocks, which are not the longest common subsequence: never higher.

    LongBench's number where fuzzywuzzy is installed alone: it then falls back to difflib.
    """
    ratio = difflib.SequenceMatcher(None, _first_line_of_code(prediction), answer).ratio()
    return round(100 * ratio) / 100


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _words_zh(text: str) -> list[str]:
    words = ("".join(word.lower().translate(_PUNCTUATION_ZH).split()) for word in _cut(text))
    return [word for word in words if word]


def _f1(predicted: list[str], right: list[str]) -> float:
    common = (Counter(predicted) & Counter(right)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(right)
    return 2 * precision * recall / (precision + recall)


def _share_of_numbers(prediction: str, right: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def _paragraph(answer: str, name: str) -> str:
    found = re.search(rf"{name}(\d+)", answer)
    if found is None:
        raise EvaluationError(f"the answer of a retrieval task is a paragraph such as '{name}7', not {answer!r}.")
    return found[1]


def _first_line_of_code(prediction: str) -> str:
    """The first line that looks like code: LongBench takes lines with a backtick, a # or a // for something else."""
    lines = prediction.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")


def _cut(text: str) -> Iterator[str]:
    jieba = _package("jieba")
    jieba.setLogLevel(logging.WARNING)  # it reports on its dictionary otherwise
    words: Iterator[str] = jieba.cut(text)
    return words


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise EvaluationError(
            f"this LongBench metric needs the package {package}: pip install 'kvprune[eval]'."
        ) from error


_recursion_limit = threading.Lock()


@contextmanager
def _room_for(frames: int) -> Iterator[None]:
    """Lets Python recurse that much deeper. One thread at a time, since the limit is the interpreter's."""
    with _recursion_limit:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + frames)
        try:
            yield
        finally:
            sys.setrecursionlimit(limit)
