"""Results of several machines, side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import machines, report
from benchmarks.comparisons import Comparison, read_results, slug, write_results

AMD = {"cpu": "AMD EPYC", "cores": 2, "isa": "avx512", "torch": "2.13.0+cpu", "time": "2026-01-01"}
INTEL = {**AMD, "cpu": "Intel(R) Xeon(R) Processor", "time": "2026-01-02"}
ROW = Comparison(
    group="toy",
    case="small",
    ours="fedkern",
    threads=1,
    pairs=15,
    seconds={"fedkern": 1e-4, "eager": 2e-4},
    speedup={"eager": 2.0},
    scatter={"fedkern": 0.1, "eager": 0.1},
    test="bench_toy.py::test_toy[small]",
    backend="reference",
)
SLOWER = replace(ROW, speedup={"eager": 1.2})
OTHER = replace(ROW, case="large", test="bench_toy.py::test_toy[large]")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("AMD EPYC", "amd-epyc"),
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763"),
        ("Intel(R) Xeon(R) Processor", "intel-xeon"),
        ("Intel(R) Xeon(R) Processor (Skylake, IBRS)", "intel-xeon-skylake-ibrs"),
        ("Intel(R) Core(TM) i7-9700K CPU @ 3.60GHz", "intel-core-i7-9700k"),
        ("", "unknown"),
    ],
)
def test_files_are_named_by_maker_and_model(name: str, short: str) -> None:
    assert slug({"cpu": name}) == short
    assert slug({"cpu": name, "gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"


def test_a_row_names_the_one_backend_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDKERN_BACKEND", raising=False)
    for cores, served in (
        ({"cuda": "c", "triton": ""}, ("cuda", "c")),
        ({"triton": ""}, ("triton", "")),
        ({}, ("reference", "")),
    ):
        monkeypatch.setattr(machines, "_core_of", cores.get)
        assert machines.served_by("cuda") == served


def test_recording_on_one_machine_leaves_the_others_file(tmp_path: Path) -> None:
    (amd,) = write_results([ROW, OTHER], AMD, tmp_path)
    before = amd.read_bytes()
    (intel,) = write_results([SLOWER, OTHER], INTEL, tmp_path)
    write_results([replace(SLOWER, speedup={"eager": 1.3})], INTEL, tmp_path)
    assert (amd.name, intel.name) == ("toy-amd-epyc.json", "toy-intel-xeon.json")
    assert amd.read_bytes() == before
    recorded = read_results(tmp_path)["toy"]
    assert [one.machine["cpu"] for one in recorded] == [AMD["cpu"], INTEL["cpu"]]
    assert [row.speedup["eager"] for row in recorded[1].rows] == [2.0, 1.3], "the row not measured again stays"


def test_processors_of_the_same_slug_keep_a_file_each(tmp_path: Path) -> None:
    clocked = {**INTEL, "cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz"}
    names = [write_results([ROW], machine, tmp_path)[0].name for machine in (INTEL, clocked, INTEL, clocked)]
    assert names == ["toy-intel-xeon.json", "toy-intel-xeon-2.json"] * 2


def test_recording_a_few_tests_adds_to_the_file(tmp_path: Path) -> None:
    gone = replace(ROW, case="gone", test="bench_toy.py::test_gone")
    foreign = replace(ROW, case="foreign", test="bench_else.py::test_foreign")
    write_results([ROW, OTHER, gone, foreign], AMD, tmp_path)
    renamed = replace(ROW, case="[64, 20]", speedup={"eager": 5.0})
    (path,) = write_results([renamed], AMD, tmp_path, collected=[ROW.test, OTHER.test])
    (recorded,) = read_results(tmp_path)["toy"]
    assert [row.case for row in recorded.rows] == ["large", "foreign", "[64, 20]"]
    assert recorded.rows[2] == renamed
    (path,) = write_results([replace(ROW, device="cuda")], {**AMD, "gpu": "NVIDIA H200"}, tmp_path)
    assert path.name == "toy-cuda-nvidia-h200.json"
    assert [recorded.name for recorded in read_results(tmp_path)["toy"]] == ["toy-amd-epyc", "toy-cuda-nvidia-h200"]


def test_the_page_shows_machine_after_machine(tmp_path: Path) -> None:
    write_results([ROW], AMD, tmp_path)
    write_results([SLOWER], INTEL, tmp_path)
    command = ["--results", str(tmp_path)]
    assert report.main([*command, "--check"]) == 1
    assert report.main(command) == 0
    assert report.main([*command, "--check"]) == 0
    amd, intel = (tmp_path / "README.md").read_text().split("\n## ")[1:]
    assert amd.startswith("toy on AMD EPYC\n\nAMD EPYC, 2 cores")
    assert "| small | 1 thread | 100 µs | 2.00× |" in amd
    assert intel.startswith("toy on Intel(R) Xeon(R) Processor\n")
    assert "| small | 1 thread | 100 µs | 1.20× |" in intel
