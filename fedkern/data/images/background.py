"""Background extraction: marking the object pixels of training images.

A source is anything with ``masks(split, classes)``: `fedkern.data.images.detections.BoxesFile`,
`detections.Detections`, or `MaskFunction` around a callable.  An image without a detection has an empty mask and stays
out of the background bank, since its object would leak into the "background" (FedGID, arXiv 2504.00850), but still
trains.
"""

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

        A row without any True means that nothing was detected.
        """


@dataclasses.dataclass(frozen=True)
class MaskFunction:
    """Mask source of a callable ``(images, labels) -> masks [n, H, W]``, bool or 0 and 1."""

    function: Callable[[Tensor, Tensor], Tensor]

    def masks(self, split: Split, classes: Sequence[str]) -> Tensor:
        """Return the callable's masks, or raise ValueError for wrong shapes or values."""
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
        data: a federation; its tests and validation set are left unchanged.
        source: anything with ``masks(split, classes)``, or a callable ``(images, labels) -> masks`` that maps uint8
            ``[n, C, H, W]`` and int64 ``[n]`` to ``[n, H, W]``, bool or numbers 0 and 1.

    Returns:
        The federation with `Split.masks`, bool ``[n, H, W]``, at every client.

    Raises:
        UserError: from the source (unknown image, boxes outside their image).
        ValueError: a callable's masks have another shape or other values.
    """
    mask_source = source if isinstance(source, MaskSource) else MaskFunction(source)
    clients = tuple(
        dataclasses.replace(split, masks=mask_source.masks(split, data.classes).contiguous()) for split in data.clients
    )
    return dataclasses.replace(data, clients=clients)


def rasterise(boxes: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Return masks bool ``[n, height, width]`` from boxes xyxy in pixels, ``[n_i, 4]`` per image.

    A pixel belongs to the object if its centre is in any box, as in `fedkern.ops.erase_boxes`.
    """
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for start in range(0, len(boxes), _CHUNK):
        chunk = [torch.as_tensor(xyxy, dtype=torch.float64).reshape(-1, 4) for xyxy in boxes[start : start + _CHUNK]]
        blank = torch.zeros(len(chunk), 1, height, width)
        masks[start : start + len(chunk)] = ops.erase_boxes(blank, chunk, fill=1.0)[:, 0] > 0
    return masks


def bounding_boxes(masks: Tensor | None) -> Tensor:
    """Return the filled bounding box of every mask, bool ``[n, H, W]``.

    A box hides the silhouette that an exact mask would leave in the background image, as a detector's box does.
    """
    if masks is None:
        raise ValueError("masks: expected bool [n, H, W], got None")
    rows, columns = masks.any(dim=2).to(torch.uint8), masks.any(dim=1).to(torch.uint8)
    return _span(rows)[:, :, None] & _span(columns)[:, None, :]


def _span(hit: Tensor) -> Tensor:
    """Fill every row of ``[n, L]`` from its first to its last 1, as bool."""
    after_first = torch.cummax(hit, dim=1).values
    before_last = torch.cummax(hit.flip(1), dim=1).values.flip(1)
    return (after_first & before_last).bool()
