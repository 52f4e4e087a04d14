"""The structure of the engine: sizes of classes, imports of the loop, and allowed imports between its pieces."""

import ast

import pytest

from fedkern.engine.setup.order import FILTER_ORDER, FILTERS, PART_ORDER, PARTS, USERS
from python_tests.test_imports import modules, read_imports

FILES = modules("fedkern")
ENGINE = {name.removeprefix("fedkern.engine."): path for name, path in FILES.items() if "fedkern.engine." in name}
PIECES = sorted(name for name in ENGINE if name.startswith(("parts.", "uploads.")))

SEAMS = {"parts.part", "uploads.encoders", "uploads.filters"}
"""The protocols, which every part and every filter is made on."""

KNOWN = {
    # A vector that stays with its client is checked there, by the function that the server checks all others with.
    "uploads.reduction": {"uploads.declared"}
}
"""What single parts and filters know of others, and why."""


def find_attributes(kind: ast.ClassDef) -> set[str]:
    """Return the names that a class annotates or that its methods assign to ``self``."""
    names = {node.target.id for node in kind.body if isinstance(node, ast.AnnAssign)}
    for node in ast.walk(kind):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return names


def find_imports(name: str) -> set[str]:
    """Return the fedkern modules that a module of the engine imports, without the prefix ``fedkern.engine.``."""
    found = read_imports(f"fedkern.engine.{name}", ENGINE[name], FILES)
    return {name.removeprefix("fedkern.engine.") for name in found}


def test_no_class_of_the_engine_holds_more_than_18_things() -> None:
    kinds = {
        f"{name}.{node.name}": find_attributes(node)
        for name, path in ENGINE.items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    assert len(kinds) > 60
    assert {"_run", "_filters", "_parts"} <= kinds["rounds.loop.Loop"]  # also of assignments side by side
    assert {"entry", "public"} <= kinds["parts.part.Record"]
    assert {name: len(names) for name, names in kinds.items() if len(names) > 18} == {}


def test_the_loop_is_short_and_knows_little() -> None:
    assert len(ENGINE["rounds.loop"].read_text().splitlines()) <= 260
    assert len(find_imports("rounds.loop")) <= 16
    assert find_imports("rounds.loop") & {*PIECES} == SEAMS - {"uploads.encoders"}


def test_a_run_walks_two_lists_and_knows_no_part_or_filter_by_name() -> None:
    assert {*PARTS, USERS} == {*PART_ORDER}
    assert {*FILTERS, USERS} == {*FILTER_ORDER}
    chosen = {"setup.run_objects": {"uploads.asynchronous"}}  # with it goes the choice of the participation
    for name in ("run", "setup.run_objects", "setup.order"):
        assert find_imports(name) & {*PIECES} - chosen.get(name, set()) <= SEAMS
    tree = ast.parse(ENGINE["run"].read_text())
    assert sum(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)) <= 30


@pytest.mark.parametrize("name", PIECES)
def test_a_part_or_filter_knows_no_other(name: str) -> None:
    assert find_imports(name) & {*PIECES} - SEAMS == KNOWN.get(name, set())
