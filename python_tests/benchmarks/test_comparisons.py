"""What recording keeps, refuses and says about itself: files per machine, rows as they come, and the report's marks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import machines
import pytest

from benchmarks import report, sources
from benchmarks.comparisons import COPY, RESULTS, Comparison, Recorder, read_results, write_results

AMD = {"cpu": "AMD EPYC", "cores": 2, "isa": "avx512", "torch": "2.13.0+cpu", "time": "2026-01-01"}
NOBODY_KNOWS = {"_cpu": "", "_cuda": ""}
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
    test="bench_toy.py::test_toy[small]",
)
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
    (whole,) = write_results([ROW, OTHER], {**AMD, "model": "1"}, tmp_path)
    before = whole.read_bytes()
    for _ in range(2):
        (path,) = write_results([ROW], {**AMD, "model": "1", **change}, tmp_path)
        assert path.name == name
    assert whole.read_bytes() == before
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
    assert [one.name for one in recorder.written] == ["toy-amd-epyc.json", "more-amd-epyc.json"]
    assert not list(tmp_path.glob("*.partial"))


def test_rows_of_earlier_forms_are_read() -> None:
    new = {"beside", "time", "core", "backend"}
    old = {name: value for name, value in ROW.record().items() if name not in new}
    assert Comparison.from_record(old) == ROW
    row = replace(ROW, beside=["eager"], time="2026-01-03T10:00:00+00:00", core="abc", backend="cpu")
    assert Comparison.from_record(json.loads(json.dumps(row.record()))) == row


def test_noise_is_marked(tmp_path: Path) -> None:
    one = replace(ROW, speedup={"eager": 2.0, "torch": 0.9}, scatter={"fedkern": 0.1, "eager": 0.31, "torch": 0.3})
    own = replace(OTHER, scatter={"fedkern": 0.4, "eager": 0.1})
    (row, noise) = report.table([one, own], NOBODY_KNOWS)[2:]
    assert row.startswith("| small | 1 thread | 100 µs | ~2.00× | **0.90×** |")
    assert noise.startswith("| large | 1 thread | ~100 µs | ~2.00× | – |")
    assert report.meanings([one], NOBODY_KNOWS) == report.meanings([own], NOBODY_KNOWS) == [report.MEANING["~"]]
    assert report.meanings([replace(one, scatter=dict.fromkeys(one.scatter, 0.3))], NOBODY_KNOWS) == []
    write_results([one, own], AMD, tmp_path)
    assert report.main(["--results", str(tmp_path), "--docs", str(tmp_path / "no.md")]) == 0


@pytest.mark.parametrize(
    ("backend", "core", "marked"),
    [
        ("cpu", "new", False),
        ("cpu", "old", True),
        ("", "", True),
        ("reference", "", False),
        ("triton", "", False),
        ("cuda or triton", "old", True),
    ],
)
def test_rows_of_another_core_are_marked(backend: str, core: str, marked: bool) -> None:
    row = replace(ROW, backend=backend, core=core)
    present = {"_cpu": "new", "_cuda": "new"}
    lines = report.short_table([row], present)
    assert ("| small † |" in lines[2]) == marked
    assert report.meanings([row], present) == [report.MEANING["†"]] * marked
    assert "†" not in "".join(report.short_table([row], NOBODY_KNOWS)), "without csrc/ nobody knows"


@pytest.mark.parametrize(("backend", "marked"), [("cpu", False), ("cuda", True), ("cuda or triton", True)])
def test_a_change_of_the_cuda_core_alone_marks_no_row_of_the_cpu(backend: str, marked: bool) -> None:
    row = replace(ROW, backend=backend, core="old")
    assert report.outdated(row, {"_cpu": "old", "_cuda": "new"}) == marked


def test_a_change_of_other_kernels_marks_no_row() -> None:
    row = replace(ROW, group="blend", backend="cpu", core="old", sources="same")
    present = {"_cpu": "new", "_cpu blend": "same", "_cpu fuse": "other"}
    assert not report.outdated(row, present)
    assert report.outdated(replace(row, group="fuse_mean"), present)
    assert report.outdated(replace(row, group="fediod_step"), present), "steps use all of them"
    assert report.outdated(replace(row, sources=""), present)


def test_what_an_operator_is_built_from(tmp_path: Path) -> None:
    names = ("cpu/blend.cpp", "cpu/fuse.cpp", "cpu/stream.h", "bindings/cpu_fuse.cpp", "cuda/fuse.cu", "cpu/isa.cpp")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def changed(name: str) -> set[str]:
        before = sources.hashes(tmp_path)
        (tmp_path / name).write_text("changed " + name)
        after = sources.hashes(tmp_path)
        return {key for key in before if before[key] != after[key]}

    cores = {core: {sources.key(core, name) for name in ("", *sources.GROUPS)} for core in ("_cpu", "_cuda")}
    assert changed("cpu/blend.cpp") == {"_cpu", "_cpu blend"}
    assert changed("bindings/cpu_fuse.cpp") == {"_cpu", "_cpu fuse"}
    assert changed("cuda/fuse.cu") == {"_cuda", "_cuda fuse"}
    assert changed("cpu/stream.h") == changed("cpu/isa.cpp") == cores["_cpu"]
    assert set(sources.hashes(tmp_path / "none").values()) == {""}
    assert sources.behind("cpu", "of another checkout", "blend") == ""
    present = sources.hashes(sources.CSRC)
    assert sources.behind("cpu", present["_cpu"], "boxes") == present["_cpu blend"] != present["_cpu"]


def test_every_recorded_operator_has_its_kernels() -> None:
    names = set(read_results(RESULTS))
    assert names > set(sources.FAMILIES)
    steps = {"feddra_step", "fediod_step", "fedlpfm_step", "fusefl_level", "overhead", "rounds"}
    assert names - set(sources.FAMILIES) <= steps, "add it to sources.GROUPS"


def test_the_check_does_not_fail_when_the_core_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results([replace(ROW, core="old", backend="cpu")], AMD, tmp_path)
    docs = tmp_path / "ops.md"
    docs.write_text("<!-- measured: toy -->\n<!-- end -->\n")
    command = ["--results", str(tmp_path), "--docs", str(docs)]
    monkeypatch.setattr(sources, "source_hash", lambda *arguments: "old")
    assert report.main(command) == 0
    assert "| small |" in docs.read_text()
    monkeypatch.setattr(sources, "source_hash", lambda *arguments: "new")
    assert report.main([*command, "--check"]) == 0
    assert report.main(command) == 0
    assert "| small † |" in docs.read_text()
    assert docs.read_text().endswith(f"\n\n{report.MEANING['†']}\n\n<!-- end -->\n")
    monkeypatch.setattr(sources, "source_hash", lambda *arguments: "old")
    assert report.main([*command, "--check"]) == 0


def test_a_forced_backend_and_the_days_are_named(tmp_path: Path) -> None:
    rows = [replace(ROW, time="2026-01-03T10:00"), replace(OTHER, time="2026-01-05T10:00")]
    write_results(rows, {**AMD, "backend": "reference"}, tmp_path)
    (recorded,) = read_results(tmp_path)["toy"]
    assert recorded.name == "toy-amd-epyc-reference"
    line = report.machine_line(recorded)
    assert line == "AMD EPYC, 2 cores, avx512, reference forced; torch 2.13.0+cpu; 2026-01-03 to 2026-01-05"
    recorded.rows[0].time = ""
    assert report.dates(recorded) == "up to 2026-01-05"
    recorded.rows[1].time = ""
    assert report.dates(recorded) == "2026-01-01"


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


@pytest.mark.parametrize("forced", ["", "reference"])
def test_a_run_says_what_served(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKERN_BACKEND", forced)
    assert machines.machine("cpu").get("backend", "") == forced
    backend, core = machines.served_by("cpu")
    if forced:
        assert (backend, core) == ("reference", "")
    else:
        assert backend in ("cpu", "reference")
        assert (len(core) == 16) == (backend == "cpu")


def test_a_promised_share_of_a_copy_stands_beside_what_was_reached() -> None:
    slow = replace(ROW, floors={COPY: 0.9}, model_bytes=1000, copy_seconds=0.7e-4)
    assert slow.broken_promises() == {COPY: 0.9}
    assert report.copied(slow) == "70 % (promised 90 %)"
    fast = replace(slow, copy_seconds=0.95e-4)
    assert not fast.broken_promises()
    assert report.copied(fast) == "95 %"
    assert not replace(ROW, floors={COPY: 0.9}).broken_promises(), "no copy was asked for"


def test_the_pages_ask_for_groups_that_are_recorded() -> None:
    recorded = read_results(RESULTS)
    page = RESULTS.parents[1] / "docs" / "ops.md"
    asked = {name.strip() for match in report.SECTION.finditer(page.read_text()) for name in match[2].split(",")}
    assert asked
    assert asked <= set(recorded)
