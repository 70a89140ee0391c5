"""Likelihood from a cache: the full cache costs nothing, and its likelihood is that of one plain forward pass."""

import sys
import weakref
from dataclasses import replace

import families
import likelihood
import pytest
import torch
import torch.nn.functional as F

from kvprune import EvaluationError
from kvprune.evaluation import likelihood as evaluated
from kvprune.evaluation.contenders import Contender
from kvprune.evaluation.likelihood import Likelihood, logits
from kvprune.evaluation.models import LanguageModel
from kvprune.policies import Full, StreamingLLM

PROMPT = 16


@pytest.fixture(scope="module")
def sequences():
    return families.token_ids(3, 40)


@pytest.fixture(scope="module")
def results(sequences):
    """In two batches, the second smaller."""
    policies = {"full": Full(), "streaming": StreamingLLM(8)}
    found = likelihood.measure(families.shared(), sequences, policies, prompt=PROMPT, batch_size=2)
    return {result.policy: result for result in found}


def test_the_full_policy_changes_nothing(results):
    stock, full = results[likelihood.FULL], results["full"]
    assert (stock.nll_change, stock.kl, stock.agreement, stock.ratio) == (0, 0, 1, 1)
    assert full.nll_change == pytest.approx(0, abs=1e-5)
    assert full.kl == pytest.approx(0, abs=1e-8)
    assert full.agreement == 1
    assert full.dense_nbytes == stock.dense_nbytes == 2 * full.half_nbytes


def test_the_likelihood_is_that_of_a_plain_forward(results, sequences):
    """Of the tokens after the first that is fed: the prediction at the end of the prompt does not count."""
    with torch.no_grad():
        logits = families.stock()(sequences).logits[:, PROMPT:-1]
    expected = F.cross_entropy(logits.flatten(0, 1), sequences[:, PROMPT + 1 :].flatten()).item()
    assert results[likelihood.FULL].nll == pytest.approx(expected, abs=1e-5)
    assert results["full"].nll == pytest.approx(expected, abs=1e-5)


def test_a_pruned_cache_shows(results):
    pruned = results["streaming"]
    assert pruned.nll - results[likelihood.FULL].nll == pytest.approx(pruned.nll_change)
    assert pruned.kl > 0.01
    assert pruned.ratio < 0.5


def digits(text, **_):
    """A tokenizer: every digit is a token."""
    return {"input_ids": [1 + int(digit) for digit in text]}


@pytest.fixture
def work(tmp_path):
    """Two sequences of 24 tokens, in one batch."""
    path = tmp_path / "digits.txt"
    path.write_text("314159265358979323846264338327950288419716939937510")
    return Likelihood(LanguageModel("tiny", families.shared(), digits), path, 24, PROMPT, limit=2, batch_size=2)


def test_the_logits_of_one_step_at_a_time_are_on_the_device(work, monkeypatch):
    """Those of the full cache go to the CPU, here a copy, as from another device; all that is computed is the same."""
    contenders = [
        Contender("full", None, None),
        Contender("streaming", None, StreamingLLM(8)),
        Contender("everything", None, Full()),
    ]
    (unit,) = work.units()
    expected = list(work.measure(unit, contenders))
    made, most = [], []

    def watched(*arguments):
        for step in logits(*arguments):
            made.append(weakref.ref(step))
            most.append(sum(each() is not None for each in made))
            yield step

    monkeypatch.setattr(evaluated, "logits", watched)
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    assert list(work.measure(unit, contenders)) == expected
    assert len(most) == 3 * (24 - 1 - PROMPT)
    assert max(most) <= 2  # the last one may be held until it is replaced


@pytest.mark.parametrize("change", [{"limit": 0}, {"batch_size": 0}, {"prompt": 0}, {"prompt": 23}, {"length": 2}])
def test_numbers_without_meaning_are_refused(work, change):
    with pytest.raises(EvaluationError):
        replace(work, **change)


def test_documents_follow_one_another():
    def tokenizer(text, **_):
        return {"input_ids": [1, *map(int, text)]}

    assert likelihood.cut(["23", "4", "567"], tokenizer, 2, length=3).tolist() == [[1, 2, 3], [1, 4, 1]]
    assert likelihood.cut(["23", "4"], tokenizer, 2, length=3).tolist() == [[1, 2, 3]]


def test_without_data_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["likelihood.py", "--model", str(tmp_path / "absent")])
    with pytest.raises(SystemExit) as stopped:
        likelihood.main()
    assert stopped.value.code == 2
    assert "--model" in capsys.readouterr().err
