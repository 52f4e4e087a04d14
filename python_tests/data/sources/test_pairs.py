"""Tests of images with captions, as users bring them."""

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import load
from fedkern.data.sharing.holdout import hold_out
from fedkern.data.sharing.partition import partition
from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.settings.config import RunConfig
from python_tests.data.image_sets import write_image


def every_split(data):
    return [*data.clients, data.validation, *data.tests.values()]


def open_set(name, root, clients=2, partition="iid", **options):
    return load(name, root=root, clients=clients, partition=partition, options={"size": 16, **options})


def test_proportions_are_kept(tmp_path):
    for i in range(8):
        write_image(tmp_path / f"{i}.png", 200, size=(40, 20))
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    image = open_set("pairs", tmp_path).clients[0].images[0, 0]
    assert int(image[:4].max()) == int(image[12:].max()) == 0
    assert int(image[4:12].min()) == 200


def test_a_window_of_every_image(tmp_path):
    """Training images are stored whole.

    All other images have the centre, those of held-out clients and clients' own tests too.
    """
    lines = ["image,text,client,site"]
    ramp = np.broadcast_to(np.arange(24, dtype=np.uint8)[None, :], (24, 24))  # a pixel's value is its column
    for i in range(40):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,text number {i},{'ABC'[i % 3]},{'ABC'[i % 3]}")
    (tmp_path / "set.csv").write_text("\n".join(lines))
    options = {"size": 24, "crop": 16, "colour": "grey"}
    data = load("pairs", root=tmp_path, clients=3, partition="attribute", options=options)
    assert data.form.augment == "window"
    assert data.form.shape == (1, 16, 16)
    assert all(split.images.shape[2:] == (24, 24) for split in data.clients)
    holdout = hold_out(data, held_out=1, share=0.25, seed=0)
    for split in (data.validation, *data.tests.values(), holdout.tests["held_out"], *holdout.client_tests):
        assert split.images.shape[2:] == (16, 16)
        assert split.images[:, 0].eq(torch.arange(4, 20)).all()
    settings = {"data": "pairs", "data_root": str(tmp_path), "clients": 3, "partition": "attribute", "width": 8}
    context = RunContext(RunConfig.make("feddra", data_options=options, **settings), data)
    own = context.samples.of_client(0)
    rows = np.arange(len(own))
    columns = (own.take(rows) * data.form.std[0] + data.form.mean[0]).mul(255).round()[:, 0, 0, 0]
    assert columns.eq(4).all()
    drawn = own.take(np.zeros(500, dtype=np.int64), np.random.default_rng(0))
    assert drawn.shape[2:] == (16, 16)
    assert set((drawn * data.form.std[0] + data.form.mean[0]).mul(255).round()[:, 0, 0, 0].tolist()) == set(range(9))


def test_a_window_is_no_larger_than_the_image(refuses, tmp_path):
    write_image(tmp_path / "a.png", 1)
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match='data set "pairs": crop is 32, more than size, 16'):
        open_set("pairs", tmp_path, crop=32)
    config = RunConfig.make("feddra", data="captions", augment="window", train_samples=24)
    with refuses(r"--augment window draws the place of a window .* crop=N"):
        run(config, out=tmp_path / "run")


# images with a text beside them


@pytest.mark.parametrize("splits", [("",), ("train", "test"), ("train", "val", "test"), ("Training", "Test")])
@pytest.mark.parametrize("labels", [("",), ("cat", "dog")])
def test_folders_of_pairs(tmp_path, splits, labels):
    for split in splits:
        for label in labels:
            for i in range(10):
                path = tmp_path / split / label / f"{i}.png"
                write_image(path, i)
                path.with_suffix(".txt").write_text(f" {split} {label}\n {i} ")
    data = open_set("pairs", tmp_path)
    assert data.classes == (("any",) if labels == ("",) else labels)
    texts = []
    for split in every_split(data):
        for name, text, image in zip(split.ids, split.texts, split.images, strict=True):
            assert text.split() == [*name.split("/")[:-1], str(int(image.max()))]
            texts.append(name)
    assert len(set(texts)) == len(texts) == 10 * len(splits) * len(labels)
    held = {name.split("/")[0] for name in data.tests[""].ids}
    assert splits == ("",) or held == {splits[-1]}


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: (t / "3.txt").unlink(), r"3\.png has no text 3\.txt beside it"),
    (lambda t: (t / "3.txt").write_text(" \n"), r"3\.txt is empty"),
    (lambda t: (t / "3.txt").write_bytes(b"\xff\xfe\xff"), "not UTF-16"),
    (lambda t: [path.unlink() for path in t.glob("*.png")], "no image found"),
    (lambda t: (t / "a.csv").write_text("image,words\n1.png,x"), 'no column "text"'),
])  # fmt: skip
def test_wrong_pairs(tmp_path, change, words):
    for i in range(6):
        write_image(tmp_path / f"{i}.png", i)
        (tmp_path / f"{i}.txt").write_text("words")
    change(tmp_path)
    with pytest.raises(UserError, match=words):
        open_set("pairs", tmp_path)


def test_stratified_shares_are_equal():
    labels = np.repeat([0, 1, 2], [50, 7, 23])
    parts = partition("stratified", labels, 4, 0)
    assert torch.equal(torch.tensor(sorted(np.concatenate(parts))), torch.arange(80))
    counts = np.stack([np.bincount(labels[part], minlength=3) for part in parts])
    assert (counts.max(0) - counts.min(0) <= 1).all()
    assert {len(part) for part in parts} == {20}
    assert not np.array_equal(parts[0], partition("stratified", labels, 4, 1)[0])
