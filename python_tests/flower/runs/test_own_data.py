"""Runs whose nodes have the data of one client each, in separate folders."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.flower.runs import node_process, run_settings, server_app
from fedkern.run import main
from fedkern.settings.run_data import data_of_one
from python_tests.flower.node_grid import NodeGrid
from python_tests.flower.runs.test_project import run_config as config_of_project
from python_tests.interrupted import outcome

pytestmark = [pytest.mark.flower, pytest.mark.usefixtures("alone")]

PAGE = Path(__file__).resolve().parents[3] / "docs/flower-reference.md"
SIZES = {"server": 6, 0: 6, 1: 4, 2: 9}
RUN = {
    "method": "scaffold", "data": "folder", "clients": 3, "data-option.size": 16, "width": 2, "rounds": 2,
    "local-epochs": 1, "batch-size": 4, "grad-cam": 0, "threads": 1, "client-threads": 1, "device": "cpu",
    "on-nan": "skip", "on-error": "skip", "flower.wait": 0.0, "flower.own-data": True,
}  # fmt: skip


@pytest.fixture
def folders(tmp_path):
    """Return a folder of images for the server and for every client, with different numbers of images."""
    rng = np.random.default_rng(0)
    for name, count in SIZES.items():
        for part, number in (("train", count), ("test", 4 if name == "server" else 1)):
            for shade, kind in enumerate(("cat", "dog")):
                folder = tmp_path / str(name) / part / kind
                folder.mkdir(parents=True)
                for i in range(number):
                    pixels = (rng.integers(0, 128, (16, 16, 3)) + 100 * shade).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def over_flower(folders, nodes=(0, 1, 2), base=RUN, **changed):
    run_config = {**base, "data-root": str(folders / "server"), "out": str(folders / "run"), **changed}
    own = {k: {"data-root": str(folders / str(k))} for k in nodes}
    server_app.play(NodeGrid(run_config, nodes, nodes=own), run_config)


def test_the_bits_of_the_same_clients_in_one_process(folders):
    over_flower(folders)
    same_as_here(RUN, folders)
    sizes = [record["clients"][str(k)]["samples"] for record in read_metrics(folders / "here") for k in range(3)]
    assert sizes == 2 * [2 * SIZES[k] for k in range(3)]


def same_as_here(run_config, folder):
    """Compare a run over Flower with one of the same clients in this process."""
    settings = {name: value for name, value in run_config.items() if name not in ("out", "data-root")}
    config = run_settings.read_run_config({**settings, "data-root": str(folder / "server")}).config
    roots = [config.replace(data_root=str(folder / str(k))) for k in range(3)]
    clients = tuple(data_of_one(root, node=True).clients[0] for root in roots)
    run(config, data=replace(data_of_one(config), clients=clients, sights={}), out=folder / "here")
    found, expected = outcome(folder / "run"), outcome(folder / "here")
    assert found[:2] == expected[:2]
    assert found[2]["metrics"] == expected[2]["metrics"]


def test_the_page_s_function_gives_every_node_its_table(tmp_path, monkeypatch):
    (code,) = re.findall(r"`hospital\.py`:\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (command,) = re.findall(r"python -m fedkern.run (.*hospital\.py.*)\n", PAGE.read_text())
    for name, count in SIZES.items():
        x = np.linspace(-1, name != 1, 4 * count, dtype=np.float32).reshape(count, 4)  # at client 1 none is ill
        with (tmp_path / str(name)).open("wb") as file:
            np.savez(file, x=x, y=np.int64(x[:, 3] > 0), x_test=x, y_test=np.int64(x[:, 3] > 0))
    (tmp_path / "hospital.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--rounds", "2", "--threads", "1", "--client-threads", "1", "--device", "cpu"]) == 0
    monkeypatch.syspath_prepend(tmp_path / "hospitals")
    run_config = {**config_of_project(tmp_path / "hospitals"), "flower.wait": 0.0}
    over_flower(tmp_path, base=run_config)
    assert [record["clients"]["1"]["samples"] for record in read_metrics(tmp_path / "run")] == [4, 4]
    same_as_here(run_config, tmp_path)


IMAGES = """
import torch
from pathlib import Path
from torch.utils.data import TensorDataset
def sets(root, width=8, classes=2, dtype=torch.float32):
    targets = [torch.arange(count) % classes for count in ({"server": 6, "0": 7, "1": 5, "2": 9}[Path(root).name], 10)]
    images = [torch.linspace(0, 255, len(y) * 24 * width).reshape(len(y), 3, 8, width) for y in targets]
    return tuple(TensorDataset(x.to(dtype), y) for x, y in zip(images, targets))
def floats(root):
    return sets(root)
def integers(root):
    return sets(root, dtype=torch.uint8)
def mixed(root):
    return sets(root, dtype=torch.uint8 if root.endswith("1") else torch.float32)
def fewer(root):
    return sets(root, classes=3 - root.endswith("2"))
def wider(root):
    return sets(root, width=8 + root.endswith("2"))
def several(root):
    return 2 * list(sets(root)[:1]), sets(root)[1]
"""


@pytest.mark.parametrize(
    ("name", "model", "reason"),
    [("floats", "cnn", ""), ("integers", "cnn", ""),
     ("mixed", "cnn", r"Client 1's data have other dtype than the server's \(uint8, and here float32\)"),
     ("fewer", "cnn", r"Client 2's data have other classes .*: name them in the function, FederatedData\."),
     ("wider", "torch.nn:Identity", r"have other items .*\[2, 3, 8, 9\].* give all machines the same classes and kind"),
     ("several", "cnn", "has 2 clients, not 1: .* have its function give a single data set")],
)  # fmt: skip
def test_functions_that_give_every_node_its_images(name, model, reason, tmp_path):
    (tmp_path / "own.py").write_text(IMAGES)
    run_config = {**RUN, "data": f"{tmp_path / 'own.py'}:{name}", "data-option.size": "", "model": model, "width": ""}
    if not reason:
        over_flower(tmp_path, base=run_config)
        same_as_here(run_config, tmp_path)
        return
    with pytest.raises(UserError, match=reason):
        over_flower(tmp_path, base=run_config)
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
def test_a_stopped_run_goes_on(folders, monkeypatch):
    over_flower(folders)
    expected = outcome(folders / "run")
    (folders / "run").rename(folders / "whole")
    from fedkern.engine.parts.checkpointing import Checkpointing

    commit = Checkpointing.round_end
    with monkeypatch.context() as patched:
        patched.setattr(Checkpointing, "round_end", lambda self, record: (commit(self, record), _stop())[0])
        with pytest.raises(KeyError):
            over_flower(folders)
    over_flower(folders, resume=True)
    assert outcome(folders / "run") == expected


def _stop():
    raise KeyError


@pytest.mark.parametrize("source", ["folder", "folder without splits", "csv", "csv without splits"])
def test_nobody_holds_images_out_that_nobody_looks_at(folders, source):
    """A node trains on all images that no file declares as test images.

    All images of the server test the network.
    """
    name, _, bare = source.partition(" ")
    for machine in map(str, SIZES):
        base = folders / machine
        if bare:
            for path in sorted(base.glob("*/*/*.png")):
                (base / path.parent.name).mkdir(exist_ok=True)
                path.rename(base / path.parent.name / f"{path.parts[-3]}-{path.name}")
            shutil.rmtree(base / "train")
            shutil.rmtree(base / "test")
        if name == "csv":
            paths = [path.relative_to(base).parts for path in sorted(base.rglob("*.png"))]
            rows = [("/".join(path), path[-2], "" if bare else path[0]) for path in paths]
            (base / "images.csv").write_text(
                "".join(",".join(row) + "\n" for row in [("path", "label", "split"), *rows])
            )
    over_flower(folders, data=name)
    clients = read_metrics(folders / "run")[0]["clients"]
    assert [clients[str(k)]["samples"] for k in range(3)] == [2 * (SIZES[k] + bool(bare)) for k in range(3)]
    server = data_of_one(
        run_settings.read_run_config({**RUN, "data": name, "data-root": str(folders / "server")}).config
    )
    assert len(server.clients[0]) == 1
    assert len(server.validation) + len(server.tests[""]) + len(server.clients[0]) == 2 * (SIZES["server"] + 4)


def test_data_that_do_not_fit_together(folders):
    (folders / "1" / "train" / "dog").rename(folders / "1" / "train" / "fox")
    (folders / "1" / "test" / "dog").rename(folders / "1" / "test" / "fox")
    with pytest.raises(UserError, match=r"Client 1's data have other classes than the server's \(\['cat', 'fox'\],"):
        over_flower(folders)
    assert not (folders / "run").exists()


def test_windows_of_every_folder_s_own_percentiles_do_not_fit_together(folders):
    """The same grey value would mean something else at every client."""
    rng = np.random.default_rng(0)
    for k, machine in enumerate(map(str, SIZES)):
        for path in sorted((folders / machine).rglob("*.png")):
            Image.fromarray(rng.integers(1000 * k, 1000 * k + 5000, (8, 8)).astype(np.uint16)).save(path)
    options = {"data-option.window": "1%,99%", "data-option.bits": 16}
    with pytest.raises(UserError, match=r"have other window than the server's .*: give data-option.window=CENTRE"):
        over_flower(folders, **options)
    assert not (folders / "run").exists()


def test_a_node_has_the_server_s_data_where_nobody_says_that_it_has_its_own(folders):
    """Without ``flower.own-data`` every site would train on a part of its own images."""
    with pytest.raises(UserError, match=r"data on this node are other than the server's.*set flower\.own-data=true"):
        over_flower(folders, **{"flower.own-data": False, "partition": "iid"})


@pytest.mark.parametrize("change", ["pixel", "label", "missing"])
def test_a_node_whose_data_differ_a_little_is_left_out(folders, change):
    for k in range(3):
        shutil.rmtree(folders / str(k))
        shutil.copytree(folders / "server", folders / str(k))
    image = folders / "1" / "train" / "cat" / "0.png"
    if change == "pixel":
        pixels = np.array(Image.open(image))
        pixels[0, 0, 0] ^= 1
        Image.fromarray(pixels).save(image)
    elif change == "label":
        dog_image = folders / "1" / "train" / "dog" / "0.png"
        cat, dog = image.read_bytes(), dog_image.read_bytes()
        image.write_bytes(dog)
        dog_image.write_bytes(cat)
    else:
        (folders / "1" / "test" / "cat" / "0.png").unlink()
    over_flower(folders, **{"flower.own-data": False, "partition": "iid", "client-test": 0.0})
    left_out = [entry for record in read_metrics(folders / "run") for entry in record.get("dropped", [])]
    assert [entry["client"] for entry in left_out] == [1, 1]
    assert all("other than the server's" in entry["reason"] for entry in left_out)


def test_all_nodes_must_be_there(folders, caplog):
    with pytest.raises(UserError, match="Clients without a node: 2; where nodes have their own data, all must be"):
        over_flower(folders, nodes=(0, 1))
    (folders / "2").rename(folders / "elsewhere")
    with pytest.raises(UserError, match="Clients without a node: 2"):
        over_flower(folders)
    assert str(folders / "2") in caplog.text


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"clients": ""}, "needs the number of clients"), ({"client-test": 0.2}, "need the data of all clients"),
     ({"data-option.backdoor-clients": 1}, "cue-clients and backdoor-clients change the data of some"),
     ({"public-samples": 5}, "Public samples and image-text data"), ({"flower.own-data": "maybe"}, "true or false")],
)  # fmt: skip
def test_settings_that_need_all_data(changed, why):
    with pytest.raises(UserError, match=why):
        run_settings.read_run_config({**RUN, **changed})


@pytest.mark.parametrize(
    "facts",
    [{"samples": 5, "classes": torch.zeros(2)}, {"samples": 0}, {"samples": 1 << 50}, {"samples": "many"}, {}, None, [],
     {"samples": 5, "classes": {"cat": 0}}, {"samples": 5, **{str(i): i for i in range(100)}}],
    ids=str,
)  # fmt: skip
def test_whatever_a_node_says_of_its_data_is_read(folders, facts, monkeypatch, caplog):
    true = node_process.describe_data

    def of_node(run_config, node, notice):
        return facts if node["partition-id"] == 1 else true(run_config, node, notice)

    monkeypatch.setattr(node_process, "describe_data", of_node)
    with pytest.raises(UserError, match="Clients without a node: 1; where nodes have their own data"):
        over_flower(folders)
    assert "Node 101 does not say" in caplog.text
