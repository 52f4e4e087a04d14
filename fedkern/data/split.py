"""Labelled images of a client or a test set, in memory or in a file."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.data.images.full_masks import FullMasks
from fedkern.data.sharing.groups import grouped_rows
from fedkern.files.image_rows import in_parts
from fedkern.tasks import Task, task_of

MAX_PIXEL_CLASSES = 32
"""Most pixel classes without names: soft edges and photographs have more values."""


def are_classes(values: Sequence[int]) -> bool:
    """Return whether sorted pixel values are class numbers from 0 without a gap, at most `MAX_PIXEL_CLASSES`."""
    return 0 < len(values) <= MAX_PIXEL_CLASSES and values[-1] == len(values) - 1


@dataclass(frozen=True)
class Split:
    """Images with labels and, where known, object masks and other columns.

    Attributes:
        images: uint8 ``[n, C, H, W]``; if stored in a file, a `fedkern.files.image_rows.ImageRows`.  Images of a user's
            data set may be float32, normalised.
        labels: int64 ``[n]``, the class of every image; for segmentation int64 ``[n, H, W]``, the class of every pixel
            (`IGNORE` where unknown), a `fedkern.files.image_rows.PixelClasses` if masks are in a file; for several
            labels per image uint8 ``[n, L]``, 1 where the image has the label.
        masks: bool ``[n, H, W]``, True on the object, or None.  A row without any True means that nothing was detected
            in that image; the image stays out of the background bank.
        ids: name of every image in its source (``"train/17"``, ``"dog/on snow/12.jpg"``), as a boxes file uses it.
        sizes: int64 ``[n, 2]``, width and height of every image before resizing, after its EXIF rotation.
        texts: caption or report of every image; an image with several texts has a row for each, all under one name in
            ``ids``.
        cases: int64 ``[n]``, the case of every image, where several images form one case, such as the slices of a
            volume or the tiles of a picture.  Metrics are means over cases.
        full: the class of every pixel at the masks' original size, where masks were resized (segmentation).
        patients: int64 ``[n]``, the patient of every image, where the data name patients; names in files are hashed.
            An image without a named patient counts as a patient of its own.  A set drawn from all images has all images
            of a patient or none; a client's own test set has all of the patient's images at that client or none.
        task: task of the labels; by default inferred from their axes and from ``texts``.
        homes: int64 ``[n]``, for images that no client trains on: the client whose site or look they show, or -1; None
            if unknown.  ``--held-out-client`` removes them together with their client.

    Raises:
        ValueError: a dtype or shape that does not fit.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor | None = None
    ids: tuple[str, ...] | None = None
    sizes: Tensor | None = None
    texts: tuple[str, ...] | None = None
    cases: Tensor | None = None
    patients: Tensor | None = None
    homes: Tensor | None = None
    full: FullMasks | None = None
    task: Task = None  # type: ignore[assignment]  # never None afterwards

    def __post_init__(self) -> None:
        if self.images.dtype not in (torch.uint8, torch.float32) or self.images.dim() != 4:
            raise ValueError(f"images: expected uint8 or float32 [n, C, H, W], got {describe(self.images)}")
        n, _, height, width = self.images.shape
        object.__setattr__(self, "task", self.task or task_of(self.labels, self.texts))
        self.task.check_labels(self.labels, n, (height, width))
        if self.masks is not None and (self.masks.dtype != torch.bool or tuple(self.masks.shape) != (n, height, width)):
            raise ValueError(f"masks: expected bool [{n}, {height}, {width}], got {describe(self.masks)}")
        for name, words in (("ids", self.ids), ("texts", self.texts)):
            if words is not None and len(words) != n:
                raise ValueError(f"{name}: expected {n}, one for every image, got {len(words)}")
        if self.sizes is not None and tuple(self.sizes.shape) != (n, 2):
            raise ValueError(f"sizes: expected [{n}, 2], got {describe(self.sizes)}")
        for name, numbers in (("cases", self.cases), ("patients", self.patients), ("homes", self.homes)):
            if numbers is not None and tuple(numbers.shape) != (n,):
                raise ValueError(f"{name}: expected [{n}], got {describe(numbers)}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_labels(self) -> Tensor:
        """Class of every image, int64 ``[n]``, for segmentation the object class with most pixels, else 0.

        For several labels per image the labels, uint8 ``[n, L]``.
        """
        return self.task.image_labels(self.labels)

    @property
    def memory(self) -> int:
        """Bytes of all images after normalisation to fp32."""
        return 4 * self.images.numel()

    def fingerprint(self, value: int = 0) -> int:
        """Return a CRC-32 of images, labels, masks and texts, continuing from ``value``."""
        for tensor in (self.images, self.labels, self.masks):
            for part in () if tensor is None else in_parts(tensor):
                value = zlib.crc32(part.contiguous().numpy().reshape(-1).view("uint8").data, value)
        return zlib.crc32("\0".join(self.texts or ()).encode(), value)

    def units(self) -> npt.NDArray[np.int64] | None:
        """Return the case, patient or image of every row, int64 ``[n]``, or None if no rows belong together."""
        return grouped_rows(self.ids, self.cases, self.patients)

    def identities(self) -> list[str]:
        """Return the name of every image, or a digest of its pixels and label where images have no names."""
        if self.ids is not None:
            return list(self.ids)
        pairs = zip(self.images, self.labels, strict=True)
        contents = (b"".join(part.numpy().tobytes() for part in pair) for pair in pairs)
        return [blake2b(content, digest_size=16).hexdigest() for content in contents]

    def raw(self) -> dict[str, object]:
        """Return the samples as a client would send them if it gave them away."""
        return {"images": self.images, "labels": self.labels, "texts": self.texts}

    def plus(self, splits: Sequence[Split]) -> Split:
        """Return the split with the images of others appended, see :func:`join_splits`."""
        return join_splits([self, *splits])

    def subset(self, indices: Tensor) -> Split:
        """Return a new split with copies of the rows ``indices``, int64 ``[m]``."""
        return Split(**{field.name: rows_of(getattr(self, field.name), indices) for field in fields(self)})


def rows_of(column: Any, rows: Tensor) -> Any:
    """Return ``rows``, int64 ``[m]``, of a column of a split, or a value without rows unchanged."""
    if isinstance(column, (tuple, list)):
        return tuple(column[row] for row in rows.tolist())
    if isinstance(column, FullMasks):
        return column.subset(rows)
    return column[rows] if isinstance(column, Tensor) else column


def join_splits(splits: Sequence[Split]) -> Split:
    """Concatenate splits, with None for columns that are None in any of them."""
    return Split(**{field.name: _concat([getattr(split, field.name) for split in splits]) for field in fields(Split)})


def _concat(parts: list[Any]) -> Any:
    if any(part is None for part in parts):
        return None
    if isinstance(parts[0], FullMasks):
        of_one_store = len({id(part.store) for part in parts}) == 1
        return FullMasks(parts[0].store, torch.cat([part.rows for part in parts])) if of_one_store else None
    if isinstance(parts[0], tuple):
        return tuple(chain(*parts))
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
