"""Runs with images on disk: the bits of a run in memory, and few images in memory at once."""

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import Split, load
from fedkern.data.forms import ImageForm
from fedkern.data.identity import data_fingerprint
from fedkern.data.images import image_cache
from fedkern.engine.batches.images import Images
from fedkern.engine.run import run
from fedkern.files import image_rows
from fedkern.files.image_rows import ImageRows, PixelClasses
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import load_data
from fedkern.settings.run_format import NAME
from fedkern.settings.stored import load_settings
from python_tests.image_files import count_gathered, two_brightnesses
from python_tests.interrupted import KillAt, outcome, play_killed

FORM = ImageForm((3, 8, 8), (0.4,) * 3, (0.2,) * 3)

IMAGES, SIDE = 60, 8
WIDE = 16
"""Side of images with masks: a U-Net needs that many pixels."""


@pytest.fixture
def root(tmp_path):
    return two_brightnesses(tmp_path / "root", IMAGES)


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """Put images into a temporary file, and keep no normalised image."""
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "home"))

    def change(yes=True):
        monkeypatch.setattr(image_cache, "MEMORY_BYTES", 0 if yes else 1 << 30)
        monkeypatch.setattr("fedkern.engine.local.samples.CACHE_BYTES", 0 if yes else 1 << 30)

    return change


def settings(root, method="fedavg", **more):
    plain = {"data": "folder", "data_root": str(root), "data_options": {"size": SIDE, **more.pop("data_options", {})}}
    small = {"width": 2, "rounds": 2, "batch_size": 4, "clients": 3, "partition": "iid", "threads": 1}
    return RunConfig.make(method, **plain, **{**small, **more})


@pytest.mark.parametrize("colour", ["rgb", pytest.param("grey", marks=pytest.mark.exhaustive)])
def test_the_bits_of_a_run_in_memory(root, on_disk, tmp_path, monkeypatch, colour):
    config = settings(root, data_options={"colour": colour}, augment="crop-flip", client_test=0.2, public_samples=5)
    monkeypatch.setattr("fedkern.engine.evaluate.CPU_BATCH", 4)
    run(config, out=tmp_path / "memory")
    on_disk()
    largest = count_gathered(monkeypatch)
    monkeypatch.setattr(image_rows, "PART_BYTES", 5 * SIDE**2)
    run(config, out=tmp_path / "disk")
    assert outcome(tmp_path / "disk") == outcome(tmp_path / "memory")
    assert max(largest) <= 5  # of a batch; a test set has 12 images, a client 10 to train on
    run(config.replace(cache=str(tmp_path / "cache")), out=tmp_path / "cached")
    assert outcome(tmp_path / "cached") == outcome(tmp_path / "memory")
    assert (tmp_path / "cached" / NAME).read_text() == (tmp_path / "memory" / NAME).read_text()


def masks(root):
    """Write masks beside the images: a bright square on some, and unknown pixels."""
    rng = np.random.default_rng(1)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES):
        mask = np.zeros((9, 9), dtype=np.uint8)
        mask[2:6, 2 : 4 + number % 4] = 1 + number % 2
        mask[8, number % 9] = 255
        pixels = rng.integers(0, 60, (9, 9), dtype=np.uint8) + 90 * (mask % 255)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["scaffold", pytest.param("fedavg", marks=pytest.mark.exhaustive)])
def test_the_bits_of_a_segmentation_in_memory(tmp_path, on_disk, monkeypatch, method):
    masks(tmp_path / "pairs")
    config = RunConfig.make(
        method, data="segmentation", data_root=str(tmp_path / "pairs"), data_options={"size": WIDE, "ignore": 255},
        width=2, rounds=2, batch_size=4, clients=3, partition="iid", threads=1, augment="crop-flip", client_test=0.2,
    )  # fmt: skip
    monkeypatch.setattr("fedkern.tasks.segmentation.PIXELS", 4 * WIDE**2)
    run(config, out=tmp_path / "memory")
    on_disk()
    monkeypatch.setattr(image_rows, "PART_BYTES", 8 * 4 * WIDE**2)
    largest = []
    plain = PixelClasses.plain

    def note_size(self):
        largest.append(len(self))
        return plain(self)

    monkeypatch.setattr(PixelClasses, "plain", note_size)
    run(config, out=tmp_path / "disk")
    assert outcome(tmp_path / "disk") == outcome(tmp_path / "memory")
    assert largest
    assert max(largest) <= 5  # of a batch; a test set has 12 images, a client 11 to train on
    run(config.replace(cache=str(tmp_path / "cache"), workers="1"), out=tmp_path / "cached")
    assert outcome(tmp_path / "cached") == outcome(tmp_path / "memory")


@pytest.mark.exhaustive
@pytest.mark.usefixtures("forked_workers")
def test_the_same_with_workers(root, on_disk, tmp_path):
    run(settings(root), out=tmp_path / "memory")
    on_disk()
    run(settings(root, workers="2"), out=tmp_path / "disk")
    assert outcome(tmp_path / "disk") == outcome(tmp_path / "memory")
    masks(tmp_path / "pairs")
    pairs = {
        "data": "segmentation",
        "data_root": str(tmp_path / "pairs"),
        "data_options": {"ignore": 255, "size": WIDE},
    }
    small = {"width": 2, "rounds": 2, "batch_size": 4, "clients": 3, "partition": "iid", "threads": 1}
    run(RunConfig.make("fedavg", **pairs, **small, workers="2"), out=tmp_path / "two")
    on_disk(False)
    run(RunConfig.make("fedavg", **pairs, **small, workers="1"), out=tmp_path / "one")
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")


@pytest.mark.parametrize("caches", [pytest.param(True, marks=pytest.mark.exhaustive), False], ids=["first", "then"])
def test_resumed_with_and_without_a_cache(root, on_disk, tmp_path, caches):
    config = settings(root)
    run(config, out=tmp_path / "whole")
    cached = config.replace(cache=str(tmp_path / "cache"))
    on_disk()
    play_killed(cached if caches else config, out=tmp_path / "run", at=KillAt("round", 1))
    run(config if caches else cached, out=tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_the_fingerprint_of_the_data(root, on_disk, monkeypatch):
    plain = data_fingerprint(load_data(settings(root)))
    on_disk()
    monkeypatch.setattr(image_rows, "PART_BYTES", 3 * 3 * SIDE**2)
    assert data_fingerprint(load_data(settings(root))) == plain


def test_a_run_folder_does_not_say_where_images_are_written(root, tmp_path):
    run(settings(root, rounds=1), out=tmp_path / "run")
    path = tmp_path / "run" / NAME
    path.write_text(f'cache = "{tmp_path / "elsewhere"}"\n' + path.read_text())
    config = load_settings(tmp_path / "run")
    assert config.cache is None


def test_backgrounds_of_images_on_disk(root, on_disk):
    on_disk()
    lazy = load("folder", root=root, clients=1, partition="iid", options={"size": SIDE}).clients[0]
    assert isinstance(lazy.images, ImageRows)
    masks = torch.rand(len(lazy), SIDE, SIDE) > 0.7
    masks[3] = False
    banks = []
    for images in (lazy.images, lazy.images.plain()):
        split = Split(images, lazy.labels, masks)
        made = Images(split, FORM, torch.device("cpu"), augment="crop-flip")
        augmented = made.backgrounds.take(np.array([5, 0, 5]), np.random.default_rng(1))
        banks.append([torch.from_numpy(made.backgrounds.labels), augmented, made.backgrounds.take(None)])
    for found, expected in zip(*banks, strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


def test_a_cache_that_cannot_be_written_leaves_no_run(root, refuses, tmp_path):
    (tmp_path / "file").write_text("")
    with refuses("name another folder with --cache DIR"):
        run(settings(root, cache=str(tmp_path / "file")), out=tmp_path / "run")
