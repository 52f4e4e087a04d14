"""Tests of fedkern.compare: comparisons from Python."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import fedkern
from fedkern.comparison import found_runs
from fedkern.comparison.cells import OF_ROUNDS
from fedkern.comparison.found_runs import Group, OwnRun, main_figures
from fedkern.comparison.run_results import Result
from fedkern.comparison.seed_statistics import Target
from fedkern.errors import UserError
from fedkern.methods import FedAvg
from fedkern.process import machine
from fedkern.settings.config import RunConfig, load_settings

TINY = {"train_samples": 120, "clients": 3, "model": "mlp", "threads": 1, "grad_cam": 0, "local_steps": 2,
        "workers": 1, "rounds": 1, "progress": False}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_methods_are_compared_over_seeds(tmp_path):
    found = fedkern.compare(
        ["fedprox", "fedavg"], seeds=2, data="digits", mu=0.5, out="x", target="confidence=0", **TINY
    )
    assert found.folder.name == "x"
    assert [path.name for path in found.files] == [f"comparison.{end}" for end in ("csv", "md", "tex", "png")]
    assert [row["group"] for row in found.table] == ["fedprox", "fedavg"]
    baseline, second = found.table
    single = fedkern.load("x/fedavg_seed=1").metrics["accuracy"]
    values = [fedkern.load(f"x/fedavg_seed={seed}").metrics["accuracy"] for seed in (0, 1)]
    assert values[1] == single
    assert second["accuracy"] == pytest.approx(np.mean(values))
    assert second["accuracy_std"] == pytest.approx(np.std(values, ddof=1))
    assert baseline["accuracy_difference"] is None
    assert second["accuracy_low"] <= second["accuracy_difference"] <= second["accuracy_high"]
    assert second["reached"] == 2
    assert second["rounds_to_target"] == 1
    assert load_settings("x/fedprox_seed=0").options["mu"] == 0.5
    rows = list(csv.DictReader((tmp_path / "x/comparison.csv").open()))
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in ("fedprox", "fedavg") for s in "01"]
    assert "rests on 2 seeds" in " ".join(found.notes)
    assert 'The option "mu" is not read by fedavg.' in found.notes
    assert str(found) == (tmp_path / "x/comparison.md").read_text()
    assert found.plot() == [found.folder / "comparison.png"]
    assert all(word in found._repr_html_() for word in ("<td", "fedprox", " ± ", "rests on 2 seeds", "files in x"))

    again = fedkern.compare(["x/fedavg_seed=0", "x/fedprox_seed=0"], out="y")
    assert [row["accuracy_low"] for row in again.table] == [None, None]
    assert "One seed (0)" in again.notes[0]


class Loud(FedAvg):
    """FedAvg whose clients print."""

    def client_update(self, client, phase, message):
        print("client", client.id)
        return super().client_update(client, phase, message)


def test_data_in_memory_and_one_folder_by_default(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (90, 12, 12), dtype=np.uint8), np.arange(90) % 2
    clients = {name: (images[i::3], labels[i::3]) for i, name in enumerate(("a", "b", "c"))}
    data = fedkern.FederatedData.from_arrays(clients, (images[:30], labels[:30]))
    settings = {name: value for name, value in TINY.items() if name not in ("train_samples", "clients")}
    found = fedkern.compare(["fedavg"], seeds=[4], data=data, **settings)
    assert found.folder.parent.name == "comparisons"
    assert (found.folder / "fedavg_seed=4/summary.json").exists()
    loud = fedkern.compare([Loud, "fedavg"], seeds=[4], data=data, jobs=2, out="x", **settings)
    assert loud.table[1]["accuracy"] == found.table[0]["accuracy"]
    assert Path("x/Loud_seed=4.log").read_text() == "client 0\nclient 1\nclient 2\n"


def test_settings_that_a_method_does_not_read_are_named(tmp_path):
    """A comparison plays them, since they change nothing, while a single run refuses them."""
    how = {name: value for name, value in TINY.items() if name not in OF_ROUNDS}
    how |= {"data": "digits", "rounds": 2, "local_epochs": 1, "seeds": 1}
    given = {"sample_fraction": 0.5, "lr_decay": 0.5, "optimizer_state": "keep"}
    single = {key: value for key, value in how.items() if key not in ("rounds", "seeds")}
    for methods, names in (
        (("local", "centralised"), {"sample_fraction"}), (("oneshot-fedavg",), {"lr_decay", "optimizer_state"}),
    ):  # fmt: skip
        idle = {name: given[name] for name in names}
        plain, found = (
            fedkern.compare(methods, out=tmp_path / f"{methods[0]}{len(extra)}", **how, **extra) for extra in ({}, idle)
        )
        assert [row["accuracy"] for row in plain.table] == [row["accuracy"] for row in found.table]
        for name in names:
            assert f"--{name.replace('_', '-')} has no effect on " in " ".join(found.notes)
            for method in methods:
                with pytest.raises(UserError, match=f"^{name} has no effect on "):
                    fedkern.simulate(method, out=tmp_path / name, pictures=False, **{name: given[name]}, **single)


class Broken(FedAvg):
    def weight(self, server, upload):
        return 1.0 / ("1",)


@pytest.mark.parametrize(
    ("methods", "options", "told"),
    [
        pytest.param(
            ["fedavg"], {"sweep": {"lr": [0.05, 1e30]}}, "lr=1e+30, seed 0: Client ", marks=pytest.mark.exhaustive
        ),
        ([Broken, "fedavg"], {}, "in weight\n"),
    ],
)
def test_a_method_that_fails_is_warned_of_and_the_others_are_compared(methods, options, told):
    with pytest.warns(UserWarning, match=r"^Not every run of the comparison succeeded\.\n") as warned:
        found = fedkern.compare(methods, seeds=1, data="digits", out="x", **TINY, **options)
    (message,) = (str(caught.message) for caught in warned)
    assert told in message
    assert found.failures[0] in message
    assert len(found.table) == len(found.failures) == 1
    assert warned[0].filename == __file__


@pytest.mark.parametrize(("folders", "left"), [(["x"], ["x/b"]), (["x", "x/a/."], None), (["x/a"], [])])
def test_unfinished_runs_that_are_left_out_are_named(folders, left, monkeypatch, tmp_path):
    for name in ("x/a", "x/b", "x/c/d"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.toml").touch()
    (tmp_path / "x/a/summary.json").touch()
    monkeypatch.setattr(found_runs, "read_run", lambda folder: folder)
    if left is None:
        with pytest.raises(UserError, match="is given twice"):
            found_runs.read_runs(folders)
    else:
        assert found_runs.read_runs(folders) == ([Path("x/a")], left)


@pytest.mark.parametrize(
    ("methods", "options", "said"),
    [
        ([], {}, "Nothing to compare"),
        (["fedprx"], {}, 'Did you mean "fedprox"'),
        (["fedavg", "feddra"], {}, '^feddra is for retrieval, but the data set "digits" is for classification'),
        (["fedavg"], {"mu": 1}, r"fedavg. has an option \"mu\". It is a method option of fedprox, moon"),
        (["fedavg"], {"local_epohcs": 1}, 'has an option "local_epohcs". Did you mean "local_epochs"'),
        (["fedavg"], {"train": print}, "train as a function or a module is for one run, fedkern.simulate: leave it"),
        (["fedavg"], {"optimizer": torch.optim.AdamW}, "optimizer as a function or a module is for one run"),
        (["fedavg"], {"init": torch.nn.Linear(1, 1)}, "init as a function or a module is for one run"),
        (["fedprox", "moon"], {"mux": 1}, 'fedprox, moon. has an option "mux". Did you mean "mu"'),
        (["fedprox"], {"temperature": 1}, 'None of the methods .fedprox. has an option "temperature"'),
        (["fedavg"], {"select": "test"}, "must be validation"),
        (["fedavg"], {"select": "validation"}, "give sweep="),
        (3, {}, "method must be the name of a method"),
        (["fedavg"], {"sweep": "lr=1"}, "sweep must be a dict of values by name, not 'lr=1'"),
        (["fedavg"], {"sweep": {"lr": 0.1}}, "sweep must have a list of values for lr, not 0.1"),
        (["fedavg"], {"seeds": 1.5}, "^seeds must be a number of seeds"),
        (["fedavg"], {"target": 3}, "^target needs the form FIGURE=VALUE"),
        (["fedavg"], {"options": "mu=1"}, "options must be a dict"),
        (["fedavg"], {"out": ""}, "out must be the path of a folder, not ''"),
    ],
)
def test_mistakes_leave_nothing(methods, options, said, tmp_path):
    with pytest.raises(fedkern.UserError, match=said):
        fedkern.compare(methods, data="digits", **TINY, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["validation_north", "id_north", "mean"])
def test_figures_of_a_set_with_any_name_are_compared(name):
    metrics = {"validation_accuracy": 0.1, f"{name}_accuracy": 0.2, f"{name}_balanced_accuracy": 0.3, "a_accuracy": 0.4}
    summary = {"metrics": metrics, "per_class": {set_name: {} for set_name in ("validation", name, "a")}}
    group = Group("fedavg", "fedavg", {0: OwnRun.of(Path("x"), RunConfig.make("fedavg"), summary, [])})
    assert sorted(main_figures([group])) == sorted([f"{name}_accuracy", "a_accuracy"])
    with pytest.raises(UserError, match=f"--target: {name}_accuracy is a fraction from 0 to 1, which never reaches 80"):
        Result([group], Target(f"{name}_accuracy", 80)).check_target()
