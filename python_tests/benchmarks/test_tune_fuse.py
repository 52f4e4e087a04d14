"""The tuner's table: written row by row, all or nothing, and only in the checkout that it runs from."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tune_fuse
from tune_fuse import Row

FIRST, SECOND = ("pool", 5, 16, 4, False), ("pool", 5, 16, 8, False)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a copy of the table, and a tuner that times nothing."""
    copy = tmp_path / "fedkern" / "ops" / "fuse_table.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(tune_fuse.TABLE, copy)
    monkeypatch.setattr(tune_fuse, "TABLE", copy)
    monkeypatch.setattr(tune_fuse, "CHECKOUT", tmp_path)
    monkeypatch.setattr(tune_fuse, "settings", lambda: iter([tune_fuse.Setting(*FIRST), tune_fuse.Setting(*SECOND)]))
    monkeypatch.setattr(tune_fuse, "runs", lambda setting: ({}, 1e12))
    monkeypatch.setattr(tune_fuse.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["tune_fuse.py", "--write"])
    return copy


def rows(table: Path) -> tuple[Row, ...]:
    names: dict[str, Any] = {}
    text = table.read_text().partition("ROWS: tuple[Row, ...] = (\n")[2].partition("\n)\n")[0]
    exec(f"ROWS = (\n{text}\n)", {"Row": Row}, names)
    return names["ROWS"]


def test_what_was_measured_before_an_interrupt_is_in_the_table(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {row[:5]: row for row in rows(table)}
    told = iter([{"grouped": 1.0, "separate": 2.0, "direct": 3.0}])

    def measure(ways: object, repeats: int) -> dict[str, float]:
        for costs in told:
            return costs
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_fuse, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        tune_fuse.main()
    assert {row[:5]: row for row in rows(table)} == {**before, FIRST: Row(*FIRST, 1.0, 2.0, 3.0)}
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_rows_of_a_kind_that_are_no_longer_settings_go_at_the_end(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows(table)
    monkeypatch.setattr(tune_fuse, "measure", lambda ways, repeats: dict.fromkeys(tune_fuse.LOWERINGS, 1.0))
    tune_fuse.main()
    after = rows(table)
    assert [row[:5] for row in after if row.kind == "pool" and row.branches == 5] == [FIRST, SECOND]
    others = [row for row in before if (row.kind, row.branches) != ("pool", 5)]
    assert [row for row in after if (row.kind, row.branches) != ("pool", 5)] == others


def test_a_table_outside_the_checkout_is_not_changed(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = table.read_bytes()
    monkeypatch.setattr(tune_fuse, "CHECKOUT", tmp_path / "another")
    with pytest.raises(SystemExit):
        tune_fuse.main()
    assert "which is not in the checkout" in capsys.readouterr().err
    assert table.read_bytes() == before
