"""Batch transforms: normalisation and seeded augmentation, vectorised over the batch."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional

from fedkern.data.split import Split
from fedkern.errors import UserError, suggest_name
from fedkern.files.image_rows import ImageRows
from fedkern.process.device_copies import send
from fedkern.tasks.segmentation import IGNORE

PADDING = 4
ROTATION = 15.0
SCALES, SHIFT = (0.2, 1.8), 1.0
"""Range of the factor and largest shift, in standard deviations, of `jitter`."""


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], *, channels_last: bool = False) -> Tensor:
    """Normalise uint8 images to float32 ``(images / 255 - mean) / std``.

    Args:
        images: uint8 ``[B, C, H, W]``, any memory format.
        mean, std: one number per channel, of images in [0, 1].
        channels_last: return the result in channels-last memory format (converted while still uint8, which is cheaper);
            otherwise the input's format is kept.

    Returns:
        float32 ``[B, C, H, W]`` on the images' device.

    Raises:
        ValueError: not uint8 ``[B, C, H, W]``, or another number of channels than ``mean`` and ``std``.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"images: expected uint8 [B, C, H, W], got {images.dtype} {list(images.shape)}")
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean, std: expected {channels} numbers each, got {len(mean)} and {len(std)}")
    scale = send(torch.tensor([1 / (255 * s) for s in std]), images.device).view(1, -1, 1, 1)
    shift = send(torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]), images.device).view(1, -1, 1, 1)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return torch.mul(images, scale).add_(shift)


def crop(
    images: Tensor, rng: Generator, *, padding: int = PADDING, flip: bool = False, fill: float | Sequence[float] = 0.0
) -> Tensor:
    """Cut a random window of the original size from padded images, and flip half of them if ``flip``.

    Images ``[B, C, H, W]`` keep their memory format.  ``rng`` draws ``B`` row offsets, ``B`` column offsets and, with
    ``flip``, ``B`` coins.  ``fill`` has one padding value or one per channel.
    """
    batch, channels, height, width = images.shape
    top = torch.from_numpy(rng.integers(0, 2 * padding + 1, size=batch))
    left = torch.from_numpy(rng.integers(0, 2 * padding + 1, size=batch))
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if flip:
        coins = torch.from_numpy(rng.random(batch) < 0.5)
        columns = torch.where(coins[:, None], columns.flip(1), columns)
    padded = images.new_empty((batch, height + 2 * padding, width + 2 * padding, channels))
    padded[:] = send(torch.as_tensor(fill, dtype=images.dtype), images.device)
    padded[:, padding : padding + height, padding : padding + width] = images.permute(0, 2, 3, 1)
    # One gather of whole pixels does crop and flip.
    return _gather(padded, rows[:, :, None], columns[:, None, :]).contiguous(memory_format=_format(images))


def window(images: Tensor, sides: tuple[int, int], rng: Generator | None = None) -> Tensor:
    """Cut a window from every image, uniformly random or, without ``rng``, central.

    Images ``[B, C, H, W]`` keep their memory format, and are returned unchanged at full size.  ``rng`` draws ``B`` row
    offsets, then ``B`` column offsets.  ValueError for a larger window.
    """
    batch, _, height, width = images.shape
    room = height - sides[0], width - sides[1]
    if min(room) < 0:
        raise ValueError(f"sides: expected at most {height} x {width}, got {sides[0]} x {sides[1]}")
    if max(room) == 0:
        return images
    if rng is None:
        top, left = room[0] // 2, room[1] // 2
        cut = images[..., top : top + sides[0], left : left + sides[1]]
        return cut.contiguous(memory_format=_format(images))
    starts = [torch.from_numpy(rng.integers(0, free + 1, size=batch)) for free in room]
    rows, columns = (start[:, None] + torch.arange(side) for start, side in zip(starts, sides, strict=True))
    cut = _gather(images.permute(0, 2, 3, 1), rows[:, :, None], columns[:, None, :])
    return cut.contiguous(memory_format=_format(images))


def cut_central_windows(split: Split, sides: tuple[int, int]) -> Split:
    """Return the split with central windows, unchanged if ``sides`` are the images'."""
    if tuple(split.images.shape[2:]) == tuple(sides):
        return split
    images, masks = split.images, split.masks
    return dataclasses.replace(
        split,
        images=images.cut_window(sides) if isinstance(images, ImageRows) else window(images, sides),
        masks=None if masks is None else window(masks[:, None], sides)[:, 0],
    )


def rotate(
    images: Tensor, rng: Generator, *, degrees: float = ROTATION, fill: float | Sequence[float] = 0.0, nearest: int = 0
) -> Tensor:
    """Rotate images about their centres by angles uniform in [-degrees, degrees], with corners of ``fill``.

    Interpolation is bilinear; the last ``nearest`` channels take the nearest pixel.
    """
    batch, channels, height, width = images.shape
    if batch == 0:
        return images.clone()
    angle = torch.from_numpy(rng.uniform(-degrees, degrees, size=batch) * (math.pi / 180)).float()
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros(batch)
    ratio = height / width  # grid coordinates run from -1 to 1 on both axes, so their units differ where H != W
    turn = torch.stack([torch.stack([cos, -sin * ratio, zero], 1), torch.stack([sin / ratio, cos, zero], 1)], 1)
    grid = functional.affine_grid(send(turn, images.device), list(images.shape), align_corners=False)
    base = send(torch.as_tensor(fill, dtype=torch.float32), images.device).view(-1, 1, 1)
    values = images.float() if not images.is_floating_point() else images
    values = values - base.to(values.dtype)
    smooth = channels - nearest
    parts = [
        functional.grid_sample(part, grid.to(values.dtype), mode=mode, padding_mode="zeros", align_corners=False)
        for part, mode in ((values[:, :smooth], "bilinear"), (values[:, smooth:], "nearest"))
        if part.shape[1]
    ]
    turned = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).add_(base.to(values.dtype))
    if not images.is_floating_point():
        turned = turned.round_().clamp_(0, 255).to(images.dtype)
    return turned.contiguous(memory_format=_format(images))


def jitter(images: Tensor, rng: Generator) -> Tensor:
    """Scale and shift every channel of every normalised image: ``v -> a v + b``.

    Surface colours then say little, while edges stay; a grey image changes contrast and brightness.  The ranges are
    fedkern's own: as wide as needed for the ground's colour in one image to say little of the class.

    ``rng`` draws ``a`` from `SCALES`, then ``b`` from ``[-SHIFT, SHIFT]``, uniformly, ``[B, C]`` each.  ValueError for
    uint8 images.
    """
    if not images.is_floating_point():
        raise ValueError(f"images: expected normalised floats [B, C, H, W] for jitter, got {images.dtype}")
    scale, shift = (
        send(torch.from_numpy(rng.uniform(low, high, images.shape[:2])).float(), images.device)[..., None, None]
        for low, high in (SCALES, (-SHIFT, SHIFT))
    )
    return (images * scale.to(images.dtype)).add_(shift.to(images.dtype))


@dataclass(frozen=True)
class Augmentation:
    """Transforms of a training image, in this order: crop, flip, rotation, jitter.

    ``padding`` is the border before a random crop, or None for no crop and no flip; ``degrees`` the largest rotation.
    """

    padding: int | None = None
    flip: bool = False
    degrees: float = 0.0
    jitter: bool = False

    def __call__(self, images: Tensor, rng: Generator, fill: float | Sequence[float], nearest: int = 0) -> Tensor:
        if self.padding is not None:
            images = crop(images, rng, padding=self.padding, flip=self.flip, fill=fill)
        if self.degrees:
            images = rotate(images, rng, degrees=self.degrees, fill=fill, nearest=nearest)
        if not self.jitter:
            return images
        colours = images.shape[1] - nearest
        jittered = jitter(images[:, :colours], rng)
        return jittered if not nearest else torch.cat([jittered, images[:, colours:]], 1)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(),
    "crop": Augmentation(padding=PADDING),
    "crop-flip": Augmentation(padding=PADDING, flip=True),
    "nico": Augmentation(padding=PADDING, flip=True, degrees=ROTATION),
    "flip-rotate": Augmentation(padding=0, flip=True, degrees=20.0),
    "jitter": Augmentation(jitter=True),
    "window": Augmentation(),
}


def augment(images: Tensor, kind: str, rng: Generator) -> Tensor:
    """Augment a batch.

    - ``none``: no change.
    - ``crop``: random crop with padding 4.
    - ``crop-flip``: ``crop``, and a horizontal flip of half of the images.
    - ``nico``: ``crop-flip``, and a rotation of up to 15 degrees (the NICO setting of FedGID's authors).
    - ``flip-rotate``: horizontal flip, and a rotation of up to 20 degrees (FuseFL's setting for Tiny-ImageNet).
    - ``jitter``: a random scale and shift of every channel, against colours that give the class away (`jitter`).
    - ``window``: no change beyond the random window of data read with the option ``crop``.  For such data every kind
      but ``none`` draws the place of the window (`window`).

    Args:
        images: ``[B, C, H, W]``, normalised floats or, except for ``jitter``, uint8.  Pixels outside the original image
            become 0, the mean colour of normalised images.
        kind: a key of `AUGMENTATIONS`.
        rng: the batch's own generator, the only source of randomness.

    Returns:
        Same shape, dtype and memory format; ``none`` returns ``images`` itself.

    Raises:
        UserError: an unknown kind; the message suggests the nearest known one.
        ValueError: uint8 images for ``jitter``.
    """
    return _find(kind)(images, rng, 0.0)


def augment_pairs(images: Tensor, labels: Tensor, kind: str, rng: Generator) -> tuple[Tensor, Tensor]:
    """Augment images and their pixel classes together: same draws, same geometry.

    Labels take the nearest pixel's class; pixels outside the original image become `IGNORE`.

    Args:
        images: normalised floats ``[B, C, H, W]``; transformed as by `augment`.
        labels: int64 ``[B, H, W]``.
        kind, rng: as for `augment`.

    Returns:
        Images and labels of the same shapes, dtypes and memory formats.

    Raises:
        UserError: an unknown kind.
        ValueError: shapes or dtypes that do not fit.
    """
    augmentation = _find(kind)
    if labels.dtype != torch.int64 or labels.shape != (len(images), *images.shape[2:]) or images.dtype == torch.uint8:
        raise ValueError(
            f"labels: expected int64 {[len(images), *images.shape[2:]]} beside floating images, got {labels.dtype} "
            f"{list(labels.shape)} beside {images.dtype}"
        )
    if augmentation == AUGMENTATIONS["none"]:
        return images, labels
    # Class numbers become a last channel; they are small enough to be exact in any floating type.
    layout = _format(images)
    stacked = torch.cat([images, labels[:, None].to(images.dtype)], 1)
    if layout == torch.channels_last:
        stacked = stacked.contiguous(memory_format=layout)
    stacked = augmentation(stacked, rng, [*[0.0] * images.shape[1], float(IGNORE)], nearest=1)
    return stacked[:, :-1].contiguous(memory_format=layout), stacked[:, -1].round().long()


def _find(kind: str) -> Augmentation:
    if kind not in AUGMENTATIONS:
        hint = suggest_name(kind, AUGMENTATIONS)
        raise UserError(f'unknown augmentation "{kind}": expected one of {", ".join(AUGMENTATIONS)}.{hint}')
    return AUGMENTATIONS[kind]


def _gather(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Gather pixels ``[B, H, W, C]`` at rows and columns ``[B, h, w]``, as channels-last ``[B, C, h, w]``."""
    height, width = pixels.shape[1:3]
    parts = torch.arange(len(pixels))[:, None, None], rows, columns
    image, rows, columns = (send(part, pixels.device) for part in parts)
    index = (image * height + rows) * width + columns
    # index_select copies whole pixels, in a fifth of the time that indexing by three tensors takes.
    values = pixels.flatten(0, 2).index_select(0, index.flatten())
    return values.reshape(*index.shape, values.shape[1]).permute(0, 3, 1, 2)


def _format(images: Tensor) -> torch.memory_format:
    is_channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format
