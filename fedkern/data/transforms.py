"""Batch transforms: normalisation and seeded augmentation, vectorised over the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedkern.errors import UserError, nearest

PADDING = 4
ROTATION = 15.0


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], *, channels_last: bool = False) -> Tensor:
    """Turns uint8 images into float32 ``(images / 255 - mean) / std``.

    Args:
        images: uint8 ``[B, C, H, W]``, any memory format.
        mean, std: one number per channel, of images in [0, 1].
        channels_last: give the result in channels-last memory format (rearranged while still bytes); otherwise the
            input's format is kept.

    Raises:
        ValueError: not uint8 ``[B, C, H, W]``, or another number of channels than ``mean`` and ``std``.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"images: expected uint8 [B, C, H, W], got {images.dtype} {list(images.shape)}")
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean, std: expected {channels} numbers each, got {len(mean)} and {len(std)}")
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(1, -1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(1, -1, 1, 1)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return torch.mul(images, scale).add_(shift)


def crop(
    images: Tensor,
    rng: np.random.Generator,
    *,
    padding: int = PADDING,
    flip: bool = False,
    fill: float | Sequence[float] = 0.0,
) -> Tensor:
    """Pads every side by ``padding`` and cuts a random window of the original size; then flips half of the images.

    Args:
        images: uint8 or floating ``[B, C, H, W]``; the memory format is kept.
        rng: draws ``B`` row offsets, ``B`` column offsets and, with ``flip``, ``B`` coins.
        fill: value of the padding, one for all channels or one each.  0 is right after normalisation (the mean colour).
    """
    batch, channels, height, width = images.shape
    top = torch.from_numpy(rng.integers(0, 2 * padding + 1, size=batch))
    left = torch.from_numpy(rng.integers(0, 2 * padding + 1, size=batch))
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if flip:
        coins = torch.from_numpy(rng.random(batch) < 0.5)
        columns = torch.where(coins[:, None], columns.flip(1), columns)
    keeps_channels_last = _is_channels_last(images)
    padded = images.new_empty((batch, height + 2 * padding, width + 2 * padding, channels))
    padded[:] = torch.as_tensor(fill, dtype=images.dtype, device=images.device)
    padded[:, padding : padding + height, padding : padding + width] = images.permute(0, 2, 3, 1)
    # One gather of whole pixels does crop and flip; its result is laid out as [B, H, W, C].
    index = torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]
    cut = padded[tuple(part.to(images.device) for part in index)].permute(0, 3, 1, 2)
    return cut if keeps_channels_last else cut.contiguous()


def rotate(
    images: Tensor, rng: np.random.Generator, *, degrees: float = ROTATION, fill: float | Sequence[float] = 0.0
) -> Tensor:
    """Turns every image about its centre by an angle uniform in [-degrees, degrees], bilinear; corners get ``fill``."""
    batch, _, height, width = images.shape
    if batch == 0:
        return images.clone()
    angle = torch.from_numpy(rng.uniform(-degrees, degrees, size=batch) * (math.pi / 180)).float()
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros(batch)
    ratio = height / width  # coordinates run from -1 to 1 along both axes, so a turn must undo their different units
    turn = torch.stack([torch.stack([cos, -sin * ratio, zero], 1), torch.stack([sin / ratio, cos, zero], 1)], 1)
    grid = functional.affine_grid(turn.to(images.device), list(images.shape), align_corners=False)
    base = torch.as_tensor(fill, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    values = images.float() if not images.is_floating_point() else images
    turned = functional.grid_sample(
        values - base.to(values.dtype),
        grid.to(values.dtype),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    ).add_(base.to(values.dtype))
    if not images.is_floating_point():
        turned = turned.round_().clamp_(0, 255).to(images.dtype)
    return turned.contiguous(memory_format=torch.channels_last) if _is_channels_last(images) else turned.contiguous()


def _none(images: Tensor, rng: np.random.Generator, fill: float | Sequence[float]) -> Tensor:
    return images


def _crop(images: Tensor, rng: np.random.Generator, fill: float | Sequence[float]) -> Tensor:
    return crop(images, rng, fill=fill)


def _crop_flip(images: Tensor, rng: np.random.Generator, fill: float | Sequence[float]) -> Tensor:
    return crop(images, rng, flip=True, fill=fill)


def _nico(images: Tensor, rng: np.random.Generator, fill: float | Sequence[float]) -> Tensor:
    return rotate(crop(images, rng, flip=True, fill=fill), rng, fill=fill)


def _flip_rotate(images: Tensor, rng: np.random.Generator, fill: float | Sequence[float]) -> Tensor:
    return rotate(crop(images, rng, padding=0, flip=True, fill=fill), rng, degrees=20.0, fill=fill)


AUGMENTATIONS: dict[str, Callable[[Tensor, np.random.Generator, float | Sequence[float]], Tensor]] = {
    "none": _none,
    "crop": _crop,
    "crop-flip": _crop_flip,
    "nico": _nico,
    "flip-rotate": _flip_rotate,
}


def augment(images: Tensor, kind: str, rng: np.random.Generator, *, fill: float | Sequence[float] = 0.0) -> Tensor:
    """Augments a batch.

    ``none``; ``crop``: random crop with padding 4; ``crop-flip``: that and a horizontal flip of half of the images;
    ``nico``: that and a rotation of up to 15 degrees (the NICO setting of FedGID's authors, method notes 1.6);
    ``flip-rotate``: flip and a rotation of up to 20 degrees (FuseFL's setting for Tiny-ImageNet, method notes 4.8).

    Args:
        images: ``[B, C, H, W]``, normalised floats (then the default ``fill`` 0 is the mean colour) or uint8.
        kind: a key of `AUGMENTATIONS`.
        rng: the batch's own generator; nothing else is drawn from.
        fill: value outside the original image, one for all channels or one each.

    Returns:
        Same shape, dtype and memory format; ``none`` returns ``images`` itself.

    Raises:
        UserError: unknown kind, with the nearest known one.
    """
    if kind not in AUGMENTATIONS:
        raise UserError(
            f'unknown augmentation "{kind}": expected one of {", ".join(AUGMENTATIONS)}.{nearest(kind, AUGMENTATIONS)}'
        )
    return AUGMENTATIONS[kind](images, rng, fill)


def _is_channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
