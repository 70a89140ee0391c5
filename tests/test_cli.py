"""The command line, as a person and as a program would use it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvprune
from kvprune import KVPruneError, policies
from kvprune.cli import app, main
from kvprune.demo.task import RecallGenerator, decode


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.fixture
def prompt(tmp_path):
    """A prompt file, and the right answer."""
    recall = RecallGenerator(2).document(800, 10)
    path = tmp_path / "prompt.txt"
    path.write_text(decode(recall.prompt(4)[1:]))
    return path, decode(recall.values[4])


def test_policies_lists_every_name():
    output = run("policies").output
    for name in ("a2sf", "h2o", "snapkv", "tova", "streaming_llm", "full"):
        assert name in output


def test_policies_as_json():
    entries = {entry["name"]: entry for entry in json.loads(run("policies", "--json").stdout)}
    assert entries["a2sf"]["settings"]["forgetting_factor"] == 0.95
    assert "2407.20485" in entries["a2sf"]["source"]


def generated(path, *more: str):
    return run("generate", "--model", "demo", "--prompt-file", str(path), "--max-new-tokens", "4", *more)


def test_generate_answers_and_says_what_it_cost(prompt, tmp_path):
    path, answer = prompt
    picture = tmp_path / "kept.png"
    result = generated(path, "--policy", "a2sf:kernel_size=7", "--plot", str(picture), "--report")
    assert result.exit_code == 0
    assert answer in result.output
    assert re.search(r"\d+ prompt tokens in [\d.]+ s, 4 new at [\d.]+ tokens/s; cache .* saved", result.output)
    assert "rows/head" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "rows/head" not in generated(path).output


def test_generate_as_json(prompt):
    path, answer = prompt
    summary = json.loads(generated(path, "--budget", "128", "--policy", "snapkv", "--json", "--compare").stdout)
    assert summary["text"].startswith(answer)
    assert summary["nbytes"] == summary["cache"]["nbytes"] < summary["dense_nbytes"] == summary["full"]["nbytes"]
    assert summary["full"]["text"].startswith(answer)
    assert summary["new_tokens"] == 4
    assert summary["prefill_seconds"] > 0


def test_generate_beside_the_full_cache(prompt):
    output = generated(prompt[0], "--compare").output
    assert output.index("A2SF(budget=0.25, kernel_size=27, ahead=23)") < output.index("full cache")
    assert output.count("prompt tokens in") == 2


def test_generate_from_a_prompt_on_the_command_line(prompt):
    path, _ = prompt
    text = path.read_text()
    same = [run("generate", "--model", "demo", *given, "--json", "--max-new-tokens", "3").stdout
            for given in (("--prompt", text), ("--prompt-file", str(path)))]  # fmt: skip
    assert json.loads(same[0])["text"] == json.loads(same[1])["text"]


def test_generate_samples_by_seed(prompt):
    def text(*sampling: str) -> str:
        return json.loads(generated(prompt[0], "--json", *sampling).stdout)["text"]

    hot = ("--temperature", "9", "--top-k", "50")
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1")
    assert len({text(*hot, "--seed", str(seed)) for seed in range(4)}) > 1
    assert text("--temperature", "9", "--top-k", "1") == text()


def test_a_policy_of_ones_own(prompt, tmp_path, monkeypatch):
    """By module and name; main() finds modules in the folder it is called in."""
    (tmp_path / "mine_alone.py").write_text(
        "from dataclasses import dataclass\nfrom kvprune.policies import H2O\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(H2O):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["kvprune", "generate", "--model", "demo", "--prompt-file", str(prompt[0]), "--policy",
                     "mine_alone:Mine:sinks=2", "--budget", "100", "--max-new-tokens", "1"],
    )  # fmt: skip
    monkeypatch.setattr("sys.path", [*sys.path])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code


# -- conversations -----------------------------------------------------------------------------------------------------


def talked(lines: list[str], *options: str) -> str:
    """What is written when these lines come in."""
    arguments = ["chat", "--model", "demo", "--max-new-tokens", "4", *options]
    result = CliRunner().invoke(app, arguments, input="\n".join(lines), catch_exceptions=False)
    assert result.exit_code == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_a_conversation_by_lines(tmp_path):
    """Documents, questions, what is held after each, another policy, a file, and mistakes on the way."""
    recall = RecallGenerator(3).document(600, 8)
    document, saved = tmp_path / "a document.txt", tmp_path / "talk.safetensors"
    document.write_text(decode(recall.document[1:]))
    questions = [decode(recall.question(note)) for note in range(3)]
    output = talked(
        [f"/read {document}", questions[0], "", "/policy", "/polish", "/read", "/read none.txt", f"/save {saved}",
         "/policy kivi:bits=4", questions[1], "/report", "/help", "/quit", "unsaid"]
    )  # fmt: skip
    assert re.search(r"600 tokens read in [\d.]+ s; holds \d+ of 600 tokens, .* instead of .* \((2|3)\d%\)", output)
    for note in range(2):
        assert decode(recall.values[note]) in output
    assert re.search(r"\d tokens read in [\d.]+ s, 4 new at [\d.]+ tokens/s; holds \d+ of 6\d\d tokens", output)
    assert "KVzip(budget=0.25)" in output
    assert "KIVI(bits=4); the next turn reads the conversation for it" in output
    for mistake in ("there is no command /polish", "/read takes a path", "cannot read none.txt"):
        assert f"error: {mistake}" in output
    assert "saved to" in output
    assert "rows/head" in output
    assert "/quit          leave" in output
    assert "unsaid" not in output
    again = talked([questions[2]], "--load", str(saved))
    assert "1 turn, KVzip(budget=0.25)" in again
    assert decode(recall.values[2]) in again
    assert "keeps what the last queries look at, and the document" in talked(
        [f"/read '{document}'"], "--policy", "snapkv", "--budget", "64"
    )


def test_conversations_that_cannot_begin(tmp_path):
    for options, message in (
        (("--read", "none.txt"), "there is no file none.txt"),
        (("--load", "none.txt"), "there is no file none.txt"),
        (("--load", __file__, "--system", "a"), "leave --read and --system out"),
        (("--load", __file__), "cannot be loaded"),
        (("--policy", "full", "--budget", "0.5"), "takes no other budget"),
        (("--top-p", "0.5"), "give a --temperature"),
    ):
        with pytest.raises(KVPruneError, match=message):
            talked([], *options)


def test_version():
    assert run("--version").output.split() == ["kvprune", kvprune.__version__]


def test_settings_are_explained():
    """Each setting of each policy has a line that says what it means."""
    for entry in json.loads(run("policies", "--json").stdout):
        assert all(entry["meanings"].values()), entry["name"]
        assert set(entry["meanings"]) == {*entry["settings"], *entry["required"]}
    output = " ".join(run("policies", "zipcache").output.split())
    assert "share of tokens" in output
    with pytest.raises(KVPruneError, match="zipcache"):
        run("policies", "zipcash")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--policy", "a2fs"), "a2sf"),
        (("--policy", "a2sf:kernel_size"), "setting=value"),
        (("--policy", "a2sf:colour=red"), "colour"),
        (("--budget", "12 parsecs"), "parsecs"),
        (("--budget", "0"), "budget"),
        (("--prompt-file", "no such file"), "no such file"),
        (("--model", "./no such model"), "no such model"),
        (("--model", "~/no such model"), "there is no folder"),
        (("--model", __file__), "is a file: give the folder"),
        (("--model", str(Path(__file__).parent)), "there is no config.json in it"),
        (("--dtype", "int8"), "weights cannot be 'int8'"),
        (("--policy", "kivi"), "takes no other budget"),
        (("--policy", "a2sf:budget=0.5"), "takes no other budget"),
        (("--top-k", "3"), "--temperature"),
        (("--plot", "kept.nothing"), "write one of"),
        (("--plot", "no folder/kept.png"), "is not there"),
        (("--prompt", "another one"), "either"),
        (("--policy", "nowhere.at_all:Policy"), "package.module:Class"),
        (("--policy", "json:JSONDecoder"), "no subclass"),
    ],
)
def test_mistakes_end_in_one_sentence(prompt, change, message):
    arguments = {"--model": "demo", "--prompt-file": str(prompt[0]), "--policy": "a2sf", "--budget": "0.25"}
    arguments |= dict([change])
    with pytest.raises(KVPruneError, match=message):
        run("generate", *[part for pair in arguments.items() for part in pair])


def test_an_empty_prompt_costs_no_loading_of_a_model():
    with pytest.raises(KVPruneError, match="the prompt holds no text"):
        run("generate", "--model", "no/where", "--prompt", " ")


def test_mistakes_exit_with_2_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kvprune", "demo", "--tokens", "20"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "error:" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *(("generate", "--max-new-tokens", value) for value in ("0", "-1")),
        *(("demo", option, value) for option in ("--tokens", "--notes", "--questions") for value in ("0", "-1")),
        ("demo", "--seed", "-1"),
        ("eval longbench", "--limit", "0"),
        *(("eval synthetic", option, value) for option, value in (("--count", "0"), ("--seed", "-1"))),
        *(("eval likelihood", option, "0") for option in ("--prompt", "--limit", "--batch-size")),
        ("eval likelihood", "--length", "2"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(prompt, command, option, value):
    needed = {
        "generate": ["--model", "absent", "--prompt-file", str(prompt[0])],
        "eval likelihood": ["--model", "absent", "--policy", "full", "--text", str(prompt[0])],
    }
    arguments = needed.get(command, [] if command == "demo" else ["--model", "absent", "--policy", "full"])
    result = run(*command.split(), *arguments, option, value)
    assert result.exit_code == 2
    assert option in re.sub(r"\x1b\[[0-9;]*m", "", result.output)  # where colours are forced, an option has several


@pytest.mark.parametrize("name", ["pip install 'kvprune[eval]'", "a2sf[/bold]"])
def test_brackets_in_an_error_are_no_markup(monkeypatch, capsys, name):
    monkeypatch.setattr("sys.argv", ["kvprune", "generate", "--model", "demo", "--prompt-file", "-", "--policy", name])
    with pytest.raises(SystemExit):
        main()
    assert name in " ".join(capsys.readouterr().err.split())


@pytest.mark.long  # the next one but for the place of the table
def test_demo_measures_and_draws(tmp_path):
    out = tmp_path / "demo"
    arguments = ["--tokens", "400", "--notes", "6", "--questions", "4", "--out", str(out)]
    result = run("demo", *arguments)
    assert result.exit_code == 0
    assert "StreamingLLM" in result.output
    assert sorted(path.name for path in out.iterdir()) == ["kept.png", "quality.png"]


def test_demo_as_json(tmp_path):
    arguments = ["--tokens", "400", "--notes", "6", "--questions", "4", "--out", str(tmp_path), "--json"]
    result = run("demo", *arguments)
    full, *others = json.loads(result.stdout)["results"]
    assert "StreamingLLM" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.png", "quality.png"]
    assert full["ratio"] == 1.0
    assert all(result["nbytes"] < full["nbytes"] for result in others)


def test_help_waits_for_no_library():
    """`kvprune --help` must not import torch, which takes seconds."""
    code = "import sys, kvprune.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_found():
    """Each when it is first asked for; the packages beside the core, too."""
    for name in kvprune.__all__:
        assert getattr(kvprune, name).__module__.startswith("kvprune.")
    assert set(kvprune.__all__) == set(kvprune._HOME_OF) <= set(dir(kvprune))
    assert kvprune.policies.A2SF is policies.A2SF
    with pytest.raises(AttributeError, match="no_such_name"):
        kvprune.no_such_name  # noqa: B018
