"""Tests of recorded comparisons: what files keep and refuse, and which rows the pages show."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gate, machines, page_figures, report, shown, sources
from benchmarks.comparisons import RESULTS, Comparison, Recorder, read_results, slug, write_results
from fedkern.process.commit import commit

AMD = {"cpu": "AMD EPYC", "cores": 2, "isa": "avx512", "torch": "2.13.0+cpu", "time": "2026-01-01"}
INTEL = {**AMD, "cpu": "Intel(R) Xeon(R) Processor", "time": "2026-01-02"}
ROW = Comparison(
    group="toy", case="small", ours="fedkern", threads=1, pairs=15, seconds={"fedkern": 1e-4, "eager": 2e-4},
    speedup={"eager": 2.0}, scatter={"fedkern": 0.1, "eager": 0.1}, test="bench_toy.py::test_toy[small]",
)  # fmt: skip
OTHER = replace(ROW, case="large", test="bench_toy.py::test_toy[large]")


def cases(path: Path) -> list[str]:
    return [record["case"] for record in json.loads(path.read_text())["results"]]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"isa": "avx2"}, "toy-amd-epyc-2.json"),
        ({"cores": 64}, "toy-amd-epyc-2.json"),
        ({"model": "17"}, "toy-amd-epyc-2.json"),
        ({"backend": "reference"}, "toy-amd-epyc-reference.json"),
    ],
)
def test_a_few_rows_of_another_kind_delete_nothing(change: dict[str, str], name: str, tmp_path: Path) -> None:
    (result,) = write_results([ROW, OTHER], {**AMD, "model": "1"}, tmp_path)
    before = result.read_bytes()
    for _ in range(2):
        (path,) = write_results([ROW], {**AMD, "model": "1", **change}, tmp_path)
        assert path.name == name
    assert result.read_bytes() == before
    assert cases(path) == ["small"]
    assert len(read_results(tmp_path)["toy"]) == 2


def test_rows_of_another_torch_are_kept_unless_the_file_is_started_anew(tmp_path: Path) -> None:
    (path,) = write_results([ROW, OTHER], AMD, tmp_path)
    before, newer = path.read_bytes(), {**AMD, "torch": "2.14.0"}
    with pytest.raises(ValueError, match=r"toy-amd-epyc.json: recorded with torch 2.13, but here it is 2.14; --anew"):
        write_results([ROW], newer, tmp_path)
    assert "--anew" in Recorder(lambda: newer, tmp_path).refusal("toy", "cpu")
    assert Recorder(lambda: newer, tmp_path, anew=True).refusal("toy", "cpu") == ""
    assert Recorder(lambda: newer, tmp_path).refusal("other", "cpu") == ""
    assert path.read_bytes() == before
    write_results([ROW], newer, tmp_path, anew=True)
    assert cases(path) == ["small"]


@pytest.mark.parametrize(("anew", "left"), [(False, ["gone before", "small", "large"]), (True, ["small", "large"])])
def test_every_row_is_written_when_it_is_there(anew: bool, left: list[str], tmp_path: Path) -> None:
    write_results([replace(ROW, case="gone before", test="bench_else.py::test_else")], AMD, tmp_path)
    recorder = Recorder(lambda: AMD, tmp_path, collected={ROW.test, OTHER.test}, anew=anew)
    recorder.add(ROW)
    recorder.add(replace(ROW, group="more"))
    path = tmp_path / "toy-amd-epyc.json"
    assert cases(path) == left[:-1], "before the session ends"
    recorder.add(OTHER)
    assert cases(path) == left
    assert [path.name for path in recorder.written] == ["toy-amd-epyc.json", "more-amd-epyc.json"]
    assert not list(tmp_path.glob("*.partial"))


def test_noise_and_losses_are_marked() -> None:
    marked = replace(ROW, speedup={"eager": 2.0, "torch": 0.9}, scatter={"fedkern": 0.1, "eager": 0.31, "torch": 0.3})
    own = replace(OTHER, scatter={"fedkern": 0.4, "eager": 0.1})
    (row, noise) = report.table([marked, own])[2:]
    assert row.startswith("| small | 1 thread | 100 µs | ~2.00× | **0.90×** |")
    assert noise.startswith("| large | 1 thread | ~100 µs | ~2.00× | – |")


@pytest.mark.parametrize(
    ("backend", "core", "shown"),
    [("cpu", "new", True), ("cpu", "old", False), ("cpu", "", False), ("reference", "", True), ("triton", "", True),
     ("cuda or triton", "old", False)],
)  # fmt: skip
def test_rows_of_other_kernels_are_not_present(backend: str, core: str, shown: bool) -> None:
    row = replace(ROW, backend=backend, sources=core)
    assert report.present(row, {"_cpu": "new", "_cuda": "new"}) == shown
    assert report.present(row, {"_cpu": "", "_cuda": ""}), "without csrc/ nobody knows"
    assert report.present(replace(row, startup_seconds={"fedkern": 1.0}), {"_cpu": "new", "_cuda": "new"})


def test_a_change_of_other_kernels_leaves_no_row_out() -> None:
    row = replace(ROW, group="blend", backend="cpu", sources="same")
    present = {"_cpu": "new", "_cpu blend": "same", "_cpu fuse": "other", "_cuda": "new"}
    assert report.present(row, present)
    assert not report.present(replace(row, group="fuse_mean"), present)
    assert not report.present(replace(row, group="overhead"), present), "small calls use all of them"


def test_pages_leave_out_rows_whose_kernels_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the page, the check nor the table of operators shows them."""
    node = "bench_blend.py::test_blend[(64, 256, 14, 14)-contiguous-permutation-1]"
    assert node in {name for name, _, _ in shown.nodes()}
    csrc = tmp_path / "csrc"
    for name in ("cpu/blend.cpp", "cpu/fuse.cpp"):
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text(name)
    monkeypatch.setattr(sources, "CSRC", csrc)
    before = sources.hashes(csrc)
    rows = [replace(ROW, group="blend", backend="cpu", sources=before["_cpu blend"], test=node),
            replace(ROW, group="fuse_mean", case="other", backend="cpu", sources=before["_cpu fuse"])]  # fmt: skip
    write_results(rows, AMD, tmp_path)
    command = ["--results", str(tmp_path)]

    def read_pages() -> tuple[str, list[str]]:
        lines = page_figures.operators("amd-epyc", folder=tmp_path)
        return (tmp_path / "README.md").read_text(), list(lines)

    assert report.main(command) == 0
    text, table = read_pages()
    assert "| small | 1 thread | 100 µs | 2.00× |" in text
    assert "| fuse_mean other |" in text
    assert "left out" not in text
    assert table[2] == "| `blend`, index | [64,256,14,14] | 1 | 100 µs | 2.00× |  |  |"
    marked = page_figures.operators("intel-xeon", "amd-epyc", folder=tmp_path)
    assert marked[2] == "| `blend`, index | [64,256,14,14] | 1 | 100 µs † | 2.00× |  |  |"
    (csrc / "cpu" / "blend.cpp").write_text("quicker")
    assert report.main([*command, "--check"]) == 1, "a commit that changes kernels records rows anew or loses them"
    assert report.main(command) == 0
    assert report.main([*command, "--check"]) == 0
    text, table = read_pages()
    assert "| small |" not in text
    assert "| fuse_mean other |" in text
    assert "1 row left out, not recorded with the present kernels" in text
    assert table == [f"{len([*shown.nodes()])} rows left out, not recorded with the present kernels."]


def test_the_rows_that_pages_show_exist_and_are_at_most_sixty() -> None:
    """The tests are collected, not run: every recorded name must be that of a test."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--shown", "--collect-only", "-q"]
    found = subprocess.run(command, cwd=sources.CSRC.parent, capture_output=True, text=True, timeout=300)
    collected = {line.rpartition("benchmarks/")[2] for line in found.stdout.splitlines() if "::" in line}
    assert collected == {node for node, _, _ in shown.nodes()}
    assert 50 <= len(collected) <= 60
    assert set(gate.read_floors().rows) <= collected


def test_what_an_operator_is_built_from(tmp_path: Path) -> None:
    names = (
        "cpu/blend.cpp", "cpu/fuse.cpp", "cpu/fuse_rows.h", "cpu/stream.h", "cpu/parallel.cpp", "bindings/cpu_fuse.cpp",
        "bindings/fuse_call.h", "bindings/cpu.cpp", "include/fedkern/fuse.h", "include/fedkern/simd.h", "cuda/fuse.cu",
        "include/fedkern/simd_math.h",
    )  # fmt: skip
    included = {
        "cpu/parallel.cpp": ("stream.h", "fedkern/simd.h"),
        "cpu/fuse.cpp": ("fuse_rows.h", "fedkern/fuse.h", "fuse_call.h"),
        "cpu/fuse_rows.h": ("fedkern/simd_math.h",),
        "cuda/fuse.cu": ("fedkern/fuse.h", "fuse_call.h"),
    }
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(f'#include "{header}"\n' for header in included.get(name, ())))

    def find_changed(name: str) -> set[str]:
        before = sources.hashes(tmp_path)
        (tmp_path / name).write_text((tmp_path / name).read_text() + "// changed\n")
        after = sources.hashes(tmp_path)
        return {key for key in before if before[key] != after[key]}

    cores = {core: {sources.key(core, name) for name in ("", *sources.GROUPS)} for core in ("_cpu", "_cuda")}
    assert find_changed("cpu/blend.cpp") == {"_cpu", "_cpu blend"}
    for name in ("bindings/cpu_fuse.cpp", "cpu/fuse_rows.h"):
        assert find_changed(name) == {"_cpu", "_cpu fuse"}
    assert find_changed("include/fedkern/simd_math.h") == {"_cpu", "_cpu fuse", "_cuda"}
    for name in ("bindings/fuse_call.h", "include/fedkern/fuse.h"):
        assert find_changed(name) == {"_cpu", "_cpu fuse", "_cuda", "_cuda fuse"}
    assert find_changed("bindings/cpu.cpp") == {"_cpu"}
    assert find_changed("include/fedkern/simd.h") == cores["_cpu"] | {"_cuda"}
    assert find_changed("cuda/fuse.cu") == {"_cuda", "_cuda fuse"}
    assert find_changed("cpu/stream.h") == find_changed("cpu/parallel.cpp") == cores["_cpu"]
    assert set(sources.hashes(tmp_path / "none").values()) == {""}
    assert sources.behind("cpu", "of another checkout", "blend") == ""
    present = sources.hashes(sources.CSRC)
    assert sources.behind("cpu", present["_cpu"], "boxes") == present["_cpu blend"] != present["_cpu"]


def test_every_recorded_operator_has_its_kernels() -> None:
    names = set(read_results(RESULTS))
    assert names - set(sources.FAMILIES) <= {"datasets", "overhead", "rounds"}, "add it to sources.GROUPS"


def test_a_forced_backend_and_the_days_are_named(tmp_path: Path) -> None:
    rows = [replace(ROW, time="2026-01-03T10:00"), replace(OTHER, time="2026-01-05T10:00")]
    write_results(rows, {**AMD, "backend": "reference"}, tmp_path)
    (recorded,) = read_results(tmp_path)["toy"]
    assert recorded.name == "toy-amd-epyc-reference"
    line = report.machine_line(recorded)
    assert line == "AMD EPYC, 2 cores, avx512, reference forced; torch 2.13.0+cpu; 2026-01-03 to 2026-01-05"


INTEL_CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 8

processor\t: 1
model\t\t: 999
"""
ARM_CPUINFO = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\nCPU revision\t: 1\n"


def test_a_processor_is_known_by_more_than_its_name(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    caches = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"), ("3", "Unified", "33M")]
    for number, values in enumerate(caches):
        folder = tmp_path / "cache" / f"index{number}"
        folder.mkdir(parents=True)
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (folder / name).write_text(value + "\n")
    info.write_text(INTEL_CPUINFO)
    chip = {"cpu": "Intel(R) Xeon(R) Processor", "family": "6", "model": "143", "stepping": "8"}
    assert machines.chip(info, tmp_path / "cache") == {**chip, "l2": "2048K", "l3": "33M"}
    info.write_text(ARM_CPUINFO)
    assert machines.chip(info, tmp_path / "none") == {"implementer": "0x41", "part": "0xd0c"}
    assert machines.chip(tmp_path / "none", tmp_path / "none") == {}


def test_results_name_their_commit() -> None:
    made = commit(sources.CSRC)
    assert machines.machine("cpu")["commit"] == made
    machine = {"time": "2026-01-02T03:04", "cpu": "AMD EPYC 7763 64-Core Processor", "commit": "unrecorded"}
    assert page_figures.caption(machine)[0] == "AMD EPYC 7763, 2026-01-02, commit unrecorded."
    told = page_figures.caption({**machine, "cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "commit": "abc1234"})[0]
    assert told == "Intel Xeon, 2 cores, 2026-01-02 at commit `abc1234`."


# -- machines ----------------------------------------------------------------------------------------------------------


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


def test_processors_of_the_same_slug_keep_a_file_each(tmp_path: Path) -> None:
    clocked = {**INTEL, "cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz"}
    names = [write_results([ROW], machine, tmp_path)[0].name for machine in (INTEL, clocked, INTEL, clocked)]
    assert names == ["toy-intel-xeon.json", "toy-intel-xeon-2.json"] * 2
