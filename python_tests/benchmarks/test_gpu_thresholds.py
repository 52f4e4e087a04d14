"""Thresholds between CUDA and Triton from made-up times of both backends."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import kernels, stages, thresholds
from fedkern.ops._core import crossovers
from fedkern.ops._core.crossovers import FILE, Times, read_entries, write_entries

MACHINE = {
    "time": "2026-11-24T02:00:00+00:00", "cpu": "a CPU", "gpu": "NVIDIA H200", "capability": "9.0",
    "torch": "2.11.0+cu130", "cuda": "13.0", "triton": "3.6.0",
}  # fmt: skip


def row(backend: str, size: int, wall: float, name: str = "kl_div", **more: Any) -> dict[str, Any]:
    key = {"operator": name, "size": str(size), "dtype": "fp32", "odd": False, "backend": backend}
    return {**key, "wall": wall, "operators": {name: size}, **more}


def write(folder: Path, rows: list[dict[str, Any]], machine: dict[str, Any] = MACHINE) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / kernels.FILE
    path.write_text(json.dumps({"machine": machine, "rows": rows}))
    return path


def both(folder: Path) -> None:
    """kl_div is faster with Triton from 1000 bytes, blend never, entropy by less than the margin."""
    times = {
        ("kl_div", 10): (1e-5, 2e-5),
        ("kl_div", 1000): (2e-4, 1e-4),
        ("kl_div", 2000): (4e-4, 3e-4),
        ("blend", 10): (1e-5, 2e-5),
        ("entropy", 10): (1.01e-5, 1e-5),
    }
    rows = [row("reference", 10, 1.0)]
    for (name, size), (cuda, triton) in times.items():
        rows += [row("cuda", size, cuda, name), row("triton", size, triton, name)]
    for backend, wall in (("cuda", 1.0), ("triton", 1e-6)):
        rows.append(row(backend, 7, wall, "step", operators={"kl_div": 5, "blend": 5}))
        rows.append(row(backend, 8, wall, "none", operators={}))
        rows.append({**row(backend, 9, wall), "operators": {}, "failed": "it broke"})
    write(folder, [*rows, row("cuda", 5, 1.0)])


def test_the_size_from_which_triton_serves() -> None:
    def found(*times: tuple[int, float, float]) -> int | None:
        return thresholds.crossover([Times(*one) for one in times])

    assert found((10, 1, 2), (20, 2, 1), (30, 2, 1)) == 20
    assert found((10, 1, 2), (20, 1, 2)) is None
    assert found((10, 2, 1), (20, 2, 1)) == 10
    # One lost size among large wins is worth it, a large loss behind a small win is not.
    assert found((10, 1, 2), (20, 3, 1), (30, 1, 1.1), (40, 3, 1)) == 20
    assert found((10, 1.1, 1), (20, 1, 3)) is None
    # Rows of one size go together.
    assert found((10, 1, 2), (10, 3, 1)) == 10
    assert found((10, 3, 1), (10, 1, 4)) is None
    # Less than the margin is nothing.
    assert found((10, 1.019, 1)) is None
    assert found((10, 1.021, 1)) == 10
    assert found() is None


def test_a_table_from_rows_of_both_backends(tmp_path, capsys, monkeypatch) -> None:
    results, into = tmp_path / "results", tmp_path / "table.json"
    both(results)
    assert thresholds.main(["--results", str(results), "--into", str(into)]) == 0
    (entry,) = read_entries(into)
    assert (entry.gpu, entry.capability, entry.time) == ("NVIDIA H200", (9, 0), "2026-11-24T02:00:00+00:00")
    assert entry.versions == {"torch": "2.11.0+cu130", "cuda": "13.0", "triton": "3.6.0"}
    assert entry.thresholds == {"blend": None, "entropy": None, "kl_div": 1000}
    assert entry.times["kl_div"] == (Times(10, 1e-5, 2e-5), Times(1000, 2e-4, 1e-4), Times(2000, 4e-4, 3e-4))
    told = capsys.readouterr().out.splitlines()
    gain = math.sqrt(2 * 4 / 3)
    assert f"kl_div: Triton from 1,000 bytes, {gain:.2f}× as fast there (2 of 3 rows)" in told
    assert "blend: CUDA at every size (1 rows)" in told
    assert "optimise: no rows, the estimate stays" in told
    monkeypatch.setattr(crossovers, "FILE", into)
    assert crossovers.serving("NVIDIA H200", (9, 0)) == entry


def test_only_this_gpus_entry_is_replaced(tmp_path) -> None:
    results, into = tmp_path / "results", tmp_path / "table.json"
    both(results)
    assert thresholds.main(["--results", str(results), "--into", str(into)]) == 0
    (entry,) = read_entries(into)
    other = replace(entry, gpu="NVIDIA H100")
    write_entries([replace(entry, thresholds={"kl_div": 1}), other], into)
    assert thresholds.main(["--results", str(results), "--into", str(into)]) == 0
    assert read_entries(into) == (other, entry)


def test_what_gives_no_thresholds_is_one_sentence(tmp_path, capsys) -> None:
    def refused(words: list[str]) -> str:
        assert thresholds.main(words) == 2
        told = capsys.readouterr()
        assert not told.out
        assert len(told.err.splitlines()) == 1
        return told.err

    into = tmp_path / "table.json"
    words = ["--results", str(tmp_path), "--into", str(into)]
    assert "cannot be read" in refused(words)
    (tmp_path / kernels.FILE).write_text("{")
    assert "play the stage 'kernels'" in refused(words)
    write(tmp_path, [row("cuda", 10, 1.0), row("triton", 20, 1.0)])
    assert "has no row of one operator that was measured with both" in refused(words)
    assert not into.exists()
    both(tmp_path)
    into.write_text("{}")
    assert f"{into} cannot be read (it is no list of GPUs)" in refused(words)
    assert into.read_text() == "{}"
    assert "cannot be written (No such file or directory)" in refused([*words[:3], str(tmp_path / "no" / "folder")])


def test_rows_of_the_same_machine_stay_in_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(kernels.machines, "machine", lambda _: dict(MACHINE))
    path = tmp_path / kernels.FILE
    for backend, wall in (("cuda", 1.0), ("triton", 2.0), ("cuda", 3.0)):
        kernels.Table(path).add(row(backend, 10, wall))
    assert [one["wall"] for one in json.loads(path.read_text())["rows"]] == [3.0, 2.0]
    monkeypatch.setattr(kernels.machines, "machine", lambda _: {**MACHINE, "gpu": "NVIDIA H100"})
    kernels.Table(path).add(row("cuda", 10, 4.0))
    assert [one["wall"] for one in json.loads(path.read_text())["rows"]] == [4.0]


def test_the_stage_reads_what_the_kernels_wrote_and_undoes_no_stage(tmp_path, monkeypatch) -> None:
    assert stages.thresholds(Path("/out")).command[-1] in stages.kernels(Path("/out")).command
    monkeypatch.setattr(command, "ROOT", tmp_path)
    (tmp_path / "fedkern").mkdir()
    (tmp_path / "fedkern" / "code.py").write_text("1")
    before = command.code()
    (tmp_path / "fedkern" / FILE.name).write_text("measured")
    assert command.code() == before
    (tmp_path / "fedkern" / "code.py").write_text("2")
    assert command.code() != before
