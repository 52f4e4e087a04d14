"""Object boxes: from a detector, cached on disk so that every image is processed only once, or from a file.

A file is made by any detector or by hand.  JSON::

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

import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from os.path import normpath
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fedkern.data.images.background import rasterise
from fedkern.data.sources.table import parse_table, read_file
from fedkern.data.split import Split
from fedkern.errors import UserError, require_format, suggest_name
from fedkern.files.filesystem import cache_folder, expand, hold_lock, parse_json, read_json, replace

Box = tuple[float, float, float, float]


class BoxesFile:
    """Object boxes from a JSON or CSV file, distinguished by suffix.

    Args:
        path: the file; see :mod:`fedkern.data.images.detections` for both formats.
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
            scaled.append(boxes * torch.tensor([width / unit[0], height / unit[1]] * 2, dtype=torch.float64))
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


FORMAT = 1
BATCH = 8
SAVE_EVERY = 16  # batches between two writes of the cache


class Detector(Protocol):
    """Detector of objects by class name, such as `fedkern.models.pretrained.detector.GroundingDino`."""

    @property
    def identity(self) -> Mapping[str, str | float]:
        """Settings that decide the boxes (model, version, thresholds), which name the cache file."""

    def detect(self, images: Tensor, name: str) -> list[Tensor]:
        """Return boxes xyxy in pixels, float ``[n_i, 4]``, of objects ``name`` in uint8 ``[B, 3, H, W]`` images."""


class Detections:
    """Mask source that asks a detector for the class of every image.

    Args:
        detector: anything with ``identity`` and ``detect``; runs only on images that the cache does not hold.
        cache: folder of the cache files (default: ``fedkern/detections`` in the user's cache folder).  Every detector
            identity has its own file (attribute ``path``).  Entries are keyed by image content and class name, so they
            fit any partition and seed.
        notice: called with progress messages.
    """

    def __init__(
        self, detector: Detector, cache: str | Path | None = None, notice: Callable[[str], None] | None = None
    ) -> None:
        self.detector = detector
        self.folder = cache_folder("detections") if cache is None else expand(cache)
        self.notice = notice
        self.identity = dict(detector.identity)
        text = json.dumps(self.identity, sort_keys=True)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(self.identity.get("model", "detector"))).name)
        self.path = self.folder / f"{name}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.json"

    def masks(self, split: Split, classes: Sequence[str]) -> Tensor:
        """Return the object masks of a split, bool ``[n, H, W]``."""
        return rasterise(self.boxes(split, classes), *split.images.shape[-2:])

    def boxes(self, split: Split, classes: Sequence[str]) -> list[Tensor]:
        """Return the boxes of every image, from the cache where possible.

        Args:
            split: images uint8 ``[n, C, H, W]`` with labels int64 ``[n]``.
            classes: names by label, which the detector looks for.

        Returns:
            One float64 ``[n_i, 4]`` per image, xyxy in pixels of ``split.images``.

        Raises:
            UserError: a damaged cache file, one of another format, or one that cannot be written.
        """
        names = [classes[label] for label in split.labels.tolist()]
        keys = [_key(image, name) for image, name in zip(split.images, names, strict=True)]
        cached = self._read()
        new: dict[str, list[list[float]]] = {}
        missing: dict[str, list[int]] = {}
        for row, key in enumerate(keys):
            if key not in cached:
                missing.setdefault(names[row], []).append(row)
        batches = [(name, rows[i : i + BATCH]) for name, rows in missing.items() for i in range(0, len(rows), BATCH)]
        total, done = sum(len(rows) for _, rows in batches), 0
        try:
            for number, (name, rows) in enumerate(batches, start=1):
                images = split.images[torch.tensor(rows)]
                results = self.detector.detect(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images, name)
                for row, boxes in zip(rows, results, strict=True):
                    new[keys[row]] = boxes.double().reshape(-1, 4).tolist()
                done += len(rows)
                if number % SAVE_EVERY == 0:
                    self._write(new)
                    if self.notice is not None:
                        self.notice(f"detecting objects: {done:,} of {total:,} images")
        finally:  # an interrupted detection keeps its results so far
            if new:
                self._write(new)
        cached.update(new)
        return [torch.tensor(cached[key], dtype=torch.float64).reshape(-1, 4) for key in keys]

    def _read(self) -> dict[str, list[list[float]]]:
        if not self.path.exists():
            return {}
        try:
            content = read_json(self.path)
            require_format(self.path, content.get("format"), FORMAT)
            boxes: dict[str, list[list[float]]] = content["boxes"]
            if content["sum"] != _sum(boxes):
                raise ValueError("its boxes are not those that were written")
            if any(len(box) != 4 or not all(map(math.isfinite, box)) for rows in boxes.values() for box in rows):
                raise ValueError("a box without four numbers")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"the detection cache {self.path} is damaged ({error}); delete it") from error
        return boxes

    def _write(self, new: Mapping[str, list[list[float]]]) -> None:
        def fill(temporary: Path) -> None:
            temporary.write_text(json.dumps(content), encoding="utf-8")

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with hold_lock(self.folder / ".lock"):
                # Read again first: another run may have added images meanwhile.
                boxes = {**self._read(), **new}
                content = {"format": FORMAT, "detector": self.identity, "boxes": boxes, "sum": _sum(boxes)}
                replace(self.path, fill)
        except OSError as error:
            raise UserError(
                f"cannot write the detection cache {self.path}: {error.strerror or error}; name another folder with "
                "the data option detector_cache"
            ) from error


def _sum(boxes: Mapping[str, list[list[float]]]) -> int:
    return zlib.crc32(json.dumps(boxes, sort_keys=True).encode())


def _key(image: Tensor, name: str) -> str:
    digest = hashlib.blake2b(f"{tuple(image.shape)}/{name}/".encode(), digest_size=16)
    digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()
