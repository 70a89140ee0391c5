"""What commands print on the real model, written into the pages by running them: `make transcripts`.

A page asks for a transcript by a comment, and what stands until the next one is made anew:

    <!-- transcript: kvprune policies kivi -->
    <!-- end of transcript -->

Lines of the comment behind the first are what the command reads from its standard input. Commands run one after the
other, in a folder of their own that has `prompt.txt`: a page of the license with a number hidden in it, and a question
for it. What depends on how busy a machine is, seconds and tokens a second, is left out, so that a page changes only
where an answer or a cache does.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
_ASKED = re.compile(
    r"(<!-- transcript: (?P<command>[^\n]+?)(?P<lines>(?:\n(?!-->)[^\n]+)*)\s*-->\n).*?(<!-- end of transcript -->)",
    re.DOTALL,
)
_TIMES = (
    (re.compile(r"(prompt tokens) in [\d.]+ s"), r"\1"),
    (re.compile(r"( new) at [\d.]+ tokens/s"), r"\1"),
    (re.compile(r" in [\d.]+ s\b"), ""),
    (re.compile(r"( done), \d+ s$", re.MULTILINE), r"\1"),
)


def asked(text: str) -> list[tuple[str, str]]:
    """The commands of a page, and what each of them reads."""
    return [(found["command"], found["lines"].lstrip("\n")) for found in _ASKED.finditer(text)]


def renewed(text: str, run: Callable[[str, str], str]) -> str:
    """A page with its transcripts made anew. run: what a command prints, by the command and what it reads."""

    def transcript(found: re.Match[str]) -> str:
        command, read = found["command"], found["lines"].lstrip("\n")
        printed = "\n".join(line.rstrip() for line in timeless(run(command, read)).strip("\n").splitlines())
        said = "".join(f"> {line}\n" for line in read.splitlines())
        fence = "~~~" if "```" in printed else "```"
        return f"{found[1]}\n{fence}text\n$ {command}\n{said}{printed}\n{fence}\n\n{found[4]}"

    return _ASKED.sub(transcript, text)


def timeless(printed: str) -> str:
    """What is printed, without the times."""
    for pattern, instead in _TIMES:
        printed = pattern.sub(instead, printed)
    return printed


def prompt() -> str:
    """A page of the license with a number in its middle, and the question for it."""
    lines = (ROOT / "LICENSE").read_text("utf-8").splitlines()[:120]
    lines.insert(60, "The code of amber-falcon is 4817263.")
    return "\n".join([*lines, "What is the code of amber-falcon? Answer with the number alone."]) + "\n"


def runner(folder: Path, environment: Mapping[str, str]) -> Callable[[str, str], str]:
    """Runs commands of kvprune in a folder. What one prints when it fails ends everything: it is no transcript."""

    def run(command: str, read: str) -> str:
        words = shlex.split(command)
        assert words[0] == "kvprune", f"{command!r} is no command of kvprune"
        print(f"$ {command}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", *words], input=read, cwd=folder, env=dict(environment), text=True,
            capture_output=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{command} failed:\n{done.stdout}{done.stderr}")
        print(done.stdout, flush=True)
        return done.stdout

    return run


def main() -> None:
    pages = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "docs").glob("*.md"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prompt.txt").write_text(prompt(), "utf-8")
        run = runner(Path(folder), os.environ | {"COLUMNS": "100", "NO_COLOR": "1"})
        for page in pages:
            text = page.read_text("utf-8")
            if asked(text):
                page.write_text(renewed(text, run), "utf-8")


if __name__ == "__main__":
    main()
