"""Tests that no file of fedkern or of its benchmarks imports a file that imports it back, even indirectly."""

import ast
import functools
import importlib.metadata
import json
import os
import re
import subprocess
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


LOCAL_ONLY = """
import os, sys

sys.modules["fcntl"] = None
for name in ("memfd_create", "MFD_CLOEXEC", "MFD_ALLOW_SEALING", "sched_getaffinity", "pwrite"):
    delattr(os, name)
import numpy as np
import fedkern
import fedkern.api
from fedkern.engine.transport.torchrun_group import LaunchedRank, TorchrunGroup

settings = {"data": "digits", "clients": 2, "train_samples": 40, "rounds": 1, "model": "mlp", "grad_cam": 0,
            "threads": 1, "progress": False, "pictures": False}
alone = fedkern.simulate("fedavg", workers=1, out=sys.argv[1] + "/alone", **settings)
assert fedkern.load(alone.out).evaluate()["accuracy"] == alone.metrics["accuracy"]
several = fedkern.simulate("fedavg", workers=2, out=sys.argv[1] + "/several", **settings)
print(several.summary["diagnostics"]["no-workers"])
try:
    TorchrunGroup(LaunchedRank(0, 2, 0, 2, 0, 0, "job")).meet([])
except fedkern.UserError as error:
    print(error)
"""


@pytest.mark.exhaustive
def test_a_run_in_one_process_where_fcntl_and_memory_files_are_absent(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOCAL_ONLY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    workers, ranks = done.stdout.splitlines()
    assert workers == "--workers 2 changes nothing here, as workers need Linux."
    assert ranks == "Ranks of torchrun share memory as only Linux has it: start the run without torchrun."


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
