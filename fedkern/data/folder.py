"""Any image classification set in folders: ``train/<class>/*`` and ``test/<class>/*``, or ``<class>/*`` alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedkern.data.found_files import need_root
from fedkern.data.images import MAX_PIXELS, list_images, subfolders
from fedkern.data.listing import SPLITS, Listing, Reading, to_source
from fedkern.data.types import Source
from fedkern.errors import UserError


def open_folder(
    root: str | Path | None,
    size: int = 64,
    colour: str = "rgb",
    test_share: float = 0.2,
    validation_share: float = 0.1,
    max_image_pixels: int = MAX_PIXELS,
) -> Source:
    """Reads a tree of class folders; images are decoded when a split needs them.

    Args:
        root: holds ``train`` and ``test``, each with a folder for every class, or the class folders themselves, from
            which a fixed split is then drawn.  ``val`` beside ``test`` is the validation set; without ``test`` it is
            the test set.  `SPLITS` has the other accepted names, in any case.
        size: side in pixels to which every image is resized.
        colour: ``"rgb"`` or ``"grey"``.
        test_share, validation_share: share of the images held out where there is no such folder.
        max_image_pixels: most pixels of an image; a file whose header announces more is not decoded.

    Raises:
        UserError: no such tree, fewer than two classes, a class without images, or a test class unknown in training.
    """
    base = need_root(root, "folder", "train/CLASS/image.png")
    splits = split_folders(base, "folder")
    classes = subfolders(base / splits.get("train", ""))
    if len(classes) < 2:
        raise UserError(
            f'data set "folder": expected train/CLASS/image.png or CLASS/image.png under {base}, found {len(classes)} '
            "class folders"
        )
    paths: list[Path] = []
    labels: list[int] = []
    belongs: list[str] = []
    for split, name in splits.items() if splits else [("", "")]:
        for own in subfolders(base / name):
            if own not in classes:
                raise UserError(
                    f'data set "folder": {base / name / own} is a class that {base / splits["train"]} does not have'
                )
            found = list_images(base / name / own)
            if not found and split in ("", "train"):
                raise UserError(f'data set "folder": the class folder {base / name / own} holds no image')
            paths += found
            labels += [classes.index(own)] * len(found)
            belongs += [split] * len(found)
    ids = tuple(path.relative_to(base).as_posix() for path in paths)
    listing = Listing(paths, ids, np.array(labels, dtype=np.int64), belongs, [""] * len(paths))
    return to_source(
        "folder",
        listing,
        tuple(classes),
        Reading(size, colour, test_share, validation_share, max_pixels=max_image_pixels),
    )


def split_folders(base: Path, data: str) -> dict[str, str]:
    """Maps every split to the name of its folder, one of `SPLITS` in any case; empty without a training folder.

    Raises:
        UserError: a training folder without a test folder, or two folders for one split.
    """
    found: dict[str, str] = {}
    names = subfolders(base)
    if not any(SPLITS.get(name.lower()) == "train" for name in names):
        return found
    for name in names:
        split = SPLITS.get(name.lower())
        if split in found:
            raise UserError(f'data set "{data}": {base} has two folders for one split, {found[split]} and {name}')
        if split is not None:
            found[split] = name
    if "test" not in found:
        if "validation" not in found:
            raise UserError(f'data set "{data}": {base} has a folder {found["train"]}, but no folder test or val')
        found["test"] = found.pop("validation")
    return found
