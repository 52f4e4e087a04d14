"""No file of fedkern or of its benchmarks imports a file that imports it back, however long the way round."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def modules(package: str) -> dict[str, Path]:
    """The files of a package by the name of their module."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        words = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports, also inside its functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = path.relative_to(ROOT).parent.parts if node.level else ()
            base = ".".join([*inside[: len(inside) + 1 - node.level], *([node.module] if node.module else [])])
            found |= {each if (each := f"{base}.{alias.name}") in known else base for alias in node.names}
    if name.startswith("benchmarks"):  # which find each other by their own folder too
        found |= {f"benchmarks.{each}" for each in found}
    return found & set(known) - {name}


@pytest.mark.parametrize("package", ["fedkern", "benchmarks"])
def test_no_circle_of_imports(package: str) -> None:
    known = modules(package)
    # The names at the top of the package are looked up when they are asked for, so that everything may import it.
    graph = {name: imported(name, path, known) - {package} for name, path in known.items()}
    assert len(graph) > 50
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]), pytrace=False)
