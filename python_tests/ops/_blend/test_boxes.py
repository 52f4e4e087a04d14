"""Tests of erase_boxes and keep_boxes: every available backend and ISA level against a loop over pixels."""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from fedkern.ops import erase_boxes, keep_boxes
from python_tests.ops.operator_cases import BACKENDS, KERNELS, pairwise, using

pytestmark = pytest.mark.usefixtures("one_thread")


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "cut_out": lambda t: torch.stack([t, t], 1)[:, 1],
    "every_second_column": lambda t: torch.stack([t, t], -1)[..., 0],
    "batch_inside": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def make_boxes(batch: int, height: int, width: int, seed: int) -> list[Tensor]:
    """Return random boxes on quarters of pixels, so that edges fall on centres: some empty, outside or inverted."""
    draw = random.Random(seed)
    boxes = []
    for _ in range(batch):
        rows = []
        for _ in range(draw.randint(0, 4)):
            x, y = draw.randint(-8, 4 * width + 8) / 4, draw.randint(-8, 4 * height + 8) / 4
            rows.append([x, y, x + draw.randint(-4, 4 * width) / 4, y + draw.randint(-4, 4 * height) / 4])
        boxes.append(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))
    return boxes


def by_pixels(images: Tensor, boxes: list[Tensor], fill: list[float], keep: bool) -> Tensor:
    out = images.clone()
    for b, i, j in itertools.product(range(images.shape[0]), range(images.shape[2]), range(images.shape[3])):
        inside = any(x1 <= j + 0.5 < x2 and y1 <= i + 0.5 < y2 for x1, y1, x2, y2 in boxes[b].tolist())
        if inside != keep:
            out[b, :, i, j] = torch.tensor(fill).to(images.dtype)
    return out


def check(name, shape, dtype, layout, per_channel, keep, seed):
    generator = torch.Generator().manual_seed(seed)
    images = LAYOUTS[layout]((torch.rand(shape, generator=generator) * 50).to(dtype))
    boxes = make_boxes(shape[0], shape[2], shape[3], seed)
    fill = [float(k % 2) for k in range(shape[1])] if per_channel else [1.0] * shape[1]
    function = keep_boxes if keep else erase_boxes
    with using(name):
        given = function(images, boxes, fill if per_channel else 1)
        padded = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True) if boxes else torch.zeros(0, 2, 4)
        again = function(images, padded, torch.tensor(fill) if per_channel else 1.0)
    assert given.dtype == dtype
    assert torch.equal(given, by_pixels(images, boxes, fill, keep))
    assert torch.equal(given, again)
    if layout == "channels_last":
        assert given.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", BACKENDS)
def test_pairs(name: str) -> None:
    axes = {
        "shape": [(0, 3, 4, 4), (1, 1, 1, 1), (2, 3, 7, 5), (3, 4, 1, 9), (3, 2, 8, 1), (2, 1, 6, 6), (2, 3, 0, 4)],
        "dtype": DTYPES,
        "layout": list(LAYOUTS),
        "per_channel": [False, True],
        "keep": [False, True],
    }
    for seed, case in enumerate(pairwise(axes, seed=11)):
        check(name, **case, seed=seed)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_rule_of_centres(name: str) -> None:
    image = torch.zeros(1, 1, 1, 8)

    def columns(x1: float, x2: float) -> list[int]:
        with using(name):
            out = erase_boxes(image, torch.tensor([[[x1, 0.0, x2, 1.0]]]), 1)
        return out[0, 0, 0].nonzero()[:, 0].tolist()

    assert columns(0, 8) == list(range(8))
    assert columns(0.5, 1.5) == [0]  # the left centre belongs to the box, the right one does not
    assert columns(0.51, 1.51) == [1]
    assert columns(-5, 1) == [0]
    assert columns(7, 99) == [7]
    assert columns(3, 3) == columns(4, 3) == columns(-4, -1) == columns(8, 9) == columns(3.6, 4.4) == []
    assert columns(-math.inf, math.inf) == list(range(8))
    assert columns(-1e300, 2) == [0, 1]


@pytest.mark.parametrize(
    "dims", [d for d in itertools.product((0, 2, None), (0, None), (0, None)) if any(x is not None for x in d)]
)
def test_vmap_and_grad(dims: tuple[int | None, ...]) -> None:
    images = torch.randn(4, 2, 3, 5, 6)
    boxes = torch.rand(4, 2, 3, 4) * 6
    fill = torch.rand(4, 3)
    full = (images, boxes, fill)
    given = [t[0] if d is None else t.movedim(0, d) for t, d in zip(full, dims, strict=True)]
    rows_of_batch = [[t[0] if d is None else t[k] for t, d in zip(full, dims, strict=True)] for k in range(4)]
    out = torch.func.vmap(erase_boxes, dims)(*given)
    assert torch.equal(out, torch.stack([erase_boxes(*row) for row in rows_of_batch]))

    def loss(x: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return keep_boxes(x, b, f).pow(2).sum()

    gradient = torch.func.vmap(torch.func.grad(loss), dims)(*given)
    assert torch.equal(gradient, torch.stack([2 * keep_boxes(x, b, 0.0) for x, b, _ in rows_of_batch]))


@pytest.mark.parametrize("isa", KERNELS)
def test_every_offset_over_sentinels(isa: str) -> None:
    from fedkern.ops._core.backend import cpu_core

    core = cpu_core()
    height, width = 5, 7
    corners = torch.tensor([[[1.0, 1, 4, 3]]], dtype=torch.float64)
    fill = torch.tensor([[9.0]])
    source = torch.randn(height * width + 41)
    with using(isa):
        for i in range(41):
            images = source[i : i + height * width].view(1, 1, height, width)
            masks = torch.full((height * width + 82,), 77, dtype=torch.uint8)
            buffer = torch.full((height * width + 82,), 777.0)
            mask, out = (t[41 - i :][: height * width].view(1, 1, height, width) for t in (masks, buffer))
            core.box_mask(corners, mask[0], 1)
            assert core.fill_boxes(images, corners, fill, False, out, 1)
            wanted = by_pixels(images, [corners[0]], [9.0], keep=False)
            assert torch.equal(out, wanted)
            assert torch.equal(mask.bool(), wanted == 9)
            for sentinel, value in ((masks, 77), (buffer, 777)):
                assert bool((sentinel[: 41 - i] == value).all())
                assert bool((sentinel[41 - i + height * width :] == value).all())


def test_fill_keeps_the_sign_of_zero() -> None:
    images, boxes = torch.ones(1, 2, 3, 3), torch.tensor([[[0.0, 0.0, 2.0, 2.0]]])
    for fill in (0.0, -0.0, 0.0):
        inside = erase_boxes(images, boxes, fill)[:, :, :2, :2]
        assert not inside.any()
        assert bool((inside.signbit() == (math.copysign(1, fill) < 0)).all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16])
def test_boxes_of_several_dtypes_keep_their_coordinates(dtype: torch.dtype) -> None:
    """The order of the dtypes changes no fraction, and no place that the narrower dtype cannot hold."""
    images = torch.rand(3, 1, 4, 4100)
    narrow, wide = torch.tensor([[1, 0, 3, 2]]), torch.tensor([[300.5, 0.5, 301.75, 3.0], [4097.0, 1.0, 4099.0, 2.0]])
    rows = [narrow.to(dtype), wide, narrow.new_full((1, 4), 2**24 + 1)]
    exact = torch.stack([torch.cat([row.double(), torch.zeros(2 - len(row), 4)]) for row in rows])
    for order in itertools.permutations(range(3)):
        images_, given, wanted = images[list(order)], [rows[i] for i in order], exact[list(order)]
        for function in (erase_boxes, keep_boxes):
            assert torch.equal(function(images_, given, 2.0), function(images_, wanted, 2.0))


X, B = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4)
WRONG = [
    ((X[0], B), ValueError, r"images must have shape \[B, C, H, W\], but has \[3, 4, 4\]"),
    ((X, B[:1]), ValueError, r"boxes must have shape \[2, n, 4\], but has \[1, 1, 4\]"),
    ((X, B[..., :3]), ValueError, r"boxes must have shape \[2, n, 4\], but has \[2, 1, 3\]"),
    ((X, [B[0]]), ValueError, "boxes must have one entry for each of the 2 images, not 1"),
    ((X, [B[0], torch.zeros(4)]), ValueError, r"boxes\[1\] must have shape \[n, 4\], but has \[4\]"),
    ((X, [B[0], [0, 0, 1, 1]]), TypeError, r"boxes\[1\] must be a tensor, but got list"),
    ((X, B.bool()), TypeError, "boxes must have a real dtype, but has torch.bool"),
    ((X, [B[0], B[1].bool()]), TypeError, r"boxes\[1\] must have a real dtype, but has torch.bool"),
    ((X, [B[0], B[1].to(torch.complex64)]), TypeError, r"boxes\[1\] must have a real dtype, but has torch.complex64"),
    ((X, torch.full((2, 1, 4), math.nan)), ValueError, "boxes must not hold NaN; box 0 of image 0 does"),
    ((X, B, [1.0, 2.0]), ValueError, "fill must be a number or have 3 values, not 2"),
    ((X, B, torch.zeros(2)), ValueError, r"fill must be a number or have shape \[3\], but has \[2\]"),
    ((X, B, torch.zeros(3, requires_grad=True)), ValueError, "fill is a constant and takes no gradient"),
    ((X.byte(), B, 256), ValueError, "fill must be a value of the images' dtype torch.uint8, not 256"),
    ((X.byte(), B, 0.5), ValueError, "fill must be a value of the images' dtype torch.uint8, not 0.5"),
    ((X.byte(), B, torch.tensor(300.0)), ValueError, "fill must be a value of the images' dtype torch.uint8, not 300"),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_wrong_arguments(name: str, arguments: tuple, error: type, message: str) -> None:
    for function in (erase_boxes, keep_boxes):
        with using(name), pytest.raises(error, match=message):
            function(*arguments)
