"""`fifteen.sh` and every line of it, on a GPU that is only pretended: the CPU computes, and the CPU's clock counts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_methods, comparisons, gpu_figures, timing
from benchmarks.gpu import beside, counters, fifteen, kernels, stages, without
from benchmarks.gpu.playing import FAILED, PASSED, RECORD
from benchmarks.gpu.stages import ROOT, Stage
from benchmarks.rounds import setting
from benchmarks.rounds.plays import Played
from fedkern.cli.flags import parse
from fedkern.cli.request import effective
from fedkern.engine import lanes, training
from python_tests.ops.emulated_core import emulated
from python_tests.ops.every_operator import OPERATORS

H200 = {"gpu": "NVIDIA H200", "capability": "9.0"}
H100 = {"gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0"}
MACHINE = {"time": "2026-11-29T03:00:00+00:00", "torch": "2.11.0+cu130", "core": "1"}
LINES = {line.name: line for line in fifteen.lines("9.0", Path("/out"), known=True)}


def python(name: str, code: str) -> Stage:
    return Stage(name, (sys.executable, "-c", code), 20)


def words_of(name: str) -> list[str]:
    """What a line's module is given."""
    return list(LINES[name].command[3:])


# -- the two commands --------------------------------------------------------------------------------------------------


def test_all_lines_have_their_time() -> None:
    kinds = " ".join(dict.fromkeys(name.split()[0] for name in LINES))
    assert kinds == "build doctor tests kernels reference run rounds trace compile counters"
    assert sum(line.seconds for line in LINES.values()) + fifteen.PATIENCE <= fifteen.FIRST <= 550
    checks = fifteen.checks(known=True)
    names = ["memcheck", "racecheck", "repeats fedgid", "repeats vit-tiny", "repeats unet-small"]
    assert [check.name for check in checks] == names
    assert sum(check.seconds for check in checks) + fifteen.PATIENCE <= fifteen.AGAIN <= 150
    assert LINES["build"].environment["CUDAARCHS"] == "90-real"
    assert not LINES["build"].ready  # a machine has nothing


def test_another_card_is_compared_with_itself_alone() -> None:
    names = [line.name for line in fifteen.lines("9.0", Path("/out"), known=False)]
    assert names == [name for name in LINES if name != "counters"]
    assert [check.name for check in fifteen.checks(known=False)] == ["memcheck", "racecheck"]
    written = [path for path in (ROOT / "benchmarks").rglob("*.py") if f'"{gpu_figures.GPU}"' in path.read_text()]
    assert written == [ROOT / "benchmarks" / "gpu_figures.py"]  # the kind is named once


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A GPU that nvidia-smi would list, a folder beside the checkout, and three lines and a check."""
    monkeypatch.setattr(fifteen, "gpu", lambda: H200)
    monkeypatch.setattr(fifteen, "code", lambda: "code")
    monkeypatch.setattr(fifteen, "BESIDE", tmp_path / "beside")
    monkeypatch.delenv("OUT", raising=False)
    (tmp_path / "out").mkdir()
    archive = tmp_path / "out" / fifteen.ARCHIVE
    look = f"import sys, tarfile; sys.exit('logs/build.log' not in tarfile.open({str(archive)!r}).getnames())"
    raw = f"p = {str(tmp_path / 'beside')!r}; open(p + '/profile.json.gz', 'w'); open(p + '/figures.json', 'w')"
    twice = f"import os, sys; sys.exit(os.path.exists({str(tmp_path / 'broken')!r}))"
    (tmp_path / "broken").touch()
    asked = [python("build", raw), python("tests", look), python("kernels", twice)]
    monkeypatch.setattr(fifteen, "lines", lambda *given, known: asked)
    monkeypatch.setattr(fifteen, "checks", lambda known: [python("memcheck", f"print({known})")])
    monkeypatch.setattr(stages, "build", lambda capability: replace(asked[0], ready=(sys.executable, "-c", "")))
    return archive


def outcomes(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as packed:
        found = packed.extractfile(RECORD)
        return {name: one["outcome"] for name, one in json.load(found)["stages"].items()}


def test_an_archive_after_every_line_a_table_last_and_what_failed_again(pretended, tmp_path, capsys) -> None:
    assert fifteen.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1].startswith("| kernels | failed |")
    assert outcomes(pretended) == {"build": PASSED, "tests": PASSED, "kernels": FAILED}
    with tarfile.open(pretended) as packed:
        assert "figures.json" in packed.getnames()
        assert "profile.json.gz" not in packed.getnames()
    pretended.unlink()  # the folder of a second command is empty
    (tmp_path / "broken").unlink()
    assert fifteen.main(["again", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^(\w+) \.\.\.", said, re.MULTILINE) == ["kernels", "memcheck"]
    assert outcomes(pretended) == dict.fromkeys(("build", "tests", "kernels", "memcheck"), PASSED)


def test_a_first_command_begins_anew(pretended, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (fifteen.BESIDE / "results").mkdir(parents=True)
    assert fifteen.main([]) == 1
    assert pretended.exists()
    assert not (fifteen.BESIDE / "results").exists()


@pytest.mark.parametrize(
    ("words", "found", "told"),
    [
        ([], H200, "name the archive's folder with --out DIR or in the variable OUT"),
        (["--out", "x"], None, "there is no NVIDIA GPU here"),
        (["again", "--out", "x"], H200, "nothing was played here: leave 'again' out"),
    ],
)
def test_what_it_cannot_take_is_one_sentence(words, found, told, pretended, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fifteen, "gpu", lambda: found)
    with pytest.raises(SystemExit) as ended:
        fifteen.main(words)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_an_archive_stays_small(tmp_path) -> None:
    for name, size in (("a.log", 300), ("b.json", 900), ("c.json", 200), ("d.pt", 1)):
        (tmp_path / name).write_bytes(bytes(size))
    fifteen.pack(tmp_path, tmp_path / "x.tar.gz", fifteen.KINDS, 600)
    with tarfile.open(tmp_path / "x.tar.gz") as packed:
        assert packed.getnames() == ["a.log", "c.json"]
    assert fifteen.MOST < 16_000_000
    assert not {".gz", ".pt", ".safetensors"} & fifteen.KINDS


# -- lines -------------------------------------------------------------------------------------------------------------


class Pretended(timing.CpuClock):
    """The CPU's clock in the place of CUDA events."""

    def __init__(self, device: torch.device) -> None:
        pass

    def wall(self, run: timing.Run, count: int) -> float:
        return self.sample(run, 1)


@pytest.fixture
def small(monkeypatch):
    """The kernels' cases in little, and on the CPU."""
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "CudaClock", Pretended)
    monkeypatch.setattr(kernels, "SAMPLES", 1)
    monkeypatch.setattr(kernels, "VECTORS", {"large": 12})
    monkeypatch.setattr(kernels, "ROWS", {"large": (4, 8)})
    monkeypatch.setattr(kernels, "MAPS", {"large": (2, 4, 24, 24)})
    monkeypatch.setattr(kernels.machines, "machine", lambda device: dict(MACHINE))
    monkeypatch.setattr(kernels.machines, "served_by", lambda device: ("cuda", "1"))


@pytest.mark.parametrize("known", [H200, H100], ids=["H200", "H100"])
def test_kernels_and_the_reference(small, known, tmp_path) -> None:
    with emulated():
        for name in ("kernels", "reference"):
            words = words_of(name)
            words[words.index("--results") + 1] = str(tmp_path / "results")
            assert kernels.main(words) == 0
    content = json.loads((tmp_path / "results" / kernels.FILE).read_text())
    assert all("seconds" in row for row in content["rows"])
    found = "\n".join(fifteen.told(tmp_path, known, {}))
    cells = next(line for line in found.splitlines() if line.startswith("| `median` |")).split(" | ")
    brackets = r"\d+ % \(\d+ %\)" if known is H200 else r"\d+ %"
    assert all(re.fullmatch(brackets, cell) for cell in cells[2:6])
    assert cells[-1].endswith("× |")


def test_all_words_name_cases_and_tests() -> None:
    cases = [f"{name} {size}" for name, size, _ in kernels.cases(torch.float32, odd=False)]
    asked = [*fifteen.CHANGED, *fifteen.COUNTED, *(f"{name} large" for name in fifteen.WITHOUT_TRITON)]
    assert [word for word in asked if not any(f"{case} ".startswith(f"{word} ") for case in cases)] == []
    tested = {operator.name.split()[0] for operator in OPERATORS}
    assert tested.issuperset(fifteen.CHANGED)
    recorded = {row.test for files in comparisons.read_results().values() for one in files for row in one.rows}
    nodes = [word.removeprefix("benchmarks/") for word in words_of("compile") if "::" in word]
    assert len(nodes) == 3
    assert recorded.issuperset(nodes)
    assert all((ROOT / folder).exists() for folder in fifteen.TESTED)
    assert set(fifteen.RUNS) <= set(bench_methods.METHODS)


@pytest.mark.parametrize("name", ["tests", "compile", "memcheck"])
def test_pytest_finds_what_a_line_names(name) -> None:
    line = LINES.get(name) or fifteen.checks(known=True)[0]
    words = [word for word in line.command[3:] if word not in ("cuda", "--device", "--record", "-q", "-n", "9")]
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *words]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    count = int(re.findall(r"(\d+)(?:/\d+)? tests collected", found.stdout)[-1])
    assert count == 3 if name == "compile" else count >= len(fifteen.CHANGED)


def test_a_failed_case_is_measured_again(small, tmp_path, monkeypatch) -> None:
    words = ["--results", str(tmp_path), "--missing", "median", "--backends", "reference"]
    with monkeypatch.context() as broken:
        broken.setattr(kernels, "measure", lambda *_: 1 / 0)
        assert kernels.main(words) == 1
    assert kernels.main(words) == 0
    monkeypatch.setattr(kernels, "measure", lambda *_: 1 / 0)
    assert kernels.main(words) == 0  # nothing is missing


def test_bounds_are_what_must_be_moved(small) -> None:
    made = {name: make for name, _, make in kernels.cases(torch.float32, odd=False)}
    assert made["geometric_median"]()[1] == (2 * kernels.CLIENTS + 1) * 12 * 4
    assert made["consensus"]()[1] == 4 * 4 * 8 * 4
    images, boxes = 2 * 4 * 24 * 24, 2 * 4 * 16 * 16
    assert made["keep_boxes"]()[1] == (images + boxes) * 4
    assert made["erase_boxes"]()[1] == (2 * images - boxes) * 4


def test_what_binds_a_kernel_stands_for_its_share() -> None:
    rows = [
        {
            "operator": name,
            "dtype": dtype,
            "odd": odd,
            "size": "large",
            "backend": "cuda",
            "share": 0.5,
            "seconds": 1e-6,
        }
        for name in ("clip_and_noise", "accumulator exact", "weighted_mean stack", "weighted_mean")
        for dtype in ("fp32", "bf16")
        for odd in (False, True)
    ]
    assert gpu_figures.kernel_table(rows).split("\n")[2:] == [
        "| `clip_and_noise` | 1 µs | bound by its generator |  |  |  | – |",
        "| `accumulator exact` | 1 µs | bound by its digits |  |  |  | – |",
        "| `weighted_mean stack` | 1 µs | 50 % | 50 % | 50 % | 4-byte loads | – |",
        "| `weighted_mean` | 1 µs | 50 % | 50 % | 50 % | 50 % | – |",
    ]
    assert {*gpu_figures.BOUND, *gpu_figures.ROWS} <= {name for name, *_ in kernels.cases(torch.float32, odd=False)}


@pytest.mark.parametrize("name", [name for name in LINES if name.startswith("run ")])
def test_runs_are_runs(name, monkeypatch) -> None:
    part, *words = words_of(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert effective(parse(words)).rounds == 12
    assert ("without" in name) == (part != "nothing")
    played = []
    monkeypatch.setattr(without, "play", lambda given: played.append((given, training.replayable, lanes.MOST)) or 0)
    for module, attribute, _ in without.PARTS.values():
        monkeypatch.setattr(module, attribute, getattr(module, attribute))  # taken back afterwards
    before = training.replayable
    assert without.main([part, *words]) == 0
    ((given, now, most),) = played
    assert given == words
    assert (now is before) == (part != "graphs")
    assert part != "graphs" or now(object, None) is False
    assert (most > 1) == (part != "lanes")


def test_phases_of_runs_are_told(tmp_path) -> None:
    folder = tmp_path / "runs" / "fedavg-without-graphs"
    records = [{"round_seconds": s, "phases": {"train": s / 2, "serve": 0.001}} for s in (3.0, 1.0, 2.0, 1.0)]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"round_sec')  # cut off
    text = "\n".join(fifteen.told(tmp_path, H200, {}))
    assert "| fedavg-without-graphs | 3000 ms | 1000.0 ms | train 500.0, serve 1.0 |" in text


@pytest.mark.parametrize("name", fifteen.NETWORKS)
def test_rounds_beside_the_lean_loop(name, tmp_path, monkeypatch, capsys, registries) -> None:
    played = []

    def play(who, task):
        played.append((who.name, who.device, task.model, task.clients, task.rounds))
        return Played(1.0, [5.0, *([0.2 if who.name == beside.OURS else 0.8] * (task.rounds - 1))], 0.5)

    monkeypatch.setattr(beside.plays, "play", play)
    monkeypatch.setattr(setting, "synthetic", _images)
    monkeypatch.setattr(beside.Task, "load", _told)
    monkeypatch.setenv(beside.DEVICE, "")
    words = words_of(f"rounds {name}")
    words[-1] = str(tmp_path / "rounds")
    assert beside.main(words) == 0
    _, clients, rounds = fifteen.NETWORKS[name]
    assert played == [(who, "cuda", name, clients, rounds + 1) for who in (beside.LEAN, beside.OURS)]
    assert "first round and median of later ones: lean loop 5000 ms and 800.0 ms" in capsys.readouterr().out
    assert "| 5000.0 ms | 800.0 ms | 5000.0 ms | 200.0 ms | 4.00× |" in "\n".join(fifteen.told(tmp_path, H200, {}))


def _told(folder: str) -> SimpleNamespace:
    return SimpleNamespace(**json.loads((Path(folder) / "task.json").read_text()))


def _images(count: int, test: int) -> tuple[torch.Tensor, ...]:
    found = [torch.zeros(n, 3, 32, 32, dtype=torch.uint8) for n in (count, test)]
    return found[0], torch.arange(count) % 10, found[1], torch.arange(test) % 10


def test_a_traced_round(tmp_path, monkeypatch, capsys, registries) -> None:
    monkeypatch.setattr(setting, "TEST", 20)
    monkeypatch.setattr(beside, "Setting", lambda *given, rounds: setting.Setting(*given, samples=16, rounds=rounds))
    monkeypatch.setenv(beside.DEVICE, "")
    words = words_of("trace lenet")
    words[-1], words[2] = str(tmp_path / "traces" / "lenet"), "2"
    for _ in range(2):  # a second time over what the first has left
        assert beside.main([*words, "--device", "cpu"]) == 0
    assert "no GPU, 0 waits" in capsys.readouterr().out
    assert "| LeNet, 2 clients × 16 | – | 0 |" in "\n".join(fifteen.told(tmp_path, H200, {}))


def test_losses_beside_others_are_told_by_both_clocks(tmp_path) -> None:
    row = comparisons.Comparison(
        "kl_div", fifteen.SIZE, "fedkern", 1, 7, {"fedkern": 4e-5, "eager": 8e-5, "compile": 2e-5},
        {"eager": 2.0, "compile": 0.5}, {}, device="cuda",
        wall_seconds={"fedkern": 2e-4, "eager": 3e-4, "compile": 4e-4},
    )  # fmt: skip
    comparisons.write_results([row], {"gpu": "NVIDIA H200", **MACHINE}, tmp_path / "results")
    text = "\n".join(fifteen.told(tmp_path, H200, {}))
    assert "| kl_div | (4096, 1000) | 40.0 µs | 200.0 µs | 2.00× (1.50×) | **0.50×** (2.00×) |  |" in text


NCU = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","dram","issue","warps","registers"
"","","ns","%","%","%","register/thread"
"0","void at::native::fill(int)","1,000","1","1","1","16"
"1","void fedkern::cuda::(anonymous namespace)::rows<float, (int)3>(fedkern::Rows)","43,800","61.2","35.0","48.1","80"
"""


def test_counters(small, tmp_path, monkeypatch, capsys) -> None:
    program = tmp_path / "ncu"
    text = NCU
    for name, metric in zip(("dram", "issue", "warps", "registers"), list(counters.METRICS.values())[1:], strict=True):
        text = text.replace(f'"{name}"', f'"{metric}"')
    (tmp_path / "csv").write_text(text)
    program.write_text(f'#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\ncp {tmp_path / "csv"} "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = words_of("counters")
    words[0] = str(tmp_path / "counters.csv")
    assert counters.main(words) == 0
    assert "1 kernels" in capsys.readouterr().out
    assert "| rows | 43.8 | 61 | 35 | 48 | 80 |" in "\n".join(fifteen.told(tmp_path, H200, {}))
    words[0] = str(tmp_path / "other.csv")
    program.unlink()
    assert counters.main(words) == 1
    assert "ncu does not start" in capsys.readouterr().out


def test_what_is_left_half_written_ends_no_other_line(tmp_path) -> None:
    (tmp_path / "counters.csv").write_text(NCU)  # no such metrics
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "cnn.json").write_text('{"case')
    text = fifteen.told(tmp_path, H200, {})
    assert [line.partition(": ")[0] for line in text if line.startswith("no table")] == [
        "no table of rounds", "no table of counters",
    ]  # fmt: skip


def test_what_is_counted_is_called_twice(small, monkeypatch) -> None:
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    profiler = SimpleNamespace(start=lambda: log.append("on"), stop=lambda: log.append("off"))
    monkeypatch.setattr(torch.cuda, "profiler", profiler)
    own = kernels.asked

    def asked(words, backends):
        for row, _ in own(words, backends):
            yield row, partial(lambda name: (partial(log.append, name), 0), row["operator"])

    monkeypatch.setattr(kernels, "asked", asked)
    monkeypatch.setattr(counters.ops, "use_backend", lambda name: emulated())
    assert counters.main([counters.INSIDE, *words_of("counters")[1:]]) == 0
    called = [name.split()[0] for name in fifteen.COUNTED]
    assert sorted(log[: len(called)]) == sorted(called)
    assert log == [*log[: len(called)], "on", *log[: len(called)], "off"]
