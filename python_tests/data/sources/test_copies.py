"""One image under two names: refused with two labels or masks, told otherwise."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from fedkern.data import identity, load
from fedkern.errors import UserError

COLUMNS = {"csv": "path,label", "pairs": "image,text,label", "segmentation": "image,mask"}
SOURCES = ["folder", *COLUMNS]
COUNT = 24


def image(number, plain=False):
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)
    return Image.fromarray(np.full_like(pixels, 7 * number) if plain else pixels)


def made(source, root, *, label="", client="", split="", plain=False, content=0):
    """Images of the classes a and b at the sites A and B, and a copy of the first with another label, client or split.

    Returns the names of the first image and of its copy.
    """
    rows = []
    for i in [*range(COUNT), COUNT]:
        copied = i == COUNT
        row = {"label": "ab"[i // 2 % 2], "client": "AB"[i % 2], "split": ("train", "train", "test", "val")[i // 4 % 4]}
        if copied:
            row = {**rows[0], **{name: value for name, value in
                                 {"label": label, "client": client, "split": split}.items() if value}}  # fmt: skip
        name = "z.png" if copied else f"{i}.png"
        if source == "folder":
            folder = {"train": "train", "test": "test", "val": "val"}[row["split"]]
            name = f"{row['client']}/{folder}/{row['label']}/{name}"
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(content if copied else i, plain).save(path)
        mask = Image.new("L", (8, 8))
        mask.paste(1, (0, 0, 4, 5 if row["label"] == "b" else 3))
        if source == "segmentation":
            mask.save(root / f"m{i}.png")
        first = COLUMNS.get(source, "path").split(",")[0]
        rows.append({**row, first: name, "text": f"text {i}", "mask": f"m{i}.png"})
    if source != "folder":
        columns = [*COLUMNS[source].split(","), "client", "split"]
        lines = [",".join(columns), *(",".join(row[column] for column in columns) for row in rows)]
        (root / "list.csv").write_text("\n".join(lines) + "\n")
    first = COLUMNS.get(source, "path").split(",")[0]
    return rows[0][first], rows[-1][first]


def told(source, root, options=None, **settings):
    said, options = [], {"size": 8, "colour": "grey", **(options or {})}
    load(source, root=root, options=options, identify=True, notice=said.append, **settings)
    return [text for text in said if text.startswith("Equal images")]


@pytest.mark.parametrize("source", SOURCES)
def test_an_image_with_two_labels(source, tmp_path):
    first, copy = made(source, tmp_path, label="b")
    what = "masks" if source == "segmentation" else "labels, a and b"
    with pytest.raises(UserError, match=f"{first} and {copy} are the same image with two {what}; leave one of the two"):
        told(source, tmp_path)


@pytest.mark.parametrize("settings", [{}, {"partition": "iid", "clients": 2}, {"train_samples": 10}], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_an_image_at_two_clients(source, settings, tmp_path):
    first, copy = made(source, tmp_path, client="B")
    (text,) = told(source, tmp_path, **settings)
    where = "" if settings.get("partition") else " (at the clients A and B)"
    expected = f"Equal images under several names count as often: {first} and {copy}{where}."
    # Images that the run uses come before others of the file.
    assert sorted(re.findall(r"\w+", text)) == sorted(re.findall(r"\w+", expected))


@pytest.mark.parametrize("source", SOURCES)
def test_an_image_in_two_sets(source, tmp_path):
    first, copy = made(source, tmp_path, split="test")
    assert told(source, tmp_path) == [
        f"Equal images under several names count as often: {first} and {copy} (in the sets train and test)."
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_a_copy_at_the_same_place(source, tmp_path):
    first, copy = made(source, tmp_path)
    assert told(source, tmp_path) == [f"Equal images under several names count as often: {first} and {copy}."]


@pytest.mark.parametrize("source", SOURCES)
def test_plain_pictures_are_alike_without_being_copies(source, tmp_path):
    first, copy = made(source, tmp_path, label="b", plain=True)
    (text,) = told(source, tmp_path)
    assert f"{first} and {copy} (with two {'masks' if source == 'segmentation' else 'labels, a and b'})" in text


@pytest.mark.parametrize("source", SOURCES)
def test_other_images_are_none(source, tmp_path):
    made(source, tmp_path, content=COUNT)
    assert told(source, tmp_path) == []


@pytest.mark.parametrize("settings", [{"train_samples": 15}, {"public_samples": 4}], ids=str)
def test_every_image_of_the_run_is_compared(settings, tmp_path, monkeypatch):
    """Also where a few images alone stand for the training images in the identity."""
    made("csv", tmp_path, content=COUNT)
    with (tmp_path / "list.csv").open("a") as table:
        for copy in "wxyz":
            shutil.copy(tmp_path / "1.png", tmp_path / f"1{copy}.png")
            table.write(f"1{copy}.png,a,B,train\n")
    monkeypatch.setattr(identity, "SAMPLED_IMAGES", 1)
    (text,) = told("csv", tmp_path, **settings)
    assert re.search(r": 1[wxyz]?.png and 1[wxyz].png\.$", text)


@pytest.mark.parametrize("settings", [{}, {"public_samples": 8}], ids=str)
def test_images_in_tiles_are_compared_as_a_whole(settings, tmp_path):
    tile = {"options": {"tile": 4}, **settings}
    first, copy = made("segmentation", tmp_path, split="test")
    white = Image.new("L", (4, 4), 255)
    for i in (1, 2):  # one tile alike, under two masks
        picture = Image.open(tmp_path / f"{i}.png").copy()
        picture.paste(white, (4, 4))
        picture.save(tmp_path / f"{i}.png")
    (text,) = told("segmentation", tmp_path, **tile)
    assert text.endswith(f": {first} and {copy} (in the sets train and test).")


def test_an_image_in_tiles_with_two_masks(tmp_path):
    first, copy = made("segmentation", tmp_path, label="b")
    with pytest.raises(UserError, match=f"{first} and {copy} are the same image with two masks; leave one of the two"):
        told("segmentation", tmp_path, options={"tile": 4})


def test_many_copies_are_counted(tmp_path):
    made("csv", tmp_path)
    with (tmp_path / "list.csv").open("a") as table:
        for i in range(1, 12):
            shutil.copy(tmp_path / f"{i}.png", tmp_path / f"again{i}.png")
            table.write(f"again{i}.png,{'ab'[i // 2 % 2]},{'AB'[i % 2]},{('train', 'train', 'test')[i // 4]}\n")
    (text,) = told("csv", tmp_path)
    assert text.endswith(" more.")
    assert len(text) < 400


def test_images_on_disk_are_looked_at_as_well(tmp_path):
    root = tmp_path / "data"
    first, copy = made("csv", root, client="B")
    for _ in range(2):
        (text,) = told("csv", root, cache=tmp_path / "cache")
        assert f"{first} and {copy} (at the clients A and B)" in text
