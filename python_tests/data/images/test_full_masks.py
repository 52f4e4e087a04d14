"""Tests of the Dice of masks in their original size, whatever the size that a network sees."""

import csv
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fedkern
from fedkern.data import load
from fedkern.data.forms import ImageForm
from fedkern.data.images.full_masks import FullMasks, MaskStore
from fedkern.downstream.prediction import Predictor, write_masks
from fedkern.engine.batches.images import Images
from fedkern.errors import UserError
from fedkern.tasks.segmentation import constant_dice, dice, overlaps, segmentation

SIDES = (40, 40), (64, 48), (16, 16), (24, 72), (8, 12)


def write_images(root, sides=SIDES, count=20):
    """Write images that show their masks: a random object, and one thin line that a small mask may miss."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for i in range(count):
        height, width = sides[i % len(sides)]
        mask = np.zeros((height, width), np.uint8)
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        mask[top : top + height // 3, left : left + width // 3] = 1
        mask[-1] = 2
        mask[0, : width // 2] = 255  # not known
        Image.fromarray(rng.integers(0, 60, mask.shape, dtype=np.uint8) + 90 * (mask % 3)).save(
            root / "images" / f"{i}.png"
        )
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    return root


def open_set(root, cache=None, **options):
    given = {"size": 16, "colour": "grey", "ignore": 255, "names": "ground|cell|line", **options}
    return load("segmentation", root=root, clients=2, options=given, cache=cache)


class Answer:
    """Test set whose network answers random classes, always the same for one image."""

    def __init__(self, split):
        self.set = Images(split, ImageForm(split.images.shape[1:], (0.5,), (0.2,)), torch.device("cpu"), size=3)
        self.full, self.cases = self.set.full, self.set.cases
        rng = torch.Generator().manual_seed(1)
        self.said = torch.randint(0, 3, split.labels.shape, generator=rng)

    def batches(self):
        start = 0
        for batch in self.set.batches():
            said = self.said[start : start + len(batch.targets)]
            start += len(batch.targets)
            yield replace(batch, inputs=30.0 * torch.nn.functional.one_hot(said, 3).movedim(-1, 1))


def slow(split, said, root, size):
    """Count pixels of the files: every pixel takes the answer of the network's pixel that it was resized to."""
    counts = {}
    for name, guess in zip(split.ids, said.numpy(), strict=True):
        mask = np.asarray(Image.open(root / "masks" / name.rpartition("/")[2]))
        found = counts.setdefault(name, torch.zeros(3, 3, dtype=torch.int64))
        for (y, x), value in np.ndenumerate(mask):
            v, u = (2 * y + 1) * size // (2 * mask.shape[0]), (2 * x + 1) * size // (2 * mask.shape[1])
            if value != 255:
                answer = guess[v, u]
                found[1, answer] += 1
                found[2, value] += 1
                found[0, value] += int(answer == value)
    return torch.stack(list(counts.values()))


@pytest.mark.sampled
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_dice_counts_the_pixels_of_the_files(tmp_path, cached, pickled):
    root = write_images(tmp_path / "root")
    for _ in range(2 if cached else 1):
        data = open_set(root, tmp_path / "cache" if cached else None)
    split = data.tests[""].subset(torch.arange(len(data.tests[""])).flip(0))
    if pickled:  # as a worker gets it
        split = pickle.loads(pickle.dumps(split))
    answer = Answer(split)
    counts = slow(split, answer.said, root, 16)
    found = segmentation(torch.nn.Identity(), answer)
    expected = dice(counts)[1:]
    assert [found["dice_1"], found["dice_2"]] == pytest.approx(expected.tolist())
    assert found["dice"] == pytest.approx(float(expected.mean()))
    overlap, said, true = counts.sum(0).double().unbind(0)
    assert found["iou"] == pytest.approx(float((overlap / (said + true - overlap))[1:].mean()))
    answer.full = None
    assert segmentation(torch.nn.Identity(), answer)["dice"] != pytest.approx(float(expected.mean()))


def test_masks_of_the_networks_size_are_counted_as_they_are(tmp_path):
    split = open_set(write_images(tmp_path, ((16, 16),))).tests[""]
    answer = Answer(split)
    assert answer.full is None
    assert torch.equal(split.full.overlaps(answer.said, 0, 3), overlaps(answer.said, split.labels, 3))


def test_a_line_that_the_small_masks_miss_counts(tmp_path):
    split = open_set(write_images(tmp_path, ((40, 40),)), size=8).tests[""]
    assert not bool((split.labels == 2).any())
    counts = split.full.overlaps(torch.zeros_like(split.labels), 0, 3)
    assert counts[:, 2, 2].tolist() == [40] * len(split)
    assert constant_dice(split, 3)[0] > 0


def test_padded_slices(tmp_path):
    """The slices of a volume are padded to a square before they are resized."""
    classes = np.zeros((6, 12), np.int16)
    classes[2:4, 3:9] = 1
    store = MaskStore(lambda row: classes, 4, square=True)
    mask, rows, columns = FullMasks(store, torch.tensor([0]))[0]
    assert np.array_equal(mask, classes)
    assert rows.tolist() == [1, 1, 1, 2, 2, 2]
    assert columns.tolist() == [k // 3 for k in range(12)]


def test_a_value_that_only_the_full_mask_holds_is_named_before_the_run(tmp_path):
    root = write_images(tmp_path / "root", ((40, 40),))
    for i in range(20):
        mask = np.asarray(Image.open(root / "masks" / f"{i}.png")).copy()
        mask[39, 39] = 7
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    with pytest.raises(UserError, match=r"masks/\d+\.png holds 7, which is none of the classes"):
        open_set(root)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_its_evaluation_and_its_predicted_masks_agree(tmp_path, workers, capsys):
    root = write_images(tmp_path / "root", ((64, 64), (48, 48)))
    options = {"size": 16, "colour": "grey", "names": "ground|cell|line", "ignore": 255}
    run = fedkern.simulate(
        "fedavg", data="segmentation", data_root=root, data_options=options, clients=2, rounds=2, local_epochs=3,
        model="unet-small", width=2, lr=0.05, batch_size=4, out=tmp_path / "run", workers=workers, threads=1,
        pictures=False, cache=str(tmp_path / "cache") if workers == 2 else None, client_test=0.3,
    )  # fmt: skip
    assert "images of 48x48 to 64x64 pixels are resized to 16x16 (1/3 to 1/4)" in capsys.readouterr().err
    assert run.evaluate()["dice"] == pytest.approx(run.metrics["dice"])
    data = open_set(root)
    paths = [root / name for name in data.tests[""].ids]
    write_masks(tmp_path / "masks", paths, Predictor.open(tmp_path / "run").files(paths))
    counts = []
    for path in paths:
        truth = torch.from_numpy(np.array(Image.open(root / "masks" / path.name))).long()
        said = torch.from_numpy(np.array(Image.open(tmp_path / "masks" / path.name))).long()
        counts.append(overlaps(said[None], truth.where(truth != 255, -1)[None], 3))
    expected = float(dice(torch.cat(counts))[1:].nanmean())
    assert run.metrics["dice"] == pytest.approx(expected)
    assert json.loads((tmp_path / "run/summary.json").read_text())["metrics"]["dice"] == run.metrics["dice"]
    with (tmp_path / "run/evaluation.csv").open(newline="") as file:
        assert {row["client"] for row in csv.DictReader(file) if row["metric"] == "dice"} == {"", "0", "1"}
