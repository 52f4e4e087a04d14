"""User image sets with classes, several labels, texts or masks, in folders or a CSV file.

Splits and sites of folders are found by `fedkern.data.sources.site_folders`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.data.images.full_masks import FullMasks, MaskStore
from fedkern.data.images.image_cache import store_files
from fedkern.data.images.image_files import MaskFiles, list_images, subfolders
from fedkern.data.labels.spelling import ANY, check_several, parse_label_sets, parse_number
from fedkern.data.labels.spelling import COLUMN as SETS
from fedkern.data.sources.listing import Labels, Masks, Reading, check_one, to_source
from fedkern.data.sources.site_folders import Tree, find_trees, holds_classes, holds_images, nested_images, tree_table
from fedkern.data.sources.table import AUTO, CLIENT, PATIENT, Table, csv_files, need_root, open_table, read_file
from fedkern.data.split import MAX_PIXEL_CLASSES, are_classes
from fedkern.data.types import Source
from fedkern.errors import UserError, first_of
from fedkern.files.image_rows import PixelClasses, in_parts
from fedkern.tasks import TASKS
from fedkern.tasks.segmentation import IGNORE, SEGMENTATION

PAIRS = ("images", "masks"), ("image", "label")
"""Accepted names of image and mask folders."""
SHOWN = 6
"""Most mask values in a message."""


def open_segmentation(
    root: str | Path | None, reading: Reading, names: str, ignore: int, layout: str, **chosen: str
) -> Source:
    """Read images and masks, the masks at once.

    CSV file: the columns ``image``, ``mask`` and those of `open_table`.  Folder: ``images`` and ``masks`` (or ``image``
    and ``label``, as in public microscopy sets) with files of the same names, in optional splits and sites.

    Masks hold class numbers, 0 for the background, or 0 and 255.  Without ``names``, joined by ``|``, all masks
    together hold every number up to the largest, at most `MAX_PIXEL_CLASSES` of them.
    """
    table = open_table(root, "segmentation", ("image", "mask"), chosen, tree=_tree, layout=layout)
    table.require("image", "mask")
    listing, masks = table.listing("image", np.zeros(len(table.rows), dtype=np.int64)), table.files("mask")
    check_one("segmentation", listing.ids, table.names_of("mask"), "the image {} has two masks", table.lines)
    limit = reading.max_image_pixels
    files = MaskFiles(masks, reading.size, "segmentation", max_pixels=limit, images=listing.paths)
    store_files(files, np.arange(len(files)), reading.cache, reading.progress, in_memory=8)  # classes are int64
    values, _ = files.read()
    counts = _counts(values)
    unknown = counts[:, ignore].copy() if ignore >= 0 else np.zeros(len(counts), dtype=np.int32)
    for row in np.flatnonzero(unknown == reading.size**2):
        raise UserError(f'data set "segmentation": the mask {masks[row]} holds nothing but {ignore}, which is ignored')
    if ignore > 0:
        counts[:, ignore] = 0
    classes, meaning = _classes(counts, masks, names)
    if ignore > 0:  # unknown pixels count as background
        counts[:, 0] += unknown
    if ignore >= 0:
        meaning[ignore] = IGNORE
    class_of = meaning.astype(np.int16)
    everything = torch.arange(len(files))
    stored = files.stored and PixelClasses.of(files.stored[0], everything, torch.from_numpy(meaning))
    pixels: Masks = class_of[values[:, 0].numpy()] if stored is None else stored
    full = FullMasks(MaskStore(partial(_read_mask, files, class_of, len(classes)), reading.size), everything)
    labels = _largest(counts, len(classes))
    listing = replace(listing, labels=labels, masks=pixels, full=full, task=SEGMENTATION)
    return to_source("segmentation", listing, classes, reading)


def _read_mask(files: MaskFiles, meaning: npt.NDArray[np.int16], count: int, row: int) -> npt.NDArray[np.int16]:
    """Return a mask's classes at its own size, from values by ``meaning``, below ``count``."""
    values = files.values(row)
    classes = meaning[values]
    if classes.max(initial=0) >= count:
        value = values[classes >= count].max()
        raise UserError(
            f'data set "segmentation": the mask {files.paths[row]} holds {value}, which is none of the classes of the '
            "resized masks; name all classes with --data-option names=a|b, or mend the mask"
        )
    return classes


def _is_part(folder: Path) -> bool:
    return any(folder.name in pair for pair in PAIRS)


def _has_pair(folder: Path) -> bool:
    return any(all((folder / name).is_dir() for name in pair) for pair in PAIRS)


def _pair(tree: Tree) -> tuple[Path, Path]:
    images, masks = PAIRS[1] if (tree.folder / PAIRS[1][0]).is_dir() else PAIRS[0]
    return tree.folder / images, tree.folder / masks


def _tree(base: Path, layout: str) -> Table:
    trees = find_trees(base, "segmentation", layout, plain=_is_part, is_site=_has_pair, mixed=True)
    table = tree_table(base, "segmentation", layout, trees, _images)
    if not table.rows:
        raise UserError(f'data set "segmentation": no image found in {_pair(trees[-1])[0]}')
    return table


def _images(tree: Tree) -> Iterator[dict[str, Path]]:
    images, masks = _pair(tree)
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(
                f'data set "segmentation": {tree.folder} has no folder {folder.name} (expected images and masks, '
                "or a CSV file with the columns image,mask)"
            )
    partners: dict[str, Path] = {}
    for mask in list_images(masks):
        if (earlier := partners.setdefault(mask.stem, mask)) is not mask:
            raise UserError(f'data set "segmentation": {earlier} and {mask} are two masks of one name; remove one')
    for image in list_images(images):
        if image.stem not in partners:
            raise UserError(f'data set "segmentation": the image {image} has no mask of its name in {masks}')
        yield {"image": image, "mask": partners[image.stem]}


def _counts(masks: Tensor) -> npt.NDArray[np.int32]:
    """Count the values of every mask, int32 ``[n, 256]``."""
    all_values = (mask.reshape(-1) for part in in_parts(masks) for mask in part.numpy())
    return np.stack([np.bincount(mask, minlength=256).astype(np.int32) for mask in all_values])


def _classes(
    counts: npt.NDArray[np.int32], masks: Sequence[Path], names: str
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return class names and the class of every value, int64 ``[256]``, and move counts of 255 to 1 in binary masks."""
    meaning = np.arange(256)
    present = np.flatnonzero(counts.any(0))
    classes = [name.strip() for name in names.split("|")] if names else []
    if 255 in present and set(present.tolist()) <= {0, 255} and len(classes) <= 2:
        meaning[255] = 1
        counts[:, 1], counts[:, 255] = counts[:, 255], 0
        present = np.minimum(present, 1)
    if len(set(classes)) != len(classes) or (classes and (len(classes) < 2 or "" in classes)):
        raise UserError(f'data set "segmentation": names must be two or more different classes, not "{names}"')
    count = len(classes) or max(2, int(present.max()) + 1)
    top = int(present.max())
    if top >= count or not (classes or are_classes(present.tolist())):
        path = masks[int(np.flatnonzero(counts[:, top])[0])]
        lower = present[:-1]
        sound = len(lower) > 0 and lower[-1] < count if classes else are_classes(lower.tolist()) and len(lower) > 1
        void = f"; where {top} marks unknown pixels, give --data-option ignore={top}" if sound else ""
        if classes:
            raise UserError(f'data set "segmentation": the mask {path} holds {top}, expected 0 to {count - 1}{void}')
        raise UserError(
            f'data set "segmentation": the masks hold {first_of([*map(str, present)], SHOWN)} ({top} in {path}), '
            f"expected 0 and 255, or class numbers from 0 to at most {MAX_PIXEL_CLASSES - 1} without a gap; name all "
            "classes, also those that no mask shows, with --data-option names=a|b|c; values between those of classes "
            f"come from soft edges, so save masks without interpolation{void}"
        )
    return tuple(classes or (str(number) for number in range(count))), meaning


def _largest(counts: npt.NDArray[np.int32], classes: int) -> npt.NDArray[np.int64]:
    """Return every image's largest object class, or 0 without an object."""
    objects = counts[:, 1:classes]
    return np.where(objects.any(1), objects.argmax(1) + 1, 0).astype(np.int64)


COLUMNS = {"class": "label", "labels": SETS}
"""CSV column with the labels, by kind (`fedkern.tasks.Task.target`)."""
CSV_TASKS = (AUTO, *(name for name, task in TASKS.items() if task.target in COLUMNS))


def open_folder(root: str | Path | None, reading: Reading, layout: str) -> Source:
    """Read ``<class>/*``, or with the layout ``patients`` ``<class>/<patient>/*``, in optional splits and sites."""
    base = need_root(root, "folder", "train/CLASS/image.png")
    single = layout == "patients"
    trees = find_trees(base, "folder", layout, plain=holds_images, is_site=holds_classes, mixed=False, single=single)
    training = [tree for tree in trees if tree.split in ("", "train")]
    folders = [(tree, name) for tree in trees for name in subfolders(tree.folder)]
    if not any(tree in training for tree, _ in folders):
        tables = csv_files(base)
        table_hint = f"; for the images that a table lists give --data csv --data-root {tables[0]}" if tables else ""
        raise UserError(
            f'data set "folder": expected train/CLASS/image.png or CLASS/image.png under {base}, found 0 '
            f"class folders{table_hint}"
        )

    def images(tree: Tree) -> Iterator[dict[str, Path | str]]:
        for name in subfolders(tree.folder):
            for path, patient in nested_images(tree.folder / name, layout):
                yield {"image": path, PATIENT[0]: patient, "label": name}

    # A class without training images could never be predicted.
    table = tree_table(base, "folder", layout, trees, images)
    classes, labels = table.classes(table.column("label"))
    holders: dict[int, set[str]] = {}
    for row, label in zip(table.rows, labels.tolist(), strict=True):
        if row["split"] in ("", "train"):
            holders.setdefault(label, set()).add(row.get(CLIENT[0], ""))
    label_of = dict(zip(table.column("label"), labels.tolist(), strict=True))
    for tree, name in folders:
        if label_of.get(name) not in holders:
            reason = f"{tree.folder / name} is a class that {training[0].folder} does not have"
            if tree in training:
                reason = f"the class folder {tree.folder / name} holds no image"
            if tree.site:
                reason = f"no site has a training image of the class {name}; leave {tree.folder / name} out"
            raise UserError(f'data set "folder": {reason}')
    # Sites without a common class are more likely classes with folders of patients.
    sites = [*dict.fromkeys(tree.site for tree in trees)]
    if len(sites) > 1 and max(map(len, holders.values())) == 1:
        raise UserError(
            f'data set "folder": no two of the folders {", ".join(sites[:4])} in {base} have a class in common, '
            "so that they are no sites with the same task; put all classes into one folder, list the images in a CSV "
            "file with a column client or, for CLASS/PATIENT/image, give --data-option layout=patients"
        )
    return to_source("folder", table.listing("image", labels), classes, reading)


def open_csv(root: str | Path | None, reading: Reading, task: str, order: str, **chosen: str) -> Source:
    """Read a CSV file with the columns ``path`` and ``label`` or ``labels``, and those of `open_table`.

    ``labels`` has any number of names per image, joined by ``|``; if both are present, ``label`` counts unless ``task``
    is for several labels.  ``order`` has the classes in order, joined by ``|``, by default sorted.
    """
    table = open_table(root, "csv", ("path", "label"), chosen)
    table.require("path")
    choice = TASKS.get(task)
    sets = chosen.get(SETS) or (SETS in table.rows[0] and "label" not in table.rows[0])
    target = choice.target if choice else "labels" if sets and not chosen.get("label") else "class"
    if any(chosen.get(column) for kind, column in COLUMNS.items() if kind != target):
        given = {"task": choice, **chosen}
        options = " and ".join(name for name, value in given.items() if value and name in ("task", "label", SETS))
        raise UserError(
            f'data set "csv": leave out one of the options {options}: label is for one class an image, {SETS} for '
            "several"
        )
    labels: Labels
    if target == "class":
        table.require("label")
        classes, labels = table.classes(table.column("label"), order)
    else:
        column = table.chosen.get(SETS, SETS)
        where = f"the column {column} of {table.path}"
        classes, labels, notices = parse_label_sets(table.column(SETS), where, "csv", order)
        check_several(
            labels.sum(1).tolist(), task, f'data set "csv": {where}', f"give --data-option label={column}",
            "give --data-option task=multilabel",
        )  # fmt: skip
        table.notices.extend(notices)
    listing = table.listing("path", labels, task=task)
    listing.task.check_classes(classes, bool(order) or None not in map(parse_number, classes))
    return to_source("csv", listing, classes, reading)


def open_pairs(root: str | Path | None, reading: Reading, longest: int, layout: str, **chosen: str) -> Source:
    """Read images and texts, each cut to ``longest`` words.

    CSV file: the columns ``image``, ``text``, optionally ``label``, and those of `open_table`, with a row for each
    text.  Folder: ``cat.jpg`` beside ``cat.txt``, in optional label folders, splits and sites.  Images are padded to
    squares.
    """
    table = open_table(root, "pairs", ("image", "text"), chosen, tree=_read_captions, layout=layout)
    table.require("image", "text")
    texts = [" ".join(text.split()[:longest]) for text in table.column("text")]
    classes, labels = table.classes([label or ANY for label in table.column("label")])
    return to_source("pairs", table.listing("image", labels, texts), classes, replace(reading, pad=True))


def _read_captions(base: Path, layout: str) -> Table:
    single = layout == "patients" or holds_images(base)
    has_layout = lambda folder: holds_images(folder) or holds_classes(folder)  # noqa: E731
    trees = find_trees(base, "pairs", layout, plain=holds_images, is_site=has_layout, mixed=True, single=single)

    def images(tree: Tree) -> Iterator[dict[str, Path | str]]:
        for label in ("", *subfolders(tree.folder)):
            for path, patient in nested_images(tree.folder / label, layout if label else ""):
                yield {"image": path, PATIENT[0]: patient, "label": label, "text": _text(path)}

    table = tree_table(base, "pairs", layout, trees, images)
    if not table.rows:
        raise UserError(f'data set "pairs": no image found in {base} (expected image.jpg with image.txt beside it)')
    return table


def _text(image: Path) -> str:
    path = image.with_suffix(".txt")
    if not path.exists():
        raise UserError(f'data set "pairs": the image {image} has no text {path.name} beside it')
    text = read_file(path, 'data set "pairs"').strip()
    if not text:
        raise UserError(f'data set "pairs": the text {path} is empty')
    return text
