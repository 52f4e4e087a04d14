"""Any image classification set in folders: ``train/<class>/*`` and ``test/<class>/*``, or ``<class>/*`` alone.

Where clients are sites, every site has such a tree in a folder of its own: ``<site>/<class>/*``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from fedkern.data.images.image_files import hidden, subfolders
from fedkern.data.labels.spelling import numbered, unified
from fedkern.data.sources.found_files import need_root
from fedkern.data.sources.listing import Listing, Reading, to_source
from fedkern.data.sources.site_folders import (
    Found,
    check_images,
    find_sites,
    holds_classes,
    holds_images,
    listed,
    nested_images,
    split_folders,
    trees,
)
from fedkern.data.types import Source
from fedkern.errors import UserError


def open_folder(root: str | Path | None, reading: Reading, layout: str) -> Source:
    """Reads a tree of class folders; images are decoded when a split needs them.

    Args:
        root: holds ``train`` and ``test``, each with a folder for every class, or the class folders themselves, from
            which a fixed split is then drawn.  ``val`` beside ``test`` is the validation set; without ``test`` it is
            the test set.  `SPLITS` has the other accepted names, in any case.  Or ``root`` holds a folder for every
            site with such a tree in it, and the sites are the clients.  The test folder of a site is then the own test
            set of that client; the test set of the run joins them.
        reading: how files become images.
        layout: one of `fedkern.data.sources.site_folders.LAYOUTS`; with ``patients``, ``<class>/<patient>/*``.

    Raises:
        UserError: no such tree, no class, a class without images, a test class unknown in training, or
            folders of sites that are not alike or have no class in common.
    """
    base = need_root(root, "folder", "train/CLASS/image.png")
    sites = (
        {"": split_folders(base, "folder")}
        if layout == "patients"
        else find_sites(base, "folder", layout, plain=holds_images, whole=holds_classes, mixed=False)
    )
    parts = trees(base, sites)
    training = {site: folder for site, split, folder in parts if split in ("", "train")}
    folders = [name for _, _, folder in parts for name in subfolders(folder)]
    spelled, told = unified(folders, f"The layout of {base}")
    one = dict(zip(folders, spelled, strict=True))
    own_classes = {site: {one[name] for name in subfolders(folder)} for site, folder in training.items()}
    classes = numbered(name for names in own_classes.values() for name in names)
    if not classes:
        tables = sorted(path for path in base.glob("*.csv") if not hidden(path.name))
        table = f"; for the images that a table lists give --data csv --data-root {tables[0]}" if tables else ""
        raise UserError(
            f'data set "folder": expected train/CLASS/image.png or CLASS/image.png under {base}, found 0 '
            f"class folders{table}"
        )
    holders = Counter(name for names in own_classes.values() for name in names)
    if len(sites) > 1 and max(holders.values()) == 1:
        raise UserError(
            f'data set "folder": no two of the folders {", ".join(list(sites)[:4])} in {base} have a class in common, '
            "so that they are no sites with the same task; put all classes into one folder, list the images in a CSV "
            "file with a column client or, for CLASS/PATIENT/image, give --data-option layout=patients"
        )
    found: list[Found] = []
    for site, split, folder in parts:
        for own in subfolders(folder):
            if one[own] not in classes:
                where = "no site has for training" if site else f"{training[site]} does not have"
                raise UserError(f'data set "folder": {folder / own} is a class that {where}')
            images = nested_images(folder / own, layout)
            if not images and split in ("", "train") and not site:
                raise UserError(f'data set "folder": the class folder {folder / own} holds no image')
            found += [Found(path, split, site, one[own], patient) for path, patient in images]
    check_images(base, "folder", sites, found)
    trained = {image.label for image in found if image.split in ("", "train")}
    for name in classes:
        if name not in trained and "" not in sites:
            raise UserError(
                f'data set "folder": no site has a training image of the class {name}; leave its folders out'
            )
    rest = listed(base, sites, found)
    rest["notices"] += told
    number = {name: label for label, name in enumerate(classes)}
    listing = Listing(labels=np.array([number[image.label] for image in found], dtype=np.int64), **rest)
    return to_source("folder", listing, classes, reading)
