"""Data set of images with captions: a text file beside every image, or a CSV file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedkern.data.images.image_files import subfolders
from fedkern.data.sources.found_files import read_file
from fedkern.data.sources.listing import Listing, Reading, to_source
from fedkern.data.sources.site_folders import Tree, find_trees, holds_classes, holds_images, nested_images, tree_table
from fedkern.data.sources.table import Table, open_table
from fedkern.data.types import Source
from fedkern.errors import UserError

ANY = "any"


def open_pairs(root: str | Path | None, reading: Reading, longest: int, layout: str, **chosen: str) -> Source:
    """Reads images and their texts; images are decoded when a split needs them.

    CSV file: the columns are ``image``, ``text``, optionally ``label``, and those of `open_table`.  An image with
    several captions has one row for each.

    Folder: every image has a text file of the same name beside it, as ``cat.jpg`` and ``cat.txt``.  Images lie directly
    in the folder or under ``train`` and ``test`` (and ``val``), optionally in a folder for each label.  Or there is a
    folder for every site, with splits or labels in it.

    Args:
        root, chosen: see `open_table`.
        reading: how files become images, with black bars where they are not square.
        layout: one of `fedkern.data.sources.site_folders.LAYOUTS`; with ``patients``, ``LABEL/PATIENT/image``.

    The other arguments are options of the data set (`fedkern.data.registry.DATASETS`).

    Raises:
        UserError: anything wrong with a file, an image without a text, or an empty text.
    """
    table = open_table(root, "pairs", ("image", "text"), chosen, tree=_tree, layout=layout)
    rest = table.listed("image")
    classes, labels = table.classes([label or ANY for label in table.column("label")])
    texts = [" ".join(text.split()[:longest]) for text in table.column("text")]
    return to_source("pairs", Listing(labels=labels, texts=texts, **rest), classes, replace(reading, pad=True))


def _tree(base: Path, layout: str) -> Table:
    single = layout == "patients" or holds_images(base)
    has_layout = lambda folder: holds_images(folder) or holds_classes(folder)  # noqa: E731
    trees = find_trees(base, "pairs", layout, plain=holds_images, whole=has_layout, mixed=True, single=single)

    def images(tree: Tree) -> Iterator[dict[str, Any]]:
        for label in ("", *subfolders(tree.folder)):
            for image in nested_images(tree.folder / label, layout if label else ""):
                yield {**image, "label": label, "text": _read(image["image"])}

    table = tree_table(base, "pairs", trees, images)
    if not table.rows:
        raise UserError(f'data set "pairs": no image found in {base} (expected image.jpg with image.txt beside it)')
    return table


def _read(image: Path) -> str:
    path = image.with_suffix(".txt")
    if not path.exists():
        raise UserError(f'data set "pairs": the image {image} has no text {path.name} beside it')
    text = read_file(path, 'data set "pairs"').strip()
    if not text:
        raise UserError(f'data set "pairs": the text {path} is empty')
    return text
