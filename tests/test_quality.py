"""`bench/quality.py`: what counts as answered, before and after compression, here and in the environment of kvpress."""

import json
import sys
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import families
import likelihood
import pytest
import quality
import torch

from kvprune import KVPruneError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.demo import load
from kvprune.demo.measure import Questions, measure, reference
from kvprune.policies import Full, SnapKV, StreamingLLM, find
from kvprune.policy.registry import parse
from measuring.asking import Answered, Asked, merge
from printing import quality_tables as tables
from printing.quality_tables import FULL, Row, Rows
from subjects.press_worker import Presses, PressJob
from subjects.worker import PEERS, Worker

REPORT = Path(__file__).parents[1] / "bench" / "quality.md"


@pytest.fixture(scope="module")
def model():
    return load()[0]


@pytest.fixture(scope="module")
def questions():
    return Questions.draw(12, tokens=256, notes=12, seed=3)


@pytest.fixture(scope="module")
def asked(questions):
    return quality.asked_about(questions)


@pytest.fixture(scope="module")
def full(model, asked):
    """Of the stock cache, by whether the question is known."""
    return {known: quality.here(FULL, None, model, None, asked).ask(known) for known in (True, False)}


def write(model, policy, document, question, known):
    """What `generate` answers, `[3]`; an unknown question is a second turn on the compressed document."""
    cache = PrunedCache(model, policy)
    if not known:
        with torch.no_grad():
            model(torch.tensor([document]), **cache_argument(cache))
    prompt = torch.tensor([[*document, *question]])
    mask = torch.ones_like(prompt)
    written = model.generate(prompt, attention_mask=mask, **cache_argument(cache), max_new_tokens=3, do_sample=False)
    return written[0, prompt.shape[1] :].tolist()


# -- what is asked, and what counts ------------------------------------------------------------------------------------


def test_questions_are_those_of_the_prompts(questions, asked):
    assert [len(each.questions) for each in asked] == [8, 4]
    prompts = [each.document + question for each in asked for question in each.questions]
    assert prompts == questions.prompts.tolist()
    assert [right for each in asked for right in each.answers] == questions.answers.tolist()


@pytest.mark.parametrize("known", [True, False])
def test_the_full_policy_answers_as_the_stock_cache(model, asked, full, known):
    found = quality.here("full", None, model, Full(), asked).ask(known)
    assert found.right == full[known].right
    assert found.kept == full[known].kept
    assert torch.tensor(full[known].right).float().mean() > 0.9  # and there is something to lose


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("text", quality.EVICTING)
def test_with_everything_kept_all_policies_answer_as_the_full_cache(model, asked, full, text, known):
    found = quality.here(text, 1.0, model, parse(text, budget=1.0), asked).ask(known)
    assert found.right == full[known].right
    assert found.kept == full[known].kept


@pytest.mark.parametrize("known", [True, False])
def test_a_cache_that_forgot_the_notes_cannot_answer(model, asked, known):
    right = torch.tensor(quality.here("", None, model, StreamingLLM(8), asked).ask(known).right)
    assert right[:, 1:].float().mean() < 0.3
    if known:
        assert right[:, 0].float().mean() > 0.9  # the first word comes out of the prefill


def test_a_known_question_is_answered_as_in_the_demo(model, questions, asked):
    dense = reference(model, questions)
    for policy in (StreamingLLM(0.5), SnapKV(40)):
        found = Row("", None, True, quality.here("", None, model, policy, asked).ask(True))
        expected = measure(model, questions, dense, policy, label="").recall
        assert sum(found.shares(1)) / len(questions.prompts) == pytest.approx(expected)


def test_an_unknown_question_is_a_second_turn(model, asked):
    policy = SnapKV(0.5)
    found = quality.here("", None, model, policy, asked).ask(False)
    written = [write(model, policy, each.document, question, False) for each in asked for question in each.questions]
    expected = [
        words[0] == right[0] for words, right in zip(written, chain(*(each.answers for each in asked)), strict=True)
    ]
    assert [words[0] for words in found.right] == expected


def test_bytes_are_of_one_sequence(full):
    assert full[True].nbytes == full[False].nbytes == 3 * 2 * 2 * 32 * 4 * (256 + 3 + 2)


def test_parts_weigh_as_many_questions_as_they_have():
    merged = merge([Answered([[True]], 1.0, 10.0), Answered([[False]] * 3, 5.0, 30.0)])
    assert merged == Answered([[True], [False], [False], [False]], 4.0, 25.0)


# -- kvpress -----------------------------------------------------------------------------------------------------------

# A press with the rule of StreamingLLM, in the way that a press of kvpress is used.
STAND_IN = """
from contextlib import contextmanager
from dataclasses import dataclass

@dataclass
class StreamingLLMPress:
    compression_ratio: float = 0.0
    n_sink: int = 4

    @contextmanager
    def __call__(self, model):
        hooks = [layer.self_attn.register_forward_hook(self.prune, with_kwargs=True) for layer in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()

    def prune(self, module, args, kwargs, output):
        layer = (kwargs.get("cache") or kwargs["past_key_values"]).layers[module.layer_idx]
        length = layer.keys.shape[2]
        last = -(-length * (1 - self.compression_ratio) // 1) - self.n_sink
        slots = [*range(self.n_sink), *range(length - int(last), length)]
        layer.keys, layer.values = layer.keys[:, :, slots], layer.values[:, :, slots]
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A worker whose kvpress is the stand-in."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "kvpress.py").write_text(STAND_IN)
    with Worker(environment={"PYTHONPATH": str(folder)}, script=quality.PRESS_WORKER) as worker:
        yield worker


@pytest.mark.parametrize("known", [True, False])
def test_a_press_predicts_what_the_policy_of_its_rule_writes(stand_in, tmp_path, known):
    """With random weights, where any other position of a question or of a word predicts something else."""
    families.build("llama").save_pretrained(tmp_path)
    model, policy = families.build("llama"), StreamingLLM(0.5, interval=None)
    documents, questions = families.token_ids(6, 60).tolist(), families.token_ids(6, 3).tolist()
    asked = [
        Asked(document, [question], [write(model, policy, document, question, known)])
        for document, question in zip(documents, questions, strict=True)
    ]
    found = Answered(**stand_in.ask("answer", PressJob(str(tmp_path), "StreamingLLMPress", 0.5, known, asked)))
    assert found.kept == (32 if known else 30)
    right = torch.tensor(found.right)
    if not known:
        right = right[:, :1]  # then the policy makes room for the question, which the press does not
    assert right.all()


def test_a_press_tells_its_settings(stand_in):
    found = stand_in.ask("versions", Presses(["StreamingLLMPress"]))
    assert found["defaults"] == {"StreamingLLMPress": {"n_sink": 4}}
    assert found["versions"]["torch"] == version("torch")


def test_a_press_that_fails_is_named_and_leaves_the_others_alone(stand_in, model, asked):
    log = quality.Log()
    candidates = [quality.there("NoPress", 0.5, stand_in, asked), quality.here(FULL, None, model, None, asked)]
    rows = quality.run(candidates, log)
    assert [row.name for row in rows] == [FULL, FULL]
    assert len(log.notes) == 2
    assert "NoPress at 50%" in log.notes[0]


# Draws of its own; a prompt of its own, in words, for the second reading.
OTHERWISE = {"RandomPress", "KVzipPress"}


def test_the_real_presses_rank_as_their_rules(model, asked):
    if not PEERS.exists():
        pytest.skip("no environment of kvpress: `make peers` makes it")
    with Worker(PEERS, script=quality.PRESS_WORKER) as worker:
        for pair in quality.PAIRS:
            if pair.press in OTHERWISE:
                continue
            policy = pair.twin(0.5) if pair.twin else find(pair.policy)(0.5, interval=None)
            found = quality.there(pair.press, 0.5, worker, asked).ask(True)
            expected = quality.here("", 0.5, model, policy, asked).ask(True)
            apart = torch.tensor(found.right) != torch.tensor(expected.right)
            assert apart.float().mean() < 0.05, pair.press  # budgets are rounded down there, up here
            assert -0.01 <= expected.kept - found.kept <= 1.01  # entries that are masked are not kept


# -- tables and the report ---------------------------------------------------------------------------------------------


def row(name, budget, known, right):
    return Row(name, budget, known, Answered([[bool(int(word)) for word in words] for words in right], 10.0, 100.0))


def test_shares_are_by_question():
    assert row("", None, False, ["011", "000", "110"]).shares(1) == [1, 0, 0.5]
    assert row("", None, False, ["011", "000"]).shares(0) == [pytest.approx(2 / 3), 0]
    assert tables.share([0, 1, 0, 1]) == "50 ± 29%"
    assert tables.share([0.5], "+") == "+50%"


def test_the_first_word_after_a_known_question_does_not_count():
    full = Answered([[True] * 3], 20.0, 400.0)
    known, unknown = (row("", 0.5, known, ["100", "111"]).to_dict(full, itemsize=4) for known in (True, False))
    assert known["recall"] == unknown["recall"] == 0.5
    assert "recall_three_words" not in known
    assert unknown["recall_three_words"] == pytest.approx(2 / 3)
    assert (known["ratio"], known["half_ratio"], known["right"]) == (0.25, 0.5, "100 111")


def test_differences_are_of_the_same_question():
    """Two that are right on the same questions differ by nothing, whatever each one's error."""
    rows = Rows([
        row(FULL, None, True, ["111"] * 4),
        row("mine", 0.5, True, ["111", "100", "111", "100"]),
        row("theirs", 0.5, True, ["111", "100", "111", "100"]),
        row("theirs", 1.0, True, ["111"] * 4),
    ])  # fmt: skip
    shown = tables.side_by_side(rows, [("mine", "mine", "theirs")], [0.5], known=True)
    cells = {str(column.header): list(column.cells) for column in shown.columns}
    assert cells["difference"] == ["+0 ± 0%"]
    assert cells["kvpress"] == ["50 ± 29%"]
    assert "told to keep everything: theirs 100 ± 0%" in str(shown.caption)


def test_who_did_not_answer_leaves_a_gap():
    rows = Rows([row(FULL, None, True, ["111"] * 2), row("a2sf", 0.5, True, ["111"] * 2)])
    shown = tables.by_budget(rows, ["a2sf"], [0.5, 0.25], known=True, first=1)
    assert [list(column.cells) for column in shown.columns] == [["a2sf"], ["100 ± 0%"], [""]]


def test_a_report_keeps_its_text():
    text = "before\n<!-- measured: a -->\nold\n<!-- /measured -->\nafter\n<!-- measured: b -->\n<!-- /measured -->\n"
    filled = tables.fill(text, {"a": r"new \1", "b": "too"})
    assert filled.splitlines() == [
        "before", "<!-- measured: a -->", "", r"new \1", "", "<!-- /measured -->", "after",
        "<!-- measured: b -->", "", "too", "", "<!-- /measured -->",
    ]  # fmt: skip
    assert tables.fill(filled, {"a": r"new \1", "b": "too"}) == filled


def test_a_report_without_a_place_says_which():
    with pytest.raises(KVPruneError, match="measured: a"):
        tables.fill("nothing", {"a": "new"})


def test_a_small_run_without_peers_or_data_fills_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "DATA", tmp_path)
    report, out = tmp_path / "quality.md", tmp_path / "quality.json"
    report.write_text(REPORT.read_text())
    sizes = "--tokens 128 --notes 6 --questions 2 --budgets 0.5 --shares 0.5 --words 3 5"
    arguments = f"{sizes} --peers {tmp_path / 'python'}".split()
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments, "--out", str(out), "--report", str(report)])
    quality.main()
    found = json.loads(out.read_text())
    assert [("kvpress" in note, "stories260K" in note) for note in found["left_out"]] == [(True, False), (False, True)]
    assert len(found["rows"]) == 2 * (1 + len(quality.EVICTING) + len(quality.PACKING))
    assert len(found["at_as_many_bytes"]) == 2 * (1 + len(quality.ON_BYTES))
    assert all(row["half_ratio"] == row["ratio"] for row in found["at_as_many_bytes"])  # of a cache in 16 bits
    assert [row["words"] for row in found["of_lengths"] if row["name"] == FULL] == [3, 3, 5, 5]
    bits = [row for row in found["at_as_many_bytes"] if row["name"].startswith("bits")]
    assert all(0.3 < row["ratio"] < 0.6 for row in bits)
    assert report.read_text().count("2 questions, documents of 128 tokens") == 3
    assert "`make peers`" in report.read_text()


@pytest.mark.parametrize(
    "mistake",
    ["--budgets 25", "--budgets 0", "--shares 0", "--questions 0", "--texts 0", "--report /no/such/report.md"],
)
def test_mistakes_are_told_before_anything_runs(mistake, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quality.py", *mistake.split()])
    with pytest.raises(SystemExit):
        quality.main()
    assert mistake.split()[0] in capsys.readouterr().err
