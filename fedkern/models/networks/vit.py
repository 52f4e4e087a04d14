"""A small vision transformer (Dosovitskiy et al., arXiv 2010.11929)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.models.networks.attention import TransformerLayer
from fedkern.models.networks.staged import StagedNetwork
from fedkern.models.precision import Layer

DEPTH, STAGES = 12, 4


class PatchEmbedding(nn.Module):
    """Patches of images with learnt positions: ``[B, C, H, W]`` to ``[B, width, H / patch, W / patch]``.

    Positions are interpolated for images of another shape.
    """

    def __init__(self, channels: int, width: int, patch: int, grid: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, width, grid, grid))

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.position, std=0.02, generator=generator)

    def interpolates(self, height: int, width: int) -> bool:
        patch = self.project.stride[0]
        return (height // patch, width // patch) != self.position.shape[2:]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(x)
        position: Tensor = self.position
        if y.shape[2:] != position.shape[2:]:
            position = F.interpolate(position, size=y.shape[2:], mode="bicubic", align_corners=False)
        return y + position


class Encoder(TransformerLayer):
    """Pre-norm transformer layer on maps ``[B, width, H, W]``, channels-last, with positions as tokens.

    As maps, transformers can be cut, mixed and fused like convolutional networks.  With ``last``, a norm follows.
    """

    def __init__(self, width: int, *, last: bool = False) -> None:
        super().__init__(width)
        self.norm: Layer = nn.LayerNorm(width) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        maps: Tensor = self.norm(super().forward(x.permute(0, 2, 3, 1).flatten(1, 2))).unflatten(1, x.shape[2:])
        return maps.permute(0, 3, 1, 2)


class ViT(StagedNetwork):
    """Patches and twelve encoder layers, three per stage, and a classifier of the average token.

    With ``width`` 192 (DeiT-Ti, arXiv 2012.12877), patches of 4 pixels on 32-pixel images and ten classes there are
    5,362,378 parameters.
    """

    def __init__(self, *, classes: int, channels: int = 3, width: int = 192, image_size: int = 32) -> None:
        patch = patch_size(image_size)
        layers: list[nn.Module] = [Encoder(width, last=i + 1 == DEPTH) for i in range(DEPTH)]
        per_stage = DEPTH // STAGES
        stages = [nn.Sequential(*layers[start : start + per_stage]) for start in range(0, DEPTH, per_stage)]
        stages[0].insert(0, PatchEmbedding(channels, width, patch, image_size // patch))
        super().__init__([*stages], width=width, classes=classes)


def patch_size(image_size: int) -> int:
    """Return the side of a patch: 16 pixels for images above 64 pixels, as published, else 4 or 2."""
    if image_size > 64:
        return 16
    return 4 if image_size >= 16 else 2
