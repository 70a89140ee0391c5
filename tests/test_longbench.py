"""LongBench: what is read and asked, what is written, and what is said of bad data."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

from kvprune.errors import EvaluationError
from kvprune.integrations.longbench import TASKS, LongBench, summary, summary_by_length, write_predictions

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "longbench"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"there is no LongBench in {SHARED}")
thorough = profile(max_examples=20 * profile.default.max_examples)

ROW = {
    "input": "Who?",
    "context": "It was she.",
    "answers": ["she", "her"],
    "length": 4,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}
PROMPTS = {"qasper": "Read.\n{context}\nNow answer {input}\nAnswer:", "trec": "{context}\n{input}", "lcc": "{context}"}


@pytest.fixture
def folder(tmp_path):
    return Data(tmp_path)


class Data:
    """A folder of LongBench, beginning with prompts alone."""

    def __init__(self, path):
        self.path = path
        self.write("dataset2prompt.json", json.dumps({task: PROMPTS.get(task, "{context} {input}") for task in TASKS}))
        self.write("dataset2maxlen.json", json.dumps(dict.fromkeys(TASKS, 7)))

    def write(self, name, text):
        (self.path / name).write_text(text, encoding="utf-8")
        return self

    def rows(self, name, *rows):
        """Rows of changes to `ROW`."""
        return self.write(name, "".join(json.dumps(ROW | row) + "\n" for row in rows))

    def mini(self, task, *rows):
        return self.write(f"MiniLongBench_{task}.json", json.dumps({str(i): row for i, row in enumerate(rows)}))

    def examples(self, **settings):
        return list(LongBench(self.path, **settings).examples())


# -- the tasks ---------------------------------------------------------------------------------------------------------


def test_has_21_tasks_of_which_13_are_extended():
    assert len(TASKS) == 21
    assert sum(task.extended for task in TASKS.values()) == 13


def test_chat_models_get_examples_and_code_as_they_are():
    assert [name for name in TASKS if not TASKS[name].chat] == "trec triviaqa samsum lsht lcc repobench-p".split()


def test_few_shot_tasks_count_the_first_line():
    assert [name for name in TASKS if TASKS[name].first_line] == "trec triviaqa samsum lsht".split()


def test_samsum_ends_at_a_line_break_but_not_at_once(folder):
    (example,) = folder.rows("samsum.jsonl", {}).examples()
    assert (example.min_new_tokens, example.stop) == (1, "\n")
    assert {task.stop for name, task in TASKS.items() if name != "samsum"} == {None}


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_row_becomes_an_example(folder):
    (example,) = folder.rows("qasper.jsonl", {}).examples()
    assert example.prompt == "Read.\nIt was she.\nNow answer Who?\nAnswer:"
    assert example.prompt[example.question_at :] == "\nNow answer Who?\nAnswer:"
    assert (example.task, example.index, example.answers) == ("qasper", 0, ("she", "her"))
    assert (example.max_new_tokens, example.min_new_tokens, example.stop, example.chat) == (7, 0, None, True)
    assert example.fields == {"all_classes": None, "length": 4}


def test_no_question_where_nothing_follows_the_context(folder):
    (example,) = folder.rows("lcc.jsonl", {}).examples()
    assert (example.prompt, example.question_at) == ("It was she.", None)


def test_braces_are_text(folder):
    braces = "{} {0} {input} {context} }{ {{x}}"
    (example,) = folder.rows("qasper.jsonl", {"context": braces, "input": braces}).examples()
    assert example.prompt == f"Read.\n{braces}\nNow answer {braces}\nAnswer:"
    assert example.prompt[example.question_at :] == f"\nNow answer {braces}\nAnswer:"


def test_limit_takes_the_first_rows_of_each_task(folder):
    folder.rows("qasper.jsonl", *({"context": f"Story {i}."} for i in range(5))).rows("musique.jsonl", {}, {}, {}, {})
    examples = folder.examples(limit=3)
    assert [(example.task, example.index) for example in examples] == [
        *(("qasper", i) for i in range(3)),
        *(("musique", i) for i in range(3)),
    ]
    assert examples == [example for example in folder.examples() if example.index < 3]
    assert "Story 2." in examples[2].prompt


def test_tasks_come_in_the_order_they_are_given(folder):
    for task in ("qasper", "musique", "hotpotqa"):
        folder.rows(f"{task}.jsonl", {})
    assert [example.task for example in folder.examples(tasks=["musique", "qasper"])] == ["musique", "qasper"]
    assert [example.task for example in folder.examples(tasks="hotpotqa")] == ["hotpotqa"]


def test_extended_reads_the_files_of_longbench_e(folder):
    folder.rows("qasper.jsonl", {}).rows("qasper_e.jsonl", {"length": 5000})
    assert [example.fields["length"] for example in folder.examples(extended=True)] == [5000]


def test_longbench_rows_come_before_mini_ones(folder):
    folder.rows("qasper.jsonl", {}, {}).mini("qasper", {"origin_prompt": "Read.", "gold": ["x"]})
    assert len(folder.examples()) == 2


def test_mini_rows_bring_their_prompt(folder):
    prompt = "Read.\nNow answer me\nNow answer Who?\nAnswer:"
    row = {"origin_prompt": prompt, "gold": ["she"], "prediction": "he"}
    (example,) = folder.mini("qasper", row).examples()
    assert example.prompt == prompt
    assert example.prompt[example.question_at :] == "\nNow answer Who?\nAnswer:"
    assert example.answers == ("she",)
    assert example.fields == {"all_classes": None, "length": None}


def test_mini_rows_with_classes(folder):
    row = {"origin_prompt": "What?", "gold": {"answers": ["Food"], "all_classes": ["Food", "Date"]}}
    (example,) = folder.mini("trec", row).examples()
    assert example.fields["all_classes"] == ["Food", "Date"]
    assert example.question_at is None  # only a line break stands between context and question
    assert LongBench(folder.path).score(example, "Food or Date") == 0.5


@pytest.mark.parametrize("inside", ["", "data/"])
def test_a_zip_file_is_a_folder(folder, inside):
    folder.rows("qasper.jsonl", {}).rows("qasper_e.jsonl", {"length": 5000})
    archive = folder.path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("qasper.jsonl", "qasper_e.jsonl"):
            file.write(folder.path / name, inside + name)
    assert list(LongBench(archive, prompts=folder.path).examples()) == folder.examples()
    assert list(LongBench(archive, prompts=folder.path, extended=True).examples()) == folder.examples(extended=True)


@pytest.mark.parametrize("data", [None, "hub"])
def test_the_hub_gives_the_zip_file(folder, monkeypatch, data):
    archive = folder.path / "archive.zip"
    folder.rows("qasper.jsonl", {})
    with zipfile.ZipFile(archive, "w") as file:
        file.write(folder.path / "qasper.jsonl", "data/qasper.jsonl")
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *name, repo_type: asked.append(name) or str(archive))
    assert list(LongBench(data, prompts=folder.path).examples()) == folder.examples()
    assert asked == [("THUDM/LongBench", "data.zip")]


@pytest.mark.parametrize("extended", [False, True])
def test_a_data_set_with_a_configuration_a_task_is_read(folder, extended, tmp_path_factory, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    name = "qasper_e" if extended else "qasper"
    folder.rows(f"{name}.jsonl", {}, {"context": "{braces}"})
    hub = tmp_path_factory.mktemp("hub")
    (hub / f"{name}.jsonl").write_bytes((folder.path / f"{name}.jsonl").read_bytes())
    (hub / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}.jsonl\n---\n"
    )
    suite = LongBench(f"hub:{hub}", tasks=["qasper"], prompts=folder.path, extended=extended)
    assert list(suite.examples()) == folder.examples(extended=extended)
    with pytest.raises(EvaluationError, match="cannot get trec"):
        list(LongBench(f"hub:{hub}", tasks=["trec"], prompts=folder.path).examples())


def test_no_network_is_said(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", folder.path / "cache")
    with pytest.raises(EvaluationError, match=r"cannot get data.zip of THUDM/LongBench from the hub: .* zip file"):
        list(LongBench("hub", prompts=folder.path).examples())


@needs_shared
def test_every_shared_file_is_read():
    examples = list(LongBench(SHARED).examples())
    assert len(examples) == 237 - 15 + 200  # one task has its own 200 rows, and 15 MiniLongBench ones
    assert set(Counter(example.task for example in examples)) == set(TASKS)


@needs_shared
def test_right_answers_score_1():
    suite = LongBench(SHARED, limit=5)
    for example in suite.examples():
        assert suite.score(example, example.answers[-1]) == pytest.approx(1.0, abs=1e-7), example.task


@needs_shared
def test_mini_prompts_are_those_of_longbench(tmp_path):
    shutil.copy(SHARED / "MiniLongBench_multifieldqa_zh.json", tmp_path)
    asked = {(example.prompt, example.question_at) for example in LongBench(SHARED, "multifieldqa_zh").examples()}
    mini = {(example.prompt, example.question_at) for example in LongBench(tmp_path, prompts=SHARED).examples()}
    assert len(mini) == 15
    assert mini < asked


@needs_shared
def test_questions_of_mini_prompts_begin_behind_the_context():
    prompts = json.loads((SHARED / "dataset2prompt.json").read_text(encoding="utf-8"))
    found = set()
    for example in LongBench(SHARED).examples():
        if example.question_at is not None:
            words = prompts[example.task].partition("{context}")[2].partition("{input}")[0]
            assert example.prompt.startswith(words, example.question_at)
            found.add(example.task)
    # Five have nothing but line breaks there, and two other words than LongBench.
    assert set(TASKS) - found == {"trec", "triviaqa", "samsum", "lsht", "repobench-p", "narrativeqa", "qasper"}


# -- scores ------------------------------------------------------------------------------------------------------------


def test_the_best_answer_counts(folder):
    (example,) = folder.rows("qasper.jsonl", {"answers": ["no", "she said", "she"]}).examples()
    assert LongBench(folder.path).score(example, "She.") == 1.0


@pytest.mark.parametrize(("task", "score"), [("triviaqa", 1.0), ("qasper", 0.5)])
def test_the_first_line_counts_where_examples_are_shown(folder, task, score):
    # qasper: she | she said so again: precision 1/3, recall 1
    (example,) = folder.rows(f"{task}.jsonl", {}).examples()
    assert LongBench(folder.path).score(example, "\n\nshe\nsaid so") == score


def test_code_by_either_matcher(folder):
    (example,) = folder.rows("lcc.jsonl", {"answers": ["aaaaab"]}).examples()
    assert LongBench(folder.path).score(example, "ababab") == 0.67
    assert LongBench(folder.path, code_matcher="difflib").score(example, "ababab") == 0.33


# -- results -----------------------------------------------------------------------------------------------------------


def result(**changes):
    row = {"label": "full", "task": "qasper", "index": 0, "prediction": "她\n说", "answers": ["她"], "score": 0.5}
    return row | {"all_classes": None, "length": 4} | changes


def test_predictions_are_written_as_longbench_reads_them(tmp_path):
    rows = [
        result(index=1, prediction="second"),
        result(label="a2sf 0.25"),
        result(task="trec", all_classes=["Food"], length=None),
        result(),
    ]
    first = {"pred": "她\n说", "answers": ["她"], "all_classes": None, "length": 4}
    written = {
        "pred/full/qasper.jsonl": [first, first | {"pred": "second"}],
        "pred/full/trec.jsonl": [first | {"all_classes": ["Food"], "length": None}],
        "pred/a2sf 0.25/qasper.jsonl": [first],
    }
    assert {path.relative_to(tmp_path).as_posix() for path in write_predictions(rows, tmp_path)} == set(written)
    for name, lines in written.items():
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert [json.loads(line) for line in text.splitlines()] == lines
        assert "她" in text


def test_predictions_of_longbench_e_have_a_folder_of_their_own(tmp_path):
    assert write_predictions([result(label="org/model")], tmp_path, extended=True) == [
        tmp_path / "pred_e" / "org" / "model" / "qasper.jsonl"
    ]


@pytest.mark.parametrize("label", ["", "..", "a/../../b", "/tmp"])
def test_predictions_stay_in_their_folder(tmp_path, label):
    with pytest.raises(EvaluationError, match="outside"):
        write_predictions([result(label=label)], tmp_path)


@needs_shared
def test_written_predictions_have_the_scores_of_the_run(tmp_path):
    """Round trip: what eval.py reads, scored anew, gives the same summary."""
    suite = LongBench(SHARED, limit=2)
    examples = list(suite.examples())
    rows = [
        {
            "label": "cut",
            "task": example.task,
            "index": example.index,
            "prediction": (prediction := example.answers[0][: len(example.answers[0]) // 2 + 1]),
            "answers": list(example.answers),
            "score": suite.score(example, prediction),
            **example.fields,
        }
        for example in examples
    ]
    again = {}
    for path in write_predictions(reversed(rows), tmp_path):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        asked = [example for example in examples if example.task == path.stem]
        scores = [suite.score(example, line["pred"]) for example, line in zip(asked, lines, strict=True)]
        again[path.stem] = round(100 * sum(scores) / len(scores), 2)
    assert summary(rows)["cut"] == again
    assert len(set(again.values())) > 5


def test_summary_is_the_mean_in_per_cent():
    rows = [result(score=1.0), result(score=0.0, index=1), result(score=0.25, index=2), result(task="trec", score=1.0)]
    rows += [result(label="a2sf", score=0.1)]
    assert summary(rows) == {"full": {"qasper": 41.67, "trec": 100.0}, "a2sf": {"qasper": 10.0}}  # 1.25 / 3


def test_summary_by_length_has_three_bins():
    lengths = {0: 0.5, 3999: 1.0, 4000: 0.25, 7999: 0.5}
    rows = [result(length=length, score=score) for length, score in lengths.items()]
    assert summary_by_length(rows) == {"full": {"qasper": {"0-4k": 75.0, "4-8k": 37.5, "8k+": None}}}
    assert summary_by_length([result(length=8000, score=1.0)])["full"]["qasper"]["8k+"] == 100.0


def test_tasks_of_a_summary_are_in_the_order_of_longbench():
    assert list(summary(result(task=task) for task in reversed(TASKS))["full"]) == list(TASKS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "full", "task": "qasper", "index": 0}, "has 'score'; this one: 'label', 'task', 'index'"),
        (result(task="recall"), "'recall' is not a task of LongBench"),
    ],
)
def test_other_results_are_refused(row, message):
    with pytest.raises(EvaluationError, match=message):
        summary([row])


def test_bins_need_lengths():
    with pytest.raises(EvaluationError, match="row 0 of qasper has no length"):
        summary_by_length([result(length=None)])


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["quasper"]}, "no task 'quasper'. Did you mean 'qasper'"),
        ({"tasks": ["needle"]}, "no task 'needle'. It has: narrativeqa"),
        ({"tasks": "musique", "extended": True}, "musique is not part of LongBench-E, which has: qasper"),
        ({"limit": 0}, "limit is a number of samples from 1"),
        ({"limit": 0.5}, "limit is a number of samples from 1"),
        ({"code_matcher": "fuzzy"}, "levenshtein or difflib, not 'fuzzy'"),
        ({"data": None}, "give prompts, the folder LongBench/config"),
        ({"data": "hub"}, "give prompts, the folder LongBench/config"),
    ],
)
def test_bad_settings(folder, settings, message):
    with pytest.raises(EvaluationError, match=message):
        LongBench(**{"data": folder.path, **settings})


def test_a_missing_task_file(folder):
    folder.rows("trec.jsonl", {"all_classes": ["she"]})
    with pytest.raises(EvaluationError, match=r"no qasper.jsonl or MiniLongBench_qasper.json in .*; its tasks: trec"):
        folder.examples(tasks=["trec", "qasper"])
    with pytest.raises(EvaluationError, match=r"no trec_e.jsonl in .*; its tasks: none"):
        folder.examples(tasks="trec", extended=True)


@pytest.mark.parametrize("name", ["nowhere", "dataset2prompt.json"])
def test_data_that_are_no_folder(folder, name):
    with pytest.raises(EvaluationError, match="neither a folder of LongBench's task files nor a zip file"):
        list(LongBench(folder.path / name, prompts=folder.path).examples())


@pytest.mark.parametrize("name", ["dataset2prompt.json", "dataset2maxlen.json"])
def test_missing_prompts(folder, name):
    folder.rows("qasper.jsonl", {})
    (folder.path / name).unlink()
    with pytest.raises(EvaluationError, match=rf"there is no {name} in .* give prompts, the folder LongBench/config"):
        folder.examples()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dataset2prompt.json", "{}", "say nothing about 'qasper'"),
        ("dataset2maxlen.json", "{}", "say nothing about 'qasper'"),
        ("dataset2prompt.json", "[]", r"expected a JSON object, not \[\]"),
        ("dataset2prompt.json", '{"qasper": 1}', "'qasper' should be a text, not 1"),
        ("dataset2prompt.json", '{"qasper": "{input}"}', "holds {context} once, this one 0 times"),
        ("dataset2prompt.json", '{"qasper": "{context} {context}"}', "holds {context} once, this one 2 times"),
        ("dataset2prompt.json", '{"qasper": "{context} {question}"}', "cannot fill in .*question"),
        ("dataset2prompt.json", '{"qasper": "{ {context}"}', "cannot fill in"),
        ("dataset2maxlen.json", '{"qasper": 0}', "should be at least 1, not 0"),
        ("dataset2maxlen.json", '{"qasper": true}', "should be a whole number, not True"),
    ],
)
def test_bad_prompts(folder, name, text, message):
    folder.rows("qasper.jsonl", {}).write(name, text)
    with pytest.raises(EvaluationError, match=message):
        folder.examples()


@pytest.mark.parametrize("field", ["input", "context", "answers", "length", "all_classes"])
def test_a_row_without_a_field(folder, field):
    row = {name: value for name, value in ROW.items() if name != field}
    folder.write("qasper.jsonl", f"{json.dumps(ROW)}\n{json.dumps(row)}\n")
    with pytest.raises(EvaluationError, match=rf"qasper.jsonl, line 2: there is no '{field}', only '(input|cont)"):
        folder.examples()


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("qasper", {"context": ""}, "'context' is empty"),
        ("qasper", {"context": " \n"}, "'context' is empty"),
        ("qasper", {"answers": []}, "'answers' is an empty list"),
        ("qasper", {"answers": "she"}, "'answers' should be a list, not 'she'"),
        ("qasper", {"answers": [1]}, "'answers' should be a text, not 1"),
        ("qasper", {"input": None}, "'input' should be a text, not None"),
        ("qasper", {"context": ["x"]}, "'context' should be a text"),
        ("qasper", {"context": "\ud800"}, "'context' has half a surrogate pair"),
        ("qasper", {"length": "4"}, "'length' should be a whole number or null, not '4'"),
        ("qasper", {"length": True}, "'length' should be a whole number or null, not True"),
        ("qasper", {"all_classes": {}}, "'all_classes' should be a list or null"),
        ("trec", {}, "needs all_classes"),
        ("passage_retrieval_en", {"answers": ["3"]}, "is a paragraph such as 'Paragraph 7', not '3'"),
    ],
)
def test_bad_rows(folder, task, changes, message):
    folder.rows(f"{task}.jsonl", changes)
    with pytest.raises(EvaluationError, match=rf"{task}.jsonl, line 1: .*{message}"):
        folder.examples()


def test_longbench_e_needs_lengths(folder):
    folder.rows("qasper_e.jsonl", {"length": None})
    with pytest.raises(EvaluationError, match="'length' should be a whole number, not None"):
        folder.examples(extended=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(ROW) + "\n\n{'input'", r"qasper.jsonl, line 3: this is not JSON"),
        ("[" * 100_000, r"line 1: this is not JSON"),
        ("3", r"line 1: expected a JSON object, not 3"),
        ("\n", r"there are no samples in"),
    ],
)
def test_bad_lines(folder, text, message):
    folder.write("qasper.jsonl", text)
    with pytest.raises(EvaluationError, match=message):
        folder.examples()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, "row '1': expected a JSON object, not 3"),
        ({"gold": ["x"]}, "row '1': there is no 'origin_prompt'"),
        ({"origin_prompt": "What?"}, "row '1': there is no 'gold'"),
        ({"origin_prompt": "", "gold": ["x"]}, "row '1': 'origin_prompt' is empty"),
        ({"origin_prompt": "What?", "gold": []}, "row '1': 'gold' is an empty list"),
        ({"origin_prompt": "What?", "gold": "x"}, "row '1': 'gold' should be a list or an object, not 'x'"),
        ({"origin_prompt": "What?", "gold": {"answers": ["x"]}}, "row '1': there is no 'all_classes'"),
    ],
)
def test_bad_mini_rows(folder, row, message):
    folder.mini("qasper", {"origin_prompt": "What?", "gold": ["x"]}, row)
    with pytest.raises(EvaluationError, match=rf"MiniLongBench_qasper.json, {message}"):
        folder.examples()


def test_files_that_are_not_utf_8(folder):
    (folder.path / "qasper.jsonl").write_bytes(b'{"input": "\xff"}')
    with pytest.raises(EvaluationError, match=r"cannot read .*qasper.jsonl: .*utf-8"):
        folder.examples()


def test_a_damaged_zip_file(folder):
    archive = folder.path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("qasper.jsonl", json.dumps(ROW))
    archive.write_bytes(archive.read_bytes().replace(b"It was she.", b"It was he. "))
    with pytest.raises(EvaluationError, match=r"cannot read .*qasper.jsonl: Bad CRC"):
        list(LongBench(archive, prompts=folder.path).examples())


# -- any data ----------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["x", "Paragraph 1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
changes = st.dictionaries(st.sampled_from(["input", "context", "answers", "length", "all_classes"]), values, max_size=2)
rows = changes.map(lambda change: ROW | change) | values
mini_rows = st.fixed_dictionaries({}, optional={"origin_prompt": values, "gold": values}) | values


@thorough
@given(st.data(), st.sampled_from(list(TASKS)), st.text(max_size=10))
def test_nothing_but_examples_or_an_evaluation_error_comes_of_any_data(data, task, prediction):
    with tempfile.TemporaryDirectory() as path:
        folder = Data(Path(path))
        if data.draw(st.booleans(), label="mini"):
            folder.mini(task, *data.draw(st.lists(mini_rows, max_size=2), label="rows"))
        else:
            folder.rows(f"{task}.jsonl").write(
                f"{task}.jsonl",
                "\n".join(json.dumps(row) for row in data.draw(st.lists(rows, max_size=2), label="rows")),
            )
        try:
            examples = folder.examples()
        except EvaluationError:
            return
        suite = LongBench(path)
        for example in examples:
            assert example.prompt
            assert example.answers
            assert 0 <= suite.score(example, prediction) <= 1 + 1e-8
            json.dumps(dict(example.fields))
