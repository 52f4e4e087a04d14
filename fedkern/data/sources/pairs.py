"""Data set of images with captions: a text file beside every image, or a CSV file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedkern.data.images.image_files import subfolders
from fedkern.data.labels.spelling import classes_of
from fedkern.data.sources.found_files import read_file
from fedkern.data.sources.listing import Listing, Reading, to_source
from fedkern.data.sources.site_folders import (
    Found,
    Splits,
    check_folders,
    check_images,
    find_sites,
    holds_classes,
    holds_images,
    listed,
    nested_images,
    split_folders,
    trees,
)
from fedkern.data.sources.table import check_unchosen, find_table, read_table
from fedkern.data.types import Source
from fedkern.errors import UserError
from fedkern.files.filesystem import expand

ANY = "any"


def open_pairs(root: str | Path | None, reading: Reading, longest: int, layout: str, **chosen: str) -> Source:
    """Reads images and their texts; images are decoded when a split needs them.

    CSV file: the columns are ``image``, ``text`` and optionally ``label``, ``split``, ``client`` and ``patient_id``.
    An image with several captions has one row for each.  All images of a patient are held out together and go to one
    client.

    Folder: every image has a text file of the same name beside it, as ``cat.jpg`` and ``cat.txt``.  Images lie directly
    in the folder or under ``train`` and ``test`` (and ``val``), optionally in a folder for each label.  Or there is a
    folder for every site, with splits or labels in it.

    Args:
        root: the CSV file, a folder with one CSV file, or the folder of images.
        reading: how files become images, with black bars where they are not square.
        layout: one of `fedkern.data.sources.site_folders.LAYOUTS`; with ``patients``, ``LABEL/PATIENT/image``.
        **chosen: columns of the CSV file, see `fedkern.data.sources.table.read_table`.

    The other arguments are options of the data set (`fedkern.data.registry.DATASETS`).

    Raises:
        UserError: anything wrong with a file, an image without a text, or an empty text.
    """
    columns = ("image", "text")
    path = find_table(root, "pairs", columns)
    if path is not None:
        check_folders("pairs", layout, path)
        table = read_table(path, "pairs", columns, chosen)
        images, texts = table.files("image", "pairs"), table.column("text")
        classes, labels = table.classes([label or ANY for label in table.column("label")])
        rest = {"paths": images, "ids": table.names_of("image"), **table.listed("pairs")}
    else:
        check_unchosen("pairs", chosen, root)
        base = expand(str(root))
        sites = _sites(base, layout)
        found = _found(base, sites, layout)
        texts = [_read(image.path) for image in found]
        classes, labels, told = classes_of([image.label or ANY for image in found], f"The layout of {base}")
        rest = listed(base, sites, found)
        rest["notices"] += told
    listing = Listing(labels=labels, texts=[" ".join(text.split()[:longest]) for text in texts], **rest)
    return to_source("pairs", listing, classes, replace(reading, pad=True))


def _sites(base: Path, layout: str) -> dict[str, Splits]:
    if holds_images(base) or layout == "patients":
        return {"": split_folders(base, "pairs")}
    whole = lambda folder: holds_images(folder) or holds_classes(folder)  # noqa: E731
    return find_sites(base, "pairs", layout, plain=holds_images, whole=whole, mixed=True)


def _found(base: Path, sites: dict[str, Splits], layout: str) -> list[Found]:
    found: list[Found] = []
    for site, split, folder in trees(base, sites):
        for label in ("", *subfolders(folder)):
            images = nested_images(folder / label, layout if label else "")
            found += [Found(path, split, site, label, patient) for path, patient in images]
    check_images(base, "pairs", sites, found)
    if not found:
        raise UserError(f'data set "pairs": no image found in {base} (expected image.jpg with image.txt beside it)')
    return found


def _read(image: Path) -> str:
    path = image.with_suffix(".txt")
    if not path.exists():
        raise UserError(f'data set "pairs": the image {image} has no text {path.name} beside it')
    text = read_file(path, 'data set "pairs"').strip()
    if not text:
        raise UserError(f'data set "pairs": the text {path} is empty')
    return text
