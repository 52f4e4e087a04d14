"""User segmentation sets: images with masks, in folders or a CSV file.

Splits and sites of folders are found by `fedkern.data.sources.site_folders`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.data.images.full_masks import FullMasks, MaskStore
from fedkern.data.images.image_cache import store_files
from fedkern.data.images.image_files import MaskFiles, list_images
from fedkern.data.sources.listing import Reading, check_one, to_source
from fedkern.data.sources.site_folders import Tree, find_trees, tree_table
from fedkern.data.sources.table import Table, open_table
from fedkern.data.split import MAX_PIXEL_CLASSES, are_classes
from fedkern.data.types import Source
from fedkern.errors import UserError, first_of
from fedkern.files.image_rows import PixelClasses, in_parts
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
    pixels: npt.NDArray[np.int16] | PixelClasses
    if files.stored is None:
        pixels = class_of[values[:, 0].numpy()]
    else:
        pixels = PixelClasses.of(files.stored[0], everything, torch.from_numpy(meaning))
    full = FullMasks(MaskStore(Meanings(files, class_of, len(classes)), reading.size), everything)
    labels = _largest(counts, len(classes))
    listing = replace(listing, labels=labels, masks=pixels, full=full, task=SEGMENTATION)
    return to_source("segmentation", listing, classes, reading)


@dataclass(frozen=True)
class Meanings:
    """Reader of a mask's classes at its own size, from values by ``meaning``."""

    files: MaskFiles
    meaning: npt.NDArray[np.int16]
    classes: int

    def __call__(self, row: int) -> npt.NDArray[np.int16]:
        values = self.files.values(row)
        classes = self.meaning[values]
        if classes.max(initial=0) >= self.classes:
            value = values[classes >= self.classes].max()
            raise UserError(
                f'data set "segmentation": the mask {self.files.paths[row]} holds {value}, which is none of the '
                "classes of the resized masks; name all classes with --data-option names=a|b, or mend the mask"
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
