"""LongBench's metrics against scores worked out by hand, and against their definitions in words."""

from __future__ import annotations

import runpy
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

from kvprune.errors import EvaluationError
from kvprune.integrations import longbench_metrics as metrics

thorough = profile(max_examples=10 * profile.default.max_examples)

CLASSES = ["Order", "rank", "Food", "Order, rank", "Food, Order"]

classes = st.permutations(CLASSES)
words = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1)
texts = st.text(
    st.sampled_from("aAthe 37.,#`/\n中国红色。段落") | st.characters(exclude_categories=["Cs"]), max_size=30
)
ANSWERS = {metrics.retrieval: "Paragraph 3", metrics.retrieval_zh: "段落3", metrics.classification: "Food"}
METRICS = [
    metrics.qa_f1,
    metrics.qa_f1_zh,
    metrics.rouge_l,
    metrics.rouge_l_zh,
    metrics.classification,
    metrics.retrieval,
    metrics.retrieval_zh,
    metrics.count,
    metrics.code_similarity,
    metrics.code_similarity_difflib,
]


def length_of_common_subsequence(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + length_of_common_subsequence(a[1:], b[1:])
    return max(length_of_common_subsequence(a[1:], b), length_of_common_subsequence(a, b[1:]))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
@thorough
@given(prediction=texts, answer=texts)
def test_scores_are_from_0_to_1(metric, prediction, answer):
    assert 0 <= metric(prediction, ANSWERS.get(metric, answer), CLASSES) <= 1 + 1e-8


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The red fox, jumped!", "a red dog", 0.4),  # red fox jumped | red dog: precision 1/3, recall 1/2
        ("yes yes", "yes", 2 / 3),  # a word counts as often as both have it: precision 1/2, recall 1
        ("YES.", "yes", 1.0),
        ("don't", "dont", 1.0),
        ("theory", "ory", 0.0),  # articles are words
        ("the", "the", 0.0),  # no word is left
        ("“yes”", "yes", 0.0),  # only ASCII punctuation goes
        ("", "yes", 0.0),
    ],
)
def test_f1_of_words(prediction, answer, score):
    assert metrics.qa_f1(prediction, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("我来到北京清华大学", "北京", 0.4),  # 我 来到 北京 清华大学 | 北京: precision 1/4, recall 1
        ("北京。", "北京", 1.0),
        ("“北京”", "北京", 1.0),  # Chinese punctuation goes, too
        ("ABC", "abc", 1.0),
        ("北京", "上海", 0.0),
        ("。", "。", 0.0),  # no word is left
    ],
)
def test_f1_of_chinese_words(prediction, answer, score):
    assert metrics.qa_f1_zh(prediction, answer) == pytest.approx(score)


# -- ROUGE-L -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("w x y z", "w y z q", 0.75),  # w y z of 4 and 4 words
        ("w x y z q r", "w z", 0.5),  # w z: precision 2/6, recall 1
        ("x y. z", "z x y", 1.0),  # sentences one by one: x y from the first, z from the second
        ("x y z", "z x y", 2 / 3),  # x y of 3 and 3 words
        ("x x x y", "x y", 1.0),  # distinct words alone are counted
        ("X", "x", 0.0),
        ("", "x", 0.0),
        ("x", "", 0.0),
        ("...", "x", 0.0),  # no sentence
        ("\n", "x", 0.0),
    ],
)
def test_rouge_l(prediction, answer, score):
    assert metrics.rouge_l(prediction, answer) == pytest.approx(score, abs=1e-7)  # the package adds 1e-8 below


@thorough
@given(words, words)
def test_rouge_l_of_a_sentence_is_the_common_subsequence(prediction, answer):
    common = length_of_common_subsequence(prediction, answer)
    f1 = 2 * common / (len(prediction) + len(answer))
    assert metrics.rouge_l(" ".join(prediction), " ".join(answer)) == pytest.approx(f1, abs=1e-7)


def test_rouge_l_of_chinese_counts_words():
    # 我 来到 北京 清华大学 | 我 来到 北京: precision 3/4, recall 1
    assert metrics.rouge_l_zh("我来到北京清华大学", "我来到北京") == pytest.approx(6 / 7, abs=1e-7)
    assert metrics.rouge_l_zh("", "我来到北京") == 0.0


def test_rouge_l_of_a_sentence_longer_than_python_recurses():
    limit = sys.getrecursionlimit()
    sentence = " ".join(f"w{i}" for i in range(limit))
    # all words of the prediction are right, and all but one are found
    assert metrics.rouge_l(sentence, "other " + sentence) == pytest.approx(2 * limit / (2 * limit + 1), abs=1e-7)
    assert sys.getrecursionlimit() == limit


def test_one_thread_at_a_time_moves_the_recursion_limit():
    entered = threading.Event()

    def other():
        with metrics._room_for(1):
            entered.set()

    with metrics._room_for(1):
        threading.Thread(target=other).start()
        assert not entered.wait(0.05)
    assert entered.wait(60)


# -- classes, numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answer", "classes", "score"),
    [
        ("Food", "Food", ["Food", "Date"], 1.0),
        ("Food or Date", "Food", ["Food", "Date"], 1 / 2),
        ("Date", "Food", ["Food", "Date"], 0.0),
        ("food", "Food", ["Food", "Date"], 0.0),
        # "Order" is part of the right class, and dropped
        ("Order, rank", "Order, rank", ["Order", "Order, rank"], 1.0),
        # "rank" stands behind the dropped "Order" and is not looked at
        ("Order, rank", "Order, rank", ["Order", "rank", "Order, rank"], 1 / 2),
        # now the right class stands there, which stays anyway
        ("Order, rank", "Order, rank", ["Order", "Order, rank", "rank"], 1.0),
    ],
)
def test_classification(prediction, answer, classes, score):
    assert metrics.classification(prediction, answer, classes) == score


@thorough
@given(st.lists(st.sampled_from(CLASSES)).map(" ".join), st.sampled_from(CLASSES), classes)
def test_classification_drops_from_the_list_that_it_walks_along(prediction, answer, classes):
    named = [name for name in classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    expected = 1 / len(named) if answer in named else 0
    assert metrics.classification(prediction, answer, classes) == expected


def test_classification_needs_classes():
    with pytest.raises(EvaluationError, match="all_classes"):
        metrics.classification("Food", "Food")


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "score"),
    [
        (metrics.count, "There are 12 paragraphs.", "12", 1.0),
        (metrics.count, "12 of 15, or 12 of 20", "12", 1 / 2),  # two of four numbers
        (metrics.count, "012", "12", 0.0),
        (metrics.count, "twelve", "12", 0.0),
        (metrics.retrieval, "Paragraph 3", "Paragraph 3", 1.0),
        (metrics.retrieval, "3", "Paragraph 3", 1.0),
        (metrics.retrieval, "Paragraph 3 or 13 or 30", "Paragraph 3", 1 / 3),
        (metrics.retrieval_zh, "段落7", "段落7", 1.0),
        (metrics.retrieval_zh, "段落7、段落8", "段落7", 1 / 2),
        (metrics.retrieval_zh, "", "段落7", 0.0),
    ],
)
def test_share_of_the_right_number(metric, prediction, answer, score):
    assert metric(prediction, answer) == score


@pytest.mark.parametrize("metric", [metrics.retrieval, metrics.retrieval_zh])
def test_retrieval_needs_a_paragraph(metric):
    with pytest.raises(EvaluationError, match="not 'the third'"):
        metric("3", "the third")


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [metrics.code_similarity, metrics.code_similarity_difflib])
@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("return x", "return x", 1.0),
        ("return x", "return y", 0.88),  # 7 of 8 characters: 87.5 %, to the even one
        ("axxxxxxx", "ayyyyyyy", 0.12),  # 1 of 8 characters: 12.5 %, to the even one
        ("\n```python\n# first\nint x; // second\nreturn x\nreturn y", "return x", 1.0),
        ("# nothing", "return x", 0.0),
        ("", "return x", 0.0),
        ("", "", 1.0),
    ],
)
def test_similarity_of_code(metric, prediction, answer, score):
    assert metric(prediction, answer) == score


def test_the_two_similarities_differ_where_blocks_cross():
    # The longest common subsequence is aaab, 8 of 12 characters. The longest block is ab: at the start of one and at
    # the end of the other, it leaves nothing to match on either side, 4 of 12.
    assert metrics.code_similarity("ababab", "aaaaab") == 0.67
    assert metrics.code_similarity_difflib("ababab", "aaaaab") == 0.33


# -- packages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "metric"),
    [("rouge", metrics.rouge_l), ("jieba", metrics.qa_f1_zh), ("rapidfuzz.fuzz", metrics.code_similarity)],
)
def test_a_missing_package_is_named(monkeypatch, module, metric):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EvaluationError, match=rf"needs the package {module.split('.')[0]}: pip .*kvprune\[eval\]"):
        metric("x", "x")


def test_packages_are_imported_when_they_are_needed(monkeypatch):
    for module in ("rouge", "jieba", "rapidfuzz", "rapidfuzz.fuzz"):
        monkeypatch.setitem(sys.modules, module, None)
    assert runpy.run_path(metrics.__file__)["count"]("12", "12") == 1.0
