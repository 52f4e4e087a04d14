"""EfficientNet-B0 (Tan and Le, arXiv 1905.11946)."""

from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from fedkern.models.networks.mobilenet import FEATURES, WIDTH, InvertedNetwork, InvertedResidual, divisible
from fedkern.models.networks.resnet import Stem

# Expansion, kernel size, channels, blocks and stride of every stage (table 1 of the paper).
STAGES = (
    (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1), (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)  # fmt: skip


class SqueezeExcitation(nn.Module):
    """Gate of every channel, computed from all channels' means (Hu et al., arXiv 1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Conv2d(channels, squeezed, 1), nn.SiLU(), nn.Conv2d(squeezed, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(x.mean(dim=(2, 3), keepdim=True))
        return x * gate


def mbconv(channels_in: int, channels_out: int, *, size: int, stride: int, expansion: int) -> InvertedResidual:
    gate = partial(SqueezeExcitation, squeezed=max(1, channels_in // 4))
    return InvertedResidual(
        channels_in, channels_out, stride=stride, expansion=expansion, size=size, activation=nn.SiLU, gate=gate
    )


class EfficientNetB0(InvertedNetwork):
    """A stem and seven stages of MBConv blocks, 4,020,358 parameters with ten classes and the default width.

    The paper's dropout and stochastic depth are left out: a run's bits must not depend on the global generator.

    Args:
        width: channels of the stem; every layer scales with width / 32, rounded to multiples of 8.
        stem: ``"imagenet"`` has the paper's strides, ``"cifar"`` stride 1 in the stem (methods note 5.5).
    """

    activation: ClassVar[type[nn.Module]] = nn.SiLU
    block = staticmethod(mbconv)

    def __init__(self, *, classes: int, channels: int = 3, width: int = WIDTH, stem: Stem = "cifar") -> None:
        features = divisible(FEATURES * (width / WIDTH))
        super().__init__(STAGES, classes=classes, channels=channels, width=width, features=features, stem=stem)
