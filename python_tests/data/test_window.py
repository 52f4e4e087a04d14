"""Tests of windows of greys of more than eight bits: lesions of +35 HU that separate, and what a network sees."""

import json
import shutil
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fedkern
from fedkern.data import load, lookup
from fedkern.data.images import greys
from fedkern.data.images.greys import format_window, inspect_files, window_of
from fedkern.downstream import run_evaluation
from fedkern.downstream.run_evaluation import _as_trained
from fedkern.errors import UserError
from fedkern.settings.config import RunConfig

SIDE, AIR = 24, 1024  # stored values are Hounsfield units + 1024
HOW = {"model": "cnn", "width": 8, "clients": 2, "partition": "iid", "rounds": 12, "local_epochs": 2, "lr": 0.05,
       "batch_size": 16, "threads": 1, "workers": 1, "progress": False, "pictures": False, "grad_cam": 0}  # fmt: skip


def scan(rng, lesion):
    """Write scans of soft tissue (40 HU, noise of 20) over a metal table, every second with a lesion of +35 HU."""
    values = 40 + AIR + rng.normal(0, 20, (SIDE, SIDE))
    y, x = rng.integers(6, SIDE - 6, 2)
    grid = np.mgrid[:SIDE, :SIDE]
    if lesion:
        values[(grid[0] - y) ** 2 + (grid[1] - x) ** 2 < 25] += 35
    values[-1] = rng.uniform(2000, 60000, SIDE)
    return np.rint(values).astype(np.uint16)


@pytest.fixture
def scans(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "scans"
    for i in range(240):
        (folder / ("ill" if i % 2 else "well")).mkdir(parents=True, exist_ok=True)
        Image.fromarray(scan(rng, i % 2)).save(folder / ("ill" if i % 2 else "well") / f"{i}.png")
    return folder


def options(**changes):
    return {"size": SIDE, "colour": "grey", "test_share": 0.3, **changes}


def open_set(folder, **changes):
    return load("folder", root=folder, clients=2, partition="iid", options=options(**changes))


@pytest.mark.exhaustive
def test_lesions_of_35_hu_separate(scans, tmp_path):
    found = {}
    for name, changes in (("without", {}), ("with", {"window": f"{40 + AIR},400"})):
        run = fedkern.simulate(
            "fedavg", data="folder", data_root=scans, data_options=options(**changes), out=tmp_path / name, **HOW
        )
        found[name] = run.metrics["auroc"]
    assert found["with"] >= 0.95
    assert found["without"] < 0.7


def test_a_window_is_kept_in_prediction_evaluation_and_export(scans, tmp_path):
    short = {**HOW, "rounds": 1, "local_epochs": 1, "train_samples": 40}
    run = fedkern.simulate(
        "fedavg", data="folder", data_root=scans, data_options=options(window=f"{40 + AIR},400"), out=tmp_path / "run",
        **short,
    )  # fmt: skip
    assert run.evaluate() == pytest.approx(run.metrics)
    paths = sorted((scans / "ill").iterdir())[:3]
    raw = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(float)
    seen = np.rint(255 * np.clip((raw - (AIR - 160)) / 400, 0, 1)).astype(np.uint8)[:, None]
    np.testing.assert_array_equal(run.predict(paths), run.predict(seen))
    _, about = run.export(tmp_path / "network.pt", "state-dict")
    assert json.loads(about.read_text())["window"] == [AIR - 160, AIR + 240]
    assert run.evaluate("folder", data_root=scans)["accuracy"] >= 0
    for path in scans.rglob("*.png"):  # as HU
        Image.fromarray(np.asarray(Image.open(path)).astype(np.int32) - AIR).save(path.with_suffix(".tif"))
        path.unlink()
    outside = r"9\d % of pixels lie below and \d % of pixels lie above the window; stored values -"
    with pytest.warns(UserWarning, match=outside):
        run.predict([path.with_suffix(".tif") for path in paths])
    with pytest.warns(UserWarning, match=outside):
        run.evaluate("folder", data_root=scans)


@pytest.mark.parametrize(("data", "given"), [
    ("pairs", {"crop": 8}), ("pairs", {"crop": 8, "size": 16}), ("pairs", {"size": 16}), ("segmentation", {"size": 16}),
])  # fmt: skip
def test_other_images_are_seen_in_the_size_of_the_run(data, given, tmp_path):
    """One case is a network that sees parts of the images."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(20):
        place = tmp_path / ("images" if data == "segmentation" else "")
        Image.fromarray(rng.integers(0, 256, (20, 20)).astype(np.uint8)).save(place / f"{i}.png")
        Image.fromarray((np.eye(20) * (i % 2)).astype(np.uint8)).save(tmp_path / "masks" / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"image {i}")
    if data == "pairs":
        shutil.rmtree(tmp_path / "masks")
    opened = partial(load, data, root=tmp_path, clients=1, partition="iid")
    trained = opened(options={"colour": "grey", **given})
    config = RunConfig.make("feddra", data=data, data_options={"colour": "grey", **given})
    about = {**trained.form.about(), "task": trained.task.name, "classes": [*trained.classes]}
    later = opened(options=_as_trained(data, about, config))
    assert later.form.shape == trained.form.shape
    assert torch.equal(later.tests[""].images[:], trained.tests[""].images[:])


def test_a_user_s_data_set_may_have_parts_without_a_size(monkeypatch):
    info = SimpleNamespace(options={"crop": lookup("pairs").options["crop"]})
    monkeypatch.setattr(run_evaluation, "lookup", lambda data: info if data == "mine" else lookup(data))
    about = {"image_size": (8, 8), "channels": 1, "grey_bits": 8, "window": None, "task": "pairs"}
    seen = _as_trained("pairs", about, SimpleNamespace(data="mine", data_options={"crop": 8}))
    assert (seen["size"], seen["colour"]) == (8, "grey")
    assert "crop" not in seen


def test_what_files_hold_and_a_network_sees_is_told(scans):
    told = []
    opened = partial(load, "folder", root=scans, clients=2, partition="iid", notice=told.append)
    data = opened(options={"size": 16, "window": "1%,90%"})
    assert data.form.window == pytest.approx((40 + AIR, 40 + AIR), abs=90)
    low, high = data.form.window
    text = f"images: 16-bit grey, {SIDE} x {SIDE}, window {(low + high) / 2:g},{high - low:g} -> 16 x 16 RGB"
    assert data.form.seen == (text,)
    (line,) = opened(options={"size": 16}).form.seen
    assert "0 to 65,535 become 0 to 255 (--data-option window=CENTRE,WIDTH keeps what matters)" in line
    assert not told  # the header tells it


def test_percentiles_are_of_the_training_files(scans):
    for i, path in enumerate(sorted(scans.rglob("*.png"))):
        split = scans / ("test" if i % 4 == 0 else "train") / path.parent.name
        split.mkdir(parents=True, exist_ok=True)
        moved = split / path.name
        path.rename(moved)
        if i % 4 == 0:
            Image.fromarray(np.full((SIDE, SIDE), 60000, np.uint16)).save(moved)
    for name in ("ill", "well"):
        (scans / name).rmdir()
    form = open_set(scans, window="0%,90%").form
    assert form.window == pytest.approx((40 + AIR, 40 + AIR), abs=150)


def test_percentiles_of_few_training_files_among_many(tmp_path, monkeypatch):
    """The header's files, evenly spread over all, may include no training file."""
    monkeypatch.setattr(greys, "MAX_FILES", 4)
    for split, count in (("test", 44), ("train", 3)):
        for i in range(count):
            folder = tmp_path / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            value = 60000 if split == "test" else 1000 + 100 * i
            Image.fromarray(np.full((9, 9), value, np.uint16)).save(folder / f"{i:02}.png")
    form = load(
        "folder", root=tmp_path, clients=1, partition="iid", options=options(window="0%,100%", validation_share=0.0)
    ).form
    assert form.window == (1000, 1200)


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (f"{40 + AIR},400", ""), ("1%,99%", ""), ("40,400", "100 % of pixels lie above the window"),
        (f"{100 + AIR},80", "76 % of pixels lie below and 4 % of pixels lie above the window"),
    ],
)  # fmt: skip
def test_a_window_that_most_pixels_lie_outside_of_is_told(window, said, scans, tmp_path):
    said = said and f"{said}; stored values 976 to 59,981"
    assert open_set(scans, window=window).form.outside.partition(": give ")[0] == said
    given = {**HOW, "rounds": 1, "model": "mlp", "data_options": options(window=window), "out": tmp_path / "run"}
    equal = pytest.raises(UserError, match=rf"All 151 images of the training set are equal .*: {said}")
    with equal if window == "40,400" else nullcontext():
        run = fedkern.simulate("fedavg", data="folder", data_root=scans, **given)
        assert run.summary["diagnostics"].get("pixels-outside-window", "").partition(": give ")[0] == said
    assert (tmp_path / "run").exists() is (window != "40,400")


@pytest.mark.parametrize(
    ("blank", "said"),
    [("ab", "All 16 images of the training set are"), ("b", r"All 8 images of client 1 \(b\) are"), ("", ""),
     ("t", "All 8 images of the test set are equal as a network sees them, so that they tell nothing: look at")],
)  # fmt: skip
def test_a_set_of_equal_images_is_refused(blank, said, tmp_path):
    noise, labels = np.random.default_rng(0).integers(0, 256, (8, 4, 4)).astype(np.uint8), np.arange(8) % 2
    a, b, test = ((0 * noise if name in blank else noise, labels) for name in "abt")
    data = fedkern.FederatedData.from_arrays({"a": a, "b": b}, test)
    settings = {"model": "mlp", "rounds": 1, "progress": False, "pictures": False, "out": tmp_path / "run"}
    with pytest.raises(UserError, match=said) if said else nullcontext():
        fedkern.simulate("fedavg", data=data, **settings)
    assert (tmp_path / "run").exists() is not bool(said)


def test_a_window_without_effect_is_told(tmp_path):
    for i in range(12):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((9, 9), i, np.uint8)).save(folder / f"{i}.png")
    told = []
    load("folder", root=tmp_path, clients=2, partition="iid", options=options(window="40,400"), notice=told.append)
    assert told == ["The data option window=40,400 has no effect: no file has greys of over 8 bits."]


def test_percentiles_are_of_the_pixels(scans):
    paths = sorted(scans.rglob("*.png"))
    looks = inspect_files(paths[::2], 10**6, True).values()
    low, high = window_of("0%,100%", looks)
    chosen = [np.asarray(Image.open(path)) for path in paths[::2]]
    assert (low, high) == (min(image.min() for image in chosen), max(image.max() for image in chosen))
    assert window_of(format_window((low, high)), looks) == (low, high)
    assert window_of("", looks) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("40", "window must be CENTRE,WIDTH such as 1064,400"), ("a,b", "must be CENTRE,WIDTH"),
        ("40,0", "holds no value between 40 and 40"), ("99%,1%", "two from 0 to 100, the lower one first"),
        ("0%,101%", "two from 0 to 100"),
    ],
)  # fmt: skip
def test_a_wrong_window_is_one_sentence(text, said, scans):
    with pytest.raises(UserError, match=said):
        open_set(scans, window=text)
