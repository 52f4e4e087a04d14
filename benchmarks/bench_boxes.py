"""Benchmark of erase_boxes and keep_boxes, two boxes per image, against slices, a mask in torch and torch.compile.

Model bytes: the images read and written once.  Every implementation allocates its result afresh.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.harness import compare
from fedkern import ops


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return images ``[B, C, H, W]`` and boxes ``[B, 2, 4]`` whose sides are up to half of theirs."""
    torch.manual_seed(0)
    side = shape[2]
    corners = torch.rand(shape[0], 2, 2) * side * 0.55
    return torch.rand(shape), torch.cat([corners, corners + (0.1 + 0.35 * torch.rand(shape[0], 2, 2)) * side], 2)


def loop(images: Tensor, boxes: Tensor, keep: bool) -> Tensor:
    """Erase slice by slice, where a pixel belongs to a box when its centre does."""
    out = torch.zeros_like(images) if keep else images.clone()
    for b, rows in enumerate((boxes - 0.5).ceil().int().tolist()):
        for x1, y1, x2, y2 in rows:
            out[b, :, y1:y2, x1:x2] = images[b, :, y1:y2, x1:x2] if keep else 0
    return out


def erase_masked(images: Tensor, boxes: Tensor, keep: bool) -> Tensor:
    """Erase all pixels of all boxes at once."""
    x1, y1, x2, y2 = (side.unsqueeze(-1) for side in boxes.unbind(-1))
    x = torch.arange(images.shape[3], device=images.device) + 0.5
    y = torch.arange(images.shape[2], device=images.device) + 0.5
    columns, rows = (x1 <= x) & (x < x2), (y1 <= y) & (y < y2)
    inside = (rows.unsqueeze(-1) & columns.unsqueeze(-2)).any(1, keepdim=True)
    return torch.where(inside != keep, 0.0, images)


SMALL, MEDIUM, LARGE = (8, 3, 32, 32), (64, 3, 64, 64), (64, 3, 224, 224)


@pytest.mark.parametrize(
    ("keep", "shape"),
    [(False, SMALL), (False, MEDIUM), (False, LARGE), (True, SMALL), (True, LARGE)],
    ids=["erase-small", "erase-medium", "erase-large", "keep-small", "keep-large"],
)
def test_boxes(node: str, keep: bool, shape: tuple[int, ...], threads: int) -> None:
    images, boxes = inputs(shape)
    ours: Callable[..., Tensor] = ops.keep_boxes if keep else ops.erase_boxes
    compiled = torch.compile(erase_masked, dynamic=False)
    runs: dict[str, Callable[[], Tensor]] = {
        "fedkern": lambda: ours(images, boxes),
        "loop of slices": lambda: loop(images, boxes, keep),
        "mask": lambda: erase_masked(images, boxes, keep),
        "compile": lambda: compiled(images, boxes, keep),
    }
    case = f"{list(shape)}{' keep' if keep else ''}"
    compare(node, "boxes", case, runs, model_bytes=2 * images.nbytes, copy=True, threads=threads)
