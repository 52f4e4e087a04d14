"""Preprocessing for pre-trained image networks according to preprocessor_config.json, without torchvision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedkern.errors import UserError
from fedkern.files.filesystem import read_json

NEAREST, BILINEAR, BICUBIC = 0, 2, 3  # Pillow's numbers, as the files have them
MODES = {NEAREST: "nearest", BILINEAR: "bilinear", BICUBIC: "bicubic"}
WHOLE = 384  # from this side on, ConvNeXt resizes the whole image and does not crop


class Preprocessing:
    """Map from the data's normalised images to a network's input.

    The resize matches Pillow's: antialiased, along one direction and then the other, rounded to whole bytes after each.
    ``settings`` are those of preprocessor_config.json, ``mean`` and ``std`` those of the data's images, ``side`` is the
    image side without a size there.
    """

    def __init__(self, settings: Mapping[str, Any], mean: Sequence[float], std: Sequence[float], side: int) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
        if kind.startswith(("PoolFormer", "Levit")) or (settings.get("do_pad") and settings.get("pad_size")):
            raise UserError(f"what {kind or 'its do_pad'} makes of images is not done here: use another network.")
        resizes, crops = settings.get("do_resize", True), settings.get("do_center_crop", False)
        self.size = _size(settings.get("size", side)) if resizes else None
        self.crop = _size(settings.get("crop_size", side), square=True) if crops else None
        share = settings.get("crop_pct") or (224 / 256 if kind.startswith("ConvNext") else None)
        if share and self.size and len(self.size) == 1:
            square = (self.size[0], self.size[0])
            large = self.size[0] >= WHOLE
            self.size, self.crop = (square, self.crop) if large else ((int(self.size[0] / share),), self.crop or square)
        resample = BILINEAR if settings.get("resample") is None else int(settings["resample"])
        if resample not in MODES:
            raise UserError(f"resample {resample} is not done here: give one of {', '.join(map(str, MODES))}.")
        self.mode = MODES[resample]
        factor = float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0
        if not factor > 0:
            raise ValueError(f"rescale_factor is {factor}")
        self.unit = 1 / factor  # byte values per unit of the network's scale
        self.offset = 1.0 if settings.get("rescale_offset") else 0.0
        self.flips = bool(settings.get("do_flip_channel_order", False))
        scales = settings.get("do_normalize", not kind.startswith("MobileViT"))
        own_std = tuple(settings.get("image_std", (0.5, 0.5, 0.5)))
        self.own_mean = tuple(settings.get("image_mean", (0.5, 0.5, 0.5))) if scales else (0.0, 0.0, 0.0)
        self.own_std = own_std if scales else (1.0, 1.0, 1.0)
        if settings.get("include_top"):  # EfficientNet divides by std once more
            self.own_std = tuple(x * y for x, y in zip(self.own_std, own_std, strict=True))

    @classmethod
    def read(cls, folder: Path, mean: Sequence[float], std: Sequence[float], side: int) -> Preprocessing:
        """Read ``folder/preprocessor_config.json``, or take sides of ``side`` pixels and values in [-1, 1]."""
        path = folder / "preprocessor_config.json"
        try:
            return cls(read_json(path) if path.is_file() else {}, mean, std, side)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error}.") from None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map images fp32 ``[B, 1 or 3, H, W]`` to fp32 ``[B, 3, h, w]``."""
        # Whole bytes as floats: sums that end in one half are then exact, and rounded up as Pillow does.
        pixels = _round_bytes(to_pixels(images, self.mean, self.std) * 255)
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        height, width = pixels.shape[-2:]
        if self.size is not None:
            scaled = tuple(int(self.size[0] * side / min(height, width)) for side in (height, width))
            tall, wide = self.size if len(self.size) == 2 else scaled
            for size in ((height, wide), (tall, wide)):  # Pillow rounds after either direction
                if size != tuple(pixels.shape[-2:]):
                    pixels = _round_bytes(_resize(pixels, size, self.mode))
        if self.crop is not None:
            height, width = pixels.shape[-2:]
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            if top < 0 or left < 0:
                raise UserError(
                    f"the image encoder crops {self.crop[0]} by {self.crop[1]} pixels out of images that are {height} "
                    f"by {width}."
                )
            pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]]
        if self.flips:
            pixels = pixels.flip(1)
        mean, std = (torch.tensor(x, device=pixels.device).view(1, 3, 1, 1) for x in (self.own_mean, self.own_std))
        pixels = pixels / self.unit
        return ((pixels - self.offset if self.offset else pixels) - mean) / std


def _round_bytes(values: Tensor) -> Tensor:
    return values.add(0.5).floor_().clamp_(0, 255)


def _resize(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if mode == "nearest":
        rows, columns = (_nearest(*pair).to(pixels.device) for pair in zip(pixels.shape[-2:], size, strict=True))
        return pixels[..., rows[:, None], columns]
    return functional.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False)


def _nearest(before: int, after: int) -> Tensor:
    """Return the indices ``[after]`` of Pillow's nearest pixels, with its accumulated rounding errors."""
    steps = torch.full((after,), before / after, dtype=torch.float64)
    steps[0] /= 2
    return steps.cumsum(0).long()


def _size(size: Any, *, square: bool = False) -> tuple[int, ...]:
    """Return a size of preprocessor_config.json as (shortest side,) or (height, width)."""
    if isinstance(size, Mapping):
        sides = {name: value for name, value in size.items() if value is not None}
        if set(sides) == {"height", "width"}:
            return int(sides["height"]), int(sides["width"])
        if set(sides) != {"shortest_edge"}:
            raise UserError(
                f"sizes by {' and '.join(sides) or 'nothing'} are not done here: give height and width, or the "
                "shortest_edge alone."
            )
        size = sides["shortest_edge"]
    return (int(size), int(size)) if square else (int(size),)


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return normalised images as fp32 in [0, 1] (up to rounding)."""
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)
    return images.float() * scale + torch.tensor(mean, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)
