"""Tests of blend, erase_boxes and keep_boxes on CUDA against the float64 reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern.ops import blend, erase_boxes, keep_boxes
from fedkern.ops._blend.boxes import fill_boxes_reference
from python_tests.ops._blend.test_blend import check
from python_tests.ops.operator_cases import DTYPES, describe, lay_out_map, move_to, pairwise

AXES: dict[str, Any] = {
    "rows": (0, 1, 5, 33),
    "size": (1, 7, 8, 129, 3202, 17000),
    "dtype": DTYPES,
    "index": ("identity", "permutation", "repeated", "one", "many"),
    "alpha": ("number", "zero", "one", "tensor", "double"),
    "layout": ("rows", "gaps", "offset", "channels_last"),
}
CASES = pairwise(AXES, seed=3)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Return the same samples with other strides or at an odd address."""
    rows, size = x.shape
    if layout == "gaps":
        return x.new_zeros(rows, 2 * size + 3)[:, :size].copy_(x)
    if layout == "offset":
        return x.new_zeros(rows * size + 1)[1:].view(rows, size).copy_(x)
    if layout == "channels_last" and size % 8 == 0:
        return x.view(rows, 2, size // 8, 4).contiguous(memory_format=torch.channels_last)
    return x


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: describe(CASES[n]))
def test_blend(device: torch.device, number: int) -> None:
    case = CASES[number]
    shape, kinds = (case["rows"], case["size"]), (case["index"], case["alpha"])
    check("cuda", shape, case["dtype"], *kinds, number, lambda x: lay_out(x.to(device), case["layout"]))


def test_index_out_of_range_stops_the_kernel(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a device assertion ends the process's use of the GPU")
    x = torch.randn(3, 8, device=device)
    for wrong in (3, -1):
        with pytest.raises(RuntimeError, match="blend: index out of range"):
            blend(x, x, 0.5, index=torch.tensor([0, wrong, 1]))


BOX_AXES: dict[str, Any] = {
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool),
    "shape": ((2, 3, 5, 7), (1, 1, 1, 9), (3, 4, 16, 16), (2, 3, 17, 1), (0, 3, 4, 4), (2, 3, 32, 48), (1, 2, 0, 4)),
    "layout": ("contiguous", "channels_last", "crop", "transposed", "offset"),
    "boxes": (0, 1, 3, 70),
    "keep": (False, True),
    "fill": ("number", "channels"),
}
BOX_CASES = pairwise(BOX_AXES, seed=5)


@pytest.mark.parametrize("number", range(len(BOX_CASES)), ids=lambda n: describe(BOX_CASES[n]))
def test_boxes(device: torch.device, number: int) -> None:
    case = BOX_CASES[number]
    generator = torch.Generator().manual_seed(number)
    shape, dtype = case["shape"], case["dtype"]
    images = lay_out_map((torch.randn(shape, generator=generator) * 50).to(dtype), case["layout"])
    corners = torch.rand(shape[0], case["boxes"], 4, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    corners = corners * torch.tensor([shape[3], shape[2], shape[3], shape[2]])
    if case["boxes"]:
        corners[:, :, 2:] = corners[:, :, :2] + corners[:, :, 2:] / case["boxes"]
        corners[:, 0] = corners[:, 0].round() + 0.5  # edges on pixels' centres
    fill: Any = 1 if case["fill"] == "number" else [int(c % 2) for c in range(shape[1])]
    out = (keep_boxes if case["keep"] else erase_boxes)(move_to(images, device), corners.to(device), fill)
    values = torch.tensor([fill] if isinstance(fill, int) else fill).expand(shape[1])[None].to(dtype)
    assert torch.equal(out.cpu(), fill_boxes_reference(images, corners, values, case["keep"]))
    if case["layout"] == "channels_last" and images.numel():
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_box_with_nan_is_empty(gpu: torch.device) -> None:
    images = torch.ones(1, 1, 4, 4, device=gpu)
    for side in range(4):
        box = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]], device=gpu)
        box[0, 0, side] = torch.nan
        assert torch.equal(erase_boxes(images, box), images)
