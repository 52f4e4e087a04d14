"""Object boxes from a file, made by any detector or by hand.

JSON::

    {"units": "pixels", "boxes": {"dog/on snow/12.jpg": [[x1, y1, x2, y2], ...], "dog/on snow/13.jpg": []}}

CSV, with a header line; further columns are ignored, and an image without a row has no box::

    image,x1,y1,x2,y2
    dog/on snow/12.jpg,10,20,180,200

``image`` is the image's name in the data set:

- folders of images: the path below the data folder;
- files of MNIST and CIFAR: ``train/ROW``, where ``ROW`` counts from 0 through all training files;
- embedded digits: ``digits/ROW``.

Coordinates are pixels of the image as stored, turned as its EXIF orientation says, x to the right and y down.  With
``"units": "fraction"`` (JSON) they are shares of the image's width and height.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from os.path import normpath
from pathlib import Path

import torch
from torch import Tensor

from fedkern.data.images.background import rasterise
from fedkern.data.sources.found_files import read_file
from fedkern.data.sources.table import parse_table
from fedkern.data.split import Split
from fedkern.errors import UserError, suggest_name
from fedkern.files.filesystem import expand
from fedkern.files.inputs import parse_json

Box = tuple[float, float, float, float]


class BoxesFile:
    """Object boxes from a JSON or CSV file, distinguished by suffix.

    Args:
        path: the file; see :mod:`fedkern.data.images.boxes_file` for both formats.
        known: names of all images of the data set; a box for any other image is an error.

    Raises:
        UserError: missing or malformed file, an unknown image, or a box that is empty or not made of four numbers.
    """

    def __init__(self, path: str | Path, known: Collection[str]) -> None:
        self.path = expand(path)
        suffix = self.path.suffix.lower()
        if suffix not in (".json", ".csv"):
            raise UserError(f"boxes file {self.path}: expected a file ending in .json or .csv")
        self.fractions = False
        self.boxes: dict[str, list[Box]] = {}
        for name, boxes in (self._read_json() if suffix == ".json" else self._read_csv()).items():
            self.boxes.setdefault(normpath(name) if normpath(name) in known else name, []).extend(boxes)
        for name in self.boxes:
            if name not in known:
                hint = suggest_name(name, sorted(known)[:5000])
                raise UserError(f'boxes file {self.path}: the data set has no image "{name}".{hint}')

    def masks(self, split: Split, classes: Sequence[str]) -> Tensor:
        """Return the object masks of a split, bool ``[n, H, W]``.

        Raises:
            UserError: a box wholly outside its image, or images without names.
        """
        if split.ids is None:
            raise UserError(f"boxes file {self.path}: the images of this data set have no names to look up")
        height, width = split.images.shape[-2:]
        scaled: list[Tensor] = []
        for row, name in enumerate(split.ids):
            boxes = torch.tensor(self.boxes.get(name, []), dtype=torch.float64).reshape(-1, 4)
            stored = (width, height) if split.sizes is None else split.sizes[row].tolist()
            unit = (1.0, 1.0) if self.fractions else (float(stored[0]), float(stored[1]))
            for x1, y1, x2, y2 in boxes.tolist():
                if x2 <= 0 or y2 <= 0 or x1 >= unit[0] or y1 >= unit[1]:
                    raise UserError(
                        f'boxes file {self.path}: box [{x1:g}, {y1:g}, {x2:g}, {y2:g}] of image "{name}" lies wholly '
                        f"outside of it ({unit[0]:g} x {unit[1]:g})"
                    )
            scale = torch.tensor([width / unit[0], height / unit[1]] * 2, dtype=torch.float64)
            scaled.append(boxes * scale)
        return rasterise(scaled, height, width)

    def _read_json(self) -> dict[str, list[Box]]:
        try:
            content = parse_json(read_file(self.path, "boxes file"))
        except ValueError as error:
            raise UserError(f"boxes file {self.path}: not valid JSON ({error})") from error
        table = content.get("boxes") if isinstance(content, dict) else None
        if not isinstance(table, dict):
            raise UserError(f'boxes file {self.path}: expected {{"boxes": {{"IMAGE": [[x1, y1, x2, y2], ...]}}}}')
        units = content.get("units", "pixels")
        if units not in ("pixels", "fraction"):
            raise UserError(f'boxes file {self.path}: units must be "pixels" or "fraction", got {units!r}')
        self.fractions = units == "fraction"
        boxes: dict[str, list[Box]] = {}
        for name, rows in table.items():
            if not isinstance(rows, list):
                raise UserError(f'boxes file {self.path}: image "{name}" needs a list of boxes')
            boxes[name] = [self._box(row, f'image "{name}"') for row in rows]
        return boxes

    def _read_csv(self) -> dict[str, list[Box]]:
        columns = ("image", "x1", "y1", "x2", "y2")
        names, rows, lines, _ = parse_table(self.path, "boxes file")
        missing = [column for column in columns if column not in names]
        if missing:
            raise UserError(
                f"boxes file {self.path}: the header line lacks {', '.join(missing)}; expected {','.join(columns)}"
            )
        boxes: dict[str, list[Box]] = {}
        for row, line in zip(rows, lines, strict=True):
            boxes.setdefault(row["image"], []).append(self._box([row[side] for side in columns[1:]], f"line {line}"))
        return boxes

    def _box(self, values: object, where: str) -> Box:
        try:
            if not isinstance(values, list) or any(isinstance(value, bool) for value in values):
                raise ValueError
            x1, y1, x2, y2 = (float(value) for value in values)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"boxes file {self.path}: {where}: expected four numbers x1, y1, x2, y2") from None
        if not all(math.isfinite(value) for value in (x1, y1, x2, y2)) or x2 <= x1 or y2 <= y1:
            raise UserError(
                f"boxes file {self.path}: {where}: box [{x1:g}, {y1:g}, {x2:g}, {y2:g}] is empty; expected "
                "x1 < x2 and y1 < y2"
            )
        return x1, y1, x2, y2
