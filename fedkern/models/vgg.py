"""VGG-16 with batch norm (Simonyan and Zisserman, arXiv 1409.1556)."""

from __future__ import annotations

from torch import nn

from fedkern.models.conv_norm import ConvSequential
from fedkern.models.staged import StagedNetwork

CONVOLUTIONS = (2, 2, 3, 3, 3)  # per stage, configuration D
WIDTHS = (1, 2, 4, 8, 8)  # in multiples of the first stage's


class VGG(StagedNetwork):
    """Five stages of 3x3 convolutions, each with batch norm and ReLU; 2x2 max pooling between the stages.

    As usual for small images, one linear layer on pooled features replaces the three large ones, and global average
    pooling replaces the last max pooling.  With ``width`` 64 and ten classes there are 14,724,042 parameters.  Images
    must be at least 16 pixels wide and high.
    """

    def __init__(self, *, classes: int, channels: int = 3, width: int = 64) -> None:
        stages: list[nn.Module] = []
        current = channels
        for i, (count, times) in enumerate(zip(CONVOLUTIONS, WIDTHS, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [
                    nn.Conv2d(current, times * width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(times * width),
                    nn.ReLU(),
                ]
                current = times * width
            if i + 1 < len(CONVOLUTIONS):
                layers.append(nn.MaxPool2d(2))
            stages.append(ConvSequential(*layers))
        super().__init__(stages, width=current, classes=classes)
