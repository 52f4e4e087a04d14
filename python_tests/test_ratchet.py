"""Tests that code and language stay below the ceilings of ``ratchet.toml``."""

import ast
from pathlib import Path

import pytest

from python_tests import ratchet

SOURCE = '''"""What it is; and more."""


def told(each: Any, value: list[Any]) -> Any:
    """Whether."""
    # a comment
    first = (
        1,

        2,
    )
    return first


def embed(seed, *, read_rows):
    text = """two
    lines"""
    return text
'''


def test_nothing_grows_above_its_ceiling() -> None:
    counts, ceilings = ratchet.count_all(), ratchet.read_ceilings()
    assert {table: set(entries) for table, entries in counts.items()} == {
        table: set(entries) for table, entries in ceilings.items()
    }
    above = [
        f"{table} {name}: {counts[table][name]:,}, at most {ceiling:,}"
        for table, entries in ceilings.items()
        for name, ceiling in entries.items()
        if counts[table][name] > ceiling
    ]
    assert not above, "python -m python_tests.ratchet --list FOLDER KIND shows where; remove as many elsewhere"


def test_what_is_counted() -> None:
    nodes = [*ratchet.walk(ast.parse(SOURCE))]
    assert ratchet.count_code_lines(SOURCE, nodes) == 10
    places = sorted((kind, line) for kind, line, _ in ratchet.find_language(nodes))
    assert places == [
        ("any", 4), ("any", 4), ("any", 4), ("clauses", 1), ("clauses", 4), ("grammar", 4), ("grammar", 7),
        ("participles", 4), ("semicolons", 1),
    ]  # fmt: skip
    assert [name for name in ("_kept", "sorted_rows", "embed", "read", "freed") if ratchet.is_participle(name)] == [
        "_kept", "freed",
    ]  # fmt: skip


def test_lower_writes_fallen_counts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ratchet.toml"
    path.write_text("# why\n[code_lines]\nfedkern = 10  # until spring\nbenchmarks = 3\n")
    monkeypatch.setattr(ratchet, "CEILINGS", path)
    ratchet.lower({"code_lines": {"fedkern": 9, "benchmarks": 4}})
    assert path.read_text() == "# why\n[code_lines]\nfedkern = 9  # until spring\nbenchmarks = 3\n"
