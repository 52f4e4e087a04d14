"""blend: mix each sample's feature map with another sample's background."""

from __future__ import annotations

from torch import Tensor


def blend_reference(
    foreground: Tensor, background: Tensor, alpha: float | Tensor = 0.5, index: Tensor | None = None
) -> Tensor:
    """The specification of :func:`blend`."""
    if isinstance(alpha, Tensor):
        alpha = alpha.to(foreground.dtype).reshape(-1, *[1] * (foreground.dim() - 1))
    other = background if index is None else background[index]
    return alpha * foreground + (1 - alpha) * other


def blend(
    foreground: Tensor, background: Tensor, alpha: float | Tensor = 0.5, *, index: Tensor | None = None
) -> Tensor:
    return blend_reference(foreground, background, alpha, index)


def erase_boxes(images: Tensor, boxes: list[Tensor] | Tensor, fill: float | Tensor = 0.0) -> Tensor:
    import torch

    height, width = images.shape[-2:]
    y = torch.arange(height, dtype=torch.float64) + 0.5
    x = torch.arange(width, dtype=torch.float64) + 0.5
    out = images.clone()
    for b, rows in enumerate(boxes):
        rows = rows.reshape(-1, 4).double()
        inside = (
            ((rows[:, 1, None] <= y) & (y < rows[:, 3, None]))[:, :, None]
            & ((rows[:, 0, None] <= x) & (x < rows[:, 2, None]))[:, None, :]
        ).any(0)
        value = fill.reshape(-1, 1) if isinstance(fill, Tensor) else fill
        out[b][:, inside] = value if isinstance(fill, Tensor) else out.new_tensor(value)
    return out
