"""FedIOD's ResNet-8."""

from __future__ import annotations

from typing import cast

from torch import nn

from fedkern.models.networks.resnet import ResNet, Stem
from fedkern.models.networks.staged import StagedNetwork


class ResNet8T(StagedNetwork):
    """ResNet-8 with a last map pooled to 2x2, so that its head reads four times as many features.

    FedIOD's teachers and student (arXiv 2312.14478) have width 128: basic blocks of 128, 256 and 512 channels, 2,048
    features, and 4.91 million parameters for ten classes.
    """

    def __init__(self, *, classes: int, channels: int = 3, width: int = 128, stem: Stem = "cifar") -> None:
        blocks = ResNet((1, 1, 1), classes=classes, channels=channels, width=width, stem=stem)
        layer1, layer2, layer3 = (cast(nn.Sequential, getattr(blocks, f"layer{i}")) for i in (1, 2, 3))
        # The four positions become channels, so StagedNetwork's global average pooling has no effect.
        last = nn.Sequential(*layer3, nn.AdaptiveAvgPool2d(2), nn.PixelUnshuffle(2))
        super().__init__([layer1, layer2, last], width=16 * width, classes=classes)
