"""`kvprune compare`: means and errors by hand, tables, a picture and a page from results of any evaluation."""

import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from typer.testing import CliRunner

from kvprune import EvaluationError
from kvprune.cli import app
from kvprune.evaluation.doubts import doubts
from kvprune.evaluation.page import page
from kvprune.evaluation.pictures import curves, svg
from kvprune.evaluation.summary import compare


def row(task, index, label, score, nbytes=25, **fields):
    policy, _, budget = label.partition(" @ ")
    return {
        "suite": "words", "model": "m", "task": task, "index": index, "label": label, "policy": policy,
        "budget": budget or None, "score": score, "nbytes": nbytes, "dense_nbytes": 100, "half_nbytes": 50,
        "settings": {"question": "known"}, **fields,
    }  # fmt: skip


ROWS = [
    row("one", 0, "full", 1.0, 100),
    row("one", 0, "a2sf @ 0.25", 0.5),
    row("one", 1, "full", 1.0, 100),
    row("one", 1, "a2sf @ 0.25", 0.0),
    row("two", 0, "full", 1.0, 100),
    row("two", 0, "a2sf @ 0.25", 1.0, 50),
    row("two", 1, "full", 0.5, 100),
    row("two", 1, "a2sf @ 0.25", 1.0),
]
LIKELIHOOD = [
    {
        **row("text", index, label, None, suite="likelihood"),
        **{"nll": nll, "nll_change": nll - 1, "kl": 0.1, "agreement": 0.9},
    }
    for index in range(2)
    for label, nll in (("full", 1.0), ("a2sf @ 0.25", 1.5 + index / 10))
]  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def test_the_score_is_the_mean_of_the_means_of_tasks():
    (comparison,) = compare(ROWS)
    full, pruned = comparison.summaries
    assert comparison.full is full
    assert full.figures["score"] == (1.0 + 0.75) / 2
    assert pruned.figures["score"] == (0.25 + 1.0) / 2
    assert pruned.tasks == {"one": 0.25, "two": 1.0}
    # variance of (0.5, 0) is 0.125, of their mean 0.0625; of (1, 1) nothing; of the mean of both a quarter
    assert pruned.errors["score"] == math.sqrt(0.0625 / 4)


def test_bytes_are_those_measured():
    (comparison,) = compare(ROWS)
    _, pruned = comparison.summaries
    assert pruned.nbytes == 125 / 4
    assert pruned.ratio == 125 / 400
    assert pruned.half_ratio == 125 / 200


def test_a_single_example_has_no_error():
    (comparison,) = compare(ROWS[:2])
    assert all(math.isnan(summary.errors["score"]) for summary in comparison.summaries)
    assert json.loads(json.dumps(comparison.to_dict()))["results"][0]["errors"] == {"score": None}


def test_what_was_not_measured_alike_stands_apart():
    unknown = [{**each, "settings": {"question": "unknown"}} for each in ROWS]
    known, later, other, text = compare([*ROWS, *unknown, {**ROWS[0], "model": "n"}, *LIKELIHOOD])
    assert "after compression" in later.title
    assert "after compression" not in known.title
    assert other.model == "n"
    assert [metric.name for metric in text.metrics] == ["nll", "nll_change", "kl", "agreement"]


def test_uneven_examples_are_pointed_out():
    assert not compare(ROWS)[0].is_uneven
    assert compare(ROWS[:-1])[0].is_uneven


def test_a_row_without_its_figure_is_named():
    with pytest.raises(EvaluationError, match="two, row 0, under full has no score"):
        compare([*ROWS[:4], {**ROWS[4], "score": None}])


def test_a_curve_goes_through_what_was_measured():
    more = [row("one", index, "a2sf @ 0.5", 1.0, 50) for index in range(2)]
    (comparison,) = compare([*ROWS, *more])
    axes = curves(comparison).axes[0]
    a2sf, full = axes.lines
    assert a2sf.get_xydata().tolist() == [[62.5, 62.5], [100.0, 100.0]]
    assert full.get_ydata()[0] == 87.5


def test_a_picture_in_a_page_is_the_same_every_time():
    (comparison,) = compare(ROWS)
    first = svg(curves(comparison))
    assert first == svg(curves(comparison))
    assert ET.fromstring(first).tag.endswith("svg")


def test_the_page_needs_nothing_else_and_shows_names_as_they_are():
    (comparison,) = compare([{**each, "model": "<script>"} for each in ROWS])
    made = page([comparison])
    assert "<script" not in made
    assert "&lt;script&gt;" in made
    assert "src=" not in made
    assert 'href="http' not in made
    assert "By task" in made
    assert ">two<" in made


def test_compare_puts_files_together(tmp_path):
    first, second = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", LIKELIHOOD)
    out = tmp_path / "deep" / "page.html"
    result = run("compare", first, second, "--out", out)
    assert result.exit_code == 0
    assert "62.5" in result.output
    assert "+0.550" in result.output
    assert out.read_text().count("<svg") == 2


def test_compare_as_json(tmp_path):
    result = run("compare", write(tmp_path / "a.jsonl", ROWS), "--out", tmp_path / "page.html", "--json")
    (comparison,) = json.loads(result.stdout)
    assert [each["label"] for each in comparison["results"]] == ["full", "a2sf @ 0.25"]


def test_compare_draws_one_picture(tmp_path):
    first, second = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", LIKELIHOOD)
    picture = tmp_path / "picture.png"
    run("compare", first, "--out", tmp_path / "page.html", "--picture", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    both = tmp_path / "both.html"
    with pytest.raises(EvaluationError, match="one comparison"):
        run("compare", first, second, "--out", both, "--picture", picture)
    assert both.read_text().count("<svg") == 2
    both.unlink()
    with pytest.raises(EvaluationError, match="write one of"):
        run("compare", first, "--out", both, "--picture", tmp_path / "picture.nothing")
    assert both.exists()


@pytest.mark.parametrize("place", ["file/page.html", "folder"])
def test_a_page_that_cannot_be_written_is_named_first(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(EvaluationError, match=place.partition("/")[0]):
        run("compare", write(tmp_path / "a.jsonl", ROWS), "--out", tmp_path / place)


def test_results_that_should_be_doubted():
    """A task that the full cache cannot do, and prompts that were cut, each example once."""
    assert not list(doubts(ROWS))
    hopeless = [{**each, "score": 0.0} for each in ROWS if each["task"] == "two"]
    (told,) = doubts([*ROWS[:4], *hopeless])
    assert told.startswith("two: the full cache scores nothing")
    (told,) = doubts([{**each, "left_out_tokens": 5, "prompt_tokens": 4000} for each in ROWS])
    assert told.startswith("4 of 4 prompts")
    assert "4,000 tokens" in told


def test_every_line_says_how_many_examples(tmp_path):
    output = run("compare", write(tmp_path / "a.jsonl", ROWS), "--out", tmp_path / "page.html").output
    assert re.search(r"a2sf .* ± .* 4 *$", output, re.MULTILINE)


@pytest.mark.parametrize("text", ["", "not JSON\n\n", "[]\n", '{"suite": 1}\n'])
def test_what_is_no_result_is_named(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=r"a\.jsonl"):
        run("compare", path, "--out", tmp_path / "page.html")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"absent\.jsonl"):
        run("compare", tmp_path / "absent.jsonl")
