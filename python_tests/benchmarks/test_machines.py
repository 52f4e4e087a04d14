"""Results and floors of several machines, side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gate, report
from benchmarks.comparisons import Comparison, read_results, slug, write_results

AMD = {"cpu": "AMD EPYC", "cores": 2, "isa": "avx512", "torch": "2.13.0+cpu", "time": "2026-01-01"}
INTEL = {**AMD, "cpu": "Intel(R) Xeon(R) Processor", "time": "2026-01-02"}
ROW = Comparison(
    group="toy",
    case="small",
    ours="fedkern",
    threads=1,
    loaded=False,
    pairs=15,
    seconds={"fedkern": 1e-4, "eager": 2e-4},
    speedup={"eager": 2.0},
    scatter={"fedkern": 0.1, "eager": 0.1},
    floors={"eager": 1.5},
    test="bench_toy.py::test_toy[small]",
)
SLOWER = replace(ROW, speedup={"eager": 1.2})
OTHER = replace(ROW, case="large", test="bench_toy.py::test_toy[large]")
DOCS = "<!-- measured: toy -->\n<!-- end -->\n"


def floors_of(folder: Path) -> gate.Floors:
    """What ``--floors`` makes of a folder of results, read from the file."""
    path = folder / "floors.toml"
    assert report.main(["--results", str(folder), "--floors", str(path)]) == 0
    return gate.read_floors(path)


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


def test_each_machine_has_floors_of_its_own(tmp_path: Path) -> None:
    write_results([ROW, OTHER], AMD, tmp_path)
    write_results([SLOWER, replace(ROW, group="more", test="t::more")], INTEL, tmp_path)
    floors = floors_of(tmp_path)
    assert {name: facts["cpu"] for name, facts in floors.machines.items()} == {
        "amd-epyc": AMD["cpu"],
        "intel-xeon": INTEL["cpu"],
    }
    for name, lowest in (("amd-epyc", 1.7), ("intel-xeon", 1.02)):
        found = floors.of(ROW.key, {name})
        assert found is not None
        assert found.against == {"eager": lowest}
    assert floors.of(OTHER.key, {"intel-xeon"}) is None
    assert floors.of(ROW.key, {"another"}) is None
    assert floors.machines_of(ROW.key) == ["amd-epyc", "intel-xeon"]
    assert floors.machines_of(OTHER.key) == ["amd-epyc"]


def test_the_short_gate_takes_this_machines_tests_and_others_only_to_skip_them(tmp_path: Path) -> None:
    write_results([ROW, OTHER], AMD, tmp_path)
    write_results([SLOWER, replace(ROW, group="more", test="t::more")], INTEL, tmp_path)
    floors = floors_of(tmp_path)
    assert floors.short_tests("cpu", {"intel-xeon"}) == {ROW.test, "t::more"}
    assert floors.short_tests("cpu", {"amd-epyc"}) == {ROW.test, OTHER.test, "t::more"}
    assert floors.short_tests("cpu", set()) == {ROW.test, OTHER.test, "t::more"}


def test_groups_of_one_processor_may_differ_in_versions(tmp_path: Path) -> None:
    write_results([ROW], AMD, tmp_path)
    write_results([replace(ROW, group="more")], {**AMD, "torch": "2.14.0"}, tmp_path)
    write_results([replace(ROW, group="most")], {**AMD, "time": "2026-01-03"}, tmp_path)
    floors = floors_of(tmp_path)
    assert {name: facts["torch"] for name, facts in floors.machines.items()} == {
        "amd-epyc": "2.14.0",
        "amd-epyc-2": "2.13.0+cpu",
    }
    assert [(row.group, row.machine) for row in floors.rows] == [
        ("more", "amd-epyc"),
        ("most", "amd-epyc-2"),
        ("toy", "amd-epyc-2"),
    ]


def test_the_pages_show_machine_after_machine(tmp_path: Path) -> None:
    write_results([ROW], AMD, tmp_path)
    write_results([SLOWER], INTEL, tmp_path)
    docs = tmp_path / "ops.md"
    docs.write_text(DOCS)
    command = ["--results", str(tmp_path), "--docs", str(docs)]
    assert report.main([*command, "--check"]) == 1
    assert report.main(command) == 0
    assert report.main([*command, "--check"]) == 0
    amd, intel = (tmp_path / "README.md").read_text().split("\n## ")[1:]
    assert amd.startswith("toy on AMD EPYC\n")
    assert intel.startswith("toy on Intel(R) Xeon(R) Processor\n")
    assert "1.20× (promised 1.5×)" in intel
    assert "promised" not in amd
    first, second = docs.read_text().split("`toy` on ")[1:]
    assert first.startswith("AMD EPYC, 2 cores")
    assert "| small † | 100 µs | 2.00× | – |" in first
    assert second.startswith("Intel(R) Xeon(R) Processor, 2 cores")
    assert "| small † | 100 µs | 1.20× (promised 1.5×) | – |" in second
