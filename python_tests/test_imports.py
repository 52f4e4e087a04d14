"""Tests that no file of fedkern or of its benchmarks imports a file that imports it back, even indirectly."""

import ast
import functools
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fedkern

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def modules(package: str) -> dict[str, Path]:
    """Return the files of a package by the name of their module."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        words = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return found


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not isinstance(child, ast.expr):
            yield from import_statements(child)


@functools.cache
def imports(package: str) -> dict[str, set[str]]:
    """Return the modules of a package that each of its files imports, also inside functions and under TYPE_CHECKING."""
    known = modules(package)
    return {name: read_imports(name, path, known) for name, path in known.items()}


def read_imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in import_statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            inside = path.relative_to(ROOT).parent.parts if node.level else ()
            base = ".".join([*inside[: len(inside) + 1 - node.level], *([node.module] if node.module else [])])
            found |= {module if (module := f"{base}.{alias.name}") in known else base for alias in node.names}
    if name.startswith("benchmarks"):  # which find each other by their own folder too
        found |= {f"benchmarks.{module}" for module in found}
    return found & set(known) - {name}


def test_fedkern_is_the_installed_one() -> None:
    """The tests use the package that users have.

    A developer may name the checkout, or install it in place.
    """
    if str(ROOT) in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        pytest.skip("PYTHONPATH names the checkout")
    installed = importlib.metadata.distribution("fedkern").read_text("direct_url.json") or "{}"
    if json.loads(installed).get("dir_info", {}).get("editable"):
        pytest.skip("fedkern is installed in place")
    assert str(ROOT) not in sys.path
    assert not Path(fedkern.__file__).is_relative_to(ROOT / "fedkern")


def test_no_module_needs_what_other_systems_lack() -> None:
    """A module of POSIX or Linux alone is imported where its absence is caught, in :mod:`fedkern.files.filesystem`."""
    lacking = re.compile(r"^\s*(import|from) (fcntl|grp|posix|pwd|resource|termios)\b", re.MULTILINE)
    found = [name for name, path in modules("fedkern").items() if lacking.search(path.read_text())]
    assert found == ["fedkern.files.filesystem"]


ORDER = (
    "errors streams", "ops", "files", "process", "foreign_runs messages privacy text_table typed_option usercode",
    "acceleration", "models", "tasks", "data", "methods", "settings", "listeners", "engine", "downstream", "report",
    "flower", "api", "comparison", "cli", "run",
)  # fmt: skip
"""Packages and single modules of fedkern, lowest layer first; those of one text do not import each other."""


def test_packages_import_only_from_lower_layers() -> None:
    """A file that must import from a higher layer is in the wrong package (docs/architecture.md)."""
    layers = {package: layer for layer, packages in enumerate(ORDER) for package in packages.split()}
    assert {name.split(".")[1] for name in modules("fedkern") if "." in name} == layers.keys()
    wrong = [
        f"{name} imports {module}"
        for name, names in imports("fedkern").items() if "." in name
        for module in names - {"fedkern"}
        if name.split(".")[1] != module.split(".")[1] and layers[name.split(".")[1]] <= layers[module.split(".")[1]]
    ]  # fmt: skip
    assert not wrong


def test_tests_lie_as_their_modules_do() -> None:
    """Tests with the name of one module of their package lie where the module lies in fedkern."""
    misplaced = []
    for path in (ROOT / "python_tests").rglob("test_*.py"):
        place, stem = path.parent.relative_to(ROOT / "python_tests"), path.stem.removeprefix("test_")
        package = ROOT / "fedkern" / place.parts[0] if place.parts else ROOT / "fedkern" / "none"
        homes = {path.parent.relative_to(ROOT / "fedkern") for path in package.rglob(f"{stem}.py")}
        if len(homes) == 1 and place not in homes:
            misplaced.append(f"{place / path.name}, and the module is in {homes.pop()}")
    assert not misplaced


@pytest.mark.parametrize("package", ["fedkern", "benchmarks"])
def test_no_circle_of_imports(package: str) -> None:
    # The names at the top of the package are looked up when they are asked for, so that everything may import it.
    graph = {name: names - {package} for name, names in imports(package).items()}
    assert len(graph) > 50
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]), pytrace=False)
