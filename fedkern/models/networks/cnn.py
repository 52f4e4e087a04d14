"""A small three-stage network for digits."""

from __future__ import annotations

from torch import nn

from fedkern.models.networks.conv_norm_layers import ConvSequential
from fedkern.models.networks.staged import StagedNetwork


class CNN(StagedNetwork):
    """Three stages of 3x3 convolution, batch norm, ReLU and 2x2 max pooling.

    The stages have ``width``, ``2 width`` and ``4 width`` channels.  With ``width`` 32, three input channels and ten
    classes the network has 94,762 parameters.  Images must be at least 8 pixels wide and high.
    """

    def __init__(self, *, classes: int, channels: int = 3, width: int = 32) -> None:
        sizes = (channels, width, 2 * width, 4 * width)
        stages: list[nn.Module] = [
            ConvSequential(
                nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, bias=False),
                nn.BatchNorm2d(sizes[i + 1]),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for i in range(3)
        ]
        super().__init__(stages, width=sizes[-1], classes=classes)
