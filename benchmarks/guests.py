"""Published networks as people write them in plain torch.nn, for images of 32 × 32 pixels."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cnn(width: int = 16) -> nn.Module:
    """Return three convolutions with batch norm, ReLU and pooling."""
    sides, layers = (3, width, 2 * width, 4 * width), []
    for inner, outer in pairwise(sides):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


class McMahan(nn.Module):
    """McMahan et al. 2017 (arXiv 1602.05629), on 28 x 28 grey pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 5, padding=2), nn.Conv2d(32, 64, 5, padding=2)
        self.fc1, self.fc2 = nn.Linear(3136, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        result: Tensor = self.fc2(F.relu(self.fc1(x.view(-1, 3136))))
        return result


class LeNet(nn.Module):
    """LeCun et al. 1998, with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv2(self.pool(F.relu(self.conv1(x))))))
        result: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))))
        return result


class Basic(nn.Module):
    """The basic block of He et al. 2016 (arXiv 1512.03385)."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), norm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), norm(channels)
        self.relu, self.down = nn.ReLU(inplace=True), None
        if stride > 1 or channels_in != channels:
            self.down = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += x if self.down is None else self.down(x)
        result: Tensor = self.relu(out)
        return result


class Bottleneck(nn.Module):
    """The bottleneck block of He et al. 2016."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        wide = 4 * channels
        self.conv1, self.norm1 = nn.Conv2d(channels_in, channels, 1, bias=False), norm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False), norm(channels)
        self.conv3, self.norm3 = nn.Conv2d(channels, wide, 1, bias=False), norm(wide)
        self.down = None
        if stride > 1 or channels_in != wide:
            self.down = nn.Sequential(nn.Conv2d(channels_in, wide, 1, stride, bias=False), norm(wide))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm3(self.conv3(F.relu(self.norm2(self.conv2(out)))))
        return F.relu(out + (x if self.down is None else self.down(x)))


def resnet(
    blocks: tuple[int, ...], width: int = 16, block: type = Basic, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    """Return a residual network with the stem for small images."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), norm(width), nn.ReLU(inplace=True)]
    channels = width
    for stage, count in enumerate(blocks):
        for number in range(count):
            layers.append(block(channels, width * 2**stage, 2 if stage and not number else 1, norm))
            channels = width * 2**stage * (4 if block is Bottleneck else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def vgg(width: int = 16, normed: bool = False) -> nn.Module:
    """Return VGG-11 (Simonyan and Zisserman 2015, arXiv 1409.1556)."""
    layers: list[nn.Module] = []
    channels = 3
    for wide in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0):
        if not wide:
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(channels, wide * width, 3, padding=1)]
        layers += [nn.BatchNorm2d(wide * width)] * normed + [nn.ReLU(inplace=True)]
        channels = wide * width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


class Fire(nn.Module):
    """SqueezeNet's module (Iandola et al. 2016, arXiv 1602.07360)."""

    def __init__(self, channels_in: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels_in, squeezed, 1)
        self.one, self.three = nn.Conv2d(squeezed, expanded, 1), nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


def squeezenet() -> nn.Module:
    """Return SqueezeNet 1.1 with a stem for small images."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), Fire(64, 16, 64), Fire(128, 16, 64),
        nn.MaxPool2d(3, 2), Fire(128, 32, 128), Fire(256, 32, 128), nn.Dropout(0.5), nn.Conv2d(256, 10, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Inverted(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018, arXiv 1801.04381)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = 6 * channels_in
        self.layers = nn.Sequential(
            nn.Conv2d(channels_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.adds = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.adds else out


def mobilenet() -> nn.Module:
    """Return a MobileNetV2 of six blocks."""
    stem = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()
    blocks = [
        Inverted(*sizes) for sizes in ((32, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    ]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Dense(nn.Module):
    """DenseNet's layer (Huang et al. 2017, arXiv 1608.06993)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, out], 1)


def densenet(growth: int = 12) -> nn.Module:
    """Return a DenseNet-BC of three blocks of four layers."""
    channels = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for stage in range(3):
        for _ in range(4):
            layers.append(Dense(channels, growth))
            channels += growth
        if stage < 2:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False)]
            layers.append(nn.AvgPool2d(2))
            channels //= 2
    tail = nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    return nn.Sequential(*layers, *tail)


def imagenet(width: int = 64) -> nn.Module:
    """Return ResNet-18 with ImageNet's stem, 7 × 7 with stride 2 and pooling."""
    body = resnet((2, 2, 2, 2), width)
    assert isinstance(body, nn.Sequential)
    stem = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *list(body)[3:])


def groups(channels: int) -> nn.Module:
    """Return a group norm of two groups."""
    return nn.GroupNorm(2, channels)


GUESTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "cnn/16": (cnn, (3, 32, 32)),
    "McMahan's CNN": (McMahan, (1, 28, 28)),
    "LeNet-5": (LeNet, (3, 32, 32)),
    "ResNet-8/16": (lambda: resnet((1, 1, 1)), (3, 32, 32)),
    "ResNet-18/16": (lambda: resnet((2, 2, 2, 2)), (3, 32, 32)),
    "ResNet-18/16, group norm": (lambda: resnet((2, 2, 2, 2), norm=groups), (3, 32, 32)),
    "ResNet-50/16": (lambda: resnet((3, 4, 6, 3), block=Bottleneck), (3, 32, 32)),
    "ResNet-18/64, ImageNet's stem": (imagenet, (3, 64, 64)),
    "VGG-11/16": (vgg, (3, 32, 32)),
    "VGG-11/16, batch norm": (lambda: vgg(normed=True), (3, 32, 32)),
    "SqueezeNet": (squeezenet, (3, 32, 32)),
    "MobileNetV2": (mobilenet, (3, 32, 32)),
    "DenseNet-BC": (densenet, (3, 32, 32)),
}
