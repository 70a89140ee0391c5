"""LongBench's files: its own JSONL in a folder, in `data.zip` or on the hub, MiniLongBench's JSON, and the prompts.

MiniLongBench (Huang et al., ACL 2025) has 237 samples of LongBench with the prompt filled in already.
"""

from __future__ import annotations

import json
import reprlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from kvprune.errors import EvaluationError

Folder = Path | zipfile.Path

HUB = "THUDM/LongBench"
ARCHIVE = "data.zip"
PROMPTS = "dataset2prompt.json"
MAX_NEW_TOKENS = "dataset2maxlen.json"
WHERE_PROMPTS_ARE = "the folder LongBench/config of https://github.com/THUDM/LongBench"


@dataclass(frozen=True)
class Row:
    """One sample. question_at: see `Example`. length: as LongBench counts it. where: file and line, for messages."""

    prompt: str
    question_at: int | None
    answers: tuple[str, ...]
    all_classes: list[str] | None
    length: int | None
    where: str


@dataclass(frozen=True)
class Template:
    """A task's prompt: what comes before the context and after it, with `{input}` for the question."""

    before: str
    after: str

    @classmethod
    def parse(cls, text: str, where: str) -> Template:
        """From LongBench's form, `... {context} ... {input} ...`. Raises EvaluationError."""
        parts = text.split("{context}")
        if len(parts) != 2:
            raise EvaluationError(
                f"{where}: a prompt holds {{context}} once, this one {len(parts) - 1} times: {text!r}."
            )
        template = cls(*parts)
        try:
            template.fill("", "")
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise EvaluationError(
                f"{where}: cannot fill in {text!r} ({error!r}); besides {{context}} a prompt may hold {{input}}, and "
                "braces of its own are written {{ and }}."
            ) from error
        return template

    def fill(self, context: str, question: str) -> tuple[str, int | None]:
        """The prompt, and where in it the text behind the context begins: None if there is none."""
        before, after = self.before.format(input=question) + context, self.after.format(input=question)
        return before + after, len(before) if after else None

    def question_at(self, prompt: str) -> int | None:
        """Where the text behind the context begins in a prompt that is filled in already; None if that cannot be told.

        Told by the words between context and input; some tasks have only line breaks there, or other words.
        """
        words = self.after.partition("{input}")[0]
        at = prompt.rfind(words) if words.strip() else -1
        return at if at >= 0 else None


def open_folder(data: str | Path | None) -> Folder:
    """The folder that holds the task files: a folder, a zip file (its folder `data` if it has one), or the hub's.

    Raises EvaluationError if there is none.
    """
    path = _download() if data in (None, "hub") else Path(str(data))
    if path.is_dir():
        return path
    if not zipfile.is_zipfile(path):
        raise EvaluationError(f"{str(path)!r} is neither a folder of LongBench's task files nor a zip file.")
    archive = zipfile.Path(path)
    return archive / "data" if (archive / "data").is_dir() else archive


def _download() -> Path:
    # `datasets` runs no loading scripts any more, and LongBench's page on the hub is one, beside the archive it reads.
    try:
        return Path(huggingface_hub.hf_hub_download(HUB, ARCHIVE, repo_type="dataset"))
    except Exception as error:  # the hub's own, the transport's and the system's
        raise EvaluationError(
            f"cannot get {ARCHIVE} of {HUB} from the hub: {error} Give the folder or the zip file that has the task "
            "files, LongBench(data='data.zip')."
        ) from error


def file_names(task: str, extended: bool) -> list[str]:
    """The files that may hold a task, the first of which counts."""
    return [f"{task}_e.jsonl"] if extended else [f"{task}.jsonl", f"MiniLongBench_{task}.json"]


def find_file(folder: Folder, task: str, extended: bool) -> Folder | None:
    """The file of a task, or None."""
    return next((folder / name for name in file_names(task, extended) if (folder / name).is_file()), None)


def read_prompts(folder: Path) -> tuple[dict[str, Template], dict[str, int]]:
    """The templates and the tokens of an answer, by task. Raises EvaluationError: missing or malformed files."""
    if missing := [name for name in (PROMPTS, MAX_NEW_TOKENS) if not (folder / name).is_file()]:
        names = " and no ".join(missing)
        raise EvaluationError(f"there is no {names} in {str(folder)!r}: give prompts, {WHERE_PROMPTS_ARE}.")
    where = {name: str(folder / name) for name in (PROMPTS, MAX_NEW_TOKENS)}
    prompts, tokens = (_object(_parse(_text(folder / name), where[name]), where[name]) for name in where)
    return (
        {task: Template.parse(_string(prompts, task, where[PROMPTS]), where[PROMPTS]) for task in prompts},
        {task: _positive(tokens, task, where[MAX_NEW_TOKENS]) for task in tokens},
    )


@dataclass(frozen=True)
class HubTask:
    """A task in a data set with LongBench's rows, which the package `datasets` reads: from the hub, or a folder."""

    dataset: str
    task: str

    def __str__(self) -> str:
        return f"{self.task} of {self.dataset}"

    def rows(self) -> Iterable[Any]:
        try:
            import datasets

            rows: Iterable[Any] = datasets.load_dataset(self.dataset, self.task, split="test")
        except ImportError:
            raise EvaluationError("the package datasets reads data sets: pip install 'kvprune[eval]'.") from None
        except Exception as error:  # the hub's own, the transport's and the system's
            raise EvaluationError(f"cannot get {self}: {error}") from error
        return rows


def read_rows(file: Folder | HubTask, template: Template, extended: bool) -> Iterator[Row]:
    """The samples of a task file, in its order. Raises EvaluationError, with file and line, for a bad one or none."""
    row = None
    if isinstance(file, HubTask):
        rows = _dataset(file, template, extended)
    else:
        rows = _jsonl(file, template, extended) if file.name.endswith(".jsonl") else _mini(file, template)
    for row in rows:
        yield row
    if row is None:
        raise EvaluationError(f"there are no samples in {file}.")


def _dataset(task: HubTask, template: Template, extended: bool) -> Iterator[Row]:
    for number, row in enumerate(task.rows()):
        where = f"{task}, row {number}"
        yield _sample(_object(row, where), where, template, extended)


def _jsonl(file: Folder, template: Template, extended: bool) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        yield _sample(_object(_parse(line, where), where), where, template, extended)


def _sample(row: Mapping[str, Any], where: str, template: Template, extended: bool) -> Row:
    """A row as LongBench writes it."""
    prompt, question_at = template.fill(_filled(row, "context", where), _string(row, "input", where))
    length = _field(row, "length", (int,) if extended else (int, type(None)), where)
    classes = _field(row, "all_classes", (list, type(None)), where) and _strings(row, "all_classes", where)
    return Row(prompt, question_at, tuple(_strings(row, "answers", where)), classes or None, length, where)


def _mini(file: Folder, template: Template) -> Iterator[Row]:
    for key, row in _object(_parse(_text(file), str(file)), str(file)).items():
        where = f"{file}, row {key!r}"
        if isinstance(_field(_object(row, where), "gold", (list, dict), where), dict):
            answers, classes = _strings(row["gold"], "answers", where), _strings(row["gold"], "all_classes", where)
        else:
            answers, classes = _strings(row, "gold", where), None
        prompt = _filled(row, "origin_prompt", where)
        yield Row(prompt, template.question_at(prompt), tuple(answers), classes, None, where)


def _lines(file: Folder) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # the last: encrypted
        raise EvaluationError(f"cannot read {file}: {error}") from error


def _text(file: Folder) -> str:
    return "".join(_lines(file))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: this is not JSON: {error}.") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EvaluationError(f"{where}: expected a JSON object, not {reprlib.repr(value)}.")
    return value


_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object", type(None): "null"}


def _field(row: Mapping[str, Any], name: str, kinds: tuple[type, ...], where: str) -> Any:
    if name not in row:
        raise EvaluationError(f"{where}: there is no {name!r}, only {', '.join(map(repr, row)) or 'an empty object'}.")
    value = row[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise EvaluationError(f"{where}: {name!r} should be {expected}, not {reprlib.repr(value)}.")
    return value


def _string(row: Mapping[str, Any], name: str, where: str) -> str:
    text: str = _field(row, name, (str,), where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EvaluationError(f"{where}: {name!r} has half a surrogate pair, which cannot be tokenized.") from error
    return text


def _filled(row: Mapping[str, Any], name: str, where: str) -> str:
    text = _string(row, name, where)
    if not text.strip():
        raise EvaluationError(f"{where}: {name!r} is empty.")
    return text


def _strings(row: Mapping[str, Any], name: str, where: str) -> list[str]:
    values = _field(row, name, (list,), where)
    if not values:
        raise EvaluationError(f"{where}: {name!r} is an empty list.")
    return [_string({name: value}, name, where) for value in values]


def _positive(row: Mapping[str, Any], name: str, where: str) -> int:
    number: int = _field(row, name, (int,), where)
    if number < 1:
        raise EvaluationError(f"{where}: {name!r} should be at least 1, not {number}.")
    return number
