"""``tune``: a table of one's own, all of it or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedkern.ops._fuse.blocks import choice as fuse_choice
from fedkern.ops._fuse.blocks import tune as fuse_tune
from fedkern.ops._fuse.blocks.lowering_costs import read_table
from fedkern.run import main


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(fuse_choice.VARIABLE, raising=False)
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "cache"))
    fuse_choice.forget()
    yield tmp_path / "cache"
    fuse_choice.forget()


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuner whose measurements take no time and find that grouped convolutions cost least."""
    monkeypatch.setattr(fuse_tune, "_ways", lambda setting: (None, 1.0))
    costs = {"grouped": 1e-12, "separate": 2e-12, "direct": 3e-12}
    monkeypatch.setattr(fuse_tune, "_fastest", lambda ways, repeats, clock: costs)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.exhaustive
def test_a_quick_table_serves_from_now_on(cache, result) -> None:
    text, told = result("tune", "--quick", "--threads", "1")
    (path,) = files(cache)
    found = fuse_choice.serving()
    assert (found.kind, found.path) == ("own", path)
    assert f"{path}: {len(fuse_tune.settings(quick=True))} rows, table {found.digest}" in " ".join(text.split("\n"))
    assert "rows" in text
    assert told.splitlines()[-1].split("/")[0] == str(len(fuse_tune.settings(quick=True)))
    (table,) = found.tables
    assert list(table.rows) == [1]
    assert all(0 < cost < 1e9 for row in table.rows[1] for cost in (row.grouped, row.separate))
    assert table.digest in result("doctor")[0]


def test_every_number_of_threads_has_its_rows(untimed, cache, result) -> None:
    told = json.loads(result("tune", "--threads", "1,3,1", "--json")[0])
    table = read_table(Path(told["file"]))
    assert (told["threads"], told["table"], told["rows"]) == ([1, 3], table.digest, 2 * len(fuse_tune.settings()))
    assert list(table.rows) == [1, 3]
    assert all({row[:5] for row in rows} == set(fuse_tune.settings()) for rows in table.rows.values())
    assert all(row[5:] == (1.0, 2.0, 3.0) for rows in table.rows.values() for row in rows)


def test_a_table_elsewhere_serves_where_it_is_named(untimed, cache, result, monkeypatch) -> None:
    text, told = result("tune", "--quick", "--quiet", "--out", "new/mine.json")
    path = Path("new/mine.json").absolute()
    assert (text, told) == (f"{path}\n", "")
    assert not cache.exists()
    assert fuse_choice.serving().kind != "own"
    monkeypatch.setenv(fuse_choice.VARIABLE, "new/mine.json")
    assert fuse_choice.serving().digest == read_table(path).digest
    assert "it serves where FEDKERN_LOWERINGS names it" in result("tune", "--quick", "--out", "new/mine.json")[0]


def test_ctrl_c_leaves_the_table_before(untimed, cache, result, monkeypatch, capsys) -> None:
    before = Path(result("tune", "--quick", "--quiet")[0].strip())
    content, calls = before.read_bytes(), iter(range(5))

    def measured(ways: object, repeats: int, clock: object) -> dict[str, float]:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return {"grouped": 7e-12, "separate": 2e-12}

    monkeypatch.setattr(fuse_tune, "_fastest", measured)
    assert main(["tune"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert files(cache) == [before]
    assert before.read_bytes() == content
    before.unlink()
    calls = iter(range(5))
    assert main(["tune"]) == 130
    assert files(cache) == []


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--qick"], ["tune does not take", "--quick"]),
        (["more"], ["tune does not take"]),
        (["--threads", "0"], ["--threads takes whole numbers from 1 to 1024", "'0'"]),
        (["--threads", "1,,2"], ["--threads takes whole numbers"]),
        (["--threads", "1" + "0" * 5000], ["--threads takes whole numbers"]),
        (["--threads", ""], ["--threads is given without a value"]),
        (["--out", " "], ["--out is given without a value"]),
        (["--out", "."], ["cannot be written (it is a folder)", "--out"]),
        (["--out", "file/table.json"], ["cannot be written", "file", "--out"]),
        (["--out", "/proc/table.json"], ["cannot be written", "/proc", "--out"]),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(argv, parts, fails, monkeypatch) -> None:
    Path("file").write_text("")
    monkeypatch.setattr(fuse_tune, "measure", None)
    sentence = fails("tune", *argv)
    assert all(part in sentence for part in parts)


def test_the_command_comes_first(fails, result) -> None:
    assert "Name tune first, then its flags" in fails("--quiet", "tune")
    assert "--quick" in result("tune", "--help")[0]
    assert "tune" in result("--help")[0]


def test_a_table_that_is_named_and_none_is_told_by_every_command(fails, result, monkeypatch) -> None:
    monkeypatch.setenv(fuse_choice.VARIABLE, "nowhere.json")
    assert "FEDKERN_LOWERINGS names nowhere.json, which is no table" in fails("fedavg")
    assert not Path("runs").exists()
    assert "FEDKERN_LOWERINGS names nowhere.json" in " ".join(result("doctor")[0].split())
