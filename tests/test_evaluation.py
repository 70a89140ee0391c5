"""Evaluations: who takes part, how prompts are made, what rows say, what survives an interruption."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import families
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import DynamicCache

from kvprune import EvaluationError, KVPruneError, PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.demo.task import RecallGenerator, decode
from kvprune.evaluation.answers import Answers
from kvprune.evaluation.contenders import Held, contenders
from kvprune.evaluation.example import Example
from kvprune.evaluation.models import LanguageModel, load
from kvprune.evaluation.processes import Processes
from kvprune.evaluation.prompts import PromptMaker
from kvprune.evaluation.results import Results, read
from kvprune.evaluation.run import run
from kvprune.policies import A2SF, Full
from kvprune.policy.registry import parse

TEMPLATE = (
    "{% for m in messages %}question {{ m.content | trim }} {% endfor %}{% if add_generation_prompt %}note{% endif %}"
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["suite", "model", "task", "index", "label", "nbytes"]), inner, max_size=6)
    ),
)


class Words:
    """A suite of recall questions: share of the answer's words that stand in the prediction."""

    name = "words"

    def __init__(self, count=3, tokens=300):
        generator = RecallGenerator(3)
        self._recalls = [generator.document(tokens, 6) for _ in range(count)]

    def examples(self):
        for index, recall in enumerate(self._recalls):
            document = decode(recall.document[1:])
            prompt = f"{document} {decode(recall.question(2))}"
            yield Example("recall", index, prompt, (decode(recall.values[2]),), 3, question_at=len(document) + 1)

    def score(self, example, prediction):
        wanted = example.answers[0].split()
        return sum(word in prediction.split() for word in wanted) / len(wanted)


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def chatty(demo):
    """The embedded model with a chat template around its prompts."""
    tokenizer = type(demo.tokenizer).from_pretrained(demo.tokenizer.name_or_path)
    tokenizer.chat_template = TEMPLATE
    return LanguageModel("chatty", demo.model, tokenizer)


def work_of(model, suite=None, **settings):
    suite = suite or Words()
    question_known = settings.pop("question_known", True)
    return Answers(suite, list(suite.examples()), PromptMaker(model, **settings), question_known)


# -- who takes part --------------------------------------------------------------------------------------------------


def test_every_policy_meets_every_budget():
    labels = [each.label for each in contenders(["full", "a2sf", "zipcache", "h2o:budget=0.5"], ["0.25", "128"])]
    assert labels == ["full", "a2sf @ 0.25", "a2sf @ 128", "zipcache", "h2o:budget=0.5"]


def test_a_chain_takes_the_budget_where_a_link_has_none():
    first, second = contenders(["a2sf:budget=0.5 | tova", "a2sf:budget=0.5 | kivi"], ["0.25"])
    assert str(first.policy).startswith("A2SF(budget=0.5) | TOVA(budget=0.25")
    assert first.budget == "0.25"
    assert second.budget is None


@pytest.mark.parametrize(
    ("policies", "budgets"), [(["a2fs"], ["0.25"]), (["a2sf"], ["12 parsecs"]), (["a2sf"], []), ([], [])]
)
def test_who_cannot_take_part_is_named(policies, budgets):
    with pytest.raises(KVPruneError):
        contenders(policies, budgets)


def test_the_full_cache_is_the_stock_one(demo):
    (full,) = contenders(["full"], ["0.5"])
    assert type(full.cache(demo.model)) is DynamicCache


def test_held_bytes_are_those_of_the_cache(demo):
    ids = families.token_ids(1, 40)
    stock, pruned = DynamicCache(config=demo.model.config), PrunedCache(demo.model, Full())
    for cache in (stock, pruned):
        demo.model(ids, **cache_argument(cache))
    assert Held.by(pruned, demo.model).nbytes == pruned.nbytes
    held = Held.by(stock, demo.model)
    assert held.nbytes == held.dense_nbytes == pruned.dense_nbytes == 2 * held.half_nbytes


@pytest.mark.parametrize("family", ["gemma3", "qwen3-hybrid", "linear"])
def test_held_bytes_of_hybrid_models_count_alike(family):
    """Sliding windows and states of linear attention weigh as much in the stock cache as in what is dense of ours."""
    model = families.linear_hybrid() if family == "linear" else families.build(family)
    stock, pruned = DynamicCache(config=model.config), PrunedCache(model, Full())
    for cache in (stock, pruned):
        model(families.token_ids(1, 40), **cache_argument(cache))
    assert Held.by(stock, model).nbytes == pruned.dense_nbytes


# -- prompts ---------------------------------------------------------------------------------------------------------


def example(prompt, **fields):
    return Example("task", 0, prompt, ("x",), fields.pop("max_new_tokens", 4), **fields)


def words_of(prompt, model):
    return model.tokenizer.decode(prompt.ids[0], skip_special_tokens=True).split()


def test_a_short_prompt_is_left_alone(demo):
    text = decode(RecallGenerator(1).document(200, 3).document[1:])
    prompt = PromptMaker(demo)(example(text))
    assert prompt.left_out == 0
    assert words_of(prompt, demo) == text.split()


@given(limit=st.integers(8, 150), asked=st.integers(0, 198))
def test_a_long_prompt_loses_its_middle(demo, limit, asked):
    words = decode(RecallGenerator(1).document(200, 3).document[1:]).split()
    question_at = len(" ".join(["", *words])) - len(" ".join(["", *words[asked:]]))
    prompt = PromptMaker(demo, max_length=limit)(example(" ".join(words), question_at=question_at))
    kept = words_of(prompt, demo)
    assert limit - 1 <= prompt.ids.shape[1] <= limit
    tail = len(kept) - limit // 2
    assert kept == words[: limit // 2] + words[len(words) - tail :]
    if asked >= len(words) - tail:  # the question is in the part that stays
        assert words_of_tail(prompt, demo) == words[asked:]


def words_of_tail(prompt, model):
    return model.tokenizer.decode(prompt.ids[0, prompt.question :], skip_special_tokens=True).split()


def test_the_middle_goes_before_the_template_comes(chatty):
    words = decode(RecallGenerator(1).document(200, 3).document[1:]).split()
    prompt = PromptMaker(chatty, max_length=50)(example(" ".join(words)))
    shown = words_of(prompt, chatty)
    assert (shown[0], shown[-1]) == ("question", "note")
    assert shown[1:20] == words[:19]
    assert shown[-20:-1] == words[-19:]


def test_a_template_is_left_out_where_the_task_wants_none(chatty):
    assert words_of(PromptMaker(chatty)(example("the old baker", chat=False)), chatty) == ["the", "old", "baker"]
    assert words_of(PromptMaker(chatty, chat=False)(example("the old baker")), chatty) == ["the", "old", "baker"]


def test_the_question_is_found_inside_a_template(chatty):
    prompt = PromptMaker(chatty)(example("  the old baker slept", question_at=len("  the old ")))
    assert words_of_tail(prompt, chatty) == ["baker", "slept", "note"]


def test_a_prompt_longer_than_the_window_leaves_room_for_the_answer(demo):
    text = "the old baker slept " * 5000
    prompt = PromptMaker(demo)(example(text, max_new_tokens=100))
    assert prompt.ids.shape[1] == demo.window - 100
    assert prompt.left_out == 20001 - (demo.window - 100)


def test_an_answer_never_takes_more_than_half_of_the_window(demo):
    assert PromptMaker(demo)(example("the", max_new_tokens=10**6)).max_new_tokens == demo.window // 2


def test_what_cannot_be_a_prompt_is_named(demo):
    tokenizer = type(demo.tokenizer).from_pretrained(demo.tokenizer.name_or_path)
    silent = LanguageModel("silent", demo.model, lambda text, **_: {"input_ids": []})
    with pytest.raises(EvaluationError, match="chat template"):
        PromptMaker(LanguageModel("plain", demo.model, tokenizer), chat=True)
    with pytest.raises(EvaluationError, match="at least 8"):
        PromptMaker(demo, max_length=7)
    with pytest.raises(EvaluationError, match="task, row 0"):
        PromptMaker(silent)(example(""))


# -- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate(demo):
    work = work_of(demo)
    rows = run(work, contenders(["full", "a2sf:kernel_size=7"], ["0.5"]), Results(None), model="demo")
    assert [row["index"] for row in rows] == [0, 0, 1, 1, 2, 2]
    for row in rows:
        (unit,) = work.units()[row["index"]]
        ids = demo.tokenizer(unit.prompt, return_tensors="pt").input_ids
        cache = None if row["label"] == "full" else PrunedCache(demo.model, A2SF(0.5, kernel_size=7))
        output = demo.model.generate(ids, **cache_argument(cache), max_new_tokens=3, do_sample=False)
        assert row["prediction"] == demo.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["score"] == work.suite.score(unit, row["prediction"]) > 0.5
        assert row["prompt_tokens"] == ids.shape[1]
        if cache is not None:
            assert row["nbytes"] == cache.nbytes


def test_an_unknown_question_comes_after_compression(demo):
    """By hand: the document alone is compressed, then the question is fed, then the answer is generated."""
    work = work_of(demo, question_known=False)
    row = run(work, contenders(["snapkv"], ["40"]), Results(None), model="demo")[0]
    (unit,) = work.units()[0]
    ids = demo.tokenizer(unit.prompt, return_tensors="pt").input_ids
    cache = PrunedCache(demo.model, "snapkv:budget=40")
    with torch.no_grad():
        demo.model(ids[:, :-3], **cache_argument(cache))
    output = demo.model.generate(ids, **cache_argument(cache), max_new_tokens=3, do_sample=False)
    assert row["prediction"] == demo.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    known = run(work_of(demo), contenders(["snapkv"], ["40"]), Results(None), model="demo")
    assert sum(each["score"] for each in known) > row["score"]


@pytest.mark.parametrize("policy", ["kvzip:recent=4", "snapkv:share=everywhere,window=4"])
def test_who_waits_for_the_end_of_a_prompt_does_not_see_an_unknown_question(demo, policy, monkeypatch):
    """What such a policy keeps of the document, it chose by the document alone."""
    work, held = work_of(demo, Words(count=1), question_known=False), []
    by = Held.by.__func__
    monkeypatch.setattr(Held, "by", classmethod(lambda cls, cache, model: held.append(cache) or by(cls, cache, model)))
    run(work, contenders([policy], ["40"]), Results(None), model="demo")
    ids = demo.tokenizer(work.units()[0][0].prompt, return_tensors="pt").input_ids[:, :-3]
    alone = PrunedCache(demo.model, parse(policy, budget=40))
    with torch.no_grad():
        demo.model(ids, **cache_argument(alone))
    for layer in alone.pruned_layers:
        chosen = [set(row.tolist()) for row in alone.kept_positions(layer)[0]]
        for row, rows in zip(held[0].kept_positions(layer)[0], chosen, strict=True):
            assert set(row[row < ids.shape[1]].tolist()) - {-1} <= rows


def test_a_question_that_cannot_be_held_back_is_named(demo):
    suite = Words()
    hidden = [dataclasses.replace(each, question_at=None) for each in suite.examples()]
    work = Answers(suite, hidden, PromptMaker(demo), question_known=False)
    with pytest.raises(EvaluationError, match="held back"):
        run(work, contenders(["a2sf"], ["0.5"]), Results(None), model="demo")


def test_a_stop_text_ends_an_answer(demo):
    suite = Words(count=1)
    (plain,) = suite.examples()
    first = plain.answers[0].split()[0]
    stopped = Answers(suite, [dataclasses.replace(plain, stop=first)], PromptMaker(demo))
    later = Answers(suite, [dataclasses.replace(plain, stop=first, min_new_tokens=2)], PromptMaker(demo))
    full = contenders(["full"], ["1"])
    assert run(stopped, full, Results(None), model="demo")[0]["new_tokens"] == 1
    assert run(later, full, Results(None), model="demo")[0]["new_tokens"] == 3


def test_layers_that_are_elsewhere_answer_alike(demo):
    """device_map="auto" where memory is short leaves layers on disk, which come when they are called."""
    pytest.importorskip("accelerate")
    places = {"model.layers.1": "disk", "model.layers.2": "disk"}
    rest = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    spread = load("demo", device_map={**rest, **places})
    assert any(parameter.is_meta for parameter in spread.model.parameters())
    who = contenders(["full", "a2sf:kernel_size=7", "zipcache"], ["0.25"])
    rows = [
        run(work_of(model), who, Results(None), model="demo")
        for model in (demo, spread, load("demo", device_map="auto"))
    ]
    said = [[row["prediction"] for row in some] for some in rows]
    assert said[0] == said[1] == said[2]


# -- results ---------------------------------------------------------------------------------------------------------


def row(task="a", index=0, label="x", **fields):
    sizes = {"nbytes": 1, "dense_nbytes": 2, "half_nbytes": 1}
    return {"suite": "s", "model": "m", "task": task, "index": index, "label": label, "score": 0.5, **sizes, **fields}


def test_what_was_added_is_read_again(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    results = Results(path)
    results.add(row())
    results.add(row(index=1, prediction="日本\n"))
    results.add(row(index=1, prediction="another"))
    assert read(path) == [row(), row(index=1, prediction="日本\n")]
    assert Results(path).has("a", 1, "x")


@given(st.data())
def test_a_file_that_was_cut_anywhere_goes_on(tmp_path_factory, data):
    """Rows that were whole are kept, the one that was cut is not, and what is added stands on lines of its own."""
    path = tmp_path_factory.mktemp("cut") / "results.jsonl"
    rows = [row(index=index, prediction="é" * index) for index in range(4)]
    results = Results(path)
    for each in rows:
        results.add(each)
    whole = path.read_bytes()
    end = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:end])
    kept = whole[:end].count(b"\n")
    assert read(path) == rows[:kept]
    again = Results(path)
    assert len(again) == kept
    for each in rows:
        again.add(each)
    again.finish()
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps(row())}\n{{broken\n{json.dumps(row(index=1))}\n")
    with pytest.raises(EvaluationError, match=r"line 2 of .*results\.jsonl"):
        Results(path)


@given(value=JSON)
def test_any_json_is_rows_or_an_error(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "results.jsonl"
    path.write_text(json.dumps(value) + "\n")
    try:
        rows = read(path)
    except EvaluationError:
        return
    assert rows in ([value], [])


def test_finishing_puts_rows_of_all_parts_in_order(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second = Results(path, 0), Results(path, 1)
    second.add(row(index=1, label="y"))
    first.add(row(task="b"))
    first.add(row(index=0))
    second.add(row(index=1))
    rows = first.finish(["a", "b"], ["x", "y"])
    assert [(each["task"], each["index"], each["label"]) for each in rows] == [
        ("a", 0, "x"), ("a", 1, "x"), ("a", 1, "y"), ("b", 0, "x"),
    ]  # fmt: skip
    assert read(path) == rows
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


def test_rows_of_other_settings_are_not_mixed(tmp_path, demo):
    path = tmp_path / "results.jsonl"
    who = contenders(["streaming_llm"], ["50"])
    run(work_of(demo), who, Results(path), model="demo")
    before = path.read_bytes()
    with pytest.raises(EvaluationError, match="max_length None"):
        run(work_of(demo, max_length=100), who, Results(path), model="demo")
    with pytest.raises(EvaluationError, match="'other'"):
        run(work_of(demo), who, Results(path), model="other")
    assert path.read_bytes() == before


def test_nothing_is_done_twice(tmp_path, demo, monkeypatch):
    path = tmp_path / "results.jsonl"
    run(work_of(demo, Words(2)), contenders(["streaming_llm"], ["50"]), Results(path), model="demo")
    asked = []
    answer = Answers._answer
    monkeypatch.setattr(Answers, "_answer", lambda self, example, prompt, who: (
        asked.append((example.index, who.label)) or answer(self, example, prompt, who)
    ))  # fmt: skip
    rows = run(work_of(demo), contenders(["full", "streaming_llm"], ["50"]), Results(path), model="demo")
    assert asked == [(0, "full"), (1, "full"), (2, "full"), (2, "streaming_llm @ 50")]
    assert [(each["index"], each["policy"]) for each in rows] == [
        (i, p) for i in range(3) for p in ("full", "streaming_llm")
    ]
    assert read(path) == rows


def test_an_interrupted_run_goes_on(tmp_path, demo, monkeypatch):
    path = tmp_path / "results.jsonl"
    who = contenders(["full", "streaming_llm"], ["50"])
    answer = Answers._answer

    def interrupted(self, example, prompt, contender):
        if (example.index, contender.label) == (1, "streaming_llm @ 50"):
            raise KeyboardInterrupt
        return answer(self, example, prompt, contender)

    monkeypatch.setattr(Answers, "_answer", interrupted)
    told = io.StringIO()  # no terminal
    with pytest.raises(KeyboardInterrupt):
        run(work_of(demo), who, Results(path), model="demo", console=Console(file=told, width=200))
    assert len(read(path)) == 3
    assert "interrupted: 3 of 6 done, kept in" in told.getvalue()
    monkeypatch.setattr(Answers, "_answer", answer)
    rows = run(work_of(demo), who, Results(path), model="demo", console=Console(file=told, width=200))
    assert "3 of 6 done in an earlier run" in told.getvalue()
    assert "6 of 6 done" in told.getvalue()
    assert [(each["index"], each["label"]) for each in rows] == [
        (index, label) for index in range(3) for label in ("full", "streaming_llm @ 50")
    ]


# -- processes -------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 9), units=st.integers(0, 50))
def test_every_unit_has_one_owner(count, units):
    for number in range(units):
        assert sum(Processes(index, count).owns(number) for index in range(count)) == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({}, Processes()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Processes(3, 8, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Processes(1, 2, 1)),
    ],
)
def test_launchers_say_who_a_process_is(monkeypatch, names, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert Processes.from_environment() == expected


def test_two_processes_do_the_work_of_one(tmp_path):
    """Also where an earlier run of three was interrupted: what its parts hold is not done again."""
    text = tmp_path / "text.txt"
    text.write_text(decode(RecallGenerator(5).document(400, 5).document))
    command = [
        "-m", "kvprune", "eval", "likelihood", "--model", "demo", "--text", str(text), "--length", "64",
        "--limit", "5", "--batch-size", "1", "--policy", "full", "--policy", "streaming_llm", "--budget", "40",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    call([*command, "--out", str(one)])
    rows = read(one)
    before = {**rows[4], "nll": 123.0}
    two.with_name("two.jsonl.part2").write_text(json.dumps(before) + '\n{"suite": "likel')
    call([*launcher, *command, "--out", str(two)])
    found = read(two)
    assert [(each["index"], each["label"]) for each in found] == [(each["index"], each["label"]) for each in rows]
    assert found[4] == before
    for mine, other in zip(rows, found, strict=True):
        if mine is not rows[4]:
            assert mine == other
    assert not list(tmp_path.glob("*.part*"))


def call(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
