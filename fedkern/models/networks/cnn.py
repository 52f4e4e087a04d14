"""A small three-stage network for digits, and random filters for classifiers from feature statistics."""

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


class RandomFilters(StagedNetwork):
    """One 3x3 convolution, ReLU, and the mean over every cell of a 4x4 grid: 16 features a filter.

    FedCGS leaves the filters as the seed draws them (random features of images: Coates et al., AISTATS 2011).
    """

    def __init__(self, *, classes: int, channels: int = 3, width: int = 32) -> None:
        filters = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        # The grid's cells become channels, so StagedNetwork's global average pooling has no effect.
        grid = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.PixelUnshuffle(4))
        super().__init__([filters, grid], width=16 * width, classes=classes)
