"""Tests of Tiny-ImageNet's folders: content, and errors of incomplete ones."""

import os

import numpy as np
import pytest
from PIL import Image

from fedkern.data import load
from fedkern.errors import UserError
from python_tests.in_time import in_time
from python_tests.papers_data import TINYIMAGENET

WNIDS = ("n02", "n01", "n03")
WORDS = {"n01": "crane, a bird", "n02": "crane", "n03": "desk, table", "n99": "unused"}


def picture(path, label, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (60 * label, 20 * number % 256, 10)
    Image.new("L" if number == 1 else "RGB", (64, 64), 60 * label if number == 1 else colour).save(path, quality=95)


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        for i in range(10):
            picture(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", label, i)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("x\t0\t0\t9\t9\n")
    lines = []
    for i in range(6):
        picture(folder / "val" / "images" / f"val_{i}.JPEG", i % 3, i)
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t61\t61\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (folder / "words.txt").write_text("".join(f"{wnid}\t{words}\n" for wnid, words in WORDS.items()))
    return folder


@pytest.mark.parametrize("above", [False, True])
def test_content(tree, above):
    data = load(TINYIMAGENET, root=tree.parent if above else tree, clients=3, partition="iid")
    assert data.classes == ("crane (n02)", "crane (n01)", "desk")
    assert data.form.shape == (3, 64, 64)
    assert data.tests[""].labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert sorted(data.validation.labels.tolist()) == [0, 1, 2]
    assert sum(data.client_sizes) == 27
    names = [name for split in (*data.clients, data.validation) for name in split.ids]
    assert len(set(names)) == 30
    for split in (*data.clients, data.tests[""]):
        red = split.images[:, 0].float().mean((1, 2))  # tells the label, up to JPEG
        assert np.allclose(red, 60 * split.labels, atol=4)


def test_what_macos_puts_beside_images_is_left_out_and_told(tree):
    for path in [*tree.rglob("*")]:
        if path.is_file():
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    told = []
    data = load(TINYIMAGENET, root=tree, clients=3, partition="iid", notice=told.append)
    assert len(data.image_ids) == 36
    assert told == [f"Files under {tree} that are not read: 42 ._* of macOS, such as ._wnids.txt."]


def test_what_is_missing_is_named(tree):
    (tree / "val" / "images" / "val_3.JPEG").unlink()
    with pytest.raises(UserError, match=r"val_3\.JPEG of .*val_annotations\.txt, line 4, is missing"):
        load(TINYIMAGENET, root=tree)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: (t / "words.txt").unlink(), r"cannot read .*words\.txt"),
        (lambda t: (t / "wnids.txt").unlink(), r"no file wnids\.txt .*found under"),
        (lambda t: (t / "wnids.txt").write_text("n01\nn01\n"), "two or more different classes"),
        (lambda t: (t / "wnids.txt").write_text("n01\nn02\nn03\nn07\n"), "n07/images is missing or holds no image"),
        (lambda t: (t / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn55\n"), "line 1, names no class"),
        (lambda t: (t / "val" / "val_annotations.txt").write_text("\n"), r"val_annotations\.txt lists no image"),
        (lambda t: (t / "train" / "n01" / "images" / "n01_2.JPEG").write_text("no"), r"cannot read the image .*n01_2"),
        (lambda t: (t / "words.txt").write_bytes(b"\xff\xfe\x00"), "not UTF-16"),
    ],
)
def test_incomplete_folders_are_one_sentence(tree, change, words):
    change(tree)
    with pytest.raises(UserError, match=words) as caught:
        load(TINYIMAGENET, root=tree, clients=2, partition="iid")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["words.txt", "val/val_annotations.txt", "wnids.txt"])
def test_lists_that_are_pipes(tree, name):
    (tree / name).unlink()
    os.mkfifo(tree / name)
    assert "named pipe" in in_time(lambda: load(TINYIMAGENET, root=tree)) or name == "wnids.txt"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_one_image_under_two_names(tree, link):
    (tree / "val" / "images" / "val_0.JPEG").unlink()
    link(tree / "train" / "n01" / "images" / "n01_0.JPEG", tree / "val" / "images" / "val_0.JPEG")
    with pytest.raises(UserError, match=r"are one file, .*remove the link"):
        load(TINYIMAGENET, root=tree, clients=2, partition="iid")
