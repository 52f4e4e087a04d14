"""MobileNetV2 (Sandler et al., arXiv 1801.04381)."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from fedkern.models.networks.conv_norm_layers import NormSequential
from fedkern.models.networks.resnet import Stem
from fedkern.models.networks.staged import StagedNetwork

# Expansion, channels, blocks and stride of the bottlenecks of every stage (table 2 of the paper).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
WIDTH = 32  # channels of the paper's stem
FEATURES = 1280


def divisible(channels: float) -> int:
    """Round to a multiple of 8, at least 8 and never more than a tenth smaller."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def conv_norm(
    channels_in: int, channels_out: int, size: int, *, stride: int = 1, groups: int = 1, activation: nn.Module | None
) -> list[nn.Module]:
    """Return a convolution of odd ``size`` with batch norm and activation, padded to keep the map's size."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, size, stride=stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels_out),
    ]
    return layers if activation is None else [*layers, activation]


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution and linear 1x1 projection, with a shortcut if the shape stays the same.

    ``expansion`` 1 leaves the expansion out.  ``gate`` makes a layer before the projection from the number of channels.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        stride: int,
        expansion: int,
        size: int = 3,
        activation: Callable[[], nn.Module] = nn.ReLU6,
        gate: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        hidden = channels_in * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += conv_norm(channels_in, hidden, 1, activation=activation())
        layers += conv_norm(hidden, hidden, size, stride=stride, groups=hidden, activation=activation())
        if gate is not None:
            layers.append(gate(hidden))
        layers += conv_norm(hidden, channels_out, 1, activation=None)
        self.layers = NormSequential(*layers)
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class InvertedNetwork(StagedNetwork):
    """A stem, stages of inverted residuals, and a last 1x1 convolution to ``features`` channels.

    Args:
        table: expansion, kernel size, channels at the default width, blocks and stride of every stage.
    """

    activation: ClassVar[type[nn.Module]] = nn.ReLU6
    block: ClassVar[Callable[..., InvertedResidual]] = InvertedResidual

    def __init__(
        self,
        table: Sequence[tuple[int, int, int, int, int]],
        *,
        classes: int,
        channels: int,
        width: int,
        features: int,
        stem: Stem,
    ) -> None:
        current = divisible(width)
        stages: list[nn.Module] = []
        for i, (expansion, size, after, count, stride) in enumerate(table):
            layers: list[nn.Module] = []
            if i == 0:
                first_stride = 1 if stem == "cifar" else 2
                layers += conv_norm(channels, current, 3, stride=first_stride, activation=self.activation())
            for j in range(count):
                wide = divisible(after * (width / WIDTH))
                layers.append(self.block(current, wide, size=size, stride=stride if j == 0 else 1, expansion=expansion))
                current = wide
            if i == len(table) - 1:
                layers += conv_norm(current, features, 1, activation=self.activation())
            stages.append(NormSequential(*layers))
        super().__init__(stages, width=features, classes=classes)


class MobileNetV2(InvertedNetwork):
    """A stem and seven stages of inverted residuals, 2,236,682 parameters with ten classes and the default width.

    The paper's dropout is left out: a run's bits must not depend on the global generator.

    Args:
        width: channels of the stem, 32 times the paper's width multiplier.
        stem: ``"imagenet"`` has the paper's strides, ``"cifar"`` stride 1 in the stem and the second stage (methods
            note 5.5).
    """

    def __init__(self, *, classes: int, channels: int = 3, width: int = WIDTH, stem: Stem = "cifar") -> None:
        table = [
            (expansion, 3, after, count, 1 if stem == "cifar" and i == 1 else stride)
            for i, (expansion, after, count, stride) in enumerate(STAGES)
        ]
        features = divisible(FEATURES * max(1.0, width / WIDTH))
        super().__init__(table, classes=classes, channels=channels, width=width, features=features, stem=stem)
