"""CLIP as a zero-shot teacher through transformers (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedkern.errors import UserError
from fedkern.models.allocate import linear_of
from fedkern.models.precision import autocasts, full
from fedkern.models.pretrained import Pretrained, check_complete
from fedkern.models.prompts import DEFAULT, read_prompts
from fedkern.models.staged import Classifier
from fedkern.models.teacher import Identity, Teacher
from fedkern.models.teacher_cache import to_pixels

SIDE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipTeacher(Teacher):
    """A frozen CLIP that classifies by prompts: logits ``s cos(v, u_c)``.

    ``v`` is the image feature.  ``u_c`` is the mean of the normalised text features of the class's prompts, normalised
    again (prompt ensembling).  ``s`` is CLIP's own logit scale.

    Args:
        model: see :class:`fedkern.models.pretrained.Pretrained`.
        mean, std: normalisation of the images that the teacher gets, per channel.
        prompts: see :func:`fedkern.models.prompts.read_prompts`.

    Raises:
        UserError: transformers is not installed, the folder holds no CLIP, or prompts that do not fit the classes.
    """

    batch = 64

    def __init__(
        self,
        model: str | Path,
        classes: Sequence[str],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        prompts: str = DEFAULT,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(f"clip:{model}", len(classes), device, None)
        self._source = Pretrained(model, "CLIP")
        self.mean, self.std = tuple(mean), tuple(std)
        self.prompts = read_prompts(prompts or DEFAULT, classes)

    @property
    def identity(self) -> Identity:
        """Everything that the logits depend on: model, content hash (of a local folder) and prompts."""
        return {**self._source.identity, "prompts": json.dumps(self.prompts)}

    def load(self) -> Classifier:
        hint = " (not a folder here; one that was downloaded before is given as clip:FOLDER)"
        source = self._source.load("CLIPModel", f"teacher {self.name}", "a CLIP", hint)
        if self._source.folder.is_dir():
            check_complete(f"CLIP {self._source.folder}", source.network, source.network, source.missing)
        network = source.network.float().eval().to(self.device)
        scale = network.logit_scale.detach().exp()
        weight = text_features(network, source.tokenizer, self.prompts, self.device) * scale
        return ClipClassifier(network, weight, self.mean, self.std, source.settings or {})


class ClipClassifier(Classifier):
    """CLIP's image encoder with its preprocessing, and class weights ``[C, d]`` on its unit features."""

    def __init__(
        self, network: Any, weight: Tensor, mean: Sequence[float], std: Sequence[float], settings: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.head = linear_of({"weight": weight, "bias": weight.new_zeros(len(weight))}, weight.device)
        self.vision, self.projection = network.vision_model, network.visual_projection
        self.mean, self.std = tuple(mean), tuple(std)
        self.resize = _side(settings.get("size"), SIDE) if settings.get("do_resize", True) else 0
        self.crop = _side(settings.get("crop_size"), SIDE) if settings.get("do_center_crop", True) else 0
        self.own_mean = tuple(settings.get("image_mean", MEAN))
        self.own_std = tuple(settings.get("image_std", STD))

    def prepare(self, images: Tensor) -> Tensor:
        """CLIP's input fp32 ``[B, 3, h, w]``: bicubic resize of the shortest side, centre crop, CLIP's normalisation.

        The resize matches that of Pillow, which CLIP was trained with: the cubic filter with a = -1/2 (torch's with
        antialias), first along the rows, then along the columns, rounded to whole bytes after each.
        """
        pixels = to_bytes(to_pixels(images, self.mean, self.std))
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        if self.resize:
            height, width = pixels.shape[-2:]
            tall, wide = (int(self.resize * side / min(height, width)) for side in (height, width))
            for size in ((height, wide), (tall, wide)):  # Pillow rounds after either direction
                if size != tuple(pixels.shape[-2:]):
                    pixels = functional.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
                    pixels = to_bytes(pixels)
        if self.crop:
            height, width = pixels.shape[-2:]
            top, left = (height - self.crop) // 2, (width - self.crop) // 2
            if top < 0 or left < 0:
                raise UserError(f"CLIP crops {self.crop} pixels out of images that are {height} by {width}.")
            pixels = pixels[..., top : top + self.crop, left : left + self.crop]
        mean, std = (torch.tensor(x, device=pixels.device).view(1, 3, 1, 1) for x in (self.own_mean, self.own_std))
        return (pixels - mean) / std

    def features(self, x: Tensor) -> Tensor:
        """Unit vectors fp32 ``[B, d]`` of the data's normalised images."""
        return functional.normalize(self._project(self.prepare(x)), dim=1)

    @autocasts
    def _project(self, pixels: Tensor) -> Tensor:
        return full(self.projection(self.vision(pixel_values=pixels).pooler_output))


@torch.no_grad()
def text_features(network: Any, tokenizer: Any, prompts: Sequence[Sequence[str]], device: torch.device) -> Tensor:
    """One unit vector per class, fp32 ``[classes, d]``: the normalised mean of the prompts' normalised features."""
    longest = int(network.config.text_config.max_position_embeddings)
    rows = []
    for texts in prompts:
        encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        output = network.text_model(
            input_ids=encoded["input_ids"].to(device), attention_mask=encoded["attention_mask"].to(device)
        )
        features = functional.normalize(network.text_projection(output.pooler_output), dim=1)
        rows.append(functional.normalize(features.mean(dim=0), dim=0))
    return torch.stack(rows)


def to_bytes(pixels: Tensor) -> Tensor:
    """Rounds values in [0, 1] to multiples of 1/255."""
    return pixels.mul(255).round().clamp(0, 255).div(255)


def _side(size: Any, default: int) -> int:
    """The side in pixels of a size in preprocessor_config.json: a number, shortest_edge, or height and width."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    return default if size is None else int(size)
