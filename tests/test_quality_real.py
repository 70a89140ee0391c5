"""The bench on the real model: who takes part, what counts as right, and tables of rows."""

from dataclasses import dataclass
from types import SimpleNamespace

import families
import pytest
import quality_real

from kvprune import Everywhere, PolicyError
from kvprune.evaluation.results import Results
from kvprune.policies import TOVA
from kvprune.policy.registry import names
from measuring import real_prompts
from printing import real_tables
from printing.output import Log, markdown


def row(policy, budget, question, index, score, **more):
    return {
        "task": "single, 7 tokens, 1k", "index": index, "policy": policy, "budget": budget, "question": question,
        "kind": "single", "length": 1000, "answer_tokens": 7, "score": score, "tokens_right": score, "kept": 100.0,
        "nbytes": 10, "dense_nbytes": 40, "prediction": "a text of the data", "answers": ["1234567"],
    } | more  # fmt: skip


ROWS = [
    *(row("full", None, None, index, 1.0) for index in range(3)),
    row("full", None, None, 3, 0.0),
    *(row("snapkv", "0.25", "known", index, float(index < 2)) for index in range(4)),
    *(row("kvpress SnapKV, window 32, kernel 7", "0.25", "known", index, float(index < 1)) for index in range(2)),
]


def cells(table):
    return [list(line) for line in zip(*(column.cells for column in table.columns), strict=True)]


def a_prompt(judged, max_new_tokens):
    generation = {"max_new_tokens": max_new_tokens, "ends": (), "done": lambda written: False}
    return real_prompts.Prompt("a task", 0, families.token_ids(1, 60), 50, generation, judged)


def test_every_registered_policy_takes_part_or_is_named():
    found, notes = quality_real.entries(["0.25"])
    texts = [entry.name.split(":")[0] for entry in found] + [note.split(":")[1].strip() for note in notes]
    assert set(names()) - {"full"} <= set(texts)
    assert len({entry.label for entry in found}) == len(found)
    assert {entry.question for entry in found} == {"known", "unknown"}


def test_a_policy_that_keeps_everything_has_no_budget():
    found, _ = quality_real.entries(["0.25", "0.1"], ["zipcache", "tova"])
    assert [entry.budget for entry in found if entry.name == "zipcache"] == [None, None]
    assert sorted(entry.budget for entry in found if entry.name == "tova") == ["0.1", "0.1", "0.25", "0.25"]


def test_a_policy_that_cannot_be_alone_is_named_and_the_others_answer():
    model, results, log = SimpleNamespace(model=families.build("llama"), name="tiny"), Results(None), Log()
    quality = quality_real.Quality(model, results, log)
    who, _ = quality_real.entries(["0.5"], ["kvcrush", "tova"])
    prompt = a_prompt(lambda written: {"score": 1.0}, max_new_tokens=2)
    assert quality.ask(prompt, who) == 2
    assert [row["label"] for row in results.rows()] == ["full", "tova @ 0.5 | known", "tova @ 0.5 | unknown"]
    assert len(log.notes) == 1
    assert "left out: kvcrush" in log.notes[0]
    assert quality.ask(prompt, who) == 0


@dataclass(frozen=True)
class Refusing(TOVA):
    """Raises once the layer has seen so many tokens; with a share over layers, that is when all have."""

    at: int = 60

    def decide(self, table, step):
        if step.tokens >= self.at:
            raise PolicyError("it refuses")
        return super().decide(table, step)

    def decide_together(self, tables, steps):
        raise PolicyError("they refuse")


@pytest.mark.parametrize("together", [1000, 2])
def test_what_cannot_hold_a_prompt_is_named_and_the_others_answer(together):
    """Raised in a layer, when a prompt is decided for all layers, at a token, or by one that reads it by itself."""
    texts = ["a2sf:budget=9KB", "bits:budget=1KB", "tova", "gemfilter | a2sf:budget=9KB", "keyformer"]
    who, notes = quality_real.entries(["0.5"], texts)
    assert not notes
    refusing = [Refusing(0.5), Refusing(0.5, at=62), Refusing(0.5, share=Everywhere())]
    named = [quality_real.Entry(f"{number} refuses", None, known, policy)
             for number, policy in enumerate(refusing) for known in (True, False)]  # fmt: skip
    found = []
    for chosen in ([*named[:3], *who, *named[3:]], [entry for entry in who if "KB" not in entry.name]):
        model, results, log = SimpleNamespace(model=families.build("llama"), name="tiny"), Results(None), Log()
        prompt = a_prompt(lambda written: {"written": list(written)}, max_new_tokens=5)
        assert quality_real.Quality(model, results, log, together).ask(prompt, chosen) == 4
        found.append({row["label"]: (row["written"], row["kept"], row["nbytes"]) for row in results.rows()})
        left_out = [entry for entry in chosen if entry not in who or "KB" in entry.name]
        assert len(log.notes) == len(left_out)
        for entry in left_out:
            (note,) = (each for each in log.notes if each.startswith(f"left out: {entry.label}, a task 0: "))
            assert "sinks and recent" in note or "refuse" in note
    assert found[0] == found[1]
    assert len(found[0]) == 5


def test_the_longest_run_of_an_answer():
    assert real_prompts._longest_run([1, 2, 3, 4], [9, 1, 2, 9, 2, 3, 4, 1]) == 3
    assert real_prompts._longest_run([1, 2, 3], [1, 2, 3]) == 3
    assert real_prompts._longest_run([1], [2, 2]) == 0
    assert real_prompts._longest_run([5, 5], [5]) == 1


def test_hits_of_full_are_counted_where_the_full_cache_answers():
    full, snapkv, _ = cells(real_tables.needles(ROWS, "known", "single", 1000))
    assert full[2] == "75 ± 25% (4)"
    assert snapkv[:2] == ["snapkv", "25%"]
    assert snapkv[2].endswith("(4)")
    assert snapkv[3] == "67 ± 33% (3)"
    assert real_tables.needles(ROWS, "unknown", "single", 1000) is None


def test_side_by_side_takes_the_prompts_that_both_answered():
    (line,) = cells(real_tables.side_by_side(ROWS, "known"))
    assert line[0] == "snapkv / SnapKV, window 32, kernel 7"
    assert line[2] == "100 ± 0% (2)"
    assert line[-1] == "+50 ± 50% (2)"


def test_the_summary_has_every_number_and_no_text_of_the_data():
    lines = real_tables.summary(ROWS)
    assert [line["n"] for line in lines] == [4, 4, 2]
    assert lines[1]["score"] == 0.5
    assert lines[1]["prompts"] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert "a text" not in str(lines)
    assert "1234567" not in str(lines)


def test_tables_without_rows_are_left_out():
    assert all(not shown for shown in real_tables.tables([]).values())
    assert "snapkv" in markdown(real_tables.tables(ROWS)["needles known"][0])


def test_bytes_are_of_a_full_cache_of_the_same_type():
    rows = [*ROWS[:-2], *(row | {"nbytes": 0} for row in ROWS[-2:])]  # of presses nobody measures them
    assert [line[5] for line in cells(real_tables.needles(rows, "known", "single", 1000))] == ["25%", "25%", ""]


def test_shares_of_bytes_have_a_column_each_where_they_were_measured():
    """Rows or bytes, the question known or unknown apart; who keeps everything is in the first."""
    held = {"cache": "bfloat16", "half_nbytes": 20}
    rows = [
        *ROWS[:3],
        *(row("bits", share, "known", index, 1.0, **held) for share in ("0.25b", "0.05b") for index in range(3)),
        row("snapkv", "0.05", "known", 0, 0.0, **held),
        row("kivi:bits=4", None, "known", 0, 1.0, **held),
        row("kvzip", "0.02", "unknown", 0, 0.5, **held),
    ]
    known, unknown = (real_tables.on_bytes(rows, 1000, question) for question in ("known", "unknown"))
    assert [column.header for column in known.columns] == ["policy", "25%", "5%", "bytes"]
    whole = "100 ± 0% (3 of 3)"
    assert cells(known) == [
        ["full cache", whole, whole, "100%"],
        ["`Bits(budget)`", whole, whole, "50.0%, 50.0%"],
        ["`SnapKV(budget)`", "", "0% (0 of 1)", "50.0%"],
        ["`KIVI(bits=4)`", "100% (1 of 1)", "", "50.0%"],
    ]
    assert [column.header for column in unknown.columns] == ["policy", "2%", "bytes"]
    assert real_tables.on_bytes(ROWS, 1000, "known") is None


def test_likelihood_has_an_error_and_a_number_in_every_cell():
    figures = {"task": "a text", "kl": 0.5, "agreement": 0.75}
    full, snapkv = ("full", None, None), ("snapkv", "0.25", "known")
    rows = [
        {"policy": policy, "budget": budget, "question": question, "index": index, "nll_change": change, **figures}
        for index, change in enumerate((0.1, 0.3))
        for policy, budget, question in (full, snapkv)
    ]
    assert cells(real_tables.likelihood(rows)) == [
        ["snapkv", "25%", "+0.200 ± 0.100 (2)", "0.500 ± 0.000 (2)", "75 ± 0% (2)"]
    ]


def test_a_quick_run_reports_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["quality_real.py", "--quick", "--tables", "--out", str(tmp_path / "found.jsonl"),
                                     "--report", str(tmp_path / "none.md")])  # fmt: skip
    quality_real.main()
    assert not list(tmp_path.iterdir())


def test_pairs_of_policies_that_both_models_tell_apart_are_counted():
    """Of three pairs, one is alike and one is not; the third is within its error on the other model."""
    rows = [
        row(policy, "0.25", "known", index, score)
        for policy, scores in (("snapkv", (1, 1, 1)), ("tova", (0.6, 0.5, 0.4)), ("h2o", (0, 0, 0)))
        for index, score in enumerate(scores)
    ]
    embedded = [
        {"name": name, "budget": 0.25, "question": "known", "words": words, "recall": recall + by, "recall_error": 0.05}
        for name, recall in (("snapkv", 0.6), ("tova", 0.9), ("h2o", 0.5), ("knorm", 1.0))
        for words, by in ((3, 0.02), (7, -0.02))
    ]
    shown = real_tables.beside_embedded(rows, embedded, "known")
    assert [line[0] for line in cells(shown)] == ["snapkv", "tova", "h2o"]
    assert [line[3] for line in cells(shown)] == ["60 ± 4%", "90 ± 4%", "50 ± 4%"]  # of both lengths
    assert "3 pairs 1 stand in the same order in both and 1 in the other" in shown.caption
    assert real_tables.beside_embedded(rows, embedded, "unknown") is None
