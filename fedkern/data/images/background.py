"""Background extraction: one interface to mark which pixels of the training images are object and which background.

A source is anything with ``masks(split, classes)``.  There are three: `fedkern.data.images.boxes_file.BoxesFile`,
`detections.Detections` (Grounding DINO or another detector), and `MaskFunction` around any callable.  All
results are stored as `Split.masks`.  An image in which nothing was detected has an empty mask and stays out of the
background bank: otherwise its object would leak into the "background" (FedGID, arXiv 2504.00850).  The image still
trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedkern import ops
from fedkern.data.split import Split
from fedkern.data.types import FederatedData

_CHUNK = 256  # images rasterised at once


@runtime_checkable
class MaskSource(Protocol):
    """Source of object masks."""

    def masks(self, split: Split, classes: Sequence[str]) -> Tensor:
        """Return the object masks of a split, bool ``[n, H, W]``.

        A row without any True means nothing was detected.
        """
        ...


@dataclasses.dataclass(frozen=True)
class MaskFunction:
    """Any callable ``(images uint8 [n, C, H, W], labels int64 [n]) -> masks [n, H, W]``, bool or numbers 0 and 1."""

    function: Callable[[Tensor, Tensor], Tensor]

    def masks(self, split: Split, classes: Sequence[str]) -> Tensor:
        """See `MaskSource`.

        Raises:
            ValueError: the callable did not return 0/1 masks of the images' size.
        """
        masks = torch.as_tensor(self.function(split.images, split.labels))
        n, _, height, width = split.images.shape
        if tuple(masks.shape) != (n, height, width):
            raise ValueError(f"masks: expected [{n}, {height}, {width}] from the callable, got {list(masks.shape)}")
        if masks.dtype != torch.bool and not bool(((masks == 0) | (masks == 1)).all()):
            raise ValueError("masks: expected True/False or 0/1 from the callable, got other values")
        return masks.bool()


def extract_background(data: FederatedData, source: MaskSource | Callable[[Tensor, Tensor], Tensor]) -> FederatedData:
    """Give every client's training split its object masks.

    Args:
        data: a federation; its tests and validation set are left as they are.

    Raises:
        UserError: from the source (unknown image, boxes outside their image).
    """
    mask_source = source if isinstance(source, MaskSource) else MaskFunction(source)
    clients = tuple(
        dataclasses.replace(split, masks=mask_source.masks(split, data.classes).contiguous()) for split in data.clients
    )
    return dataclasses.replace(data, clients=clients)


def rasterise(boxes: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Object masks from boxes, by the pixel rule of `fedkern.ops.erase_boxes`.

    Args:
        boxes: one ``[n_i, 4]`` per image, xyxy in pixels; a pixel belongs to the object when its centre is in any box.

    Returns:
        bool ``[n, height, width]``.
    """
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for start in range(0, len(boxes), _CHUNK):
        chunk = [torch.as_tensor(xyxy, dtype=torch.float64).reshape(-1, 4) for xyxy in boxes[start : start + _CHUNK]]
        blank = torch.zeros(len(chunk), 1, height, width)
        masks[start : start + len(chunk)] = ops.erase_boxes(blank, chunk, fill=1.0)[:, 0] > 0
    return masks


def bounding_boxes(masks: Tensor | None) -> Tensor:
    """Return the filled bounding box of every mask, bool ``[n, H, W]``, and an empty one of an empty mask.

    A mask that follows the outline leaves the object's silhouette in the background image.  A box hides the shape, as a
    detector's box does.
    """
    if masks is None:
        raise ValueError("masks: expected bool [n, H, W], got None")
    rows, columns = masks.any(dim=2).to(torch.uint8), masks.any(dim=1).to(torch.uint8)
    return _span(rows)[:, :, None] & _span(columns)[:, None, :]


def _span(hit: Tensor) -> Tensor:
    """Return True from the first to the last 1 of every row of ``[n, L]``."""
    after_first = torch.cummax(hit, dim=1).values
    before_last = torch.cummax(hit.flip(1), dim=1).values.flip(1)
    return (after_first & before_last).bool()
