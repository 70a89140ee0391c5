"""The rooms of the core: which imports which, and how long its files are."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kvprune

CORE = Path(kvprune.__file__).parent
ROOT = CORE.parent

# Every room, and the rooms whose modules its own may import beside one another.
GROUND = ("errors", "state")
ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "state": ("errors",),
    "table": GROUND,
    "attention": (*GROUND, "table"),
    "kernels": (*GROUND, "table", "attention"),
    "policy": (*GROUND, "table", "attention"),
    "cache": (*GROUND, "table", "attention", "kernels", "policy"),
    "passes": (*GROUND, "table", "attention", "kernels", "policy", "cache"),
    "saving": (*GROUND, "table", "attention", "kernels", "policy", "cache"),
    "routing": (*GROUND, "table", "attention", "policy", "cache", "passes", "saving"),
    "serving": (*GROUND, "kvprune", "policy", "cache", "saving", "evaluation"),
}
LONGEST = 400


def module_of(path: Path) -> str:
    """The dotted name of a file of the core."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, is_package: bool, known: set[str]) -> set[str]:
    """Modules of the core that a source imports, anywhere in its code: late, or for type checkers alone."""
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            base = above if node.level else node.module or ""
            # `from package import name`: of a module of this name, or of what the package itself holds.
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return {name for name in found if name == "kvprune" or name.startswith("kvprune.")} - {module}


FILES = {module_of(path): path for path in sorted(CORE.rglob("*.py"))}
IMPORTS = {
    module: imports(path.read_text("utf-8"), module, is_package=path.name == "__init__.py", known=set(FILES))
    for module, path in FILES.items()
}


def room(module: str) -> str:
    """`kvprune.cache.layer` -> `cache`; of `kvprune` itself, `kvprune`."""
    return module.split(".")[1] if "." in module else module


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_what_is_below_it(name):
    allowed = {name, *ROOMS[name]}
    wrong = {
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        if room(module) == name
        for other in others
        if room(other) not in allowed
    }
    assert not wrong
    assert any(room(module) == name for module in FILES)


def test_every_folder_of_the_core_is_a_room_or_above_them():
    """What people use may import everything; a new room has to be put into the table above."""
    used = {"__main__", "kvprune", "asking", "chat", "cli", "demo", "evaluation", "generation"}
    assert {room(module) for module in FILES} <= {*ROOMS, *used}


def test_no_modules_import_each_other_in_a_circle():
    try:
        tuple(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "line",
    [
        *("import kvprune.cache.layer", "from kvprune.cache import layer", "from ..cache import layer"),
        *("from ..cache.layer import PrunedLayer", "def f():\n    from kvprune.cache.layer import PrunedLayer"),
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kvprune.cache.layer import PrunedLayer",
    ],
)
def test_every_kind_of_import_is_seen(line):
    found = imports(line, "kvprune.table.rows", is_package=False, known=set(FILES))
    assert found == {"kvprune.cache.layer"}


@pytest.mark.parametrize(
    "path",
    [path for pattern in ("*.py", "*.c", "*.h") for path in sorted(CORE.rglob(pattern))],
    ids=lambda path: str(path.relative_to(CORE)),
)
def test_no_file_is_too_long_to_hold_in_the_head(path):
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST
