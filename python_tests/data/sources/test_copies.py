"""Tests of one image under two names: refused with two labels or masks, otherwise a warning."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from fedkern.data import identity, load
from fedkern.errors import UserError
from python_tests.data.image_sets import COLUMNS, write_mask, write_table

SOURCES = ["folder", *COLUMNS]
COUNT = 24


def image(number, plain=False):
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)
    return Image.fromarray(np.full_like(pixels, 7 * number) if plain else pixels)


def write_copy(source, root, *, label="", client="", split="", plain=False, content=0):
    """Write images of the classes a and b at the sites A and B, and a copy with another label, client or split.

    Returns the names of the first image and of its copy.
    """
    rows = []
    for i in [*range(COUNT), COUNT]:
        row = {"label": "ab"[i // 2 % 2], "client": "AB"[i % 2], "split": ("train", "train", "test", "val")[i // 4 % 4]}
        name = f"{i}.png"
        if i == COUNT:
            given = {"label": label, "client": client, "split": split}
            row, name = rows[0] | {key: value for key, value in given.items() if value}, "z.png"
        if source == "folder":
            name = f"{row['client']}/{row['split']}/{row['label']}/{name}"
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(content if i == COUNT else i, plain).save(path)
        write_mask(root / f"m{i}.png", box=(0, 0, 4, 5 if row["label"] == "b" else 3))
        rows.append({**row, "name": name, "mask": f"m{i}.png"})
    if source != "folder":
        write_table(root, f"{source},client,split", rows, files=False)
    return rows[0]["name"], rows[-1]["name"]


def get_notices(source, root, options=None, **settings):
    said, options = [], {"size": 8, "colour": "grey", **(options or {})}
    load(source, root=root, options=options, identify=True, notice=said.append, **settings)
    return [text for text in said if text.startswith("Equal images")]


@pytest.mark.parametrize("source", SOURCES)
def test_an_image_with_two_labels(source, tmp_path):
    image, copy = write_copy(source, tmp_path, label="b")
    kind = "masks" if source == "segmentation" else "labels, a and b"
    with pytest.raises(UserError, match=f"{image} and {copy} are the same image with two {kind}; leave one of the two"):
        get_notices(source, tmp_path)


@pytest.mark.parametrize("settings", [{}, {"partition": "iid", "clients": 2}, {"train_samples": 10}], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_an_image_at_two_clients(source, settings, tmp_path):
    original, copy = write_copy(source, tmp_path, client="B")
    (text,) = get_notices(source, tmp_path, **settings)
    where = "" if settings.get("partition") else " (at the clients A and B)"
    expected = f"Equal images under several names count as often: {original} and {copy}{where}."
    # Images that the run uses come before others of the file.
    assert sorted(re.findall(r"\w+", text)) == sorted(re.findall(r"\w+", expected))


@pytest.mark.parametrize("source", SOURCES)
def test_an_image_in_two_sets(source, tmp_path):
    original, copy = write_copy(source, tmp_path, split="test")
    assert get_notices(source, tmp_path) == [
        f"Equal images under several names count as often: {original} and {copy} (in the sets train and test)."
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_a_copy_at_the_same_place(source, tmp_path):
    original, copy = write_copy(source, tmp_path)
    assert get_notices(source, tmp_path) == [f"Equal images under several names count as often: {original} and {copy}."]


@pytest.mark.parametrize("source", SOURCES)
def test_plain_pictures_are_alike_without_being_copies(source, tmp_path):
    original, copy = write_copy(source, tmp_path, label="b", plain=True)
    (text,) = get_notices(source, tmp_path)
    assert f"{original} and {copy} (with two {'masks' if source == 'segmentation' else 'labels, a and b'})" in text


@pytest.mark.parametrize("source", SOURCES)
def test_other_images_are_none(source, tmp_path):
    write_copy(source, tmp_path, content=COUNT)
    assert get_notices(source, tmp_path) == []


@pytest.mark.parametrize("settings", [{"train_samples": 15}, {"public_samples": 4}], ids=str)
def test_every_image_of_the_run_is_compared(settings, tmp_path, monkeypatch):
    """All images are compared, also where the data's identity rests on a few training images."""
    write_copy("csv", tmp_path, content=COUNT)
    with (tmp_path / "list.csv").open("a") as table:
        for copy in "wxyz":
            shutil.copy(tmp_path / "1.png", tmp_path / f"1{copy}.png")
            table.write(f"1{copy}.png,a,B,train\n")
    monkeypatch.setattr(identity, "SAMPLED_IMAGES", 1)
    (text,) = get_notices("csv", tmp_path, **settings)
    assert re.search(r": 1[wxyz]?.png and 1[wxyz].png\.$", text)


def test_many_copies_are_counted(tmp_path):
    write_copy("csv", tmp_path)
    with (tmp_path / "list.csv").open("a") as table:
        for i in range(1, 12):
            shutil.copy(tmp_path / f"{i}.png", tmp_path / f"again{i}.png")
            table.write(f"again{i}.png,{'ab'[i // 2 % 2]},{'AB'[i % 2]},{('train', 'train', 'test')[i // 4]}\n")
    (text,) = get_notices("csv", tmp_path)
    assert text.endswith(" more.")
    assert len(text) < 400


def test_images_on_disk_are_looked_at_as_well(tmp_path):
    root = tmp_path / "data"
    original, copy = write_copy("csv", root, client="B")
    for _ in range(2):
        (text,) = get_notices("csv", root, cache=tmp_path / "cache")
        assert f"{original} and {copy} (at the clients A and B)" in text
