"""Tests of fedkern.record: its files, an interruption, mistakes, and comparisons with fedkern's own runs."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import fedkern
from fedkern.comparison.comparison_page import read_comparison
from fedkern.errors import UserError
from fedkern.foreign_runs import recording
from fedkern.foreign_runs.recorded_run import dump
from fedkern.run import main

HOW = {"method": "mine", "framework": "lab", "settings": {"lr": 0.1, "clients": 2, "none": None, "sides": (3, 4)}}
LABELS = [0, 1, 1, 0]


def write_run(folder, accuracies, start=1, **changed):
    figures = ((number, {"accuracy": accuracy}) for number, accuracy in enumerate(accuracies, start))
    return write_rounds(folder, figures, **changed)


def raise_after(accuracies):
    yield from accuracies
    raise ZeroDivisionError


def write_rounds(folder, rounds=(), **changed):
    with fedkern.record(folder, **{"seed": 0, **HOW, **changed}) as run:
        for number, figures in rounds:
            run.round(number, **{"bytes_up": 10, "seconds": 2, **figures})
    return folder


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs/compare-frameworks.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile(code, str(page), "exec"), {})
    assert "| mine (JAX) | 3 | 61.0 ± 1.0 % | 24.0 kB |" in capsys.readouterr().out


def test_no_torch_is_imported():
    code = "import fedkern, sys; fedkern.record; fedkern.hash_labels; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_labels_have_one_hash_in_any_form():
    forms = LABELS, np.array(LABELS, np.uint8), torch.tensor(LABELS), torch.tensor([-0.0, 1, 1, 0])
    assert len({fedkern.hash_labels(labels) for labels in forms}) == 1
    different = [1, 0, 1, 0], [0, 1, 1], [LABELS]
    assert len({fedkern.hash_labels(labels) for labels in (LABELS, *different)}) == 4
    for labels in (["cat", "dog"], ["1", "2"], [], None, [None]):
        with pytest.raises(UserError, match="Test labels must be numbers"):
            fedkern.hash_labels(labels)


def test_the_files_of_a_run(tmp_path):
    with fedkern.record(tmp_path / "x", seed=3, sizes={"train": 9}, test_labels=LABELS, **HOW) as run:
        assert not (tmp_path / "x").exists()
        run.round(0, accuracy=torch.tensor(0.25), seconds=1)
        run.round(2, accuracy=np.float32(0.5), loss=float("nan"), bytes_up=10, bytes_down=5, seconds=1)
        run.round(3, loss=1, bytes_down=5, seconds=1)
    records = [json.loads(line) for line in (tmp_path / "x/metrics.jsonl").read_text().splitlines()]
    assert records == [
        {"round": 0, "seconds": 1, "accuracy": 0.25},
        {"round": 2, "seconds": 2, "bytes_up": 10, "bytes_down": 5, "accuracy": 0.5, "loss": None},
        {"round": 3, "seconds": 3, "bytes_up": 10, "bytes_down": 10, "loss": 1},
    ]
    assert json.loads((tmp_path / "x/summary.json").read_text()) == {
        "metrics": {"accuracy": 0.5, "loss": 1}, "rounds": 3, "seconds": 3,
        "bytes": {"up": 10, "down": 10, "total": 20},
    }  # fmt: skip
    assert f'test = "{fedkern.hash_labels(LABELS)}"' in (tmp_path / "x/record.toml").read_text()


def test_an_interrupted_run_is_resumed(tmp_path):
    complete = write_run(tmp_path / "complete", [0.1, 0.2, 0.3])
    for name, accuracies in (("x", ()), ("y", (0.1, 0.9))):
        with pytest.raises(ZeroDivisionError):
            write_run(tmp_path / name, raise_after(accuracies))
    assert not (tmp_path / "x").exists()
    with (tmp_path / "y/metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "acc')  # cut off by a crash
    with pytest.raises(UserError, match=r"The run in .*/y is not finished: continue it with resume=ROUND"):
        fedkern.compare([tmp_path / "y"])
    write_run(tmp_path / "y", [0.2, 0.3], start=2, resume=1)
    for name in ("record.toml", "metrics.jsonl", "summary.json"):
        assert (tmp_path / "y" / name).read_bytes() == (complete / name).read_bytes()
    with fedkern.record(tmp_path / "y", seed=0, resume=2, **HOW):
        assert not (tmp_path / "y/summary.json").exists()
    for changed, message in (
        ({"resume": 5}, "has no round 5 to continue after; its rounds are, last first: 2, 1"),
        ({"resume": 2, "method": "other"}, "was begun with other values of method: give"), ({}, "is there already"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            write_rounds(tmp_path / "y", **changed)


def test_a_full_disk_leaves_no_half_of_a_line(tmp_path, monkeypatch):
    def fill_disk(record):
        with (tmp_path / "x/metrics.jsonl").open("ab") as file:
            file.write(dump(record)[:9])
        raise OSError(errno.ENOSPC, "full")

    complete = write_run(tmp_path / "complete", [0.1, 0.2])
    with fedkern.record(tmp_path / "x", seed=0, **HOW) as run:
        for number, accuracy in ((1, 0.1), (2, 0.2)):
            monkeypatch.setattr(recording, "dump", fill_disk)
            with pytest.raises(UserError, match="the disk is full"):
                run.round(number, accuracy=0.9)
            monkeypatch.setattr(recording, "dump", dump)
            run.round(number, accuracy=accuracy, bytes_up=10, seconds=2)
    for name in ("record.toml", "metrics.jsonl", "summary.json"):
        assert (tmp_path / "x" / name).read_bytes() == (complete / name).read_bytes()


def test_two_programs_do_not_share_a_folder(tmp_path):
    slow_run = fedkern.record(tmp_path / "x", seed=0, **HOW).__enter__()
    write_run(tmp_path / "x", [0.5])
    with pytest.raises(UserError, match="is there already"):
        slow_run.round(1, accuracy=0.1)
    assert "0.5" in (tmp_path / "x/summary.json").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": ""}, "fedkern.record: method must be a text of one line, not ''"),
        ({"seed": -1}, "seed must be a whole number from 0 on, not -1"),
        ({"main": "mae"}, """better, for mae, must be "max" or "min", not ''"""),
        ({"better": "high"}, 'better, for accuracy, must be "max" or "min"'),
        ({"settings": {"lr": [None]}}, "settings: lr must be a text of one line, a number"),
        ({"main": "round", "better": "max"}, "no figure can have the name 'round'"),
        ({"settings": 3}, "settings must be a table by name, not 3"),
        ({"settings": {"lr": {}}}, "settings: lr must be a text of one line, a number"),
        ({"sizes": {"clients": 1.5}}, "sizes: clients must be a whole number from 0 on, not 1.5"),
        ({"test_labels": "abc"}, "test_labels: test must be the result of fedkern.hash_labels, not 'abc'"),
        ({"resume": 1}, "x has no run to continue: leave out resume to begin one"),
    ],
)
def test_mistakes_in_arguments(changed, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_rounds(tmp_path / "x", **changed)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("number", "figures", "message"),
    [
        (1, {"accuracy": 0.5}, "Round 1 of .*: round must be a whole number over 1, not 1"),
        (2, {"accuracy": 70.3}, "accuracy must be a fraction from 0 to 1, not 70.3"),
        (2, {"loss": "low"}, "loss must be a number, not 'low'"),
        (2, {"loss": torch.ones(2)}, "loss must be a number, not "),
        (2, {"group": 1}, "no figure can have the name 'group'"),
        (2, {"bytes_up": -1}, "bytes_up must be a number from 0 on, not -1.0"),
    ],
)
def test_mistakes_in_rounds(number, figures, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_rounds(tmp_path / "x", [(1, {"loss": 1.0}), (number, figures)])
    assert len((tmp_path / "x/metrics.jsonl").read_text().splitlines()) == 1
    with pytest.raises(UserError, match='has the main figure "accuracy": give it to round'):
        write_rounds(tmp_path / "x", resume=1)
    assert not (tmp_path / "x/summary.json").exists()


def test_runs_are_compared_with_those_of_fedkern(tmp_path):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    table = TensorDataset(x, labels := (x[:, 0] > 0).long())
    data = fedkern.FederatedData.from_datasets([table, table], test=table)
    how = {"model": lambda: torch.nn.Linear(4, 2), "rounds": 2, "workers": 1, "progress": False, "lr": 0.1}
    fedkern.compare("fedavg", seeds=2, data=data, out=tmp_path / "own", **how)
    for method, test_labels in {"same": labels, "unknown": None, "other": 1 - labels}.items():
        for seed in (0, 1):
            about = {"seed": seed, "method": method, "test_labels": test_labels}
            write_run(tmp_path / "recorded" / f"{method}{seed}", [0.2, 0.5 + seed / 4], **about)
    found = fedkern.compare([tmp_path / "own", tmp_path / "recorded"], out=tmp_path / "z", target="accuracy=0.5")
    rows = {row["group"]: row for row in found.table}
    assert [*rows] == ["fedavg", "other (lab)", "same (lab)", "unknown (lab)"]
    assert rows["other (lab)"]["accuracy_difference"] is None
    differences = [rows[f"{name} (lab)"]["accuracy_difference"] for name in ("same", "unknown")]
    assert differences == [pytest.approx(0.625 - rows["fedavg"]["accuracy"])] * 2
    paired = rows["same (lab)"]
    assert (paired["bytes"], paired["seconds"], paired["rounds_to_target"], paired["bytes_to_target"]) == (20, 4, 2, 20)
    notes = " ".join(found.notes)
    assert "Not paired with fedavg, as the test labels differ: other (lab)." in notes
    assert "as a hash of them is missing: unknown (lab)." in notes
    assert "lr" not in notes  # is the same
    unpaired = fedkern.compare(
        [tmp_path / "own", *sorted((tmp_path / "recorded").glob("other*"))], out=tmp_path / "alone"
    )
    assert "an interval needs two seeds in common, on the same test labels, so none" in " ".join(unpaired.notes)
    assert all((tmp_path / f"z/comparison.{end}").exists() for end in ("csv", "md", "tex", "png"))
    assert [group.label for group in read_comparison(found.folder).groups] == [*rows]
    assert "Clients of fedavg, seed 0" in found.report().read_text()


def test_recorded_runs_alone_with_unknown_costs(tmp_path):
    for seed, lr in ((0, 0.1), (0, 0.2), (1, 0.2)):
        with fedkern.record(tmp_path / f"{lr}-{seed}", method="m", seed=seed, settings={"lr": lr, "seed": seed}) as run:
            unknown = float("nan")
            run.round(1, accuracy=0.5, seconds=unknown, **({"bytes_up": unknown, "bytes_down": 7} if seed else {}))
    found = fedkern.compare(tmp_path, out=tmp_path / "z", target="accuracy=0.5")
    assert [row["group"] for row in found.table] == ["m (own code) lr=0.1", "m (own code) lr=0.2"]
    assert [row["seconds"] for row in found.table] == [row["bytes_to_target"] for row in found.table] == [None, None]
    assert str(found).count("– | – |") == 4
    assert found.report().exists()


@pytest.mark.parametrize(
    "words", ["evaluate X", "report X", "fedavg --resume X", "export X --format onnx", "extend X --rounds 9"]
)
def test_other_commands_name_the_way_out(words, tmp_path, capsys):
    folder = str(write_run(tmp_path / "x", [0.5]))
    assert main(words.replace("X", folder).split()) == 2
    assert "x has a run that fedkern.record wrote" in capsys.readouterr().err
