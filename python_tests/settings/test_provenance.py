"""Tests of comparisons of runs on different data, code or files: refused, or groups of their own."""

import json
import linecache
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedkern
from fedkern import UserError
from fedkern.data import FederatedData, load
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.methods import method_registry
from fedkern.settings.config import RunConfig, load_settings
from fedkern.settings.run_data import declared_data, kept_data
from python_tests.plugin_sources import unload_all

TINY = {"model": "mlp", "threads": 1, "grad_cam": 0, "local_steps": 1, "workers": 1, "rounds": 1, "progress": False}
DIGITS = {"data": "digits", "train_samples": 120, "clients": 3, **TINY}
PLUGIN = '''
from fedkern import register
from fedkern.methods import FedAvg

@register("NAME")
class Halved(FedAvg):
    """FedAvg that goes a share of the way."""

    def server_update(self, server, phase, uploads):
        before = server.state["parameters"].clone()
        super().server_update(server, phase, uploads)
        server.state["parameters"] = before + SHARE * (server.state["parameters"] - before)
'''
NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes, channels):
        super().__init__(nn.Flatten(1), nn.Linear(1024 * channels, 4), nn.ACT(), nn.Linear(4, classes))
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    method_registry.GIVEN.clear()
    yield
    method_registry.GIVEN.clear()
    unload_all()


def folder(root, seed=0, classes=("a", "b"), count=6):
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in classes:
            for number in range(count):
                path = Path(root) / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return str(Path(root).absolute())


def table(root, rows, seed=0):
    folder(root, seed)
    lines = [f"train/{name}/{number}.png,{label}" for name, number, label in rows]
    (Path(root) / "list.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    return str((Path(root) / "list.csv").absolute())


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (30, 8, 8), dtype=np.uint8), np.arange(30) % 2
    return fedkern.FederatedData.from_arrays([(images[k::3], labels[k::3]) for k in range(3)], (images, labels))


def a_folder(kind, seed):
    if kind == "arrays":
        return {"data": arrays(seed)}
    if kind == "csv":
        rows = [(name, number, name) for name in "ab" for number in range(6)]
        return {"data": "csv", "data_root": table(f"csv{seed}", rows, seed), "clients": 2, "partition": "iid",
                "data_options": {"size": 8}}  # fmt: skip
    return {"data": "folder", "data_root": folder(f"images{seed}", seed), "clients": 2, "partition": "iid",
            "data_options": {"size": 8}}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("second", ["fedavg", "fedprox"])
@pytest.mark.parametrize("kind", ["folder", "csv", "arrays"])
def test_folders_of_runs_on_different_data_are_refused(kind, second):
    for out, method, seed in (("a0", "fedavg", 0), ("b1", second, 1)):
        fedkern.simulate(method, out=out, seed=seed, pictures=False, **{**TINY, **a_folder(kind, seed)})
    with pytest.raises(UserError, match=r"a0 and b1 were made with different data \(.*images.*\)"):
        fedkern.compare(["a0", "b1"], out="c")
    assert not Path("c").exists()


def test_private_runs_are_told_apart_by_their_checkpoints_alone():
    for seed in (0, 1):
        fedkern.simulate(
            "fedavg", out=f"a{seed}", seed=seed, data=arrays(seed), pictures=False, records="private", **TINY
        )
    with pytest.raises(UserError, match=r"a0 and a1 were made with different data \(.*images.*\)"):
        fedkern.compare(["a0", "a1"], out="c")
    shutil.rmtree("a0/checkpoints")
    assert [row["seeds"] for row in fedkern.compare(["a0", "a1"], out="c").table] == [2]


@pytest.mark.parametrize("kind", ["folder", "csv", "arrays"])
def test_equal_data_elsewhere_are_the_same(kind):
    for seed in (0, 1):
        given = a_folder(kind, 0)
        if "data_root" in given:
            moved = Path(f"moved{seed}")
            source = Path(given["data_root"])
            shutil.copytree(source.parent if source.is_file() else source, moved)
            given["data_root"] = str((moved / source.name if source.is_file() else moved).absolute())
        extra = {"partition": "dirichlet:5:min=1"} if seed and kind != "arrays" else {}
        fedkern.simulate("fedavg", out=f"a{seed}", seed=seed, pictures=False, **{**TINY, **given, **extra})
    assert sum(row["seeds"] for row in fedkern.compare(["a0", "a1"], out="c").table) == 2


def change(part, step, name="halved"):
    """Return the settings of a comparison whose data, code or file change from step to step under the same names."""
    if part == "one image":
        given = a_folder("folder", 0)
        if step:
            Image.new("L", (8, 8), 7).save(Path(given["data_root"]) / "train/a/3.png")
        return given
    if part == "images":
        return {**a_folder("folder", 0), "data_root": folder(f"other{step}", step)}
    if part == "labels":
        rows = [(name, number, name if number or not step else "b") for name in "ab" for number in range(6)]
        return {**a_folder("csv", 0), "data_root": table("csv", rows)}
    if part == "arrays":
        return {"data": arrays(step)}
    given = dict(DIGITS)
    if part == "plugin":
        Path("plugin.py").write_text(PLUGIN.replace("SHARE", str(1 - step / 2)).replace("NAME", name))
        return {**given, "plugins": ["plugin.py"]}
    if part == "network":
        Path("net.py").write_text(NETWORK.replace("ACT", ("ReLU", "Sigmoid")[step]))
        return {**given, "model": "net.py:Net"}
    if part == "init":
        run = fedkern.simulate("fedavg", out=f"start{step}", pictures=False, **{**DIGITS, "rounds": 1 + step})
        shutil.copy(run.out / "model.safetensors", "start.safetensors")
        return {**given, "init": "start.safetensors"}
    images = sorted(fedkern.data.load("digits").image_ids)
    Path("boxes.json").write_text(json.dumps({"boxes": {name: [[0, 0, 4, 4 + step]] for name in images}}))
    return {**given, "data_options": {"boxes": "boxes.json"}}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("part", ["one image", "images", "labels", "arrays", "plugin", "network", "init", "boxes"])
def test_a_comparison_does_not_go_on_with_what_has_changed(part):
    method = "halved" if part == "plugin" else "fedavg"
    fedkern.compare(method, out="x", seeds=1, **{**TINY, **change(part, 0)})
    named = {"plugin": "plugin", "network": "model", "init": "init", "boxes": "boxes"}.get(part, "different data")
    with pytest.raises(UserError, match=f"{method}_seed=0 was made with .*{named}"):
        fedkern.compare(method, out="x", seeds=2, **{**TINY, **change(part, 1)})
    assert not Path(f"x/{method}_seed=1").exists()


def test_a_changed_class_is_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    for factor, seeds in ((1.0, 1), (0.25, 2)):
        text = PLUGIN.replace('@register("NAME")', "").replace("SHARE", str(factor))
        Path("of_a_module.py").write_text(text)
        linecache.clearcache()
        method_registry.GIVEN.clear()
        module = types.ModuleType("of_a_module")
        module.__file__ = str(tmp_path / "of_a_module.py")
        monkeypatch.setitem(sys.modules, "of_a_module", module)
        exec(compile(text, module.__file__, "exec"), module.__dict__)
        if seeds == 1:
            fedkern.compare([module.Halved], out="x", seeds=seeds, **DIGITS)
    with pytest.raises(UserError, match="the class Halved has changed since"):
        fedkern.compare([module.Halved], out="x", seeds=2, **DIGITS)


@pytest.mark.parametrize("part", ["plugin", "version"])
def test_folders_of_runs_of_different_code_are_groups_of_their_own(part, monkeypatch):
    method = "quartered" if part == "plugin" else "fedavg"
    for seed in (0, 1):
        if part == "version":
            monkeypatch.setattr(fedkern, "__version__", f"9.{seed}")
        given = change("plugin", seed, method) if part == "plugin" else DIGITS
        fedkern.simulate(method, out=f"a{seed}", seed=seed, pictures=False, **given)
    found = fedkern.compare(["a0", "a1"], out="c")
    assert [row["seeds"] for row in found.table] == [1, 1]
    assert f"code.{'plugins' if part == 'plugin' else 'version'}" in " ".join(found.notes)


def test_seeds_of_coloured_data_are_one_group():
    given = {**DIGITS, "data": "colordigits"}
    for seed in (0, 1):
        fedkern.simulate("fedavg", out=f"a{seed}", seed=seed, pictures=False, **given)
    assert [row["seeds"] for row in fedkern.compare(["a0", "a1"], out="c").table] == [2]
    assert load_settings("a0").identity == load_settings("a1").identity


# -- run data ----------------------------------------------------------------------------------------------------------


PRIVATE = {
    "client-level": ("fedavg", {"dp_clip": 0.5, "dp_noise": 2.0}),
    "scaffold": ("scaffold", {"dp_clip": 0.5, "dp_noise": 2.0}),
    "fediod": ("fediod", {"options": {"epsilon": 5.0}}),
    "dp-sgd": ("fediod", {"options": {"epsilon": 5.0, "teacher_dp": True}}),
    "asked for": ("fedavg", {"records": "private"}),
}
HEADERS = {"csv": "path,label", "pairs": "image,text,label", "segmentation": "image,mask"}


def write_list(name, root, splits=("",)):
    lines = [f"{HEADERS[name]},client,split"]
    for i in range(40):
        picture = Image.new("L", (8, 8), i)
        picture.save(root / f"{i}.png")
        picture.paste(1, (0, 0, 8, 8))
        picture.paste(0, (0, 0, 4, 4))
        picture.save(root / f"m{i}.png")
        row = {
            "path": f"{i}.png", "image": f"{i}.png", "mask": f"m{i}.png", "text": f"text {i}",
            "label": "ab"[i // 2 % 2],
        }  # fmt: skip
        row |= {"client": "AB"[i % 2], "split": splits[i % len(splits)]}
        lines.append(",".join(row[column] for column in lines[0].split(",")))
    (root / "list.csv").write_text("\n".join(lines))
    return load(name, root=root, options={"size": 8, "colour": "grey"})


def folders(root):
    for k, site in enumerate("AB"):
        for label in "ab":
            for i in range(8):
                (root / site / label).mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 100 * k + 50 * (label == "a") + i).save(root / site / label / f"{i}.png")
    return load("folder", root=root, options={"size": 8, "colour": "grey"})


def keep(kind, data):
    method, settings = PRIVATE[kind]
    return kept_data(RunConfig.make(method, data="csv", clients=2, **settings), data)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", PRIVATE)
@pytest.mark.parametrize("name", [*HEADERS, "folder"])
def test_a_drawn_validation_set_is_withheld(tmp_path, kind, name):
    data = folders(tmp_path) if name == "folder" else write_list(name, tmp_path)
    assert len(data.validation)
    found = keep(kind, data)
    assert len(found.validation) == 0
    assert (found.task, found.form.shape) == (data.task, data.form.shape)
    assert [split.ids for split in found.clients] == [split.ids for split in data.clients]
    assert len(kept_data(RunConfig.make("fedavg", data="csv", clients=2), data).validation)


@pytest.mark.parametrize("kind", PRIVATE)
def test_a_validation_set_of_its_own_stays(tmp_path, kind):
    """A set that a column names, the caller gives or a published data set has counts as public, like test sets."""
    named = write_list("csv", tmp_path, ("train", "train", "train", "train", "val", "val", "test", "test"))
    train = named.clients[0]
    pair = train.images, train.labels
    given = FederatedData.from_arrays([pair, pair], pair, validation=pair)
    for data in (named, given, load("digits", clients=2)):
        assert len(keep(kind, data).validation) == len(data.validation) > 0


@pytest.mark.parametrize("noted", ["private", "all"])
def test_no_file_of_a_private_run_tells_of_it(tmp_path, noted):
    data = write_list("csv", tmp_path)
    config = RunConfig.make(
        "fedavg", data="csv", data_root=str(tmp_path), data_options={"size": 8, "colour": "grey"}, rounds=2, threads=1,
        model="cnn", width=2, local_epochs=1, batch_size=4, workers=1, dp_clip=0.5, dp_noise=0.0, records=noted,
        clients=2, partition="attribute", grad_cam=0,
    )  # fmt: skip
    out = tmp_path / "run"
    run(config, out=out)
    told = [name for record in read_metrics(out) for name in record if name.startswith("validation_")]
    told += [name for name in read_summary(out)["metrics"] if name.startswith("validation_")]
    assert bool(told) == (noted == "all")
    texts = [path.read_text() for path in out.iterdir() if path.suffix in (".json", ".jsonl", ".csv")]
    assert any('"validation_' in text for text in texts) == (noted == "all")
    assert len(data.validation)


def test_data_of_which_only_the_sizes_are_known(tmp_path):
    data = folders(tmp_path)
    found = declared_data(data, [5, 7])
    assert found.client_sizes == (5, 7)
    assert found.task == data.task
    assert list(found.statistics.sizes) == [5, 7]
    assert sum(split.images.numel() for split in found.clients) < 100
