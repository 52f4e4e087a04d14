"""Networks as users write them, in a module that worker processes import too."""

import torch
import torch.nn.functional as F
from torch import nn


class Plain(nn.Module):
    """Network with functions between the layers and a view: its classifier can be found, its stages cannot."""

    def __init__(self, classes=3, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.fc = nn.Linear(4 * 3 * 3, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.fc(x.view(len(x), -1))


class Small(nn.Module):
    """Network of a normalised backbone and a head, for any number of pixels."""

    def __init__(self, classes=3, channels=3):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool, self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.pool(self.backbone(x)))


class Remembering(nn.Module):
    """Network that changes non-persistent buffers: a running mean and a count, beside one drawn from the seed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("draw", torch.rand(8, 1, 1), persistent=False)
        self.register_buffer("mean", torch.zeros(8, 1, 1), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            self.mean.lerp_(x.mean((0, 2, 3))[:, None, None], 0.5)
        return x * self.draw + self.mean + self.calls / 10


def remembering(classes=3, channels=3):
    network = Small(classes, channels)
    network.backbone.append(Remembering())
    return network


class Masked(Plain):
    """Network with a mask of -inf among its buffers, as in causal attention.

    The mask adds nothing to the logits.
    """

    def __init__(self, classes=3, channels=3):
        super().__init__(classes, channels)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    def forward(self, x):
        return super().forward(x) + self.mask.softmax(1)[0, 1]


class Staged(nn.Sequential):
    """Network of modules one after another, with dropout."""

    def __init__(self, classes=3, channels=3):
        super().__init__(
            nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2),
            nn.Linear(6, classes),
        )  # fmt: skip


class Looks(nn.Module):
    """Layer that ends the run where a map has other strides than a DataLoader's and torch's layers' on the CPU."""

    def forward(self, x):
        assert x.stride() == torch.empty(x.shape).stride(), f"{list(x.shape)} with strides {x.stride()}"
        return x.view(x.shape[0], -1).view(x.shape)


class Looking(nn.Sequential):
    """Staged network that looks at the images and at the maps, with torch's usual shortcut of few channels."""

    def __init__(self, classes, channels):
        super().__init__(
            Looks(), nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True), Looks(),
            nn.Conv2d(4, 8, 1, stride=2), Looks(), nn.ReLU(), nn.Conv2d(8, 6, 1), Looks(), nn.AdaptiveAvgPool2d(1),
            Looks(), nn.Flatten(), nn.Linear(6, classes),
        )  # fmt: skip


class Whole(nn.Module):
    """Network that cannot be cut around the layers of `Looking`."""

    def __init__(self, classes, channels):
        super().__init__()
        self.all = Looking(classes, channels)

    def forward(self, x):
        return self.all(x + 0 * x.mean())


class Raw(nn.Module):
    """Network with tied weights and a parameter of its own.

    Its logits are no layer's result.
    """

    def __init__(self, classes=3):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.two.weight = self.one.weight
        self.out = nn.Parameter(torch.randn(classes, 64) / 8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return F.relu(self.two(F.relu(self.one(x[:, 0].flatten(1))))) @ self.out.T


class Pixels(nn.Module):
    """Network with classes of pixels."""

    def __init__(self, classes, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, classes, 3, padding=1)

    def forward(self, x):
        return self.conv(x)
