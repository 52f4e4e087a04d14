"""Multi-layer perceptron with 1x1 feature maps as hidden layers."""

from torch import nn

from fedkern.models.networks.staged import StagedNetwork


class MLP(StagedNetwork):
    """Three hidden layers of ``width`` units with batch norm and ReLU, each a stage.

    Units are the channels of maps ``[B, width, 1, 1]``, so methods that mix, send or fuse feature maps work on them.
    Images of another shape than ``image_size`` are first averaged.
    """

    def __init__(self, *, classes: int, channels: int = 3, width: int = 256, image_size: int = 32) -> None:
        front: list[nn.Module] = [nn.AdaptiveAvgPool2d(image_size), nn.Conv2d(channels, width, image_size, bias=False)]
        stages: list[nn.Module] = []
        for i in range(3):
            layers = front if i == 0 else [nn.Conv2d(width, width, 1, bias=False)]
            stages.append(nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU()))
        super().__init__(stages, width=width, classes=classes)
