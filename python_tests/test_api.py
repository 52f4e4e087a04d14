"""Tests of fedkern.simulate and fedkern.load: runs from Python."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fedkern
from fedkern.api import read_request
from fedkern.listeners import Listener
from fedkern.report.figures import curves
from fedkern.run import main
from fedkern.usercode import plugins
from python_tests.hearing import Hearing

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/python.md").read_text(), re.DOTALL)
TINY = {"data": "digits", "train_samples": 120, "clients": 3, "model": "mlp", "threads": 1, "grad_cam": 0,
        "local_steps": 2, "workers": 1, "progress": False, "pictures": False}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sites(count=40, size=12):
    """Return three named clients whose classes show in the brighter half of an image."""
    rng = np.random.default_rng(0)

    def pair(n):
        labels = rng.integers(0, 2, n)
        images = rng.integers(0, 120, (n, size, size), dtype=np.uint8)
        images[labels == 0, : size // 2] += 120
        images[labels == 1, size // 2 :] += 120
        return images, labels

    return {name: pair(count) for name in ("north", "south", "west")}, pair(60)


@pytest.mark.usefixtures("undrawn")
def test_a_run_from_python_is_that_of_the_command_line(tmp_path):
    run = fedkern.simulate("fedprox", rounds=2, mu=0.1, out="mine", **TINY)
    words = [
        f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name not in ("progress", "pictures")
    ]
    assert main(["fedprox", *words, "--rounds=2", "--method-option", "mu=0.1", "--quiet", "--out", "theirs"]) == 0
    typed_run = fedkern.load("theirs")
    assert run.config.to_dict() == typed_run.config.to_dict()
    assert run.metrics == typed_run.metrics
    own_state, two = run.model().state_dict(), typed_run.model().state_dict()
    assert all(torch.equal(own_state[name], two[name]) for name in own_state)
    assert run.history["accuracy"] == typed_run.history["accuracy"]
    assert [record.get("accuracy") for record in run.history] == run.history["accuracy"]
    assert len(run.history) == 2


def test_a_run_without_a_folder_gets_one_of_its_own(tmp_path):
    run = fedkern.simulate("fedavg", rounds=1, **TINY)
    second = fedkern.simulate("fedavg", rounds=1, **TINY)
    assert run.out != second.out
    assert {run.out.parent.name, second.out.parent.name} == {"runs"}


def test_a_folder_of_runs_that_is_none_is_said(tmp_path):
    (tmp_path / "runs").symlink_to("nowhere")
    with pytest.raises(fedkern.UserError, match=r"cannot be made .*: name a run folder with out="):
        fedkern.simulate("fedavg", rounds=1, **TINY)


def test_arrays_of_named_clients_are_learnt(tmp_path):
    clients, test = sites()
    data = fedkern.FederatedData.from_arrays(clients, test, classes=["top", "bottom"])
    run = fedkern.simulate("fedavg", data=data, model="mlp", rounds=4, local_epochs=2, lr=0.1, threads=1, workers=1,
                           grad_cam=0, out="run", progress=False, pictures=False)  # fmt: skip
    assert run.config.clients == 3
    assert run.summary["client_names"] == ["north", "south", "west"]
    assert run.metrics["accuracy"] > 0.9
    assert run.evaluate()["accuracy"] == run.metrics["accuracy"]
    probabilities = run.predict(test[0][:, None])
    assert probabilities.shape == (60, 2)
    assert float((probabilities.argmax(1).numpy() == test[1]).mean()) == run.metrics["accuracy"]
    asked = test[0][:2, None]
    for images, said in (
        (asked / 255, r"are float64 \[2, 1, 12, 12\]; give floats in \[0, 1\] as \(255 \* images\)"),
        (torch.from_numpy(asked).half(), r"are float16 \[2, 1, 12, 12\]; give floats"),
        (asked.astype(np.int64), r"are int64 \[2, 1, 12, 12\]\.$"),
        (asked[:, 0], r"are uint8 \[2, 12, 12\]\.$"),
        (asked.astype(object), r"are object\.$"),
    ):
        with pytest.raises(fedkern.UserError, match=r"^images must be uint8.*, but " + said):
            run.predict(images)


def test_runs_in_memory_are_extended_with_their_data(tmp_path):
    clients, test = sites()
    data = fedkern.FederatedData.from_arrays(clients, test)
    quiet = {"progress": False, "pictures": False}
    settings = {"data": data, "model": "mlp", "threads": 1, "workers": 1, "grad_cam": 0, **quiet}
    long = fedkern.simulate("fedavg", rounds=3, out="long", **settings)
    fedkern.simulate("fedavg", rounds=1, out="short", **settings)
    short = fedkern.load("short", data=data).extend(3, workers=1, **quiet)
    assert short.metrics == long.metrics
    with pytest.raises(fedkern.UserError, match="given through Python"):
        fedkern.load("long").evaluate()


def test_a_module_is_the_network(tmp_path):
    clients, test = sites()
    data = fedkern.FederatedData.from_arrays(clients, test)
    torch.manual_seed(1)
    mine = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    run = fedkern.simulate("fedavg", data=data, model=mine, rounds=2, local_epochs=2, lr=0.1, threads=1, workers=1,
                           grad_cam=0, out="run", progress=False, pictures=False)  # fmt: skip
    probabilities = run.predict(test[0][:, None])
    assert float((probabilities.argmax(1).numpy() == test[1]).mean()) == run.metrics["accuracy"]
    assert type(run.model()) is type(mine)
    assert run.model().state_dict().keys() == mine.state_dict().keys()
    again = fedkern.load("run", data=data, model=mine)
    assert again.evaluate()["accuracy"] == run.metrics["accuracy"]
    again.extend(3, progress=False, workers=1, pictures=False)
    assert again.summary["rounds"] == 3
    with pytest.raises(fedkern.UserError, match="a module that a script made"):
        fedkern.load("run").model()


def test_the_method_of_a_plugin_runs():
    file = str(Path(__file__).parents[1] / "examples/plugins/smoothed_labels.py")
    try:
        run = fedkern.simulate("smoothed", plugins=[file], rounds=1, out="run", **TINY)
        assert list(fedkern.load("run").config.plugins) == list(run.config.plugins) == [file]
    finally:
        plugins.unload(file)
    with pytest.raises(fedkern.UserError, match='Unknown method "smoothed"'):
        fedkern.simulate("smoothed", **TINY)


def test_events_reach_a_listener():
    heard = Hearing()
    fedkern.simulate("fedavg", rounds=2, out="run", listener=[heard, Listener()], **TINY)
    assert len(heard.records) == 2
    fedkern.load("run").extend(3, progress=False, workers=1, listener=heard, pictures=False)
    assert len(heard.records) == 3


def test_the_pictures_are_drawn_at_the_end(monkeypatch, capsys):
    run = fedkern.simulate("fedavg", rounds=1, out="run", **{**TINY, "pictures": True})
    assert (run.out / "accuracy.png").exists()
    monkeypatch.setattr(curves, "accuracy_panels", lambda *_, **__: 1 / 0)
    with pytest.raises(fedkern.UserError, match="already holds a run"):
        fedkern.simulate("fedavg", rounds=1, out="run", **{**TINY, "pictures": True})
    Path("other").mkdir()
    Path("other/accuracy.png").touch()
    with pytest.raises(fedkern.UserError, match=r"already holds accuracy\.png"):
        fedkern.simulate("fedavg", rounds=1, out="other", **{**TINY, "pictures": True})

    def full(*_, **__):
        raise fedkern.UserError("The disk is full.")

    monkeypatch.setattr(curves, "accuracy_panels", full)
    run = fedkern.simulate("fedavg", rounds=1, out="last", **{**TINY, "pictures": True})
    assert run.metrics["accuracy"] > 0
    said = "The run is complete, but not its pictures (The disk is full): draw them with fedkern.load('last').plot()."
    assert said in capsys.readouterr().err


def test_pictures_of_a_module_and_data_in_memory():
    clients, test = sites()
    data = fedkern.FederatedData.from_arrays(clients, test)
    mine = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 2))
    run = fedkern.simulate("fedavg", data=data, model=mine, rounds=1, threads=1, workers=1, out="run", progress=False)
    assert (run.out / "accuracy.png").exists()
    assert (run.out / "accuracy.png") in run.plot()
    (run.out / "pictures.json").unlink()
    run.resume(progress=False)
    assert (run.out / "pictures.json").exists()


def test_paths_are_texts_or_paths(tmp_path):
    fedkern.simulate("fedavg", rounds=1, out=Path("first"), **TINY)
    run = fedkern.simulate("fedavg", rounds=1, out="run", init=Path("first"), **TINY)
    assert run.config.init == str(tmp_path / "first")
    assert read_request("fedavg", "mnist", None, {"data_root": Path()})[0].data_root == str(tmp_path)
    assert len(run.config.init_sha256) == 64
    with pytest.raises(fedkern.UserError, match=re.escape(str(tmp_path / "no.json"))):
        fedkern.simulate("fedavg", rounds=1, out="other", data_options={"boxes": Path("no.json")}, **TINY)
    with pytest.raises(fedkern.UserError, match=re.escape(str(tmp_path / "none"))):
        fedkern.simulate("ensemble", out="other", teachers=Path("none"), **{**TINY, "local_steps": None})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Listener, r"not the class Listener: make one, Listener\(\)\.$"),
        ([Listener(), 3], r"not an object of type int\.$"),
    ],
)
def test_what_is_no_listener(given, said):
    with pytest.raises(fedkern.UserError, match=said):
        fedkern.simulate("fedavg", rounds=1, out="run", listener=given, **TINY)
    assert not Path("run").exists()


def test_predictions_of_files_and_pictures(tmp_path):
    run = fedkern.simulate("fedavg", rounds=1, out="run", **TINY)
    Image.fromarray(np.full((20, 20), 200, np.uint8)).save("a.png")
    assert run.predict([Path("a.png")]).shape == run.predict("a.png").shape == (1, 10)
    assert [path.name for path in run.plot()] == ["accuracy.png", "confusion.png", "partition.png"]  # of an MLP


def test_wrong_arguments_of_a_run_are_said():
    run = fedkern.simulate("fedavg", rounds=1, out="run", **TINY)
    for call, said in (
        (lambda: fedkern.load("~/none"), f"The run folder {Path.home()}/none does not exist"),
        (lambda: fedkern.load(None), "out must be the path of a folder, not None"),
        (lambda: run.evaluate(data=3), "data must be the name of a data set or FederatedData, not int"),
        (lambda: run.evaluate("digits", data_options="x"), "data_options must be a dict"),
        (lambda: run.extend("x"), '^rounds must be an integer, not "x"'),
        (lambda: run.predict(None), "images must be a tensor, an array, or image files, not None"),
        (lambda: run.predict([3]), r"image files, not \[3\]"),
    ):
        with pytest.raises(fedkern.UserError, match=said):
            call()


def test_the_history_as_a_data_frame():
    pytest.importorskip("pandas")
    run = fedkern.simulate("fedavg", rounds=2, out="run", **TINY)
    assert list(run.history.to_pandas()["round"]) == [1, 2]


def _page(code):
    """Return a page's code as a case, exhaustive for comparisons and methods of a script, which other tests play.

    Four rounds or runs take seconds.
    """
    return pytest.param(code, marks=[pytest.mark.exhaustive] if re.search(r"compare\(|^class", code, re.M) else [])


@pytest.mark.parametrize("code", [_page(code) for code in BLOCKS])
def test_the_pages_code_runs(code):
    quiet = code.replace("fedkern.simulate(", "fedkern.simulate(progress=False, pictures=False, local_steps=1, method=")
    quiet = quiet.replace('data="digits", rounds=1,', 'data="digits", rounds=1, local_steps=1,')  # of comparisons
    exec(compile(quiet.replace("rounds=3)", "rounds=3, progress=False, pictures=False)"), "docs/python.md", "exec"), {})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"method": "fedavgg"}, 'Unknown method "fedavgg"'),
        ({"mus": 1.0}, 'no setting "mus". Did you mean "mu"'),
        ({"mu": -1.0}, "mu"),
        ({"data": "digit"}, 'unknown data set "digit"'),
        ({"rounds": 0}, "rounds"),
        ({"out": 3}, "out must be the path of a folder, not 3"),
        ({"out": ""}, "out must be the path of a folder, not ''"),
        ({"plugins": 3}, "plugins must be a list of files and modules, not 3"),
        ({"plugins": [3]}, "plugins must be a list of files and modules, not [3]"),
        ({"plugins": "mine.py"}, "plugins must be a list of files and modules, not 'mine.py'"),
        ({"data_options": "x"}, "data_options must be a dict of values by name, not 'x'"),
        ({"data_options": {3: 1}}, "data_options must be a dict of values by name, not {3: 1}"),
        ({"local_epochs": 3}, "local_epochs has no effect beside local_steps"),
        ({"partition": ""}, "partition is given without a value"),
        ({"model": 3}, "an nn.Module, a class or function that makes one, or the name of a network, not 3."),
        ({"model": torch.nn.Flatten}, "module:Flatten has no parameters that require gradients"),
    ],
)
def test_mistakes_are_said_and_leave_nothing(given, sentence, tmp_path):
    settings = {"method": "fedprox", **TINY, **given}
    with pytest.raises(fedkern.UserError) as error:
        fedkern.simulate(**settings)
    assert sentence in str(error.value)
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"clients": {}}, "clients must hold at least one client"),
        ({"clients": {"a": (np.zeros((2, 4, 4)) + 2, [0, 1])}}, "client a: floating images must lie in"),
        ({"clients": {"a": (np.zeros((2, 4, 4), np.uint8), [0.5, 1])}}, "client a: labels must be whole numbers"),
        ({"clients": {"a": (np.zeros((2, 4, 4), np.uint8), [0])}}, "client a: labels: expected int64"),
        ({"clients": {"a": np.zeros(3)}}, "client a: expected a pair"),
        ({"test": (np.zeros((2, 5, 5), np.uint8), [0, 1])}, "images must have shape"),
        ({"classes": ["one"]}, "classes must name at least 2"),
        ({"classes": ["x", "x"]}, "classes must be a list of different names, none of them empty"),
        ({"classes": ["", "x"]}, "classes must be a list of different names, none of them empty"),
        ({"classes": "xy"}, "classes must be a list of different names, none of them empty, not 'xy'"),
        ({"clients": None}, "clients must be pairs"),
        ({"test": (["a", "b"], [0, 1])}, "the test set: expected numbers"),
        ({"test": None}, r"There is no test set: give test=\(images, labels\)"),
        ({"test": {}}, "There is no test set"),
        ({"clients": {"a": (np.zeros((2, 16)), [0, 1])}}, r"client a: images must be .*, but are float64 \[2, 16\]"),
        ({"test": (np.zeros((2, 4, 4, 3, 1), np.float32), [0, 1])}, r"but are float32 \[2, 4, 4, 3, 1\]"),
        ({"test": {"b": (np.zeros((2, 4, 4), np.int64), [0, 1])}}, r"test set b: images .*, but are int64 \[2, 4, 4\]"),
    ],
)
def test_arrays_that_do_not_fit_are_said(change, sentence):
    clients = {"a": (np.zeros((2, 4, 4), np.uint8), [0, 1])}
    given = {"clients": clients, "test": (np.zeros((2, 4, 4), np.uint8), [0, 1]), **change}
    with pytest.raises(fedkern.UserError, match=sentence):
        fedkern.FederatedData.from_arrays(**given)


def test_layouts_and_dtypes_of_images():
    colour = np.random.default_rng(0).random((2, 6, 6, 3))
    data = fedkern.FederatedData.from_arrays([(colour, [0, 1])], (torch.from_numpy(colour).permute(0, 3, 1, 2), [0, 1]))
    assert data.form.shape == (3, 6, 6)
    assert torch.equal(data.clients[0].images, data.tests[""].images)
    assert data.clients[0].images[0, 1, 2, 3] == round(255 * colour[0, 2, 3, 1])


def test_importing_fedkern_loads_no_torch():
    code = (
        "import sys, fedkern; dir(fedkern); dir(fedkern.listeners)\n"
        "assert 'fedkern.usercode.plugins' not in sys.modules\n"
        "from fedkern.usercode import plugins; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert issubclass(fedkern.listeners.WandB, Listener)
    with pytest.raises(AttributeError, match="has no attribute 'simulat'"):
        fedkern.simulat  # noqa: B018
