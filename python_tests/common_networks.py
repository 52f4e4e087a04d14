"""Networks as users bring them to a first run, each with a habit of its own, for images of 32 pixels."""

from torch import nn


class View(nn.Module):
    """LeNet as tutorials write it, with ``view`` between convolutions and linear layers."""

    def __init__(self, classes, channels):
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, 6, 5), nn.Conv2d(6, 16, 5)
        self.three, self.four = nn.Linear(16 * 5 * 5, 84), nn.Linear(84, classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.one(x).relu(), 2)
        x = nn.functional.max_pool2d(self.two(x).relu(), 2)
        return self.four(self.three(x.view(x.size(0), -1)).relu())


class Flatten(nn.Sequential):
    def __init__(self, classes, channels):
        super().__init__(
            nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
            nn.Linear(8 * 4 * 4, classes),
        )  # fmt: skip


class InPlace(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, classes)

    def forward(self, x):
        x = self.norm(self.conv(x))
        x += 0.1
        return self.fc(nn.functional.relu_(x).mean((2, 3)).mul_(0.5))


class Shortcut(nn.Module):
    """Residual block with torch's usual shortcut, a strided 1 × 1 convolution of few channels."""

    def __init__(self, classes, channels):
        super().__init__()
        self.stem, self.conv, self.short = (
            nn.Conv2d(channels, 4, 3, 1, 1),
            nn.Conv2d(4, 8, 3, 2, 1),
            nn.Conv2d(4, 8, 1, 2),
        )
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, classes)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((self.norm(self.conv(x)) + self.short(x)).relu().mean((2, 3)))


class Depthwise(nn.Sequential):
    def __init__(self, classes, channels):
        super().__init__(
            nn.Conv2d(channels, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
        )  # fmt: skip


class Rows(nn.Module):
    """GRU over the rows of an image, without convolutions."""

    def __init__(self, classes, channels, image_size):
        super().__init__()
        self.gru, self.fc = nn.GRU(channels * image_size, 16, batch_first=True), nn.Linear(16, classes)

    def forward(self, x):
        return self.fc(self.gru(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])


class Dropout(nn.Sequential):
    def __init__(self, classes, channels):
        super().__init__(
            nn.Conv2d(channels, 8, 3, 2), nn.ReLU(), nn.Dropout2d(0.2), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(32, classes),
        )  # fmt: skip


class GroupNorm(nn.Sequential):
    def __init__(self, classes, channels):
        super().__init__(
            nn.Conv2d(channels, 8, 3, 2), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 16, 3, 2), nn.GroupNorm(4, 16),
            nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
        )  # fmt: skip


OWN = (View, Flatten, InPlace, Shortcut, Depthwise, Rows, Dropout, GroupNorm)
