"""VGG-16 with batch norm (arXiv 1409.1556): python -m fedkern.run fusefl --model examples/vgg16.py:VGG."""

import tempfile

import torch
from torch import Tensor, nn

import fedkern

STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))  # convolutions and multiples of the first width, configuration D


class VGG(nn.Module):
    """Five stages of 3x3 convolutions for images of at least 16 pixels, and one linear layer."""

    def __init__(self, classes: int, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for count, times in STAGES:
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if stages else []
            for _ in range(count):
                convolution = nn.Conv2d(channels, times * width, 3, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(times * width), nn.ReLU()]
                channels = times * width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pooling(self.stages(images)))


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        vgg = VGG(classes=10, channels=1, width=4)
        run = fedkern.simulate("fedavg", data="digits", model=vgg, rounds=3, out=folder, pictures=False)
        print(f"accuracy after {run.config.rounds} rounds: {run.metrics['accuracy']:.1%}")
