"""Thresholds between CUDA and Triton from made-up rows of both backends."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.comparisons import Comparison, write_results
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import stages, thresholds
from fedkern.ops._core import crossovers
from fedkern.ops._core.crossovers import FILE, Times, read_entries, write_entries

MACHINE = {
    "cpu": "a CPU", "cores": 16, "isa": "avx512", "gpu": "NVIDIA H200", "capability": "9.0", "torch": "2.11.0+cu130",
    "cuda": "13.0", "triton": "3.6.0",
}  # fmt: skip


def row(group: str, case: str, wall: float, operators: dict[str, int], **more: Any) -> Comparison:
    return Comparison(
        group=group, case=case, ours="fedkern", threads=1, pairs=15, seconds={"fedkern": 1.0},
        speedup={"eager": 2.0}, scatter={"fedkern": 0.1}, device="cuda", test=f"bench_{group}.py::test[{case}]",
        wall_seconds={"fedkern": wall} if wall else {}, operators=operators, time="2026-11-24T02:00:00+00:00", **more,
    )  # fmt: skip


def record(
    folder: Path, cuda: list[Comparison], triton: list[Comparison], of_triton: dict[str, str] | None = None
) -> None:
    write_results(cuda, {**MACHINE, "backend": "cuda"}, folder)
    write_results(triton, {**MACHINE, "backend": "triton", **(of_triton or {})}, folder)


def both(folder: Path) -> None:
    """kl_div is faster with Triton from 1000 bytes, blend never, entropy by less than the margin."""
    times = {
        ("kl_div", "a", 10): (1e-5, 2e-5),
        ("kl_div", "b", 1000): (2e-4, 1e-4),
        ("kl_div", "c", 2000): (4e-4, 3e-4),
        ("blend", "a", 10): (1e-5, 2e-5),
        ("entropy", "a", 10): (1.01e-5, 1e-5),
    }
    for i, name in enumerate(thresholds.BACKENDS):
        rows = [row(group, case, wall[i], {group: size}) for (group, case, size), wall in times.items()]
        rows.append(row("step", "many", (1.0, 1e-6)[i], {"kl_div": 5, "blend": 5}))
        rows.append(row("kl_div", "reference", (1.0, 1e-6)[i], {}))
        write_results(rows, {**MACHINE, "backend": name}, folder)


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
    assert read_entries(results / FILE.name) == (entry,)
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


def test_kernels_times_count_where_there_is_no_wall_time(tmp_path) -> None:
    cuda = row("kl_div", "a", 1.0, {"kl_div": 10}, peak_bytes={})
    triton = replace(row("kl_div", "a", 0, {"kl_div": 10}), seconds={"fedkern": 0.25})
    record(tmp_path, [cuda], [triton])
    entry, left_out = thresholds.measured(tmp_path, None)
    assert entry.times == {"kl_div": [Times(10, 1.0, 0.25)]}
    assert left_out == 0


def test_rows_without_a_counterpart_are_left_out_and_counted(tmp_path, capsys) -> None:
    same, lone = row("kl_div", "a", 1.0, {"kl_div": 10}), row("kl_div", "b", 1.0, {"kl_div": 20})
    changed = row("kl_div", "c", 1.0, {"kl_div": 20})
    record(tmp_path, [same, lone, changed], [same, replace(changed, operators={"kl_div": 30})])
    assert thresholds.main(["--results", str(tmp_path), "--into", str(tmp_path / "table")]) == 0
    assert "left out: 3 rows, recorded with one backend alone" in capsys.readouterr().out
    assert [len(rows) for rows in read_entries(tmp_path / "table")[0].times.values()] == [1]


ROW = row("kl_div", "a", 1.0, {"kl_div": 10})


@pytest.mark.parametrize(
    ("cuda", "triton", "changes", "reason"),
    [
        ([ROW], [], {}, "has no row of one operator that triton served on NVIDIA H200"),
        ([replace(ROW, operators={})], [ROW], {}, "has no row of one operator that cuda served on NVIDIA H200"),
        ([ROW], [replace(ROW, case="b")], {}, "has no row that was recorded with both backends"),
        ([ROW], [ROW], {"torch": "2.12"}, "was recorded with torch 2.12, but in kl_div-cuda-nvidia-h200-cuda.json it"),
        ([ROW], [ROW], {"cpu": "another"}, "was recorded with cpu another, but in"),
        ([ROW], [ROW], {"triton": "3.7"}, "was recorded with triton 3.7, but in"),
        ([ROW], [ROW], {"gpu": "NVIDIA H100"}, "has rows of NVIDIA H100, NVIDIA H200: name one of them with --gpu"),
    ],
)
def test_what_gives_no_thresholds_is_one_sentence(tmp_path, capsys, monkeypatch, cuda, triton, changes, reason) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record(tmp_path, cuda, triton, changes)
    assert thresholds.main(["--results", str(tmp_path), "--into", str(tmp_path / "table")]) == 2
    told = capsys.readouterr()
    assert reason in told.err
    assert len(told.err.splitlines()) == 1
    assert not told.out
    assert not (tmp_path / "table").exists()
    assert not (tmp_path / FILE.name).exists()


def test_no_results_and_no_table_are_one_sentence(tmp_path, capsys) -> None:
    into = tmp_path / "table.json"
    assert thresholds.main(["--results", str(tmp_path / "none"), "--into", str(into)]) == 2
    assert "none is no folder of recorded rows: play the operators' stages" in capsys.readouterr().err
    assert thresholds.main(["--results", str(tmp_path), "--into", str(into)]) == 2
    assert "has no rows that a forced backend served on a GPU" in capsys.readouterr().err
    both(tmp_path)
    into.write_text("{}")
    assert thresholds.main(["--results", str(tmp_path), "--into", str(into)]) == 2
    assert f"{into} cannot be read (it is no list of GPUs)" in capsys.readouterr().err
    assert into.read_text() == "{}"
    assert thresholds.main(["--results", str(tmp_path), "--into", str(tmp_path / "no" / "folder")]) == 2
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err
    (tmp_path / "kl_div-x.json").write_text("{")
    assert thresholds.main(["--results", str(tmp_path), "--into", str(tmp_path / "new")]) == 2
    assert "has a file of rows that cannot be read" in capsys.readouterr().err


def test_rows_that_tell_no_capability_are_refused(tmp_path, capsys) -> None:
    both(tmp_path)
    for path in tmp_path.glob("*.json"):
        content = json.loads(path.read_text())
        del content["machine"]["capability"]
        path.write_text(json.dumps(content))
    assert thresholds.main(["--results", str(tmp_path), "--into", str(tmp_path / "table")]) == 2
    assert "do not tell its compute capability" in capsys.readouterr().err


def test_the_gpu_of_this_machine_is_taken_among_several(tmp_path, monkeypatch) -> None:
    both(tmp_path)
    write_results([ROW], {**MACHINE, "gpu": "NVIDIA H100", "backend": "cuda"}, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert thresholds.measured(tmp_path, None)[0].gpu == "NVIDIA H200"
    with pytest.raises(thresholds.Refused, match="no row of one operator that triton served on NVIDIA H100"):
        thresholds.measured(tmp_path, "NVIDIA H100")


def test_the_stage_comes_after_the_operators_and_undoes_no_stage(tmp_path, monkeypatch) -> None:
    names = [stage.name for stage in stages.plan("9.0", Path("/out"), None)]
    written = {stage.name for stage in stages.operators(Path("/out"))}
    assert max(names.index(name) for name in written) < names.index("thresholds")
    assert stages.thresholds(Path("/out")).command[-2:] == ("--results", str(Path("/out/results")))
    monkeypatch.setattr(command, "ROOT", tmp_path)
    (tmp_path / "fedkern").mkdir()
    (tmp_path / "fedkern" / "code.py").write_text("1")
    before = command._code()
    (tmp_path / "fedkern" / FILE.name).write_text("measured")
    assert command._code() == before
    (tmp_path / "fedkern" / "code.py").write_text("2")
    assert command._code() != before
