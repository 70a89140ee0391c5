"""The pages of the site: those of this folder, and documents that lie elsewhere in the repository, each written once.

A page takes over a part of another document by a line of its own:

    <!-- from README.md: Install -->

The part is what stands under the heading of that name, or from the paragraph that begins with that name in bold to the
next such paragraph or heading. In the reference, lines of this kind stand for all policies, and for the public names
that no other line has. mkdocs calls the two functions at the end.
"""

from __future__ import annotations

import posixpath
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ELSEWHERE = (
    "CONTRIBUTING.md",
    "bench/README.md",
    "bench/quality.md",
    "bench/quality-real.md",
    "bench/reliability.md",
    "bench/results/beyond-window.md",
    "bench/results/memory.md",
    "bench/results/speed.md",
    "kvprune/demo/README.md",
)
"""Documents that are pages under the paths they have in the repository."""
_FROM = re.compile(r"^<!-- from (\S+): (.+) -->$", re.MULTILINE)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)


@cache
def pages() -> dict[str, str]:
    """Every page by its path in the site, as Markdown. Raises LookupError for a part that is not there."""
    own = {path.relative_to(ROOT / "docs").as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}
    texts = {page: _expanded(page, path.read_text("utf-8")) for page, path in own.items()}
    return texts | {page: _moved((ROOT / page).read_text("utf-8"), page, page) for page in ELSEWHERE}


def _expanded(page: str, text: str) -> str:
    def part(found: re.Match[str]) -> str:
        source, title = found.groups()
        return _moved(section((ROOT / source).read_text("utf-8"), title), source, page)

    text = _moved(text, f"docs/{page}", page)
    text = text.replace("<!-- every policy -->", _described(_policies(), "{ inherited_members: false, members: [] }"))
    if "<!-- every other name -->" in text:
        others = [f"kvprune.{name}" for name in _public_names() if f"::: kvprune.{name}\n" not in text]
        text = text.replace("<!-- every other name -->", _described(others, "{}"))
    return _FROM.sub(part, text)


def _policies() -> list[str]:
    """Where each policy is: mkdocstrings reads files, and `kvprune.policies` is another folder's name."""
    imports = re.findall(r"^from kvprune\.(policies\.\w+) import (.+)$", _source("policies/__init__.py"), re.MULTILINE)
    return [f"{module}.{name}" for module, names in imports for name in names.split(", ")]


def _public_names() -> list[str]:
    return re.findall(r'^    "(\w+)",$', _source("kvprune/__init__.py").partition("__all__")[2], re.MULTILINE)


def _source(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def _described(names: list[str], options: str) -> str:
    return "\n\n".join(f"::: {name}\n    options: {options}" for name in names)


def section(text: str, title: str) -> str:
    """The part of a document under a heading, without it, or that a bold beginning starts."""
    fences: list[str] = []

    def put_away(found: re.Match[str]) -> str:  # a comment of a shell looks like a heading
        fences.append(found[0])
        return f"\0{len(fences) - 1}\0"

    blocks = _FENCE.sub(put_away, text).split("\n\n")
    heading = re.compile(rf"(#+) {re.escape(title)}$")
    for start, block in enumerate(blocks):
        if found := heading.match(block.strip()):
            end = re.compile(rf"#{{1,{len(found[1])}}} ")
            start += 1
        elif block.startswith(f"**{title}**"):
            end = re.compile(r"\*\*[A-Z]|#+ ")
        else:
            continue
        stop = next((at for at in range(start + 1, len(blocks)) if end.match(blocks[at].lstrip("\n"))), len(blocks))
        return re.sub(r"\0(\d+)\0", lambda kept: fences[int(kept[1])], "\n\n".join(blocks[start:stop]))
    raise LookupError(f"there is no part {title!r}")


def _moved(text: str, source: str, page: str) -> str:
    """A text with links as a page has them, which were written for the place of its source."""

    def moved(found: re.Match[str]) -> str:
        target, hash_, anchor = found[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), target)).removeprefix("docs/")
        return found[1] + posixpath.relpath(target, posixpath.dirname(page) or ".") + hash_ + anchor + found[3]

    parts = _FENCE.split(text)
    return "".join(part if number % 2 else _LINK.sub(moved, part) for number, part in enumerate(parts))


# -- what mkdocs calls -------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the documents that lie elsewhere."""
    from mkdocs.structure.files import File

    for page in ELSEWHERE:
        files.append(File.generated(config, page, content=pages()[page]))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put parts of other documents in their places."""
    return pages()[page.file.src_uri]
