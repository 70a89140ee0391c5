"""README and the pages of the site: what they show is run, and where they lead is there."""

import os
import posixpath
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import openai
import pytest
import torch
import typer
import yaml
from starlette.testclient import TestClient
from typer.testing import CliRunner

import kvprune
import pages as site
import transcripts
from kvprune import PrunedCache, cli, demo, policies
from kvprune.cache.models import CACHE_ARGUMENT
from kvprune.evaluation import smollm2
from kvprune.serving.app import Options, Server, application

ROOT = Path(__file__).parent.parent
SHOWN = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kvprune/demo/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^( *)```(\w*).*?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
IDS = {"ids": lambda path: str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)}


def snippets(path, language):
    return [
        re.sub(f"^{indent}", "", text, flags=re.M)
        for indent, of, text in FENCE.findall(path.read_text())
        if of == language
    ]


def with_snippets(language):
    return [path for path in SHOWN if snippets(path, language)]


# -- where they lead ---------------------------------------------------------------------------------------------------


def links(text):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|mailto:", link)]


def anchors(text):
    """As GitHub and mkdocs name headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", sorted(site.pages()))
def test_links_of_a_page_lead_to_pages(page):
    for link in links(site.pages()[page]):
        target, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) if target else page
        assert target in site.pages(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(site.pages()[target]), f"{page} links to {link}"


@pytest.mark.parametrize("path", SHOWN, **IDS)
def test_links_in_the_repository_lead_to_files(path):
    for link in links(path.read_text()):
        target, _, anchor = link.partition("#")
        found = path.parent / target if target else path
        assert found.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(found.read_text()), f"{path.name} links to {link}"


def test_every_page_is_in_the_navigation():
    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [leaf for each in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(each)]

    assert sorted(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == sorted(site.pages())


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: (\S+)", site.pages()["reference.md"], re.MULTILINE)
    found = {name.rpartition(".")[2] for name in named}
    assert {*kvprune.__all__, *policies.__all__} <= found
    assert {policies.find(name).__name__ for name in policies.names() if ":" not in name} <= found


def test_a_part_of_a_document_is_what_stands_under_its_name():
    text = (
        "# A\n\n## B\n\none\n\n```bash\n\n# two\n\n```\n\n### C\n\nthree\n\n## D\n\n**Four.** 4\n\n- 5\n\n**Six** 6\n"
    )
    assert site.section(text, "B").split() == ["one", "```bash", "#", "two", "```", "###", "C", "three"]
    assert site.section(text, "Four.").split() == ["**Four.**", "4", "-", "5"]
    with pytest.raises(LookupError):
        site.section(text, "E")


# -- what they show ----------------------------------------------------------------------------------------------------

CHAT = "{% for message in messages %}question {{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where snippets run: the documents are there, and the embedded model, which speaks in turns."""
    folder = tmp_path_factory.mktemp("snippets")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copytree(demo.MODEL_PATH, folder / "model")
    (folder / "model/chat_template.jinja").write_text(CHAT)
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "report.txt").write_text("note bold fox: oak bell one. the boat laughed by the old mill. " * 8)
    return folder


def known(folder):
    """What the documents take for granted before their first line of Python."""
    model, tokenizer = demo.load()
    tokenizer.chat_template = CHAT
    document = (folder / "report.txt").read_text()
    inputs = tokenizer(document, return_tensors="pt", return_token_type_ids=False)
    return vars(policies) | {
        **{"name": str(folder / "model"), "model": model, "tokenizer": tokenizer, "document": document},
        **{"inputs": inputs, "token": inputs.input_ids[:, :1], "torch": torch},
    }


def client_of(namespace):
    """What makes clients of a server that is not at its address, but in this process."""
    served = Server("smollm2", namespace["model"], namespace["tokenizer"], Options())
    client = openai.OpenAI
    return lambda base_url, **more: client(
        base_url=base_url, http_client=TestClient(application(served), base_url=base_url), **more
    )


@pytest.mark.skipif(CACHE_ARGUMENT != "cache", reason="pages show the argument of newer transformers")
@pytest.mark.parametrize("path", with_snippets("python"), **IDS)
def test_python_runs_as_shown(path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(smollm2, "checkpoint", lambda: folder / "model")
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)  # test_compile.py compiles
    namespace = known(folder)
    monkeypatch.setattr(openai, "OpenAI", client_of(namespace))
    for words in commands(path):  # files that are made there
        if words[0] == "sh":
            check(words, folder)
    for number, text in enumerate(snippets(path, "python")):
        if "PrunedCache(" not in text and "cache" in namespace:  # it speaks of a cache that has seen nothing else
            namespace["cache"] = PrunedCache(namespace["model"], policies.A2SF(0.25))
            with torch.no_grad():
                if "input_ids[:, :-1]" not in text:
                    namespace["model"](**namespace["inputs"], cache=namespace["cache"])
        exec(compile(text, f"{path.name}, {number}", "exec"), namespace)


def commands(path):
    for text in snippets(path, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
                del words[0]
            if {">", ">>"} & {*line.split()}:
                yield ["sh", "-c", line]
            elif words:
                yield words


@cache
def command_line():
    return typer.main.get_command(cli.app)


def parsed(words):
    """The options that a command of kvprune reads from what follows its name; what it refuses, it raises."""
    command, context = command_line(), None
    while True:
        context = command.make_context(command.name, list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return context
        _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])


def check_kvprune(words, folder):
    if words[-1] == "...":  # the rest is as elsewhere
        assert words[0] in command_line().commands
        return
    command = parsed(words).command.name
    if command == "serve":
        policies.parse(words[words.index("--policy") + 1], budget=0.25)
    if command in ("generate", "policies"):
        small = ["--max-new-tokens", "2"] if command == "generate" else []
        words = [str(folder / "model") if words[at - 1] == "--model" else word for at, word in enumerate(words)]
        result = CliRunner().invoke(cli.app, [*words, *small])
        assert result.exit_code == 0, result.output


MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def check(words, folder):
    """Run a command that is shown, if it is cheap, or see that it can be run."""
    if "kvprune" in words and words[0] in ("accelerate", "torchrun"):
        words = words[words.index("kvprune") :]
    if words[:2] == ["sh", "-c"]:
        return subprocess.run(words, cwd=folder, check=True)
    program = os.path.basename(words[0])
    if program == "kvprune":
        return check_kvprune(words[1:], folder)
    if program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert {*targets} <= set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    elif program == "curl":
        routes = application(SimpleNamespace(options=Options())).routes
        assert urlsplit(words[-1]).path in {getattr(route, "path", None) for route in routes}
    elif program == "pip":
        named = [extra for word in words if word.startswith(".[") for extra in word[2:-1].split(",")]
        assert {*named} <= EXTRAS.keys()
    elif words[:2] == ["serve", "run"]:  # of Ray Serve
        module, _, function = words[2].partition(":")
        source = (ROOT / "integrations" / f"{module.rpartition('.')[2]}.py").read_text()
        known = {each.name for each in fields(Options)} | {*re.findall(r"(\w+)=\((?:str|int|float)\b", source)}
        assert f"def {function}(" in source
        assert {word.partition("=")[0] for word in words[3:]} <= known
    elif program == "python" and words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if word.endswith(".py"))
    elif program == "python":
        read = (ROOT / words[1]).read_text() + "".join(path.read_text() for path in (ROOT / "bench").glob("*/*.py"))
        assert all(f'"{word}"' in read for word in words[2:] if word.startswith("--"))
    else:
        shown = (["python3", "-m", "venv", ".venv"], ["source", ".venv/bin/activate"])
        assert words in shown, f"this test does not know how to try {shlex.join(words)!r}"


@pytest.mark.parametrize("path", with_snippets("bash"), **IDS)
def test_commands_work_as_shown(path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for words in commands(path):
        check(words, folder)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("make tea", "tea"),
        ("kvprune generate --moddel demo", "No such option: --moddel"),
        ("kvprune brew", "No such command 'brew'"),
        ("serve run kvprune.integrations.ray_serve:app moddel=demo", "moddel"),
        ("pip install '.[tea]'", "tea"),
        ("tea", "does not know how to try"),
    ],
)
def test_a_command_that_does_not_exist_is_found_out(wrong, message, folder):
    with pytest.raises(Exception, match=message):
        check(shlex.split(wrong), folder)


def test_transcripts_are_of_commands_that_exist_and_hold_what_they_printed():
    pages = {path: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
    shown = [(path, command) for path, text in pages.items() for command, _ in transcripts.asked(text)]
    assert len(shown) >= 4
    for path, command in shown:
        program, *words = shlex.split(command)
        assert program == "kvprune"
        parsed(words)
        assert f"text\n$ {command}\n" in pages[path]
    assert all(text.count("<!-- transcript:") == len(transcripts.asked(text)) for text in pages.values())


def test_a_transcript_is_written_between_its_marks():
    page = (
        "a\n\n<!-- transcript: kvprune chat --model x\n/read y\nhi\n-->\nold\n<!-- end of transcript -->\n\nb\n"
        "<!-- transcript: kvprune policies -->\n<!-- end of transcript -->\nc\n"
    )
    assert transcripts.asked(page) == [("kvprune chat --model x", "/read y\nhi"), ("kvprune policies", "")]
    once = transcripts.renewed(
        page, lambda command, read: f"{len(read)} said, 3 new at 2.5 tokens/s; 5 MiB in 0.3 s\n\n"
    )
    assert "```text\n$ kvprune chat --model x\n> /read y\n> hi\n10 said, 3 new; 5 MiB\n```" in once
    assert "old" not in once
    assert once.startswith("a\n\n<!--")
    assert once.endswith("-->\nc\n")
    again = transcripts.renewed(once, lambda command, read: f"{len(read)} said, 3 new at 9.1 tokens/s; 5 MiB in 4.0 s")
    assert again == once  # nothing but the times had changed


@pytest.mark.parametrize("path", with_snippets("toml"), **IDS)
def test_tables_are_of_groups_that_exist(path):
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for text in snippets(path, "toml"):
        assert tomllib.loads(text)["project"]["entry-points"].keys() <= groups.keys()
