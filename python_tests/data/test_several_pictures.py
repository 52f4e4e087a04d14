"""Tests of files that hold several pictures, of which only the first would be read: every source refuses them."""

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import load
from fedkern.data.images.image_files import ImageFiles
from fedkern.downstream.prediction import Predictor
from fedkern.errors import UserError

FIRST, SECOND = (np.full((8, 8), value, np.uint8) for value in (10, 200))
SUFFIXES = "gif", "png", "webp", "tif"


def write(path, *pictures):
    picture, *later = [Image.fromarray(values) for values in pictures]
    picture.save(
        path, save_all=bool(later), append_images=later, **({"lossless": True} if path.suffix == ".webp" else {})
    )


def tree(root, suffix):
    """Write twelve files for every source, one of which holds two pictures."""
    for i in range(12):
        for folder in (root / "classes" / "ab"[i % 2], root / "cells/images", root / "cells/masks"):
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / f"{i}.{suffix}", *((FIRST, SECOND) if i == 6 else (FIRST,)))
        if suffix == "webp":  # has no single channel, as masks have
            write(root / "cells/masks" / f"{i}.png", FIRST)
            (root / "cells/masks" / f"{i}.webp").unlink()
        (root / "classes" / "ab"[i % 2] / f"{i}.txt").write_text("words")
    rows = [f"classes/{'ab'[i % 2]}/{i}.{suffix},{'ab'[i % 2]},some words here" for i in range(12)]
    (root / "paths.csv").write_text("\n".join(["path,label,report", *rows]))
    return root


def open_source(name, root):
    where = {
        "csv": "paths.csv", "segmentation": "cells", "pairs": "classes/a", "folder": "classes",
    }[name]  # fmt: skip
    return load(name, root=root / where, clients=2, partition="iid", options={"size": 8})


@pytest.mark.sampled
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["folder", "csv", "pairs", "segmentation"])
def test_two_pictures_in_a_file_are_refused(tmp_path, name, suffix):
    root = tree(tmp_path, suffix)
    with pytest.raises(UserError, match=rf"6\.{suffix} holds several pictures.*save the picture") as caught:
        open_source(name, root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["gif", "png", "tif"])
def test_a_mask_of_two_pictures_is_refused(tmp_path, suffix):
    root = tree(tmp_path, suffix) / "cells"
    write(root / "images" / f"6.{suffix}", FIRST)
    with pytest.raises(UserError, match=rf"masks/6\.{suffix} holds several pictures"):
        load("segmentation", root=root, clients=2, options={"size": 8})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_prediction_refuses_two_pictures(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}", FIRST, SECOND)
    about = {
        "task": "classification", "classes": ("a", "b"), "image_size": (8, 8), "channels": 1, "grey_bits": 16,
        "window": None, "mean": (0.5,), "std": (0.2,),
    }  # fmt: skip
    with pytest.raises(UserError, match="holds several pictures"):
        Predictor(torch.nn.Identity(), about).read([tmp_path / f"a.{suffix}"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_picture_is_read(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}", FIRST)
    assert (ImageFiles([tmp_path / f"a.{suffix}"], 8, "folder").read()[0] == 10).all()


def test_the_first_picture_of_a_photograph_counts(tmp_path):
    """Telephones store depth and brightness as further pictures of a JPEG file."""
    Image.fromarray(FIRST).save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.fromarray(SECOND)]
    )
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.n_frames == 2
    assert (ImageFiles([tmp_path / "a.jpg"], 8, "folder").read()[0] == 10).all()
