"""The benchmarks' own arithmetic: ratios within a round, who takes part, bytes, tables, and the pipe to a worker."""

import dataclasses
import json
import sys
import time
from collections import Counter
from pathlib import Path

import beside_llama_cpp
import beyond_window
import bits
import decode_parts
import families
import gpu
import memory
import plots
import pytest
import serve
import steps
import torch
from torch import nn
from transformers import DynamicCache

from kvprune import PrunedCache
from kvprune.cache.models import cache_argument
from kvprune.policies import A2SF, KIVI, Full, ZipCache
from measuring import turns
from measuring.workload import Contender, Job, Stopwatch, build_model, fingerprint, held_bytes, measure, resident
from printing import output
from subjects import llama_worker, rounds
from subjects.contenders import CONTENDERS, EAGER, KVPRESS, STOCK
from subjects.worker import Here, Worker, incomparable


def tiny(name, budget=None, **settings):
    return Job(name, **{"tokens": 64, "budget": budget, "new_tokens": 4, "model": "tiny", **settings})


def result(seconds, nbytes=100):
    return {"prefill_s": seconds, "decode_ms": 10 * seconds, "last_to_first_quarter": 1.0, "nbytes": nbytes}


class Scripted:
    """A runner with answers at hand: `{contender: {measure: answers}}`, each given once."""

    def __init__(self, script):
        self.script, self.asked = script, []

    def ask(self, measure, job):
        self.asked.append((measure, job.contender))
        if measure == "warm_up":
            return self.script[job.contender].get("warm_up", {})
        return self.script[job.contender]["time"].pop(0)


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_round():
    """A machine that is three times as slow in the second round changes no ratio; a ratio of medians would move."""
    measured = {
        tiny(STOCK): [result(1), result(30), result(10)],
        tiny("A2SF", 0.25): [result(2, 25), result(60, 25), result(5, 25)],
    }
    stock, pruned = rounds.summarise(measured)
    assert stock["prefill_s_ratio"] == stock["decode_ms_ratio"] == 1
    assert pruned["prefill_s_ratio"] == pruned["decode_ms_ratio"] == 2
    assert pruned["prefill_s_ratio_range"] == [0.5, 2]
    assert pruned["prefill_s"] == 5
    assert pruned["nbytes_ratio"] == 0.25
    assert (pruned["contender"], pruned["budget"], pruned["rounds"]) == ("A2SF", 0.25, 3)


def test_without_stock_there_are_no_ratios():
    (row,) = rounds.summarise({tiny("A2SF", 0.25): [result(2)]})
    assert row["prefill_s"] == 2
    assert not any("ratio" in name for name in row)


def test_everyone_takes_a_turn_in_every_round():
    runner = Scripted({name: {"time": [result(1), result(2)]} for name in (STOCK, "A2SF")})
    jobs = [tiny(STOCK), tiny("A2SF", 0.25)]
    rounds.interleave(jobs, lambda _: runner, rounds=2, minutes=60, say=pytest.fail)
    assert [name for measure, name in runner.asked if measure == "time"] == [STOCK, "A2SF"] * 2


def test_who_fails_is_named_and_leaves_the_others_alone():
    runner = Scripted(
        {
            STOCK: {"time": [result(1), result(1)]},
            "A2SF": {"time": [result(1), {"error": "out of memory"}]},
            "H2O": {"warm_up": {"error": "needs more"}},
        }
    )
    said = []
    jobs = [tiny(STOCK), tiny("A2SF", 0.25), tiny("H2O", 0.5)]
    measured = rounds.interleave(jobs, lambda _: runner, rounds=2, minutes=60, say=said.append)
    assert list(measured) == [tiny(STOCK)]
    assert said == ["skipped: H2O 50%: needs more", "dropped: A2SF 25%: out of memory"]


def test_rounds_end_when_another_would_take_too_long():
    runner = Scripted({STOCK: {"time": [result(1)]}})  # a second would find no answer
    measured = rounds.interleave([tiny(STOCK)], lambda _: runner, rounds=5, minutes=0, say=pytest.fail)
    assert len(measured[tiny(STOCK)]) == 1


def test_cells_vary_along_one_axis():
    cells = rounds.star([4096, 1024], [1, 4], ["float32", "bfloat16"], [0.25, 0.1])
    assert cells == [
        rounds.Cell(4096, 1, "float32", 0.25),
        rounds.Cell(1024, 1, "float32", 0.25),
        rounds.Cell(4096, 4, "float32", 0.25),
        rounds.Cell(4096, 1, "bfloat16", 0.25),
        rounds.Cell(4096, 1, "float32", 0.1),
    ]


def test_another_budget_is_for_those_that_have_one():
    center = rounds.Cell(budget=0.25)
    names = ["A2SF", "ZipCache"]
    assert [each.name for each in rounds.taking_part(center, names, center)] == [STOCK, *names]
    other = rounds.Cell(budget=0.1)
    assert [each.name for each in rounds.taking_part(other, names, center)] == [STOCK, "A2SF"]


def test_hindrances_say_what_is_missing(tmp_path):
    assert rounds.hindrance(CONTENDERS["A2SF"], tiny("A2SF")) is None
    assert "make peers" in rounds.hindrance(CONTENDERS["kvpress SnapKV"], tiny("kvpress SnapKV"), tmp_path / "python")
    absent = Contender("absent", "transformers", lambda *_: None, package="no_such.package")
    assert "no_such.package" in rounds.hindrance(absent, tiny("absent"))
    assert "GiB" in rounds.hindrance(CONTENDERS[EAGER], tiny(EAGER, tokens=1 << 20))
    assert rounds.hindrance(CONTENDERS[EAGER], tiny(EAGER, tokens=1 << 20, device="cuda")) is None


# -- turns, and llama.cpp ----------------------------------------------------------------------------------------------


class Counting:
    """Its n-th turn takes n seconds a step."""

    def __init__(self):
        self.turns = []

    def turn(self, steps):
        self.turns.append(steps)
        return float(len(self.turns))


def test_first_turns_and_first_steps_do_not_count():
    going = {"one": Counting(), "other": Counting()}
    assert turns.take_turns(going, turns=2, steps=6) == {"one": [2, 3], "other": [2, 3]}
    assert going["one"].turns == [6, 6, 6]
    slow = iter([0.2, 0, 0, 0])
    assert turns.seconds_of(lambda: time.sleep(next(slow)), steps=3) < 0.1


def seconds_of_caches(**steps):
    """Seconds by round, `name=(after FEW tokens, after 4,096)`."""
    here, there = beside_llama_cpp.HERE, beside_llama_cpp.THERE
    names = {
        "stock": (here, beside_llama_cpp.STOCK), "spectral": (here, "Spectral(2)"),
        "f16": (there, beside_llama_cpp.F16), "q4": (there, "q4_0"), "no_flash": (there, beside_llama_cpp.NO_FLASH),
    }  # fmt: skip
    return {
        beside_llama_cpp.Key(*names[name], tokens): rounds
        for name, both in steps.items()
        for tokens, rounds in zip((beside_llama_cpp.FEW, 4096), both, strict=True)
    }


TAKEN = seconds_of_caches(
    stock=([1, 10], [3, 30]),
    spectral=([1, 10], [2, 20]),
    f16=([1, 1], [2, 1]),
    q4=([1, 1], [1.8, 1]),
    no_flash=([0.5, 0.5], [0.9, 0.58]),
)


def test_what_grows_with_a_cache_has_a_ratio_of_its_own():
    """Within a round: a machine that is ten times as slow in the second one changes neither ratio."""
    found = beside_llama_cpp.ratios(
        TAKEN, beside_llama_cpp.Key(beside_llama_cpp.HERE, "Spectral(2)", 4096), beside_llama_cpp.STOCK
    )
    assert found.step == [2 / 3, 2 / 3]
    assert found.growing == [0.5, 0.5]


def test_a_round_in_which_nothing_grew_says_nothing_of_growth():
    found = beside_llama_cpp.ratios(
        TAKEN, beside_llama_cpp.Key(beside_llama_cpp.THERE, "q4_0", 4096), beside_llama_cpp.F16
    )
    assert found.step == [0.9, 1]
    assert found.growing == [pytest.approx(0.8)]


def test_what_is_claimed_is_held_against_what_was_measured():
    """Against llama.cpp's f16 cache with its flash attention, and without."""
    step, growing = beside_llama_cpp.verdict(TAKEN, 4096)
    assert "Spectral(2) 0.67x of stock, float32, at most 0.50x: no" in step
    assert "q4_0, 0.95x of its f16: yes" in step
    assert step.endswith("q4_0, 1.86x of its f16, no flash: yes")
    assert "Spectral(2) 0.50x of stock, float32, at most 0.50x: yes" in growing
    assert "q4_0, 0.80x of its f16: yes" in growing


def test_caches_of_both_libraries_are_rows_of_one_table():
    shown = output.markdown(beside_llama_cpp.shown(TAKEN, dict.fromkeys(TAKEN, 10), 4096))
    assert [line.split(" | ")[0] for line in shown.splitlines() if line.startswith(("| kvprune", "| llama"))] == [
        "| kvprune: stock, float32", "| kvprune: Spectral(2)", "| llama.cpp: f16", "| llama.cpp: q4_0",
        "| llama.cpp: f16, no flash",
    ]  # fmt: skip


def test_without_llama_cpp_it_is_said_how_to_get_it(tmp_path):
    python, gguf = tmp_path / "python", tmp_path / "model.gguf"
    assert "make llama" in beside_llama_cpp.hindrance(python, gguf)
    python.touch()
    assert "make smollm2" in beside_llama_cpp.hindrance(python, gguf)
    assert "make smollm2" in beside_llama_cpp.hindrance(python, None)
    gguf.touch()
    assert beside_llama_cpp.hindrance(python, gguf) is None


def test_what_is_no_policy_is_refused():
    assert beside_llama_cpp.policy("KIVI(4)") == KIVI(4)
    with pytest.raises(SystemExit, match=r"KIVI is no policy: write one such as"):
        beside_llama_cpp.policy("KIVI")


def test_llama_cpp_answers_with_a_reason_where_it_cannot():
    """Whether its package is here, or, as in most environments, is not."""
    job = llama_worker.LlamaJob("a", "no such.gguf", "q4_0", True, [1], tokens=1, room=1, threads=1, filling=1)
    with Worker(script=Path(llama_worker.__file__)) as worker:
        assert set(worker.ask("open", job)) == {"error"}
        assert worker.ask("turn", llama_worker.Turn("a", 1)) == {"error": "KeyError: 'a'"}


# -- one measurement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, each in CONTENDERS.items() if each.family == "kvprune"])
def test_contenders_of_ours_run(name):
    contender = CONTENDERS[name]
    found = measure(contender, tiny(name, 0.75 if contender.has_budget else None))
    assert found["prefill_s"] > 0
    assert found["decode_ms"] > 0
    assert found["nbytes"] > 0


@pytest.mark.parametrize("policy", [Full(), A2SF(40), ZipCache(), A2SF(40) | ZipCache()])
def test_bytes_found_are_those_that_the_cache_counts(policy):
    """And, in each layer, some indices of the batch and the heads, whose size no prompt changes."""
    model = families.build("llama")
    cache = PrunedCache(model, policy)
    with torch.no_grad():
        model(families.token_ids(2, 60), **cache_argument(cache))
    assert 0 <= held_bytes(cache) - cache.nbytes <= 128 * len(cache.layers)


def test_bytes_of_a_stock_cache():
    cache = DynamicCache()
    keys = torch.zeros(2, 4, 10, 8)
    cache.update(keys, keys, 0)
    cache.update(keys, keys, 1)
    assert held_bytes(cache) == 4 * keys.nbytes
    cache.layers[1].keys = cache.layers[0].keys[:, :, :5]  # a view of what is held already
    assert held_bytes(cache) == 3 * keys.nbytes


def test_the_fingerprint_tells_models_apart():
    model, other = build_model("tiny"), build_model("tiny")
    assert fingerprint(model) == fingerprint(other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    assert fingerprint(model) != fingerprint(other)
    assert incomparable({"weights": "a"}, {"weights": "a"}) is None
    assert incomparable({"weights": "a"}, {"weights": "b"})
    assert incomparable({"weights": "a"}, {"error": "no kvpress"}) == "no kvpress"


def test_a_stopwatch_gives_a_figure_for_each_mark():
    watch = Stopwatch("cpu")
    watch.mark()
    watch.mark()
    assert len(watch.seconds()) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_is_in_bytes():
    before = resident("VmRSS")
    held = torch.ones(1 << 23)
    assert 0.9 * held.nbytes < resident("VmRSS") - before < 2 * held.nbytes


# -- processes ---------------------------------------------------------------------------------------------------------

FAKE = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["job"]["contender"] == "dies":
        sys.exit(3)
    print(json.dumps({"echo": request}), flush=True)
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    with Worker(script=script) as worker:
        yield worker


def test_a_worker_is_asked_in_json(fake):
    request = fake.ask("time", tiny("A2SF", 0.25))["echo"]
    assert request["measure"] == "time"
    assert Job(**request["job"]) == tiny("A2SF", 0.25)


def test_a_worker_that_dies_is_an_error_of_its_job_alone(fake):
    assert "3" in fake.ask("time", tiny("dies"))["error"]
    assert "echo" in fake.ask("time", tiny("A2SF", 0.25))


def test_the_real_worker_answers_as_this_process_does():
    with Worker() as worker:
        job = tiny("A2SF", 0.75)
        assert incomparable(Here().ask("versions", job), worker.ask("versions", job)) is None
        assert worker.ask("time", job).keys() == Here().ask("time", job).keys()
        assert worker.ask("time", tiny("A2SF", budget=3)) == Here().ask("time", tiny("A2SF", budget=3))


def test_a_job_that_fails_leaves_a_reason():
    assert "BudgetError" in Here().ask("time", tiny("A2SF", budget=3))["error"]


# -- tables and pictures -----------------------------------------------------------------------------------------------


def row(contender, family="kvprune", tokens=1024, budget=0.25, **figures):
    return {
        "contender": contender, "family": family, "tokens": tokens, "batch": 1, "dtype": "float32", "budget": budget,
        "rounds": 2, "prefill_s": 1.0, "prefill_s_ratio": 1.1, "prefill_s_ratio_range": [1.0, 1.2], "decode_ms": 2.0,
        "decode_ms_ratio": 0.5, "decode_ms_ratio_range": [0.4, 0.6], "last_to_first_quarter": 1.0, "nbytes": 10,
        "nbytes_ratio": 0.25, **figures,
    }  # fmt: skip


def test_a_table_in_markdown():
    shown = output.table("title", "caption", "name", "ratio")
    shown.add_row("A2SF | ZipCache", "0.50x")
    assert output.markdown(shown).splitlines() == [
        "**title**", "", "| name | ratio |", "| --- | ---: |", r"| A2SF \| ZipCache | 0.50x |", "", "caption",
    ]  # fmt: skip


def test_results_are_kept_with_their_notes(tmp_path):
    shown = output.table("title", "", "name")
    output.save(tmp_path / "made" / "x.json", rows=[1])
    output.save_markdown(tmp_path / "made" / "x.json", [shown], ["someone was skipped"])
    assert json.loads((tmp_path / "made" / "x.json").read_text())["rows"] == [1]
    assert (tmp_path / "made" / "x.md").read_text().endswith("- someone was skipped\n")


def test_memory_ratios_are_to_stock():
    def peaks(name, prefill):
        return {"contender": name, "prefill_peak_bytes": prefill, "decode_peak_bytes": 10, "nbytes": 4}

    found = memory.with_ratios([peaks(STOCK, 100), peaks("A2SF", 80)])
    assert found[1]["prefill_peak_bytes_ratio"] == 0.8
    assert memory.with_ratios([peaks("A2SF", 80)]) == [peaks("A2SF", 80)]


def test_pictures_come_of_every_length(tmp_path):
    rows = [
        each
        for tokens in (1024, 4096)
        for each in (
            row(STOCK, "transformers", tokens, None),
            row("A2SF", tokens=tokens),
            row("kvpress SnapKV", KVPRESS, tokens),
            row("A2SF", tokens=tokens, budget=0.5, decode_ms=9.0),
        )
    ]
    (tmp_path / "speed.json").write_text(json.dumps({"rows": rows}))
    assert [path.name for path in plots.draw(tmp_path)] == ["speed-1024.png", "speed-4096.png", "decode.png"]
    assert [each["budget"] for each in plots.along_lengths(rows)].count(0.5) == 0


# -- the GPU's targets -------------------------------------------------------------------------------------------------


def test_sizes_of_a_model():
    sizes = gpu.Sizes.of("tiny", "bfloat16")
    assert sizes.weights == sum(2 * parameter.numel() for parameter in build_model("tiny").parameters())
    assert sizes.kv_token == 2 * 2 * 2 * 2 * 8  # keys and values, 2 bytes, 2 layers, 2 heads of 8


def test_targets_are_of_the_longest_context():
    sizes = gpu.Sizes(weights=1000, kv_token=10)
    rows = [
        row("A2SF", tokens=100, budget=0.25, decode_peak_bytes=1, prefill_s_ratio=1.0),
        row("A2SF", tokens=200, budget=0.25, decode_peak_bytes=600, prefill_s_ratio=1.2),
        row("A2SF", tokens=200, budget=0.1, decode_peak_bytes=210, decode_ms_ratio=0.4),
    ]
    quarter, tenth, faster, zipcache, prefill = gpu.targets(rows, sizes)
    assert (quarter.measured, quarter.met) == (1600 / 1500, False)
    assert (tenth.measured, tenth.met) == (1210 / 1200, True)
    assert (faster.measured, faster.met) == (2.5, True)
    assert (zipcache.measured, zipcache.met) == (None, False)
    assert (prefill.measured, prefill.met) == (1.2, False)


def test_the_gpu_benchmark_runs_without_one(tmp_path, monkeypatch, capsys):
    arguments = "--device cpu --tiny --contexts 64 --rounds 1 --new-tokens 2 --contenders A2SF".split()
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--out", str(tmp_path / "gpu.json")])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    runs = [(each["contender"], each["budget"]) for each in found["rows"]]
    assert runs == [(STOCK, None), ("A2SF", 0.25), ("A2SF", 0.1)]
    assert found["notes"] == ["64 tokens: skipped: kvpress: no --wheels"]
    assert "targets" in capsys.readouterr().out


def test_modules_are_not_bytes_of_a_cache():
    cache = DynamicCache()
    cache.model = nn.Linear(100, 100)
    assert held_bytes(cache) == 0


# -- beyond the window -------------------------------------------------------------------------------------------------


def test_losses_beyond_the_window_are_those_of_the_text():
    """A full cache is fed in blocks and a policy token by token; both predict what one forward pass does."""
    torch.manual_seed(0)
    model = families.build("llama").eval()
    texts = torch.randint(3, 60, (2, 15))
    with torch.no_grad():
        log_p = model(texts).logits.log_softmax(-1)
    right = -log_p[:, 6:-1].gather(2, texts[:, 7:, None]).squeeze(2)
    for policy in (None, "full"):
        torch.testing.assert_close(beyond_window.losses(model, texts, policy, 6), right)
    renumbered = beyond_window.losses(model, texts, "streaming_llm:positions=cache,budget=8", 6)
    assert renumbered.shape == right.shape
    assert not torch.allclose(renumbered, right)


def test_pieces_of_a_text_are_named_by_their_places():
    found = beyond_window.pieces(torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0]]), 2)
    assert found == {"2 to 4": [2.0], "4 to 6": [6.0], "6 to 8": [9.0]}


# -- few bits ----------------------------------------------------------------------------------------------------------


def test_bits_are_counted_as_a_model_of_16_bits_would_hold_them():
    """Whatever is held in float32 counts half; storages count once, and whole."""
    wide, codes = torch.zeros(6), torch.zeros(5, dtype=torch.uint8)
    assert bits.bytes_of([wide, wide[:2], codes, torch.zeros(3, dtype=torch.bfloat16)]) == 12 + 5 + 6
    model = families.build("llama")
    cache = bits.cache_of(model, KIVI(4, group_size=8, residual=4))
    with torch.no_grad():
        model(families.token_ids(1, 60), **cache_argument(cache))
    # 4 bits a code; 8 keys of a channel, and 8 channels of a value, share 32 bits; a block number is of 16 numbers.
    assert bits.bits_of(cache) == pytest.approx(4 + 4 + 0.5)


@pytest.mark.parametrize(
    ("failed", "happened"),
    [
        ("that of generate", {"wrong": 1}),
        ("that of generate", {"counts": Counter()}),
        ("lost", {"counts": Counter(answers=9, lost=1)}),
        ("prefixes in memory within 1 MiB", {"prefixes": 2**20 + 1}),
        ("the process within 2 MiB", {"resident": 2**21 + 1}),
        ("after kill -9", {"found": 0}),
        ("nothing runs", {"running": 1}),
    ],
)
def test_a_load_test_fails_for_what_went_wrong_alone(failed, happened):
    good = serve.Run(Counter(answers=9), wrong=0, prefixes=2**20, resident=2**21, found=3, running=0)
    assert all(serve.verdicts(good, 2**20, 2**21).values())
    told = serve.verdicts(dataclasses.replace(good, **happened), 2**20, 2**21)
    (name,) = [each for each, holds in told.items() if not holds]
    assert failed in name


# -- steps -------------------------------------------------------------------------------------------------------------


def test_steps_are_of_caches_that_go_on():
    found = steps.measured([STOCK, "A2SF", "KIVI 2 bit"], tiny(STOCK, 0.25), turns=2)
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in found.values())
    fed = 3 * (steps.STEPS + 1)  # a turn more than is counted, and a step in each
    config = build_model("tiny").config
    dense = DynamicCache(config=config)
    build_model("tiny")(torch.ones(1, 64 + fed, dtype=torch.long), **cache_argument(dense))
    assert found[STOCK]["nbytes"] == held_bytes(dense)
    assert found["A2SF"]["nbytes"] < found[STOCK]["nbytes"]
    shown = steps.shown(found, [STOCK, "A2SF"], "steps")
    assert list(shown.columns[0].cells) == list(found)


def test_every_part_of_a_step_is_timed():
    assert all(microseconds > 0 for microseconds in decode_parts.parts(repeats=2).values())
