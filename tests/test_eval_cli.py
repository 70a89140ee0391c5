"""`kvprune eval`: one command from a model and data to results, a table and pictures; mistakes end in one sentence."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvprune import KVPruneError
from kvprune.cli import app
from kvprune.demo.task import RecallGenerator, decode
from kvprune.evaluation.integrations import integration
from kvprune.evaluation.results import read

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no evaluation data in {DATA}")


def run(*arguments):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(decode(RecallGenerator(5).document(300, 5).document))
    return path


@pytest.fixture
def longbench(tmp_path):
    """A folder of two tasks in the words of the embedded model: one chat task, and one of LongBench-E's short ones."""
    generator = RecallGenerator(2)
    recall = generator.document(200, 4)
    row = {
        "context": decode(recall.document[1:]), "input": decode(recall.question(1)),
        "answers": [decode(recall.values[1])], "length": 200, "all_classes": None,
        "dataset": "qasper", "language": "en", "_id": "0",
    }  # fmt: skip
    for name in ("qasper.jsonl", "qasper_e.jsonl", "hotpotqa.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n" + json.dumps(row | {"_id": "1"}) + "\n")
    prompts = dict.fromkeys(("qasper", "hotpotqa"), "{context} {input}")
    (tmp_path / "dataset2prompt.json").write_text(json.dumps(prompts))
    (tmp_path / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(prompts, 3)))
    return tmp_path


def test_longbench_from_a_folder(longbench):
    out = longbench / "results" / "demo.jsonl"
    result = run(
        "longbench", "--model", "demo", "--data", longbench, "--tasks", "qasper,hotpotqa", "--limit", 1,
        "--policy", "full", "--policy", "snapkv", "--budget", "0.5,0.9", "--out", out,
    )  # fmt: skip
    rows = read(out)
    labels = ["full", "snapkv @ 0.5", "snapkv @ 0.9"]
    assert [(row["task"], row["label"]) for row in rows] == [(t, x) for t in ("qasper", "hotpotqa") for x in labels]
    assert [row["score"] for row in rows] == [1.0] * 6
    assert "hotpotqa" in result.output
    assert "100.0" in result.output
    predictions = out.with_suffix("") / "pred" / "snapkv@0.5" / "qasper.jsonl"
    assert json.loads(predictions.read_text()) == {
        "pred": rows[1]["prediction"], "answers": rows[1]["answers"], "all_classes": None, "length": 200,
    }  # fmt: skip


def test_longbench_e_shows_scores_by_length(longbench):
    result = run(
        "longbench", "--model", "demo", "--data", longbench, "--e", "--policy", "full", "--out", longbench / "e.jsonl"
    )
    assert "0-4k" in result.output
    assert (longbench / "e" / "pred_e" / "full" / "qasper.jsonl").is_file()


def test_longbench_with_the_question_held_back(longbench):
    arguments = ("--model", "demo", "--data", longbench, "--tasks", "qasper", "--limit", 1, "--budget", 60, "--json")
    scores = {}
    for question in ("known", "unknown"):
        shown = run("longbench", *arguments, "--policy", "snapkv", "--question", question).stdout
        (comparison,) = json.loads(shown)
        scores[question] = comparison["results"][0]["figures"]["score"]
    assert scores["known"] > scores["unknown"]


def test_synthetic_draws_a_heat_map(tmp_path):
    picture, out = tmp_path / "heat.png", tmp_path / "results.jsonl"
    result = run(
        "synthetic", "--model", "demo", "--tasks", "needle_single", "--lengths", "150,300", "--count", 3,
        "--policy", "full", "--policy", "streaming_llm", "--heat-map", picture, "--out", out,
    )  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "streaming_llm" in result.output
    rows = read(out)
    assert {(row["length"], row["depth"]) for row in rows} == {(n, d) for n in (150, 300) for d in (0, 50, 100)}
    page = tmp_path / "page.html"
    CliRunner().invoke(app, ["compare", str(out), "--out", str(page)], catch_exceptions=False)
    assert "By depth and length" in page.read_text()


def test_likelihood_of_any_text(text):
    shown = run(
        "likelihood", "--model", "demo", "--text", text, "--length", 64, "--limit", 3, "--policy", "full",
        "--policy", "streaming_llm", "--budget", 40, "--json",
    ).stdout  # fmt: skip
    ((full, pruned),) = (comparison["results"] for comparison in json.loads(shown))
    assert full["figures"]["nll_change"] == full["figures"]["kl"] == 0
    assert pruned["figures"]["kl"] > 0
    assert full["examples"] == pruned["examples"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--policy": "a2fs"}, "a2sf"),
        ({"--budget": "12 parsecs"}, "parsecs"),
        ({"--text": "absent.txt"}, "absent.txt"),
        ({"--length": "9000"}, "window"),
        ({"--length": "400"}, "shorter than"),
        ({"--prompt": "64"}, "--prompt"),
        ({"--model": "./no such model"}, "no such model"),
    ],
)
def test_mistakes_about_likelihood_end_in_one_sentence(text, change, message):
    options = {"--model": "demo", "--policy": "a2sf", "--budget": "0.5", "--text": str(text), "--length": "64"} | change
    with pytest.raises(KVPruneError, match=message):
        run("likelihood", *[part for pair in options.items() for part in pair])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--lengths": "4k"}, "--lengths"),
        ({"--depths": "120"}, "depth"),
        ({"--tasks": "needle_singel"}, "needle_single"),
        ({"--distractors": ","}, "--distractors"),
        ({"--lengths": "8"}, "8"),
    ],
)
def test_mistakes_about_synthetic_tasks_end_in_one_sentence(change, message):
    options = {"--model": "demo", "--policy": "full", "--lengths": "150", "--count": "1"} | change
    with pytest.raises(KVPruneError, match=message):
        run("synthetic", *[part for pair in options.items() for part in pair])


def test_mistakes_about_longbench_end_before_the_model_loads(longbench):
    for change, message in (("--tasks=narrativeqa", "narrativeqa"), ("--data=absent", "absent")):
        with pytest.raises(KVPruneError, match=message):
            run("longbench", "--model", "absent", "--data", longbench, "--policy", "full", change)


def test_a_chat_template_that_is_not_there_is_named(longbench):
    with pytest.raises(KVPruneError, match="chat template"):
        run("longbench", "--model", "demo", "--data", longbench, "--policy", "full", "--chat")


def test_integrations_are_found_by_entry_point(tmp_path, monkeypatch):
    """One that is not there, or whose imports fail, is named with the cause."""
    folder = tmp_path / "other-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[kvprune.evaluations]\nother = json:dumps\nbroken = no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert integration("other") is json.dumps
    with pytest.raises(KVPruneError, match=r"'broken'.*package other.*No module named 'no_such_module'"):
        integration("broken")
    with pytest.raises(KVPruneError, match="no installed package registers 'absent'"):
        integration("absent")


@needs_data
@pytest.mark.parametrize("model", ["demo", pytest.param(str(DATA / "stories260K"), marks=pytest.mark.long)])
def test_every_file_of_longbench_runs(tmp_path, model):
    """Scores say nothing here; contexts are far longer than a window, which both models have different ones of."""
    out = tmp_path / "results.jsonl"
    run(
        "longbench", "--model", model, "--data", DATA / "longbench", "--limit", 1, "--policy", "a2sf",
        "--budget", 64, "--max-length", 300, "--out", out,
    )  # fmt: skip
    rows = read(out)
    assert len(rows) == len({row["task"] for row in rows}) == 21
    assert all(0 <= row["score"] <= 1 for row in rows)
    assert all(row["prompt_tokens"] <= 300 for row in rows)
    assert len(list((tmp_path / "results" / "pred" / "a2sf@64").iterdir())) == 21


@needs_data
def test_a_context_longer_than_the_window(tmp_path):
    out = tmp_path / "results.jsonl"
    run(
        "longbench", "--model", DATA / "stories260K", "--data", DATA / "longbench", "--tasks", "narrativeqa,gov_report",
        "--limit", 1, "--policy", "a2sf", "--budget", 64, "--out", out,
    )  # fmt: skip
    short, long = read(out)
    assert short["prompt_tokens"] == 512 - 128
    assert long["prompt_tokens"] == 512 - 256  # its answer may take 512 tokens, of which the window leaves half
    assert short["left_out_tokens"] > 10_000
