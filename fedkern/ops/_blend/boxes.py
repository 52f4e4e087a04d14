"""boxes: images with the pixels inside a detector's boxes erased (the background remains), or with only these kept."""

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fedkern.ops._blend.kernels import BoxesKernels, output_strides
from fedkern.ops._core import backend, library
from fedkern.ops._core.backend import eager, select, select_ordinary
from fedkern.ops._core.checks import check_dense, check_device, check_memory, check_tensor, show_value, to_float
from fedkern.ops._core.library import Context, EagerFunction
from fedkern.ops._core.memory import place_values


def boxes_mask_reference(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the mask ``[B, height, width]`` of pixels whose centre lies in any of ``boxes [B, n, 4]``."""
    x1, y1, x2, y2 = (side.unsqueeze(-1) for side in boxes.to(torch.float64).unbind(-1))
    x = torch.arange(width, dtype=torch.float64, device=boxes.device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=boxes.device) + 0.5
    columns, rows = (x1 <= x) & (x < x2), (y1 <= y) & (y < y2)
    mask = torch.zeros(boxes.shape[0], height, width, dtype=torch.bool, device=boxes.device)
    for k in range(boxes.shape[1]):  # one box at a time: memory O(B * H * W), not O(B * n * H * W)
        mask = mask | (rows[:, k, :, None] & columns[:, k, None, :])
    return mask


def fill_boxes_reference(images: Tensor, boxes: Tensor, fill: Tensor, keep: bool) -> Tensor:
    """Specify :func:`erase_boxes` and (``keep``) :func:`keep_boxes`, with ``fill [1 or B, C]``."""
    mask = boxes_mask_reference(boxes, images.shape[2], images.shape[3])[:, None]
    return torch.where(mask != keep, fill[:, :, None, None].to(images.dtype), images)


def erase_boxes(
    images: Tensor, boxes: Tensor | Sequence[Tensor], fill: float | Sequence[float] | Tensor = 0.0
) -> Tensor:
    """Replace every pixel inside a box by ``fill``, which leaves the background (FedGID, arXiv 2504.00850).

    A pixel in row i and column j belongs to a box when its centre does: x1 <= j + 1/2 < x2 and y1 <= i + 1/2 < y2.
    Boxes are clipped to the image. A box with x2 <= x1 or y2 <= y1 is empty.

    Args:
        images: ``[B, C, H, W]`` of any real dtype (uint8 too) and layout.
        boxes: xyxy pixel coordinates, a list of B tensors ``[n_i, 4]`` or one padded ``[B, n, 4]`` (pad with empty
            boxes, for example zeros), of any real dtype.
        fill: a number, or one number per channel (a sequence or tensor ``[C]``).

    Returns:
        ``[B, C, H, W]``, a new tensor of the images' dtype and memory format. Differentiable in the images: a replaced
        pixel gets no gradient. Works under torch.compile (one graph node), torch.func.grad, vmap and for second
        derivatives.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device or shape is wrong; on the CPU also if a coordinate is
            NaN. On CUDA a box with a NaN is empty.
    """
    return _boxes(images, boxes, fill, False)


def keep_boxes(
    images: Tensor, boxes: Tensor | Sequence[Tensor], fill: float | Sequence[float] | Tensor = 0.0
) -> Tensor:
    """Replace every pixel outside all boxes by ``fill``: the complement of :func:`erase_boxes`, with its arguments."""
    return _boxes(images, boxes, fill, True)


def _boxes(
    images: Tensor, boxes: Tensor | Sequence[Tensor], fill: float | Sequence[float] | Tensor, keep: bool
) -> Tensor:
    kernel: BoxesKernels | None = select_ordinary("boxes", images, boxes, fill)
    if kernel is not None:
        padded, fills = cast(Tensor, boxes), _constant(cast(float, fill), images)
    else:
        check_tensor(images, "images")
        _check_real(images, "images")
        if images.dim() != 4:
            raise ValueError(f"images must have shape [B, C, H, W], but has {list(images.shape)}")
        padded, fills = _pad_boxes(boxes, images), _fills(fill, images)
        if not eager(images, padded, fills):
            return _fill_boxes(images, padded, fills, keep)
    if torch.is_grad_enabled() and images.requires_grad:
        return _FillBoxes.call(kernel, images, padded, fills, keep)
    return _run(kernel, images, padded, fills, keep)


@functools.lru_cache(maxsize=64)
def _make_fill(fill: float, sign: float, dtype: torch.dtype, channels: int) -> Tensor:
    return torch.full((1, channels), fill, dtype=dtype, device="cpu")


def _constant(fill: float, images: Tensor) -> Tensor:
    """Return the fill as ``[1, C]``, cached on the CPU by value and sign: 0.0 and -0.0 are equal."""
    channels = images.shape[1]
    if images.is_cpu:
        return _make_fill(fill, math.copysign(1.0, fill), images.dtype, channels)
    # One made while a CUDA graph is captured, or on another stream, may hold nothing yet when it is used again.
    return torch.full((1, channels), fill, dtype=images.dtype, device=images.device)


def _check_real(tensor: Tensor, name: str, *, boolean: bool = True) -> None:
    if tensor.is_complex() or (tensor.dtype is torch.bool and not boolean):
        raise TypeError(f"{name} must have a real dtype, but has {tensor.dtype}")


def _pad_boxes(boxes: Tensor | Sequence[Tensor], images: Tensor) -> Tensor:
    batch = images.shape[0]
    if isinstance(boxes, Tensor):
        check_dense(boxes, "boxes")
        if boxes.dim() != 3 or boxes.shape[0] != batch or boxes.shape[2] != 4:
            raise ValueError(f"boxes must have shape [{batch}, n, 4], but has {list(boxes.shape)}")
        padded = boxes
    elif isinstance(boxes, str) or not isinstance(boxes, Sequence):
        raise TypeError(f"boxes must be a tensor or a list of tensors, not {type(boxes).__name__}")
    else:
        rows = list(boxes)
        if len(rows) != batch:
            raise ValueError(f"boxes must have one entry for each of the {batch} images, not {len(rows)}")
        for position, row in enumerate(rows):
            name = f"boxes[{position}]"
            check_tensor(row, name)
            if row.dim() != 2 or row.shape[1] != 4:
                raise ValueError(f"{name} must have shape [n, 4], but has {list(row.shape)}")
            _check_real(row, name, boolean=False)
            check_device(row, name, images, "images")
        if any(row.dtype != rows[0].dtype for row in rows):  # pad_sequence would cast all to the first one's
            rows = [row.double() for row in rows]
        empty = torch.zeros(0, 0, 4, device=images.device)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else empty
    _check_real(padded, "boxes", boolean=False)
    check_device(padded, "boxes", images, "images")
    return padded


def _fills(fill: float | Sequence[float] | Tensor, images: Tensor) -> Tensor:
    channels = images.shape[1]
    if isinstance(fill, Tensor):
        check_dense(fill, "fill")
        _check_real(fill, "fill")
        if fill.requires_grad:
            raise ValueError("fill is a constant and takes no gradient; pass fill.detach()")
        if fill.shape not in ((), (channels,)):
            raise ValueError(f"fill must be a number or have shape [{channels}], but has {list(fill.shape)}")
        if fill.dim():
            check_device(fill, "fill", images, "images")
        if fill.is_cpu and eager(fill):  # on a GPU reading the values would wait for the device
            _check_values(fill.flatten().tolist(), images.dtype)
            if not fill.dim():
                return place_values([fill.item()], images.device, images.dtype).expand(channels)[None]
        return fill.to(images).expand(channels)[None]
    several = isinstance(fill, Sequence) and not isinstance(fill, (str, bytes, bytearray))
    values: list[Any] = list(fill) if several else [fill]  # type: ignore[arg-type]
    for value in values:
        to_float(value, "fill", "a number, one per channel, or a tensor")
    if len(values) not in (1, channels):
        raise ValueError(f"fill must be a number or have {channels} values, not {len(values)}")
    _check_values(values, images.dtype)
    if images.is_floating_point() and torch.compiler.is_compiling():
        return library.numbers_tensor(values, images.device).to(images.dtype).expand(channels)[None]
    return place_values(values, images.device, images.dtype).expand(channels)[None]


def _check_values(values: Sequence[float], dtype: torch.dtype) -> None:
    if dtype.is_floating_point:
        return
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    for value in values:
        if not low <= value <= high or value != math.floor(value):
            raise ValueError(f"fill must be a value of the images' dtype {dtype}, not {show_value(value)}")


class _FillBoxes(EagerFunction):
    @staticmethod
    def forward(
        ctx: Context, kernel: BoxesKernels | None, images: Tensor, boxes: Tensor, fill: Tensor, keep: bool
    ) -> Tensor:
        ctx.save_for_backward(boxes)
        ctx.settings = keep
        return _run(kernel, images, boxes, fill, keep)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_backward(ctx, grad)


def _run(kernel: BoxesKernels | None, images: Tensor, boxes: Tensor, fill: Tensor, keep: bool) -> Tensor:
    if kernel is None:
        return _implementation(images, boxes, fill, keep)
    out = torch.empty_like(images)
    kernel.fill(images, boxes, fill, keep, out)
    return out


def _implementation(images: Tensor, boxes: Tensor, fill: Tensor, keep: bool) -> Tensor:
    check_memory(images, "images")
    check_memory(boxes, "boxes")
    if boxes.is_cpu and boxes.is_floating_point():
        for *_, image, box, _ in boxes.isnan().nonzero().tolist():
            raise ValueError(f"boxes must not hold NaN; box {box} of image {image} does")
    out = _fake(images, boxes, fill, keep)
    kernel: BoxesKernels | None = select("boxes", images)
    if kernel is None:
        return out.copy_(fill_boxes_reference(images, boxes, fill, keep))
    kernel.fill(images, boxes.resolve_neg(), fill.to(images.dtype).resolve_neg(), keep, out)
    return out


def _fake(images: Tensor, boxes: Tensor, fill: Tensor, keep: bool) -> Tensor:
    return images.new_empty_strided(images.shape, output_strides(images.shape, images.stride()))


def _setup_context(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    _, boxes, _, keep = inputs
    ctx.save_for_backward(boxes)
    ctx.settings = keep


def _backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The gradient passes where the image passed: the same operator on the gradient, with fill 0.
    (boxes,) = ctx.saved_tensors
    return (keep_boxes if ctx.settings else erase_boxes)(grad, boxes), None, None, None


def _vmap(
    info: library.Mapped, in_dims: tuple[int | None, ...], images: Tensor, boxes: Tensor, fill: Tensor, keep: bool
) -> tuple[Tensor, int]:
    count = info.batch_size
    batch = images.movedim(in_dims[0], 0).shape[1] if in_dims[0] is not None else images.shape[0]
    if in_dims[2] is not None:
        # One fill per mapped call becomes one fill per image.
        fill = fill.movedim(in_dims[2], 0)
        fill = fill.expand(count, batch, fill.shape[2]).flatten(0, 1)
    elif len(fill) > 1:
        fill = library.fold_mapped(fill, None, count)
    folded, padded = (library.fold_mapped(x, d, count) for x, d in ((images, in_dims[0]), (boxes, in_dims[1])))
    return _fill_boxes(folded, padded, fill, keep).unflatten(0, (count, batch)), 0


_fill_boxes = library.register(
    "fill_boxes", "(Tensor images, Tensor boxes, Tensor fill, bool keep) -> Tensor", _implementation, fake=_fake,
    setup_context=_setup_context, backward=_backward, vmap=_vmap, reference=fill_boxes_reference,
)  # fmt: skip


_DTYPES = backend.FLOATS | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool}
backend.add_kernels("boxes", cpu=BoxesKernels, cuda=BoxesKernels, dtypes=_DTYPES, fits="boxes_fit")
