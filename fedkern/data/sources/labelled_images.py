"""User image sets with classes, several labels or texts, in folders or a CSV file.

Splits and sites of folders are found by `fedkern.data.sources.site_folders`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedkern.data.images.image_files import subfolders
from fedkern.data.labels.label_sets import COLUMN as SETS
from fedkern.data.labels.label_sets import check_several, parse_label_sets
from fedkern.data.labels.spelling import parse_number
from fedkern.data.sources.found_files import need_root, read_file
from fedkern.data.sources.listing import Labels, Reading, to_source
from fedkern.data.sources.site_folders import Tree, find_trees, holds_classes, holds_images, nested_images, tree_table
from fedkern.data.sources.table import AUTO, CLIENT, PATIENT, Table, csv_files, open_table
from fedkern.data.types import Source
from fedkern.errors import UserError
from fedkern.tasks import TASKS

COLUMNS = {"class": "label", "labels": SETS}
"""CSV column with the labels, by kind (`fedkern.tasks.Task.target`)."""
CSV_TASKS = (AUTO, *(name for name, task in TASKS.items() if task.target in COLUMNS))
ANY = "any"
"""Class of images with a text and no label."""


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
