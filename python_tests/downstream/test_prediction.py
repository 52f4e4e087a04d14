"""Tests of predictions of many images: a batch in memory at a time, and no half-written output."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fedkern import ops
from fedkern.data.images.image_files import ImageFiles
from fedkern.downstream.model_export import check, export, of_images
from fedkern.downstream.prediction import BATCH, Predictor, found_images, write_masks, write_table
from fedkern.errors import UserError
from fedkern.tasks import CLASSIFICATION

SIDE = 8
CLASSES = ("dark", "bright", "other")


class Brightness(nn.Module):
    """Network whose logits are the mean of an image, or every pixel."""

    def __init__(self, pixelwise: bool) -> None:
        super().__init__()
        self.pixelwise = pixelwise
        self.seen: list[int] = []

    def forward(self, images):
        self.seen.append(len(images))
        value = images.mean(1, keepdim=True) if self.pixelwise else images.mean((1, 2, 3))[:, None]
        return torch.cat([-value, value, torch.full_like(value, -3.0)], 1)


def predictor(task: str, side: int = SIDE) -> Predictor:
    about = {"task": task, "classes": CLASSES, "image_size": (side, side), "channels": 1, "mean": (0.5,), "std": (0.2,),
             "grey_bits": 16, "window": None}  # fmt: skip
    return Predictor(Brightness(task == "segmentation"), about)


@pytest.fixture
def paths(tmp_path):
    """Write eleven grey images of different brightness and size."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(11):
        pixels = rng.integers(0, 60, (10 + i, 12), dtype=np.uint8) + np.uint8(i * 17)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return found_images([folder])


@pytest.mark.parametrize(("side", "at_once"), [(8, BATCH), (64, BATCH), (224, 20), (2048, 1)])
def test_batches_of_large_images_are_smaller(side, at_once):
    assert predictor("classification", side).batch == at_once


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_answers_do_not_depend_on_the_batches(paths, task):
    together = predictor(task)
    expected = list(together.files(paths))
    assert together.module.seen == [11]
    parted = predictor(task)
    parted.batch = 4
    found = list(parted.files(paths))
    assert parted.module.seen == [4, 4, 3]
    assert [path for path, _, _ in found] == paths
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got[1], wanted[1])
        assert torch.equal(got[2], wanted[2])
    assert torch.equal(parted.probabilities_of(paths), together.probabilities_of(paths))
    assert together.probabilities_of([]).shape == (0, 3, *((SIDE, SIDE) if task == "segmentation" else ()))


def test_masks_are_written_as_they_come(paths, tmp_path, monkeypatch):
    counts = []
    read = ImageFiles.read

    def count_and_read(files):
        counts.append(len(list((tmp_path / "masks.part").iterdir())))
        return read(files)

    monkeypatch.setattr(ImageFiles, "read", count_and_read)
    own = predictor("segmentation")
    own.batch = 4
    write_masks(tmp_path / "masks", paths, own.files(paths))
    assert counts == [0, 4, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "masks"]
    monkeypatch.setattr(ImageFiles, "read", read)
    for path in paths:
        with Image.open(path) as image, Image.open(tmp_path / "masks" / path.name) as mask:
            assert mask.size == image.size
            assert mask.mode == "L"
            expected = own.probabilities_of([path]).argmax(1)[0].to(torch.uint8).numpy()
            again = Image.fromarray(expected).resize(image.size, Image.Resampling.NEAREST)
            assert np.array_equal(np.asarray(mask), np.asarray(again))


def test_rows_are_written_as_they_come(paths, tmp_path):
    own = predictor("classification")
    lengths = []

    def rows():
        for number, (path, answer, _) in enumerate([*own.files(paths)] * 200):
            if number == 2000:  # a file's buffer holds fewer rows
                lengths.extend(path.stat().st_size for path in tmp_path.glob(".table.csv.*.part"))
                assert not (tmp_path / "table.csv").exists()
            yield path, answer, None

    write_table(tmp_path / "table.csv", own, rows())
    assert lengths[0] > 0
    assert not list(tmp_path.glob(".*.part"))
    with (tmp_path / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2200
    assert [row["path"] for row in table[:11]] == [str(path) for path in paths]
    assert [row["predicted"] for row in (table[0], table[10])] == ["dark", "bright"]
    assert float(table[3]["dark"]) == pytest.approx(float(own.probabilities_of(paths)[3, 0]), rel=1e-5)


class Fusing(nn.Module):
    def forward(self, images):
        return ops.fuse_mean([images.flatten(1)[:, :3]] * 2)


@pytest.mark.exhaustive
def test_a_network_of_fedkerns_operators_is_not_exported(tmp_path):
    made = predictor("classification")
    made.module = Fusing()
    with pytest.raises(UserError, match="operators of fedkern, which nothing else reads: take --format state-dict"):
        export(of_images(made), tmp_path / "model.pt2", "torch-export")
    assert list(tmp_path.iterdir()) == []


def test_an_exported_network_is_compared_by_the_probabilities_of_its_task():
    shifted = {task: of_images(predictor(task)) for task in ("classification", "multilabel")}
    for found in shifted.values():
        check(found(), found)
    check(shifted["classification"]() + 1, shifted["classification"])  # says the same
    with pytest.raises(UserError, match="outputs differ from the run's by 0"):
        check(shifted["multilabel"]() + 1, shifted["multilabel"])


@pytest.mark.parametrize(
    ("classes", "columns"),
    [
        (["path", "predicted"], ["p_path", "p_predicted"]), (["predicted", "p_predicted"], ["p_predicted",
        "p_p_predicted"]), (["p_path", "path"], ["p_p_path", "p_path"]), (["Path", "pathology"], ["Path", "pathology"]),
    ],
)  # fmt: skip
def test_every_class_has_a_column_of_its_own(classes, columns, tmp_path):
    own = SimpleNamespace(classes=classes, task=CLASSIFICATION)
    write_table(tmp_path / "table.csv", own, [(tmp_path / "x.png", torch.tensor([0.25, 0.75]), None)])
    head, row = (tmp_path / "table.csv").read_text().splitlines()
    assert head.split(",") == ["path", "predicted", *columns]
    assert row.split(",")[1:] == [classes[1], "0.25", "0.75"]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("stop", [UserError, KeyboardInterrupt, BrokenPipeError])
def test_a_prediction_that_ends_early_leaves_nothing(paths, tmp_path, task, stop):
    own = predictor(task)
    before = sorted(tmp_path.rglob("*"))

    def rows():
        for number, row in enumerate(own.files(paths)):
            if number == 7:
                raise stop("here")
            yield row

    def write():
        if task == "segmentation":
            write_masks(tmp_path / "found", paths, rows())
        else:
            write_table(tmp_path / "found", own, rows())

    with pytest.raises(stop, match="here"):
        write()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_image_behind_the_first_batch_leaves_nothing(paths, tmp_path):
    paths[9].write_bytes(b"no image")
    before = sorted(tmp_path.rglob("*"))
    own = predictor("segmentation")
    own.batch = 4
    with pytest.raises(UserError, match="cannot read the image"):
        write_masks(tmp_path / "masks", paths, own.files(paths))
    assert sorted(tmp_path.rglob("*")) == before


def test_masks_of_another_process_are_left_alone(paths, tmp_path):
    (tmp_path / "masks.part").mkdir()
    (tmp_path / "masks.part" / "00.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"masks\.part is there: .* remove it"):
        write_masks(tmp_path / "masks", paths, iter(()))
    assert (tmp_path / "masks.part" / "00.png").read_bytes() == b"mine"


def test_two_images_of_one_name(paths, tmp_path):
    with pytest.raises(UserError, match=r"Two images would give the mask 00\.png"):
        write_masks(tmp_path / "masks", [*paths, Path("elsewhere/00.jpg")], iter(()))
    assert not (tmp_path / "masks.part").exists()
