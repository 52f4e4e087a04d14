"""Residual networks (He et al., arXiv 1512.03385), and FedIOD's ResNet-8."""

from collections import OrderedDict
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.models.networks.conv_norm_layers import ConvSequential, run_conv_norm
from fedkern.models.networks.staged import StagedNetwork
from fedkern.ops._core.layout import NARROW

Stem = Literal["cifar", "imagenet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = _shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = run_conv_norm(x, self.conv1, self.bn1, F.relu)
        return run_conv_norm(y, self.conv2, self.bn2, F.relu, residual=self.shortcut(x))


def _shortcut(channels_in: int, channels_out: int, stride: int) -> ConvSequential:
    """Return a 1x1 convolution with batch norm, called ``"0"`` and ``"1"`` in the state dict."""
    layers: dict[str, nn.Module] = {}
    if stride != 1 and channels_in < NARROW:  # the same as ``ops._core.layout.conv2d``, as a layer
        layers["pixels"] = nn.AvgPool2d(1, stride)
        stride = 1
    layers["0"] = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)
    layers["1"] = nn.BatchNorm2d(channels_out)
    return ConvSequential(OrderedDict(layers))


def _stem(kind: Stem, channels: int, width: int) -> list[nn.Module]:
    if kind == "cifar":
        return [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return [
        nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]


class ResNet(StagedNetwork):
    """A stem and stages of basic blocks, each stage of twice the width and half the size.

    Args:
        blocks: basic blocks per stage: ``(1, 1, 1)`` is ResNet-8, ``(2, 2, 2, 2)`` ResNet-18.
        stem: ``"cifar"``, one 3x3 convolution, or ``"imagenet"``, a 7x7 convolution and 3x3 max pooling of stride 2.
    """

    def __init__(
        self, blocks: tuple[int, ...], *, classes: int, channels: int = 3, width: int = 64, stem: Stem = "cifar"
    ) -> None:
        stages: list[nn.Module] = []
        current = width
        for i, count in enumerate(blocks):
            after = width * 2**i
            layers: list[nn.Module] = _stem(stem, channels, width) if i == 0 else []
            for j in range(count):
                layers.append(BasicBlock(current, after, stride=2 if i > 0 and j == 0 else 1))
                current = after
            stages.append(ConvSequential(*layers))
        super().__init__(stages, width=current, classes=classes)


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
